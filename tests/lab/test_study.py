from __future__ import annotations

import dataclasses

import pytest

from normwise.lab.claims import claims
from normwise.lab.errors import LabError
from normwise.lab.store import Store
from normwise.lab.study import study
from support.made_up_runs import made_up


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "runs.sqlite") as opened:
        yield opened


def add(store, runs):
    for run in runs:
        store.add(run.key, run.identity, run)


def cnn(seeds, **changes):
    found = made_up(claims()["cnn"], seeds, lambda spec, draws: {"final/accuracy": [0.9]})
    return [dataclasses.replace(r, key=f"{r.key}{changes}", identity={**r.identity, **changes}) for r in found]


def test_rows_tasks_and_claims_of_a_store(store):
    add(store, cnn(3))
    found = study(store)
    assert [(row.task, row.batch_size, row.norm) for row in found.rows] == [
        ("cnn", 64, norm) for norm in ("none", "batch", "layer")
    ]
    assert found.tasks["cnn"].name == "cnn"
    assert found.left_out == 0
    assert found.notes == {}
    assert {one.claim.id: one.found for one in found.judged}["cnn"] == 18
    assert len(found.judged) == len(claims())


def test_the_newest_version_counts_and_what_is_left_out_is_said(store):
    add(store, cnn(3, torch="1.0"))
    add(store, cnn(1))
    found = study(store)
    assert {run.identity["torch"] for row in found.rows for run in row.runs} != {"1.0"}
    assert found.left_out == 18
    assert {one.claim.id: one.found for one in found.judged}["cnn"] == 6
    (note,) = found.notes["cnn"]
    assert note == (
        "Version 2 of 2 is drawn, the newest, with 6 runs; 18 runs of the other are left out. They differ in torch's "
        "version; `normwise runs list` numbers them."
    )
    (again,) = cnn(2, torch="1.0", steps=151)[-1:]
    add(store, [again])
    found = study(store)
    assert {run.identity["torch"] for row in found.rows for run in row.runs} == {"1.0"}
    assert found.notes["cnn"][0].startswith(
        "Version 1 of 2 is drawn, the newest, with 19 runs; 6 runs of the other are"
    )
    assert found.notes["cnn"][1:] == [
        "1 run is left out: training was longer or shorter than in most runs of the same batch size."
    ]
    add(store, cnn(1, torch="3.0")[:1])
    assert "Version 3 of 3 is drawn, the newest, with 1 run; 25 runs of the others" in study(store).notes["cnn"][0]


def test_figures_show_one_length_and_claims_are_judged_by_all(store):
    add(store, cnn(3))
    add(store, cnn(2, steps=100))
    add(store, [run for run in made_up(claims()["ics"], 2, lambda spec, draws: {}) if run.identity["task"] == "mlp"])
    found = study(store)
    assert {run.identity["steps"] for row in found.rows if row.task == "cnn" for run in row.runs} == {150}
    assert list(found.tasks) == ["mlp", "cnn"]
    # of mlp both norms and seeds; of cnn, which shares these runs with another claim, both norms and three seeds
    assert {one.claim.id: one.found for one in found.judged}["ics"] == 10
    assert found.left_out == 12


def test_a_task_that_is_not_built_in_has_no_code(store):
    add(store, cnn(2, task="mine"))
    assert study(store).tasks == {"mine": None}


def test_a_built_in_task_with_other_settings_is_not_taken_for_the_one_at_hand(store):
    add(store, cnn(2, settings={"width": 99}))
    assert study(store).tasks == {"cnn": None}


def test_some_tasks_alone_come_without_claims_and_the_others_are_not_counted(store):
    add(store, cnn(2))
    add(store, cnn(1, task="mine"))
    add(store, cnn(1, task="mine", steps=100))
    found = study(store, ["mine"])
    assert list(found.tasks) == ["mine"]
    assert {row.task for row in found.rows} == {"mine"}
    assert found.judged == []
    assert found.left_out == 6
    with pytest.raises(LabError, match=r"'mlp'.*cnn"):
        study(store, ["mine", "mlp"])


def test_an_empty_store_is_an_error_with_the_cure(store):
    with pytest.raises(LabError, match=r"has no runs yet; `normwise claims --out"):
        study(store)
