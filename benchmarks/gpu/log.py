"""What a phase tells the command that started it: a line of JSON at a time, so that what it had stays if it dies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Named = TypeVar("Named")


class Log:
    """A file of lines and a deadline.

    Attributes:
        deadline: in seconds of time.monotonic; no case is begun after it.
        only: cases whose name does not contain it are left out without a word.
    """

    def __init__(self, path: Path, deadline: float, only: str = "") -> None:
        self.path, self.deadline, self.only = path, deadline, only

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def each(
        self,
        cases: Sequence[Named],
        name_of: Callable[[Named], str],
        figure_of: Callable[[Named, float], dict[str, Any]],
        say: Callable[[dict[str, Any]], str],
    ) -> None:
        """`figure_of(case, seconds)` of one case after another, until the deadline; seconds are its share of the time.

        What raises is a figure too, with the error's words as "failed".
        """
        cases = [case for case in cases if self.only in name_of(case)]
        for n, case in enumerate(cases):
            if self.seconds_left <= 0:
                self.write(not_measured=[name_of(left) for left in cases[n:]])
                print(f"{len(cases) - n} cases did not fit in the time", flush=True)
                return
            self.write(begun=name_of(case))
            try:
                figure = figure_of(case, self.seconds_left / (len(cases) - n))
            except Exception as error:
                figure = {"failed": reason(error)}
            figure = {"case": name_of(case)} | figure
            self.write(figures=[figure])
            told = f"FAILED: {figure['failed']}" if "failed" in figure else say(figure)
            print(f"{figure['case']:<58} {told}", flush=True)


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
