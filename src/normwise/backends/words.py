"""Counts in sentences, for messages of every room."""

from __future__ import annotations

_OTHERWISE = {"axis": "axes"}


def counted(count: int, what: str) -> str:
    """ "1 batch", "2 batches", "1,000 runs"; `what` is the word for one, and may have others before it."""
    *before, noun = what.split(" ")
    if count != 1:
        noun = _OTHERWISE.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
    # A symbolic size knows no format.
    return f"{f'{count:,}' if type(count) is int else count} {' '.join([*before, noun])}"
