"""IDX files, the format of MNIST and of the sets that took its place; and a folder of four of them.

A file is: two zero bytes, the kind of the numbers (8: unsigned bytes), the number of axes, the length of each axis
as four bytes (highest first), then the numbers row by row (LeCun, yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.lab.datasets import Digits
from normwise.lab.errors import LabError

UNSIGNED_BYTE = 8
GZIP, GZIP_CHUNK = b"\x1f\x8b", 4096
CLASSES, SIDE = 10, 28
PARTS = {"train": "train", "test": "t10k"}
NAMES = ("{}-images-idx3-ubyte", "{}-labels-idx1-ubyte")
GET_AGAIN = "Get the file again"


class Folder(NamedTuple):
    """The cases to train on and to test on, and the sha256 of the numbers of all four files, packed or not."""

    train: Digits
    test: Digits
    sha256: str


def load_folder(folder: Path) -> Folder:
    """MNIST's or Fashion-MNIST's four files, with or without .gz, and with a point before "idx" as well.

    Raises:
        LabError: a file is missing; or broken, truncated or no such file, with the offset in bytes.
    """
    parts, digest = {}, hashlib.sha256()
    for part, prefix in PARTS.items():
        images_path, labels_path = (find(folder, name.format(prefix)) for name in NAMES)
        images, labels = read_idx(images_path, axes=3), read_idx(labels_path, axes=1)
        if images.shape[1:] != (SIDE, SIDE):
            shape = "x".join(map(str, images.shape[1:]))
            raise LabError(f"{images_path}: offset 8: images of {shape} pixels, expected {SIDE}x{SIDE}")
        if len(images) != len(labels):
            raise LabError(
                f"{labels_path}: offset 4: {len(labels)} labels, and {images_path.name} has {len(images)} images; "
                "take all four files from one place"
            )
        wrong = torch.nonzero(labels >= CLASSES)
        if len(wrong):
            first = int(wrong[0])
            raise LabError(
                f"{labels_path}: offset {8 + first}: label {int(labels[first])}, expected 0 to {CLASSES - 1}"
            )
        for numbers in (images, labels):
            digest.update(numbers.numpy().tobytes())
        parts[part] = Digits(images, labels.long())
    return Folder(parts["train"], parts["test"], digest.hexdigest())


def find(folder: Path, name: str) -> Path:
    """The file ``name`` in one of its spellings.

    Raises:
        LabError: there is none.
    """
    if not folder.is_dir():
        raise LabError(f"{folder}: no such folder; {_CURE}")
    for spelling in (name, f"{name}.gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / spelling).is_file():
            return folder / spelling
    raise LabError(f"{folder} has no {name} and no {name}.gz; {_CURE}")


_CURE = (
    "expected the four IDX files of MNIST or Fashion-MNIST, as in Debian's package dataset-fashion-mnist "
    "(apt install dataset-fashion-mnist; then --data /usr/share/datasets/fashion-mnist)"
)


def read_idx(path: Path, axes: int) -> Tensor:
    """The unsigned bytes of a file with ``axes`` axes, unpacked if it is a gzip file.

    Raises:
        LabError: the file is broken, truncated or something else; names the offset, in bytes of the unpacked file.
    """
    content = _unpacked(path)
    start = 4 + 4 * axes
    if len(content) < start:
        raise LabError(f"{path}: offset {len(content)}: the file ends within its header of {start} bytes. {GET_AGAIN}")
    if content[:2] != b"\0\0":
        raise LabError(f"{path}: offset 0: {content[:2].hex(' ')}, expected 00 00: this is no IDX file. {GET_AGAIN}")
    if content[2] != UNSIGNED_BYTE:
        raise LabError(f"{path}: offset 2: numbers of kind {content[2]:#04x}, expected 0x08 (unsigned bytes)")
    if content[3] != axes:
        raise LabError(f"{path}: offset 3: {content[3]} axes, expected {axes}; images have 3 and labels 1")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + math.prod(shape)
    if len(content) < expected:
        raise LabError(
            f"{path}: offset {len(content)}: the file ends here, and {'x'.join(map(str, shape))} numbers need "
            f"{expected} bytes: it is truncated. {GET_AGAIN}"
        )
    if len(content) > expected:
        raise LabError(
            f"{path}: offset {expected}: {len(content) - expected} bytes too many after "
            f"{'x'.join(map(str, shape))} numbers. {GET_AGAIN}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=start, count=math.prod(shape)).reshape(shape)


def _unpacked(path: Path) -> bytearray:
    """Whether a file is packed is told by its first bytes, not by its name."""
    raw = path.read_bytes()
    if raw[:2] != GZIP:
        return bytearray(raw)
    unpack, out = zlib.decompressobj(wbits=31), bytearray()
    for at in range(0, len(raw), GZIP_CHUNK):
        try:
            out += unpack.decompress(raw[at : at + GZIP_CHUNK])
        except zlib.error as error:  # noqa: PERF203 (the chunk tells where)
            end = min(at + GZIP_CHUNK, len(raw))
            raise LabError(f"{path}: offset {at} to {end}: the gzip data is broken ({error}). {GET_AGAIN}") from error
    if not unpack.eof:
        raise LabError(
            f"{path}: offset {len(raw)}: the gzip data ends before its end mark, after {len(out)} unpacked bytes: "
            f"the file is truncated. {GET_AGAIN}"
        )
    return out
