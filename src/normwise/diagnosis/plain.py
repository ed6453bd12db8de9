"""Records as plain data and JSON, and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict(value: Any) -> Any:
    """`value` with non-finite numbers as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return value


T = TypeVar("T")


def restored(kind: type[T], plain: dict[str, Any]) -> T:
    """A record of class `kind` from what `dataclasses.asdict` made of it."""
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: _value(hints[f.name], plain[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return [_value(arguments[0], v) for v in value]
    if origin is dict:
        return {key: _value(arguments[1], v) for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return restored(hint, value)  # type: ignore[arg-type]
    return _NAMES[value] if hint in (float, Any) and isinstance(value, str) and value in _NAMES else value
