"""The pages about these libraries are true: their Python blocks run."""

from __future__ import annotations

import importlib.util

import pytest

from support.pages import PAGES, each_of, needed_by, run_python_blocks, suite_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
HERE = [page for page in PAGES if needed_by(page) and suite_of(page) == "models"]


@each_of(HERE)
def test_python_blocks_run(page):
    """A library that is not installed is a reason to skip; one that is there and cannot be imported is a fault."""
    for library in needed_by(page):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}: pip install 'normwise[models]'")
    run_python_blocks(page)


def test_there_is_something_to_test():
    assert {library for page in HERE for library in needed_by(page)} >= {"timm", "transformers"}
