"""Laws of the house that imports do not show: who chooses a backend, what a forward does, where private names are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "normwise"
# torch._VF is torch.nn's own way to its recurrent kernels.
PRIVATE = re.compile(r"torch\._(?!VF\b)[a-zA-Z]|torch\.\w+\._[a-z]|import _[a-z]|_functorch")


def code_of(file: Path) -> str:
    """The file without comments and docstrings."""
    return ast.unparse(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = "..."
    return tree


def files(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in sorted((SOURCE / room).rglob("*.py"))]


@pytest.mark.parametrize("room", ["backends", "ops", "nn", "measure", "surgery"])
def test_private_names_of_torch_are_in_one_file(room: str) -> None:
    found = {
        str(file.relative_to(SOURCE)): names
        for file in files(room)
        if file.name != "_torch_internals.py" and (names := PRIVATE.findall(code_of(file)))
    }
    assert found == {}


def test_dispatch_alone_chooses_a_backend() -> None:
    """Nobody else holds the backends, and each run asks once."""
    asking = []
    for file in files("backends", "ops", "nn", "measure", "surgery"):
        name, code = str(file.relative_to(SOURCE)), code_of(file)
        if name != "ops/dispatch.py" and not name.endswith("backend.py"):
            assert not re.search(r"\bBACKEND\b", code), name
        asking += [name] * len(re.findall(r"\bresolve\(", code))
    asking = [name for name in asking if name != "ops/dispatch.py"]
    assert sorted(asking) == ["ops/norm/run.py", "ops/rnn/stack.py"]


def calls_into_ops(file: Path) -> dict[str, list[int]]:
    """For each class with a forward: how many calls of functions of ops each way through it makes.

    `symbolic` does not count: it records a call for torch.fx instead of making one.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("normwise.ops"):
            for alias in node.names:
                (
                    modules if node.module in ("normwise.ops", "normwise.ops.norm", "normwise.ops.rnn") else functions
                ).add(alias.asname or alias.name)
    modules.discard("symbolic")

    def is_call(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        called = node.func
        if isinstance(called, ast.Attribute):
            return isinstance(called.value, ast.Name) and called.value.id in modules
        return isinstance(called, ast.Name) and called.id in functions

    found = {}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for method in cls.body:
            if isinstance(method, ast.FunctionDef) and method.name == "forward":
                found[cls.name] = [sum(is_call(node) for node in ast.walk(method))]
    return found


def test_a_forward_makes_one_call_into_ops() -> None:
    counted = {f"{file.name}:{cls}": n for file in files("nn") for cls, (n,) in calls_into_ops(file).items()}
    assert counted
    assert {name: n for name, n in counted.items() if n > 1} == {}
