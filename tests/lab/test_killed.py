"""SIGKILL at any moment loses at most the runs in flight."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "killed_sweeps.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks, which this system cannot")
def test_two_sweeps_on_one_store_killed_at_20_random_moments_lose_nothing_that_was_stored(tmp_path):
    ran = subprocess.run([sys.executable, PROGRAM, tmp_path], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len(ran.stdout.split()) == 20
