from __future__ import annotations

import json

import pytest

from normwise.cli.claims import numbers
from normwise.lab.claims import claims
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.verdict import Effect, Measured


@pytest.fixture
def small(monkeypatch):
    """The claim ics on one net, with runs of three steps."""
    module = __import__("normwise.lab.claims.ics", fromlist=["NETS"])
    monkeypatch.setattr(module, "NETS", {"mlp": (0.1, 3)})


def test_exact_claims_need_no_store(normwise_command, tmp_path):
    status, out, err = normwise_command("claims", "--only", "identity,invariance", "--out", str(tmp_path / "out"))
    assert (status, err) == (0, "")
    assert "SUPPORTED  identity" in out
    assert "+ 18 of 18 computed parts hold" in out
    assert out.endswith("2 claims here: 2 supported, 0 contradicted, 0 undecided, 0 cannot tell.\n")
    assert not (tmp_path / "out").exists()
    assert max(map(len, out.splitlines())) <= 80


def test_a_claim_is_trained_stored_and_judged(normwise_command, tmp_path, small):
    arguments = ("claims", "--only", "ics", "--jobs", "1", "--out", str(tmp_path))
    status, out, err = normwise_command(*arguments, "--seeds", "2")
    assert status == 0
    assert "4/4" in err
    assert "UNDECIDED  ics" in out
    assert "2 of the 3 seeds that a verdict needs; more seeds" in " ".join(out.split())
    assert "4 runs" in out
    assert "Source: Santurkar et al. 2018" in out
    assert max(map(len, out.splitlines())) <= 80
    _, out, err = normwise_command(*arguments, "--quick")
    assert "6/6" in err  # two seeds were there
    assert "over 3 seeds, 95%" in out


def test_json_has_everything(normwise_command, tmp_path, small):
    arguments = ("claims", "--only", "ics,bn-count", "--jobs", "1", "--out", str(tmp_path), "--seeds", "1", "--json")
    found = json.loads(normwise_command(*arguments).out)
    exact, ran = found["claims"]
    assert found["seeds"] == 1
    assert (exact["id"], exact["kind"], exact["verdict"], exact["runs"]) == ("bn-count", "exact", "supported", [])
    assert (ran["id"], ran["runs_wanted"], ran["runs_found"], len(ran["runs"])) == ("ics", 2, 2, 2)
    assert {"what", "unit", "minimum", "mean", "interval_95", "by_seed", "runs", "would_decide"} <= set(ran["parts"][0])
    with Store(tmp_path / "runs.sqlite") as store:
        assert store.keys() == set(ran["runs"])


def test_stored_runs_are_judged_and_nothing_is_trained(normwise_command, tmp_path, small):
    specs = claims()["ics"].needs(1)
    with Store(tmp_path / "runs.sqlite") as store:
        sweep(specs[:1], store, jobs=1, finished=lambda *_: None)
    status, out, err = normwise_command("claims", "--only", "ics", "--stored", "--seeds", "1", "--out", str(tmp_path))
    assert (status, err) == (0, "")
    assert "1 run of 2 that the rule asks for" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cnn,ice"], "unknown claim 'ice'; did you mean ics?"),
        (["--only", ""], "unknown claim ''"),
        (["--seeds", "0"], "--seeds"),
        (["--quick", "--seeds", "5"], "--quick is --seeds 3"),
        (["--stored"], "no such store"),
    ],
)
def test_bad_arguments_exit_2_and_make_nothing(normwise_command, tmp_path, arguments, message):
    status, out, err = normwise_command("claims", *arguments, "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_difference_of_rounding_is_shown_as_0():
    part = Effect("accuracy", "points", 0.5, Measured({0: 0.1 + 0.2 - 0.3, 1: 1.0, 2: -1.0}), headroom="none")
    assert numbers(part).startswith("0 ± 1 points over 3 seeds")
