"""IDX files, the format of MNIST and of the sets that took its place; and a folder of four of them.

A file is: two zero bytes, the kind of the numbers (8: unsigned bytes), the number of axes, the length of each axis
as four bytes (highest first), then the numbers row by row (LeCun, yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from normwise.lab.datasets import Digits
from normwise.lab.errors import LabError
from normwise.words import counted

UNSIGNED_BYTE = 8
GZIP, CHUNK = b"\x1f\x8b", 1 << 20
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
        images, labels = read_idx(images_path, (SIDE, SIDE)), read_idx(labels_path, ())
        if len(images) != len(labels):
            raise LabError(
                f"{labels_path}: offset 4: {counted(len(labels), 'label')}, and {images_path.name} has "
                f"{counted(len(images), 'image')}; take all four files from one place"
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


def read_idx(path: Path, cell: tuple[int, ...]) -> Tensor:
    """The unsigned bytes of a file of items of shape ``cell``: (items, *cell), at least one. A gzip file is unpacked.

    The header is read first, and no more is unpacked than it promises.

    Raises:
        LabError: the file is broken, truncated or something else; names the offset, in bytes of the unpacked file.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            if not packed:
                return _read(path, cell, file)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _unpack(path, cell, file, unpacked)
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from error


def _unpack(path: Path, cell: tuple[int, ...], file: BinaryIO, unpacked: gzip.GzipFile) -> Tensor:
    try:
        return _read(path, cell, unpacked)
    except EOFError as error:
        raise LabError(
            f"{path}: offset {file.tell()}: the gzip data ends before its end mark, after {unpacked.tell()} unpacked "
            f"bytes: the file is truncated. {GET_AGAIN}"
        ) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise LabError(
            f"{path}: before offset {file.tell()}: the gzip data is broken ({error}). {GET_AGAIN}"
        ) from error


def _read(path: Path, cell: tuple[int, ...], file: BinaryIO | gzip.GzipFile) -> Tensor:
    shape = _shape(path, cell, file)
    start, count = 4 + 4 * len(shape), math.prod(shape)
    sizes = "x".join(map(str, shape))
    content = bytearray()
    while len(content) < count and (part := file.read(min(CHUNK, count - len(content)))):
        content += part
    if len(content) < count:
        raise LabError(
            f"{path}: offset {start + len(content)}: the file ends here, and {sizes} numbers need "
            f"{start + count} bytes: it is truncated. {GET_AGAIN}"
        )
    if file.read(1):  # of a gzip file this also reads its end mark
        raise LabError(f"{path}: offset {start + count}: more bytes follow after {sizes} numbers. {GET_AGAIN}")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _shape(path: Path, cell: tuple[int, ...], file: BinaryIO | gzip.GzipFile) -> list[int]:
    """The length of each axis, from the header."""
    axes = 1 + len(cell)
    header = file.read(4 + 4 * axes)
    if len(header) >= 2 and header[:2] != b"\0\0":
        raise LabError(f"{path}: offset 0: {header[:2].hex(' ')}, expected 00 00: this is no IDX file. {GET_AGAIN}")
    if len(header) >= 3 and header[2] != UNSIGNED_BYTE:
        raise LabError(f"{path}: offset 2: numbers of kind {header[2]:#04x}, expected 0x08 (unsigned bytes)")
    if len(header) >= 4 and header[3] != axes:
        raise LabError(f"{path}: offset 3: {header[3]} axes, expected {axes}; images have 3 and labels 1")
    if len(header) < 4 + 4 * axes:
        raise LabError(
            f"{path}: offset {len(header)}: the file ends within its header of {4 + 4 * axes} bytes. {GET_AGAIN}"
        )
    shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
    if tuple(shape[1:]) != cell:
        given, expected = ("x".join(map(str, sizes)) for sizes in (shape[1:], cell))
        raise LabError(f"{path}: offset 8: images of {given} pixels, expected {expected}")
    if not shape[0]:
        raise LabError(f"{path}: offset 4: the file has 0 items, expected at least 1. {GET_AGAIN}")
    return shape
