"""The reference pages name everything that the package exports, and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import normwise
import normwise.integrations

PAGES = sorted((Path(__file__).parent.parent.parent / "docs" / "api").glob("*.md"))
SHOWN = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)]


def exported(dotted: str) -> object:
    """The object of a dotted path whose beginning is a module."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_everything_exported_is_on_a_page():
    shown = {id(exported(name)) for name in SHOWN if not name.startswith("normwise.integrations.")}
    apart = {"__version__", "functional"}  # the members of the module are asked for below
    missing = [n for n in normwise.__all__ if n not in apart and id(getattr(normwise, n)) not in shown]
    assert missing == []


def test_every_function_of_functional_is_on_a_page():
    """The module alone would show none of them: they are defined elsewhere."""
    assert {f"normwise.functional.{name}" for name in normwise.functional.__all__} <= set(SHOWN)


def test_all_of_the_integrations_is_on_a_page():
    """By name: two of them are subclasses of classes of libraries that may be missing here."""
    assert set(normwise.integrations.__all__) <= {name.rpartition(".")[2] for name in SHOWN}


def test_a_page_shows_a_thing_once():
    assert len(SHOWN) == len(set(SHOWN))
