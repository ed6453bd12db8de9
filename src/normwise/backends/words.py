"""Counts in sentences, for messages of every room."""

from __future__ import annotations

from typing import Any


def counted(count: Any, what: str, *, many: str | None = None) -> str:
    """ "1 batch", "2 batches", "1,000 runs": `what` is one of them, `many` several where an s is not enough."""
    if many is None:
        many = f"{what}es" if what.endswith(("s", "x", "ch", "sh")) else f"{what}s"
    return f"{count:,} {what if count == 1 else many}"
