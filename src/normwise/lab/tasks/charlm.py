"""Text, character by character: what the tasks ``charlm-lstm``, ``charlm-gru`` and ``charlm-transformer`` share."""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.lab.errors import LabError
from normwise.lab.tasks.base import Batch, Task
from normwise.words import counted

HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 100_000
ON_TEXT = (
    "that predicts the next character of a text (default: the topics of Python's own help), from 64 before it at most; "
    "the last tenth of the text is held out"
)


def python_topics() -> str:
    """The documentation topics that ship with the running Python (what ``help("topics")`` lists), in a fixed order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        LabError: it cannot be read, or is not UTF-8 (with the offset in bytes).
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise LabError(f"{path}: offset {error.start}: no UTF-8 ({error.reason}); convert it, as by iconv") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class CharLm(Task, ABC):
    """Inputs and targets are (N, T) character numbers, one step apart; scores (N, T, characters).

    The text is cut into pieces of ``length`` characters, each read from an empty state. Its characters, all of them,
    are the vocabulary. ``path`` is a text file; empty, the text is Python's documentation topics.
    """

    batch_sizes: ClassVar[tuple[int, ...]] = (16, 4)
    learning_rates: ClassVar[tuple[float, ...]] = (0.003, 0.01)
    steps: ClassVar[int] = 100
    looks: ClassVar[int] = 3

    path: str = field(default="", metadata={"place": True})
    length: int = 64
    width: int = 64

    @functools.cached_property
    def text(self) -> str:
        return read_text(Path(self.path)) if self.path else python_topics()

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @functools.cached_property
    def characters(self) -> str:
        """The vocabulary: a character's place is its number."""
        return "".join(sorted(set(self.text)))

    def data(self) -> tuple[Batch, Batch]:
        number = {character: at for at, character in enumerate(self.characters)}
        held_out = min(int(HELD_OUT_SHARE * len(self.text)), MOST_HELD_OUT)
        if held_out < 10 * (self.length + 1):
            raise LabError(
                f"{self.path or 'the text'} has {counted(len(self.text), 'character')}, expected at least "
                f"{math.ceil(10 * (self.length + 1) / HELD_OUT_SHARE):,}: pieces of {self.length}, ten of them held out"
            )
        numbers = torch.tensor([number[character] for character in self.text])
        return self.pieces(numbers[:-held_out]), self.pieces(numbers[-held_out:])

    def pieces(self, numbers: Tensor) -> Batch:
        """The text, cut; a rest that fills no piece is left out."""
        cut = numbers.unfold(0, self.length + 1, self.length)
        return Batch(cut[:, :-1], cut[:, 1:])

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy over all characters, in nats."""
        return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten())

    def derived(self, loss: float) -> dict[str, float]:
        return {"bits-per-character": loss / math.log(2)}
