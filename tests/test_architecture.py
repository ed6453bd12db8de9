"""The rooms of src/normwise import downwards only:

    cli -> integrations -> lab, diagnosis -> surgery -> measure -> nn -> ops -> backends -> words

Rooms on one level do not know each other: neither lab and diagnosis nor one backend and another, which share what lies
at the top of backends/. Nor do integrations know the lab. The package's own modules (`functional.py`) stand between nn
and the rooms above it; only its front, `normwise/__init__.py`, which names what users call, imports surgery. Every
import statement counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING, relative, or as a
string given to `import_module`.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "normwise"
PACKAGE = "normwise"

FRONT = f"{PACKAGE}/__init__.py"
BACKENDS = ("backends/reference", "backends/aten", "backends/cpu", "backends/triton")
LEVEL = {
    "cli": 9,
    "integrations": 8,
    "lab": 7,
    "diagnosis": 7,
    "surgery": 6,
    "measure": 5,
    PACKAGE: 4,
    "nn": 3,
    "ops": 2,
    **dict.fromkeys(BACKENDS, 1),
    "backends": 0,
    "words": -1,
}

# Besides torch and the standard library (words has only the latter). Outside cli, lab and diagnosis nothing else may
# be needed (surgery shows its bar by rich where that is installed).
OUTSIDE = {
    "cli": {"typer", "rich"},
    "lab": {"numpy", "scipy", "rich", "jinja2", "joblib", "altair", "vl_convert", "distributed", "pyarrow"},
    "diagnosis": {"numpy", "rich", "jinja2"},
    "integrations": {"lightning", "transformers", "wandb"},
    "surgery": {"rich"},
    "backends/triton": {"triton"},
}


def violations(source: Path) -> list[str]:
    """Every forbidden import below `source`, as 'file:line: what is wrong'."""
    found = []
    graph: dict[str, set[str]] = {}
    for file in sorted(source.rglob("*.py")):
        module = module_name(file, source)
        graph[module] = set()
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for line, imported in imports(file.read_text(encoding="utf-8"), package):
            graph[module].add(imported)
            fault = forbidden(FRONT if module == PACKAGE else room(module, source), imported, source)
            if fault:
                found.append(f"{file.relative_to(source)}:{line}: {fault}")
    return found + scoring_that_trains(graph, source)


def forbidden(importer: str, imported: str, source: Path) -> str | None:
    """Why room `importer` may not import module `imported`, or None."""
    top = imported.partition(".")[0]
    if top != PACKAGE:
        allowed = OUTSIDE.get(importer, set()) | (set() if importer == "words" else {"torch"})
        if top in sys.stdlib_module_names or top in allowed:
            return None
        return f"{importer} may not import {imported}: it is not among what this room may use of others"
    target = room(imported, source)
    if importer == FRONT:
        importer = PACKAGE
        if target in ("surgery", "diagnosis"):
            return None
    if (importer, target) != ("integrations", "lab") and (importer == target or LEVEL[target] < LEVEL[importer]):
        return None
    return f"{importer} may not import {imported}: {target} is not below it"


def scoring_that_trains(graph: dict[str, set[str]], source: Path) -> list[str]:
    """What lab/score.py reaches, over any number of lab modules: it reads stored runs and can build no model."""
    seen, stack, found = set(), [f"{PACKAGE}.lab.score"], []
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        for imported in sorted(graph.get(module, ())):
            top = imported.partition(".")[0]
            if top == "torch" or (top == PACKAGE and room(imported, source) not in ("lab", "words")):
                found.append(f"{module} imports {imported}, and lab/score.py needs it: scoring may not build a model")
            # `from normwise.lab.store import Run` names an attribute: follow its module.
            stack += [name for name in (imported, imported.rpartition(".")[0]) if name in graph and "lab." in name]
    return found


def module_name(file: Path, source: Path) -> str:
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def room(module: str, source: Path) -> str:
    """The room of a module or of a name in it: its folder, or the package itself for what lies at its top. Each backend
    is a room."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 and (source / parts[1]).is_dir() else PACKAGE
    if name == "backends" and len(parts) > 2 and (source / name / parts[2]).is_dir():
        name = f"backends/{parts[2]}"
    assert name in LEVEL, f"{name} is a new room: give it a level here, in accordance with the design"
    return name


