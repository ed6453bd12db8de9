"""What a user's file makes: `FILE.py:function` on a command line."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

from normwise.lab.errors import LabError
from normwise.words import did_you_mean, given


def parsed(reference: str, example: str) -> tuple[Path, str]:
    """(file, name of the function). LabError if `reference` is of another form, or the file is not there."""
    file, colon, function = reference.rpartition(":")
    if not colon or not function.isidentifier() or not file.endswith(".py"):
        raise LabError(f"{reference!r} is not of the form FILE.py:function, as in {example}")
    path = Path(file)
    if not path.is_file():
        raise LabError(f"{file!r}: no such file")
    return path, function


def called(path: Path, function: str) -> Any:
    """What the function, called without arguments, returns; LabError if the file has none of that name, or one that
    cannot be called so.

    The file's own folder is where its imports are looked up first, as when Python runs it: to the end of the process,
    since a function may import when it is called.
    """
    name = f"normwise_user_{sha256(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there while the file runs
    folder = str(path.resolve().parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise LabError(f"{path}: {_not_there(module, function)}")
    _check_callable(make, f"{path}:{function}")
    made = make()
    _check_loaded(path)
    return made


def _not_there(module: ModuleType, function: str) -> str:
    """What the file has under this name or one near to it, or else which functions it has."""
    said = f"no function {function!r} in this file"
    if function in vars(module):
        said += f", where it is {given(getattr(module, function))}"
    functions = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    own = [name for name, value in functions.items() if getattr(value, "__module__", None) == module.__name__]
    return said + (did_you_mean(function, functions) or f"; it has {', '.join(own) or 'none'}")


def _check_callable(make: Callable[..., Any], name: str) -> None:
    """A call without arguments would fail before the first line of the user's code.

    Raises:
        LabError: the function needs arguments, or is a class that lacks methods.
    """
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return  # some that are written in C say nothing of their arguments
    needed = [
        one.name
        for one in signature.parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if needed:
        raise LabError(
            f"{name} takes arguments ({', '.join(needed)}), and is called without any: give them defaults, or name a "
            "function that calls it"
        )
    missing = getattr(make, "__abstractmethods__", ())
    if missing:
        raise LabError(f"{name} is a class without {', '.join(sorted(missing))}: it must define them")


def _check_loaded(path: Path) -> None:
    """Two folders may each have a module of one name, and a process holds one of them.

    Raises:
        LabError: a module that the file imports from its folder is loaded from somewhere else.
    """
    for name, file in modules(path).items():
        there = getattr(sys.modules.get(name), "__file__", None)
        if there and Path(there).resolve() != file.resolve() and name.partition(".")[0] not in sys.stdlib_module_names:
            raise LabError(
                f"{path} imports {name!r}, which is {file}, but {there} has been loaded under this name: rename one, "
                "or run each task by a command of its own"
            )


def source_of(path: Path) -> str:
    """The sha256 of the file and of `modules`, by name and content; the file's own name and place do not count."""
    files = {"": path, **modules(path)}
    text = "".join(f"{name} {sha256(files[name])}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def modules(path: Path) -> dict[str, Path]:
    """The modules that the file imports from its own folder, and those that they import from there, by dotted name.

    They are read, not run: an import counts wherever it stands, also inside a function that is never called, and so
    does `import_module` of a name that is written out.
    """
    folder = path.resolve().parent
    found: dict[str, Path] = {}
    waiting: list[tuple[str, Path]] = [("", path)]  # a package and a file in it
    while waiting:
        package, file = waiting.pop()
        for name in _imported(file, package):
            for module, its_file in _files(name.lstrip("."), folder):
                if module not in found:
                    found[module] = its_file
                    inside = module if its_file.name.startswith("__init__.") else module.rpartition(".")[0]
                    waiting.append((inside, its_file))
    return found


def _imported(file: Path, package: str) -> Iterator[str]:
    """Names of what may be modules, for `from a import b` both a and a.b; "a.*" for all that a package holds."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # whoever imports it gets the error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield _absolute(node.args[0].value, package)


def _absolute(name: str, package: str) -> str:
    """`name` with its leading points resolved, as seen from a module of `package`."""
    bare = name.lstrip(".")
    if bare == name:
        return name
    parents = package.split(".")
    parents = parents[: len(parents) - (len(name) - len(bare) - 1)]
    return ".".join(part for part in (*parents, bare) if part)


def _files(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The packages that lead to the module `name` in the folder, and itself, as far as they are there."""
    *packages, last = name.split(".")
    for depth, package in enumerate(packages, 1):
        file = _file(folder / package)
        if file is not None:
            yield ".".join(packages[:depth]), file
        folder /= package
    if last == "*":
        inside = {path.name.partition(".")[0] for path in folder.glob("*")} - {"__init__", "__pycache__"}
    else:
        inside = {last}
    for one in sorted(inside):
        file = _file(folder / one)
        if file is not None:
            yield ".".join((*packages, one)), file


def _file(module: Path) -> Path | None:
    """What Python would load for a module, by its path without a suffix: a package goes before a file of that name."""
    for base in (module / "__init__", module):
        for suffix in (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES):
            file = base.with_name(base.name + suffix)
            if file.is_file():
                return file
    return None


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
