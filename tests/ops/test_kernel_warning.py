"""Without its compiled library normwise works, and says once what is missing and how to get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Runs in a fresh interpreter whose library cannot be found; prints what was warned of, step by step.
HIDDEN = """
import json, warnings
import torch
warnings.simplefilter("always")
told = {}

def step(name, run):
    with warnings.catch_warnings(record=True) as caught:
        run()
    told[name] = [[w.category.__name__, str(w.message)] for w in caught]

def load():
    global normwise
    import normwise
    from normwise.backends.cpu import library
    library.NAME = "libelsewhere.so"

x = torch.randn(64, 1024)
step("import", load)
step("half", lambda: normwise.LayerNorm(1024).half()(x.half()))
def forced():
    with normwise.backend("aten"):
        normwise.LayerNorm(1024)(x)
step("forced", forced)
step("compiled", lambda: torch.compile(normwise.LayerNorm(1024), backend="eager", fullgraph=True)(x))
step("first", lambda: normwise.LayerNorm(1024)(x))
step("again", lambda: (normwise.LayerNorm(1024)(x), normwise.LSTM(4, 4)(x[:, None, :4])))
exact = torch.nn.functional.layer_norm(x.double(), (1024,))
told["error"] = float((normwise.LayerNorm(1024)(x) - exact).abs().max())
print(json.dumps(told))
"""


def told(**environment: str) -> dict:
    outer = {name: value for name, value in os.environ.items() if name != "NORMWISE_ISA"}
    ran = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, env={**outer, **environment})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_missing_library_is_told_once_at_its_first_use_with_the_cure() -> None:
    said = told()
    assert said["error"] < 1e-5
    ((category, text),) = said.pop("first")
    assert category == "KernelWarning"
    for part in ("without its compiled library libelsewhere.so", "install a C++ compiler", "NORMWISE_KERNEL_WARNING"):
        assert part in text
    ours = {name: [text for kind, text in said[name] if kind == "KernelWarning"] for name in said if name != "error"}
    assert set(ours) == {"import", "half", "forced", "compiled", "again"}
    assert not any(ours.values())


@pytest.mark.parametrize(
    "environment",
    [{"NORMWISE_KERNEL_WARNING": "off"}, {"NORMWISE_BACKEND": "reference"}, {"NORMWISE_ISA": "none"}],
    ids=str,
)
def test_silent_on_request(environment: dict[str, str]) -> None:
    assert told(**environment)["first"] == []