@functools.cache  # the copies of the source that are planted in differ in one file
def imports(text: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute name) of everything that a file of `package` imports."""
    return list(_imports(text, package))


def _imports(text: str, package: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                up = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*up, base] if base else up)
            # Over the package itself a room is named after `import`; elsewhere the module says it all.
            yield from ((node.lineno, f"{base}.{alias.name}".removesuffix(".*")) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str):
                yield node.lineno, f"{package}{name}" if name.startswith(".") else name


def test_imports_point_downwards():
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("ops/planted.py", "from normwise.nn import BatchNorm1d", "normwise.nn"),
        ("ops/planted.py", "import normwise.nn.planted as p", "normwise.nn"),
        ("ops/planted.py", "from normwise import nn", "normwise.nn"),
        ("ops/planted.py", "from normwise import BatchNorm1d", "normwise.BatchNorm1d"),
        ("ops/planted.py", "import normwise", "normwise"),
        ("nn/planted.py", "from normwise import functional", "normwise.functional"),
        ("nn/planted.py", "def late():\n    from normwise.lab import run", "normwise.lab"),
        ("nn/planted.py", "if TYPE_CHECKING:\n    from normwise.cli import main", "normwise.cli"),
        ("nn/planted.py", "from ..surgery import convert", "normwise.surgery"),
        ("nn/planted.py", "from .. import diagnosis", "normwise.diagnosis"),
        ("backends/cpu/planted.py", "from normwise.backends.reference import moments", "normwise.backends.reference"),
        ("backends/aten/planted.py", "from ..cpu import library", "normwise.backends.cpu"),
        ("backends/reference/planted.py", "from normwise.backends.aten import norms", "normwise.backends.aten"),
        ("backends/reference/planted.py", "import numpy as np", "numpy"),
        ("backends/reference/planted.py", "import_module('normwise.ops')", "normwise.ops"),
        ("backends/reference/planted.py", "importlib.import_module('normwise.ops')", "normwise.ops"),
        ("backends/planted.py", "from normwise.backends import reference", "normwise.backends.reference"),
        ("backends/triton/planted.py", "from normwise.backends.cpu import library", "normwise.backends.cpu"),
        ("backends/aten/planted.py", "import triton", "triton"),
        ("backends/cpu/planted.py", "from normwise.ops import dispatch", "normwise.ops"),
        ("__init__.py", "from normwise.lab import run", "normwise.lab"),
        ("functional.py", "from normwise.surgery import convert", "normwise.surgery"),
        ("functional.py", "from normwise.lab import data", "normwise.lab"),
        ("functional.py", "import triton", "triton"),
        ("lab/planted.py", "from normwise.cli.main import main", "normwise.cli"),
        ("lab/planted.py", "from normwise.diagnosis import collect", "normwise.diagnosis"),
        ("lab/planted.py", "import pandas", "pandas"),
        ("diagnosis/planted.py", "from normwise.lab import run", "normwise.lab"),
        ("diagnosis/planted.py", "from normwise.integrations import hook", "normwise.integrations"),
        ("diagnosis/planted.py", "import wandb", "wandb"),
        ("integrations/planted.py", "from normwise.lab import run", "normwise.lab"),
        ("integrations/planted.py", "import pandas", "pandas"),
        ("measure/planted.py", "from normwise.diagnosis import records", "normwise.diagnosis"),
        ("measure/planted.py", "from ..lab.tasks import Task", "normwise.lab"),
        ("measure/planted.py", "def late():\n    from normwise.surgery.select import layers", "normwise.surgery"),
        ("measure/planted.py", "import numpy", "numpy"),
        ("nn/planted.py", "from normwise.measure.snapshot import Values", "normwise.measure"),
        ("ops/planted.py", "from normwise.measure import shift", "normwise.measure"),
        ("functional.py", "from normwise.measure.shift import input_shift", "normwise.measure"),
        ("__init__.py", "from normwise.measure import shift", "normwise.measure"),
        ("surgery/planted.py", "from normwise.diagnosis import collect", "normwise.diagnosis"),
        ("words/__init__.py", "import torch", "torch"),
        ("words/__init__.py", "from normwise.backends import scalars", "normwise.backends"),
        ("lab/score.py", "from normwise.nn import BatchNorm1d", "normwise.nn"),
        ("lab/score.py", "from normwise.lab.planted_trainer import train", "normwise.nn"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, named):
    """Planted into a copy of the real source, so that the test also fails if real modules are skipped."""
    source = tmp_path / "src" / PACKAGE
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "data", "*.so"))
    for name in ("surgery", "diagnosis"):
        (source / name).mkdir(exist_ok=True)
    (source / "lab" / "planted_trainer.py").write_text("from normwise.nn import LayerNorm\n")
    planted = source / file
    planted.parent.mkdir(exist_ok=True)
    before = violations(source)
    with planted.open("a") as text:
        text.write(f"\n{line}\n")
    new = [fault for fault in violations(source) if fault not in before]
    assert new, f"{line!r} in {file} went unnoticed"
    assert all(named in fault for fault in new)


def test_what_the_design_allows_passes(tmp_path):
    source = tmp_path / PACKAGE
    allowed = {
        "integrations/i.py": "import wandb\nfrom normwise.diagnosis import g\nfrom normwise.surgery import h\n",
        "diagnosis/g.py": "import numpy\nfrom normwise.surgery import h\nfrom normwise.measure import m\n",
        "surgery/h.py": "from normwise.nn import c\nfrom normwise.measure import m\n",
        "measure/m.py": "from normwise.nn import c\nfrom normwise.backends.reference import e\n",
        "cli/a.py": "from normwise.lab import b\nimport typer\nimport normwise\nfrom normwise.ops import dispatch\n",
        "lab/b.py": "import numpy\nfrom normwise import BatchNorm1d\nfrom ..measure import m\nfrom . import score\n",
        "lab/score.py": "import math\nfrom normwise.lab.store import read\nfrom normwise.words import counted\n",
        "lab/store.py": "import sqlite3\n",
        "__init__.py": "from normwise.nn import c\nfrom normwise import functional\n",
        "functional.py": "from normwise.ops import d\nfrom normwise.backends.reference import e\n",
        "nn/c.py": "import torch\nfrom normwise.ops import d\nfrom normwise.backends.reference import e\n",
        "ops/d.py": "from normwise.backends.cpu import f\nfrom ..backends import reference\nfrom torch import Tensor\n",
        "backends/reference/e.py": "from torch.nn import functional\nimport math\nfrom . import e2\n",
        "backends/reference/e2.py": "from normwise.backends.protocol import Backend\n",
        "backends/cpu/f.py": "import ctypes\nfrom .. import protocol\n",
        "backends/protocol.py": "from __future__ import annotations\nfrom normwise.words import counted\n",
        "words/__init__.py": "import math\n",
    }
    for name, text in allowed.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    assert violations(source) == []


def test_what_is_imported_from_outside_is_declared():
    """Everything that OUTSIDE allows is in an extra."""
    needed = [requirement.partition(";") for requirement in requires(PACKAGE) or []]
    assert [name.split(">")[0] for name, _, condition in needed if not condition] == ["torch"]
    ours = re.compile("extra == .(lab|cluster|parquet|triton|lightning|wandb|models)\\b")
    named_otherwise = {"vl-convert-python": "vl_convert"}
    used = {name.split(">")[0] for name, _, condition in needed if ours.search(condition)}
    used = {named_otherwise.get(name, name) for name in used}
    # The tests are about these; torch itself imports tensorboard.
    assert set().union(*OUTSIDE.values()) == used - {"normwise[lab]", "timm", "diffusers", "torchvision"}
