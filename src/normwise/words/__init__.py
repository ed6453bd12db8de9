"""What messages of every room put into words alike: counts, and what was given. The lowest room: it needs nothing."""

from __future__ import annotations

from typing import Any

MOST = 40  # characters of what was given
_OTHERWISE = {"axis": "axes"}


def counted(count: int, what: str) -> str:
    """ "1 batch", "2 batches", "1,000 runs"; `what` is the word for one, and may have others before it."""
    *before, noun = what.split(" ")
    if count != 1:
        noun = _OTHERWISE.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
    # A symbolic size knows no format.
    return f"{f'{count:,}' if type(count) is int else count} {' '.join([*before, noun])}"


def given(value: Any) -> str:
    """Kind and value of what was given, short: "str ('0.1')"."""
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} ({text if len(text) <= MOST else text[: MOST - 3] + '...'})"
