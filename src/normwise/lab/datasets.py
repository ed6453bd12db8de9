"""The data that ships with the lab: ``data/README.md`` gives each file's source and licence."""

from __future__ import annotations

import functools
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MNIST_HELD_OUT_PER_DIGIT = 100


class Digits(NamedTuple):
    """Grey levels (N, 28, 28) uint8 and digits (N,) int64."""

    images: Tensor
    labels: Tensor


class Utterances(NamedTuple):
    """Frames (N, T, 12) float32, padded with 0 to the longest; lengths (N,) int64; speakers 0-8 (N,) int64."""

    frames: Tensor
    lengths: Tensor
    speakers: Tensor


def _arrays(name: str) -> dict[str, Tensor]:
    with as_file(files("normwise.lab") / "data" / name) as path, np.load(path) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


@functools.cache
def load_mnist_5k() -> tuple[Digits, Digits]:
    """4,000 digits to train on and 1,000 held out, 400 and 100 of each class.

    The file has no split of its own, so the split is fixed here: the last 100 of each digit, in the file's order,
    are held out. The tensors are cached and shared; do not change them in place.
    """
    data = _arrays("mnist_5k.npz")
    images, labels = data["images"], data["labels"].long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[torch.nonzero(labels == digit)[-MNIST_HELD_OUT_PER_DIGIT:, 0]] = True
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])


@functools.cache
def load_japanese_vowels() -> tuple[Utterances, Utterances]:
    """270 utterances to train on (7-26 frames) and 370 to test on (7-29 frames): the set's own split.

    The longest test utterances are longer than any in training. The tensors are cached and shared.
    """
    data = _arrays("japanese_vowels.npz")

    def part(name: str) -> Utterances:
        lengths = data[f"{name}_lengths"].long()
        utterances = data[f"{name}_frames"].split(lengths.tolist())
        frames = torch.nn.utils.rnn.pad_sequence(list(utterances), batch_first=True)
        return Utterances(frames, lengths, data[f"{name}_speakers"].long())

    return part("train"), part("test")
