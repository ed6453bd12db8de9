"""What the lab refuses, and the one outcome that is no failure."""

from __future__ import annotations

from collections.abc import Iterable

from normwise.words import nearest


class LabError(ValueError):
    """A request that cannot be run: an unknown task or norm, a number out of range, a file that holds no task."""


class StoreError(RuntimeError):
    """A store that cannot be used: damaged, newer than this normwise, or something else altogether."""


class WorkerError(RuntimeError):
    """A process that trained died: killed for memory, or by a crash in compiled code."""


class UndefinedError(Exception):
    """The norm has no meaning in this setting. It is recorded as a result of the run, with its reason."""


def unknown(kind: str, given: str, known: Iterable[str], of: str = "") -> LabError:
    """The error for a name that is not there: what was given, the nearest names, and all that are accepted.

    Args:
        of: whose kind it is, as in "for task 'mlp'".
    """
    known = list(known)
    near = nearest(given, known, most=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return LabError(f"unknown {kind} {given!r}{of and ' ' + of}{hint} (known: {', '.join(known)})")
