"""`python -m benchmarks gpu`, tried from end to end without a GPU, and that its proof sees what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import build, correct, device, norm_cases, recurrent_cases
from benchmarks.gpu.clock import Device
from benchmarks.gpu.command import PHASES
from normwise.backends.protocol import NormFamily
from normwise.backends.triton import norms

ROOT = Path(__file__).parent.parent.parent
DRY = Device(dry=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.timeout(500)
def test_a_dry_run_goes_through_every_phase_and_has_no_times(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    ran = run("gpu", "--dry", "--json", str(file))
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = json.loads(file.read_text())
    assert results["dry"] is True
    assert results["machine"]["gpu"].startswith("none")
    assert list(results["phases"]) == list(PHASES)
    for name, phase in results["phases"].items():
        assert phase["figures"], name
        assert not phase["not_measured"], name
        assert phase["died"] is None, name
        assert [f for f in phase["figures"] if "failed" in f] == []
    for name in ("recurrent", "norms"):
        for figure in results["phases"][name]["figures"]:
            assert figure["refused"] == {}, figure
            assert {way["median"] for way in figure["ways"].values()} == {None}
    assert {f["value"] for f in results["phases"]["device"]["figures"]} == {None}
    ways = results["phases"]["recurrent"]["figures"][0]["ways"]
    assert {"cuDNN, no norm", "stepwise", "stepwise, replayed", "loop", "compiled cell"} <= set(ways)
    table = ran.stdout[ran.stdout.index("**Dry run") :].strip()
    assert run("table", str(file)).stdout.strip() == table


def test_the_proof_sees_a_wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = next(p for p in correct.proofs(dry=False) if p.name.startswith("RMSNorm") and p.dtype == "float32")
    assert 0 < correct.outcome(proof, DRY)["error"] <= 1
    right = norms.FAMILIES["features"]

    def forward(*request):  # a slip of a few roundings
        found = right.forward(*request)
        return found._replace(y=found.y * (1 + 1e-5))

    monkeypatch.setitem(norms.FAMILIES, "features", NormFamily(forward, right.backward))
    assert correct.outcome(proof, DRY)["error"] > 1


def test_the_proof_sees_other_bits_and_memory_that_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = next(p for p in correct.proofs(dry=False) if p.name.startswith("RMSNorm") and p.dtype == "float32")
    right = norms.FAMILIES["features"]
    calls = []

    def changing(*request):
        found = right.forward(*request)
        calls.append(found)
        found.y.view(-1)[0] += 1e-6 * len(calls)
        return found

    monkeypatch.setitem(norms.FAMILIES, "features", NormFamily(changing, right.backward))
    assert "gave other bits" in correct.outcome(proof, DRY)["failed"]

    def unwritten(*request):
        found = right.forward(*request)
        fresh = torch.empty_like(found.y)
        fresh.view(-1)[1:] = found.y.view(-1)[1:]
        return found._replace(y=fresh)

    monkeypatch.setitem(norms.FAMILIES, "features", NormFamily(unwritten, right.backward))
    assert correct.outcome(proof, DRY)["error"] == float("inf")


def test_every_case_to_be_timed_can_be_built_and_is_what_torch_computes() -> None:
    """In its small shape, where a mistake in what it is held against would show."""
    for case in norm_cases.cases():
        built = norm_cases.Built(case, "cpu", torch.float32, small=True)
        if case.masked:  # torch's operations must not read what is left out either
            built.inputs[0] = torch.where(built.mask, built.inputs[0].detach(), 0.0).requires_grad_()
        theirs = built.step(case.theirs)
        assert norm_cases.error_of(theirs, built.truth(), 10 * norm_cases.ALLOWED[torch.float32]) <= 1, case.name


# Of torch.compile's own look at a tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("cell", recurrent_cases.CELLS)
def test_compiled_cells_are_the_layers(cell: str) -> None:
    built = recurrent_cases.Built(recurrent_cases.Case(cell, (5, 3, 4, 6), "float32"), "cpu", torch.float32)
    loop = recurrent_cases.CompiledCell(built.layer, cell, "eager")
    assert built.error(built.step(loop), built.truth()) <= 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("phase", ["correct", "recurrent", "norms"])
def test_a_case_of_each_phase_is_built_ahead(phase: str) -> None:
    last = {"correct": 0, "recurrent": 2, "norms": 2}[phase]
    assert build.make((phase, last), dry=True) == ""
    assert (phase, last) in build.jobs(dry=False)


def test_designs_are_refused_by_name_or_run() -> None:
    for name in recurrent_cases.designs():
        case = recurrent_cases.Case("LSTM", (2, 2, 3, 8), "float32")
        outcome = correct.outcome(correct.Proof(case, "float32", name), DRY)
        assert outcome["error"] <= 1
        assert name != "stepwise" or "refused" not in outcome


def test_a_barrier_that_lets_some_through_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import kernels

    class Nothing:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kernels, "barriers", Nothing())
    probe = next(p for p in device.probes(dry=True) if p.name.startswith("barrier"))
    with pytest.raises(RuntimeError, match="0 arrivals at the barrier where 2 were expected"):
        device.measured(probe, DRY, 1.0)
