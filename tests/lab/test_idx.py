from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from normwise.lab.errors import LabError
from normwise.lab.idx import load_folder, read_idx
from support.idx_files import as_idx, write_folder

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some-idx3-ubyte"


def test_numbers_come_back(path):
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    for content in (as_idx(images), gzip.compress(as_idx(images))):
        path.write_bytes(content)
        assert torch.equal(read_idx(path, (28, 28)), images)


@pytest.mark.parametrize("spelling", [{}, {"packed": True}, {"point": True}, {"packed": True, "point": True}])
def test_a_folder_has_the_same_fingerprint_in_every_spelling(tmp_path, spelling):
    plain, other = load_folder(write_folder(tmp_path / "a")), load_folder(write_folder(tmp_path / "b", **spelling))
    assert plain.sha256 == other.sha256
    assert torch.equal(plain.train.images, other.train.images)
    assert (plain.train.images.shape, plain.test.labels.dtype) == ((400, 28, 28), torch.int64)
    assert plain.sha256 != load_folder(write_folder(tmp_path / "c", test=99)).sha256


GOOD_IMAGES = torch.zeros(3, 28, 28, dtype=torch.uint8)
GOOD = as_idx(GOOD_IMAGES)
# Without the time of day: it would be part of the test's name, and differ between the processes that run the tests.
PACKED = gzip.compress(as_idx((torch.arange(40 * 28 * 28) % 251).byte().reshape(40, 28, 28)), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"offset 0: the file ends within its header of 16 bytes"),
        (GOOD[:10], r"offset 10: the file ends within its header of 16 bytes"),
        (GOOD[:-1], r"offset 2367: the file ends here, and 3x28x28 numbers need 2368 bytes: it is truncated"),
        (GOOD + b"xy", r"offset 2368: more bytes follow after 3x28x28 numbers"),
        (gzip.compress(GOOD + b"x", mtime=0), r"offset 2368: more bytes follow after 3x28x28 numbers"),
        (gzip.compress(GOOD[:-1], mtime=0), r"offset 2367: the file ends here, and 3x28x28 numbers need 2368 bytes"),
        (gzip.compress(GOOD, mtime=0) + gzip.compress(b"x", mtime=0), r"offset 2368: more bytes follow"),
        (gzip.compress(GOOD, mtime=0) + b"rubbish", r"the gzip data is broken .*Not a gzipped file"),
        (as_idx(torch.zeros(0, 28, 28, dtype=torch.uint8)), r"offset 4: the file has 0 items, expected at least 1"),
        (as_idx(torch.zeros(3, 32, 28, dtype=torch.uint8)), r"offset 8: images of 32x28 pixels, expected 28x28"),
        (as_idx(torch.zeros(3, 28, 0, dtype=torch.uint8)), r"offset 8: images of 28x0 pixels, expected 28x28"),
        (b"<html>" + GOOD, r"offset 0: 3c 68, expected 00 00: this is no IDX file"),
        (b"\0\0\x0d" + GOOD[3:], r"offset 2: numbers of kind 0x0d, expected 0x08"),
        (as_idx(torch.zeros(30, dtype=torch.uint8)), r"offset 3: 1 axes, expected 3"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 28, 28), r"offset 16: the file ends here"),
        (PACKED[:50], r"offset 50: the gzip data ends before its end mark, after \d+ unpacked bytes"),
        (PACKED[:100] + b"\xff" * 20 + PACKED[120:], r"before offset \d+: the gzip data is broken"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], r"before offset \d+: the gzip data is broken .*CRC check failed"),
    ],
)
def test_a_broken_file_is_named_with_the_offset(path, content, message):
    path.write_bytes(content)
    with pytest.raises(LabError, match=message) as caught:
        read_idx(path, (28, 28))
    assert str(path) in str(caught.value)


def test_a_gzip_file_is_unpacked_no_further_than_its_header_promises(path):
    """64 MB out of 64 kB; what the header cannot mean is refused before the rest is looked at."""
    for header, message in ((as_idx(GOOD_IMAGES), "more bytes follow"), (b"", "0x00, expected 0x08")):
        path.write_bytes(gzip.compress(header + bytes(1 << 26)))
        tracemalloc.start()
        with pytest.raises(LabError, match=message):
            read_idx(path, (28, 28))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 4 << 20


def test_files_of_no_items_are_refused_in_every_place(tmp_path):
    folder = write_folder(tmp_path / "a")
    for name, cell in (("train-labels-idx1-ubyte", ()), ("t10k-images-idx3-ubyte", (28, 28))):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(as_idx(torch.zeros(0, *cell, dtype=torch.uint8)))
        with pytest.raises(LabError, match=f"{name}: offset 4: the file has 0 items"):
            load_folder(folder)
        (folder / name).write_bytes(good)


def test_files_that_do_not_belong_together_are_named(tmp_path):
    folder = write_folder(tmp_path / "a")
    labels = folder / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(as_idx(torch.zeros(399, dtype=torch.uint8)))
    with pytest.raises(LabError, match="offset 4: 399 labels, and train-images-idx3-ubyte has 400 images"):
        load_folder(folder)
    labels.write_bytes(good[:20] + b"\x0a" + good[21:])
    with pytest.raises(LabError, match=r"labels-idx1-ubyte: offset 20: label 10, expected 0 to 9"):
        load_folder(folder)
    labels.write_bytes(good)
    (folder / "t10k-images-idx3-ubyte").write_bytes(as_idx(torch.zeros(100, 32, 32, dtype=torch.uint8)))
    with pytest.raises(LabError, match="offset 8: images of 32x32 pixels, expected 28x28"):
        load_folder(folder)


def test_a_missing_file_or_folder_is_named_with_the_cure(tmp_path):
    with pytest.raises(LabError, match=r"nowhere: no such folder; .*apt install dataset-fashion-mnist"):
        load_folder(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "a")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(LabError, match=r"a has no t10k-labels-idx1-ubyte and no t10k-labels-idx1-ubyte\.gz"):
        load_folder(folder)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_packs_it():
    folder = load_folder(FASHION)
    assert (len(folder.train.labels), len(folder.test.labels)) == (60_000, 10_000)
    assert folder.train.labels.bincount().tolist() == [6000] * 10
    assert folder.test.labels.bincount().tolist() == [1000] * 10
