"""What a user's file makes: `FILE.py:function` on a command line."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from normwise.lab.errors import LabError


def parsed(reference: str, example: str) -> tuple[Path, str]:
    """(file, name of the function). LabError if `reference` is of another form, or the file is not there."""
    file, colon, function = reference.rpartition(":")
    if not colon or not function.isidentifier():
        raise LabError(f"{reference!r} is not of the form FILE.py:function, as in {example}")
    path = Path(file)
    if not path.is_file():
        raise LabError(f"{file!r}: no such file")
    return path, function


def called(path: Path, function: str) -> Any:
    """What the function, called without arguments, returns; LabError if the file has none of that name.

    The file's own folder is where its imports are looked up first, as when Python runs it.
    """
    name = f"normwise_user_{sha256(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there while the file runs
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise LabError(f"{path}: no function {function!r} in this file")
        return make()
    finally:
        sys.path.remove(folder)


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
