"""What stands for a user's task: its file and the modules that it imports from its own folder."""

from __future__ import annotations

import sys

import pytest

from normwise.lab.errors import LabError
from normwise.lab.user_file import called, modules, source_of


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "task.py"


@pytest.mark.parametrize(
    ("statement", "files"),
    [
        ("import net", ["net"]),
        ("import net as other, net2", ["net", "net2"]),
        ("from net import build", ["net"]),
        ("import pack.inner.net", ["pack/__init__", "pack/inner/__init__", "pack/inner/net"]),
        ("from pack.inner import net", ["pack/__init__", "pack/inner/__init__", "pack/inner/net"]),
        ("from pack import *", ["pack/__init__", "pack/a", "pack/b"]),
        ("import bare.net", ["bare/net"]),  # a folder without __init__.py
        ("def later():\n    if 0:\n        import net", ["net"]),
        ("class A:\n    async def later(self):\n        from net import build", ["net"]),
        ("import importlib\nimportlib.import_module('net')", ["net"]),
        (
            "from importlib import import_module as i, import_module\nimport_module('pack.a')",
            ["pack/__init__", "pack/a"],
        ),
        ("__import__('net')", ["net"]),
        ("try:\n    import net\nexcept ImportError:\n    import torch", ["net"]),
    ],
)
def test_every_form_of_import_counts_wherever_it_stands(tmp_path, statement, files):
    path = write(tmp_path, task=statement, **{name.replace("/", "__in__"): "" for name in files})
    (tmp_path / "unused.py").write_text("")
    assert sorted(str(f.relative_to(tmp_path)) for f in modules(path).values()) == sorted(f"{f}.py" for f in files)
    before = source_of(path)
    for name in files:
        (tmp_path / f"{name}.py").write_text("x = 1")
        after = source_of(path)
        assert after != before
        before = after
    (tmp_path / "unused.py").write_text("x = 1")
    assert source_of(path) == before


def test_relative_imports_are_followed_through_packages_and_in_circles(tmp_path):
    path = write(
        tmp_path,
        task="import pack",
        pack__in____init__="from . import a\nfrom .inner.deep import x",
        pack__in__a="from .b import *\nimport importlib\nimportlib.import_module('.c', __package__)",
        pack__in__b="from . import a",
        pack__in__c="import task, top",
        pack__in__inner____init__="",
        pack__in__inner__in____init__="from ..d import y",
        pack__in__inner__in__deep="from ...pack import e\nfrom .. import f",
        pack__in__d="",
        pack__in__e="",
        pack__in__f="",
        top="this is no Python",
    )
    names = {"pack", "task", "top"} | {f"pack.{n}" for n in ("a", "b", "c", "d", "e", "f", "inner", "inner.deep")}
    assert set(modules(path)) == names


def test_the_place_does_not_count_but_the_names_do(tmp_path):
    one = write(tmp_path / "one", task="import net, other", net="x = 1", other="")
    moved = write(tmp_path / "moved", task="import net, other", net="x = 1", other="")
    swapped = write(tmp_path / "swapped", task="import net, other", net="", other="x = 1")
    assert source_of(one) == source_of(moved) != source_of(swapped)
    renamed = one.rename(one.with_name("renamed.py"))
    assert source_of(renamed) == source_of(moved)


def test_what_is_imported_late_is_found_in_the_folder_too(tmp_path):
    path = write(
        tmp_path, task="def make():\n    return lambda: __import__('user_file_late').x", user_file_late="x = 5"
    )
    assert called(path, "make")() == 5


def test_two_folders_with_modules_of_one_name_are_refused(tmp_path):
    text = "import user_file_twin\ndef make():\n    return user_file_twin.x"
    first, second = (write(tmp_path / n, task=text, user_file_twin=f"x = '{n}'") for n in ("a", "b"))
    assert called(first, "make") == called(first, "make") == "a"
    with pytest.raises(LabError, match=r"imports 'user_file_twin', which is .*b.user_file_twin\.py, but .*a.user_"):
        called(second, "make")
    del sys.modules["user_file_twin"]
    assert called(second, "make") == "b"
