"""How far a pass over the data is: a bar, or a function that is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

Progress: TypeAlias = bool | Callable[[int, int | None], None]


@contextmanager
def shown(progress: Progress) -> Iterator[Callable[[Iterable[Any], int], Iterator[Any]]]:
    """A function of (batches, passes) that goes over the batches and shows what is done of all passes.

    Args:
        progress: False shows nothing, True a bar; or a function of the number of batches done and their total, None
            if the batches have no length.
    """
    done = 0

    def over(batches: Iterable[Any], passes: int) -> Iterator[Any]:
        nonlocal done
        total = len(batches) * passes if isinstance(batches, Sized) else None
        for batch in batches:
            yield batch
            done += 1
            report(done, total)

    with (
        nullcontext(progress) if callable(progress) else _bar() if progress else nullcontext(lambda done, total: None)
    ) as report:
        yield over


@contextmanager
def _bar() -> Iterator[Callable[[int, int | None], None]]:
    try:
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield _line
        print(file=sys.stderr)
        return
    with Bar(transient=True) as bar:
        task = bar.add_task("recalibrate", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(done: int, total: int | None) -> None:
    print(f"\rrecalibrate: batch {done}" + (f" of {total}" if total else ""), end="", file=sys.stderr, flush=True)
