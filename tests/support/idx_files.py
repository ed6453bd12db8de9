"""Small IDX files for tests: digits of the lab's own, under MNIST's names."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from normwise.lab.datasets import load_mnist_5k


def as_idx(numbers: Tensor) -> bytes:
    return struct.pack(f">BBBB{numbers.dim()}I", 0, 0, 8, numbers.dim(), *numbers.shape) + numbers.numpy().tobytes()


def write_folder(folder: Path, *, train: int = 400, test: int = 100, packed: bool = False, point: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, digits, count in zip(("train", "t10k"), load_mnist_5k(), (train, test), strict=True):
        mixed = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))[:count]
        for kind, numbers in (("images-idx3", digits.images[mixed]), ("labels-idx1", digits.labels[mixed].byte())):
            name = f"{prefix}-{kind}-ubyte".replace("-idx", ".idx" if point else "-idx")
            content = as_idx(numbers)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder
