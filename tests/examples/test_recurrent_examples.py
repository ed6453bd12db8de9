"""The examples of recurrent layers run, learn, and show what they claim to show."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_streaming(capsys):
    accuracy, difference = runpy.run_path(str(EXAMPLES / "streaming.py"))["main"](60)
    assert accuracy > 0.8  # a constant answer is right two times in three
    assert difference < 1e-4
    assert "streaming differs from the whole sequence" in capsys.readouterr().out


def test_ppo_policy(capsys):
    score, drift = runpy.run_path(str(EXAMPLES / "ppo_policy.py"))["main"](20)
    assert score > 0.7  # without memory 0.5
    assert drift < 1e-4
    assert "update  20" in capsys.readouterr().out
