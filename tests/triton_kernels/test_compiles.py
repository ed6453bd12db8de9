"""What Triton's interpreter cannot show: that the kernels compile for GPUs, and what they need there.

They are compiled by the Triton that comes with torch 2.11, older than the one whose interpreter runs the other tests:
`make test-triton` puts it into a folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRITON = "3.6.0"
FOLDER = Path(sys.prefix) / "triton-3.6"
SCRIPT = Path(__file__).parent / "compile_launches.py"
# For each kernel and target, the most that a launch of it may take: registers of a thread, bytes that a thread spills
# to memory, bytes of shared memory of a block. `make triton-budgets` writes it anew.
BUDGETS = Path(__file__).parent / "budgets.json"
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


def compiled(tmp_path: Path) -> Any:
    if not (FOLDER / "triton").is_dir():
        pytest.fail(f"the compiler of the GPU kernels is not in {FOLDER}: `make test-triton` installs it")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.mark.timeout(500)
def test_every_launch_compiles_within_its_budget(tmp_path: Path) -> None:
    found = compiled(tmp_path)
    assert found["triton"] == TRITON
    budgets = json.loads(BUDGETS.read_text())
    facts = found["facts"]
    missing = {fact["kernel"] for fact in facts} ^ set(budgets)
    assert not missing, f"not both compiled here and in {BUDGETS.name}: {sorted(missing)}"
    for fact in facts:
        budget = budgets[fact["kernel"]][fact["target"]]
        over = [name for name, most in budget.items() if fact[name] > most]
        assert not over, f"{', '.join(over)} over the budget {budget} (`make triton-budgets`): {fact}"
        if fact["target"] != "gfx942":  # what all threads of a block of that many warps can have
            assert fact["registers"] * fact["warps"] * 32 <= 65536, fact
        if fact["kernel"].startswith("grid_") and fact["target"] != "gfx942":
            ordered = fact["order"]
            assert ordered["released after"] == ["bar.sync"] * 2, fact
            assert ordered["acquires"] == 2, fact
            assert ordered["loads past the cache"] > 0, fact
            assert ordered["copies ahead"] == 0, fact


def test_budgets_are_within_what_the_gpus_have() -> None:
    budgets = json.loads(BUDGETS.read_text())
    for kernel, targets in budgets.items():
        assert set(targets) == set(SHARED), kernel
        for target, budget in targets.items():
            assert set(budget) == {"registers", "spilled", "shared"}
            assert budget["shared"] <= SHARED[target], (kernel, target)
            assert budget["registers"] <= (512 if target == "gfx942" else 256), (kernel, target)
