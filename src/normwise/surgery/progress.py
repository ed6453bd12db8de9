"""Progress of a pass over the data: a bar, or a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

Told: TypeAlias = Callable[[int, int | None], None]
Progress: TypeAlias = bool | Told


def told(progress: Progress, verb: str) -> AbstractContextManager[Told]:
    """A function that shows progress, of the number done and the total (None if unknown).

    Args:
        progress: False shows nothing, True a bar on stderr; or such a function.
        verb: what is being done, beside the bar.
    """
    return nullcontext(progress) if callable(progress) else _bar(verb) if progress else nullcontext(lambda *_: None)


@contextmanager
def shown(progress: Progress, verb: str) -> Iterator[Callable[[Iterable[Any], int], Iterator[Any]]]:
    """A function of (batches, passes) that goes over the batches and shows what is done of all passes: see `told`."""
    done = 0

    def over(batches: Iterable[Any], passes: int) -> Iterator[Any]:
        nonlocal done
        total = len(batches) * passes if isinstance(batches, Sized) else None
        for batch in batches:
            yield batch
            done += 1
            report(done, total)

    with told(progress, verb) as report:
        yield over


@contextmanager
def _bar(verb: str) -> Iterator[Told]:
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield lambda done, total: _line(verb, done, total)
        print(file=sys.stderr)
        return
    with Bar(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(verb: str, done: int, total: int | None) -> None:
    print(f"\r{verb}: batch {done}" + (f" of {total}" if total else ""), end="", file=sys.stderr, flush=True)
