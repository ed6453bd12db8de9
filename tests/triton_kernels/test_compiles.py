"""What Triton's interpreter cannot show: that the kernels compile for GPUs, and what they need there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Registers of a thread on sm_90 are what all threads of a block of that many warps can have; a spilled byte goes to
# memory. Only LayerNorm's backward of the longest rows, 16 elements of five tensors a thread, has been given any.
SPILLED = {"rows_backward": 32}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


@pytest.mark.timeout(500)
def test_every_launch_compiles_within_what_a_gpu_has(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent / "compile_launches.py"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    facts = json.loads(ran.stdout)
    kernels = {fact["kernel"] for fact in facts}
    assert len(kernels) == 13
    assert {(fact["kernel"], fact["target"]) for fact in facts} >= {(k, target) for k in kernels for target in SHARED}
    for fact in facts:
        assert fact["spilled"] <= SPILLED.get(fact["kernel"], 0), fact
        assert fact["shared"] <= SHARED[fact["target"]], fact
        if fact["target"] != "gfx942":
            assert fact["registers"] * fact["warps"] * 32 <= 65536, fact
