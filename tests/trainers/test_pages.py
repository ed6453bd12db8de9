"""The pages about trainers and loggers are true: their Python blocks run."""

from __future__ import annotations

import pytest

from support.pages import PAGES, each_of, needed_by, run_python_blocks, suite_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
HERE = [page for page in PAGES if needed_by(page) and suite_of(page) == "trainers"]


@each_of(HERE)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its loggers write
    run_python_blocks(page)


def test_there_is_something_to_test():
    assert {library for page in HERE for library in needed_by(page)} == {
        "lightning",
        "tensorboard",
        "transformers",
        "wandb",
    }
