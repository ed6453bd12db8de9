"""What messages of every room put into words alike: counts, what was given, and what was perhaps meant.

The lowest room: it needs nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
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


def nearest(
    given: Any, known: Iterable[str], others: Mapping[str, str] | None = None, *, most: int = 1, cutoff: float = 0.6
) -> list[str]:
    """Of the known words those that were perhaps meant, the likeliest first; none where nothing is near.

    Case, "_" and "-" do not count, nor how many axes a class is for. A class, function or module goes by its name, and
    a norm by its kind: normwise.GroupNorm, "GroupNorm" and "group_norm" are "group".

    Args:
        others: other names of some of them, in small letters and without "_".
    """
    words = list(known)
    if not isinstance(given, str):
        given = getattr(given, "__name__", type(given).__name__)
    name = re.sub(r"[123]d$", "", re.sub(r"[-_ ]", "", given.lower()))
    plain = {re.sub(r"[-_ ]", "", word.lower()): word for word in words}
    for one in ((others or {}).get(name), plain.get(name), plain.get(name.removesuffix("norm"))):
        if one in words:
            return [one]
    found = difflib.get_close_matches(name, plain, n=most, cutoff=cutoff)
    return [plain[one] for one in found]


def did_you_mean(given: Any, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """ "; did you mean 'group'?", to end a message by; nothing where no known word is near."""
    return "".join(f"; did you mean {one!r}?" for one in nearest(given, known, others))
