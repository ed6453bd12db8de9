"""Silencing findings: by code, and by layer, in the call and in pyproject.toml."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.records import Finding
from normwise.diagnosis.rules.rule import some
from normwise.diagnosis.rules.table import BY_CODE

TABLE = "[tool.normwise.diagnose]"


def checked(entries: Iterable[str], origin: str = "ignore") -> list[tuple[str, str]]:
    """(code, pattern of layer names) of entries such as "NW005" and "NW001:encoder.*".

    Raises:
        DiagnosisError: something else, or an unknown code.
    """
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise DiagnosisError(f"{origin} must be a list such as ['NW005', 'NW001:encoder.*'], but got {entries!r}")
    pairs = []
    for entry in entries:
        if not isinstance(entry, str):
            raise DiagnosisError(f"{origin} must hold strings such as 'NW001:encoder.*', but got {entry!r}")
        code, colon, pattern = entry.partition(":")
        if code not in BY_CODE:
            nearest = difflib.get_close_matches(code.upper(), BY_CODE, n=1, cutoff=0.0)[0]
            raise DiagnosisError(f"{origin} names the unknown code {code!r}: did you mean {nearest!r}?")
        pairs.append((code, pattern if colon else "*"))
    return pairs


def is_silenced(finding: Finding, pairs: Iterable[tuple[str, str]]) -> bool:
    return any(finding.code == code and fnmatch.fnmatchcase(finding.layer, pattern) for code, pattern in pairs)


def without_effect(pairs: Iterable[tuple[str, str]], layers: Sequence[str]) -> list[str]:
    """A sentence for each pattern that means no layer of the model.

    Of patterns given in the call: those of pyproject.toml may be meant for another of a project's models.
    """
    notes = []
    for code, pattern in pairs:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in ("", *layers)):
            near = difflib.get_close_matches(pattern, layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the layers are {some(layers)}"
            notes.append(f"ignore={code}:{pattern} silences nothing, since no layer has such a name: {hint}")
    return notes


def from_pyproject(folder: Path) -> list[tuple[str, str]]:
    """What `ignore` says in the table [tool.normwise.diagnose] of the nearest pyproject.toml, from `folder` upwards.

    Raises:
        DiagnosisError: the table cannot be read, or holds something else.
    """
    path = next((p for place in (folder, *folder.parents) if (p := place / "pyproject.toml").is_file()), None)
    if path is None:
        return []
    text = path.read_text(encoding="utf-8")
    if TABLE not in text:
        return []
    reader = _toml()
    if reader is None:
        raise DiagnosisError(
            f"{path} has a table {TABLE}, but Python before 3.11 cannot read TOML: pip install tomli, or pass "
            "ignore=[...] and use_pyproject=False"
        )
    try:
        settings = reader.loads(text).get("tool", {}).get("normwise", {}).get("diagnose", {})
    except ValueError as error:
        raise DiagnosisError(f"{path} is no valid TOML: {error}") from error
    unknown = sorted(settings.keys() - {"ignore"})
    if unknown:
        raise DiagnosisError(f"{path}: {TABLE} has the unknown key {unknown[0]!r}: expected ignore = [...]")
    return checked(settings.get("ignore", []), f"{path}: ignore")


def _toml() -> Any:
    """The standard library's reader, or the package that it came from; None where there is neither."""
    for name in ("tomllib", "tomli"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    return None
