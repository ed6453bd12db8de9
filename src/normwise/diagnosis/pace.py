"""How much time a diagnosis has, and how far it is."""

from __future__ import annotations

import time

from normwise.diagnosis.errors import DiagnosisError
from normwise.surgery.progress import Told


class Pace:
    """Counts forward passes, tells of them, and knows when the time is up.

    Attributes:
        total: passes in all, None while that is not known.
        left_out: what there was no time for, in words.
    """

    def __init__(self, max_seconds: float | None, told: Told) -> None:
        """
        Raises:
            DiagnosisError: `max_seconds` is no positive number.
        """
        if max_seconds is not None and (
            isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)) or not max_seconds > 0
        ):
            raise DiagnosisError(f"max_seconds must be a positive number of seconds or None, but got {max_seconds!r}")
        self.max_seconds, self.told = max_seconds, told
        self.end = None if max_seconds is None else time.monotonic() + max_seconds
        self.done = 0
        self.total: int | None = None
        self.left_out: list[str] = []

    @property
    def over(self) -> bool:
        """Whether the time is up: what has not begun is left out."""
        return self.end is not None and time.monotonic() >= self.end

    def step(self) -> None:
        """One pass is done."""
        self.done += 1
        self.told(self.done, None if self.total is None else max(self.total, self.done))

    def note(self) -> str | None:
        """What was left out, as a sentence; None where nothing was."""
        if not self.left_out:
            return None
        return f"After {self.max_seconds:g} s (max_seconds) was left out: {'; '.join(self.left_out)}."
