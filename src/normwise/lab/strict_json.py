"""JSON as the standard has it, which knows no NaN and no infinity: every file and every ``--json`` is written here."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False, compact: bool = False) -> str:
    """``value`` in ASCII, which every terminal and pipe can carry; a number that is not finite is null."""
    separators = (",", ":") if compact else None
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, separators=separators, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
