"""The example of several ranks, started as its own text says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "sync_batch_norm.py"


def test_sync_batch_norm_by_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLE), "--steps", "8"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks with 2 images each, 8 steps" in done.stdout
    differs = dict(
        re.findall(r"^(SyncBatchNorm|BatchNorm on each rank|one batch) .* (\S+)$", done.stdout, re.MULTILINE)
    )
    assert float(differs["one batch"]) == 0
    assert 0 < float(differs["SyncBatchNorm"]) < 1e-10  # float64
    assert float(differs["BatchNorm on each rank"]) > 1e-2
