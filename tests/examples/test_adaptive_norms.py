"""The examples of adaptive norms run and learn what only the condition can tell."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_dit_block(capsys):
    first, last = runpy.run_path(str(EXAMPLES / "dit_block.py"))["main"](60)
    assert last < 0.6 < 0.75 < first
    assert "after 60 steps" in capsys.readouterr().out


def test_conditional_resnet(capsys):
    right, wrong = runpy.run_path(str(EXAMPLES / "conditional_resnet.py"))["main"](60)
    assert right < 0.2 < 1 < wrong
    assert "against its class" in capsys.readouterr().out
