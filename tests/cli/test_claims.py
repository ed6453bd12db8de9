from __future__ import annotations

import json

import pytest

from normwise.cli.claims_text import agreement, numbers
from normwise.lab.claim import judge
from normwise.lab.claims import claims
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.verdict import Effect, Measured


@pytest.fixture
def small(monkeypatch):
    """The claim ics on one net, with runs of three steps, whose cost no record tells."""
    module = __import__("normwise.lab.claims.ics", fromlist=["NETS"])
    monkeypatch.setattr(module, "NETS", {"mlp": (0.1, 3)})
    monkeypatch.setattr("normwise.lab.cost.recorded", dict)


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
    assert {
        "what",
        "unit",
        "minimum",
        "mean",
        "interval",
        "confidence",
        "headroom",
        "no_ceiling",
        "power",
        "reason",
        "by_seed",
        "runs",
        "would_decide",
    } <= set(ran["parts"][0])
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
        (["--stored"], "no such store; `normwise claims --out"),
        (["--decide", "--seeds", "5"], "--decide looks at 5, 10, 20, 40 and 80 seeds"),
        (["--decide", "--quick"], "--decide looks at 5, 10, 20, 40 and 80 seeds"),
        (["--minutes", "0"], "0.0 is not a positive number of minutes"),
        (["--minutes", "nan"], "nan is not a positive number of minutes"),
        (["--stored", "--minutes", "3"], "--stored trains nothing"),
        (["--first-seed", "-1"], "--first-seed"),
        (["--against", "nowhere.json"], "nowhere.json"),
        (["--against", __file__], "test_claims.py is no record of claims"),
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


def test_without_only_what_does_not_fit_is_listed_with_cost_and_recorded_verdict(
    normwise_command, tmp_path, small, monkeypatch
):
    few = {name: claims()[name] for name in ("identity", "ics", "cnn")}
    monkeypatch.setattr("normwise.lab.claims.claims", lambda: few)
    record = {
        "ics": {"verdict": "contradicted", "seeds": 5, "seconds_a_seed": 0.1},
        "cnn": {"verdict": "undecided", "seeds": 7, "seconds_a_seed": 120.0},
    }
    monkeypatch.setattr("normwise.lab.cost.recorded", lambda: record)
    arguments = ("claims", "--seeds", "2", "--minutes", "1", "--jobs", "1", "--out", str(tmp_path))
    status, out, err = normwise_command(*arguments)
    assert status == 0
    assert "4/4" in err
    assert "UNDECIDED  ics" in out
    assert out.endswith(
        "  cnn: 4 minutes; undecided (7 seeds)\n    In conv nets at a good batch size BatchNorm beats LayerNorm, and "
        "LayerNorm\n    beats none.\n"
    )
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(normwise_command(*arguments, "--json").out)
    assert [claim["id"] for claim in found["claims"]] == ["identity", "ics"]
    assert found["not_run"] == {"cnn": {"seconds": 240.0, "recorded": record["cnn"]}}
    assert 0 < found["claims"][1]["seconds_a_seed"] < 60


def test_decide_adds_seeds_resumes_and_compares_with_other_seeds(normwise_command, tmp_path, small):
    arguments = ("claims", "--only", "ics", "--decide", "--jobs", "1", "--out", str(tmp_path / "one"))
    status, out, err = normwise_command(*arguments, "--minutes", "0.0001")
    assert (status, err) == (0, "")  # not even five seeds fit
    assert "ics (undecided after 0 seeds): 5 seeds may decide it, for " in " ".join(out.split())
    record = tmp_path / "one.json"
    record.write_text(normwise_command(*arguments, "--minutes", "0.3", "--json").out)
    (found,) = json.loads(record.read_text())["claims"]
    assert found["seeds"] in (5, 10, 20, 40, 80)
    assert {part["confidence"] for part in found["parts"]} == {0.988}
    with Store(tmp_path / "one" / "runs.sqlite") as store:
        assert len(store.keys()) >= 2 * found["seeds"]
    stored = json.loads(normwise_command(*arguments, "--stored", "--json").out)
    assert stored["claims"] == [found]
    out = normwise_command(
        "claims", "--only", "ics,identity", "--seeds", "1", "--first-seed", "50", "--jobs", "1", "--out",
        str(tmp_path / "two"), "--against", str(record)
    ).out  # fmt: skip
    assert f"ics               undecided     {found['verdict']:<14}open" in out
    assert "identity          supported     absent        open" in out
    with Store(tmp_path / "two" / "runs.sqlite") as store:
        assert {run.identity["seed"] for run in store.index()} == {50}


def test_verdicts_that_are_decided_twice_must_agree():
    judged = [judge(claims()[name], (), 1) for name in ("bn-count", "identity", "padding")]
    other = {
        "bn-count": {"verdict": "supported"},
        "identity": {"verdict": "contradicted"},
        "padding": {"verdict": "undecided"},
    }
    lines = agreement(judged, other).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["agree", "DIFFER", "open"]
    assert lines[4] == "1 agree, 1 DIFFER, 1 open"
