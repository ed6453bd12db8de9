"""The CSV logger's files; and what is said where a library is missing."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise
from normwise import integrations
from normwise.diagnosis import DiagnosisError
from normwise.integrations import CSVLogger, TensorBoardLogger, WandbLogger


def looked_at(logger: object, steps: int = 0) -> normwise.diagnosis.Look:
    """One step of a net with a finding."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.99), nn.Tanh())
    with normwise.Monitor(model, logger, every=1, steps=steps) as monitor:
        model(torch.randn(20, 6)).square().sum().backward()
        return monitor.step()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_files_have_every_number_and_finding(tmp_path):
    with CSVLogger(tmp_path / "run" / "1") as logger:
        looks = [looked_at(logger, step) for step in (0, 7)]
    found = rows(tmp_path / "run" / "1" / "scalars.csv")
    expected = [(str(look.step), tag, value) for look in looks for tag, value in look.scalars.items()]
    assert [(row["step"], row["tag"], float(row["value"])) for row in found] == expected
    assert "normwise/1/running/distance" in {row["tag"] for row in found}
    findings = rows(tmp_path / "run" / "1" / "findings.csv")
    assert [(row["step"], row["code"], row["layer"]) for row in findings] == [("0", "NW006", "1"), ("7", "NW006", "1")]
    assert findings[0]["cure"] == looks[0].findings[0].cure


def test_an_earlier_run_is_not_written_over(tmp_path):
    looked_at(CSVLogger(tmp_path))
    with pytest.raises(FileExistsError, match=r"scalars\.csv and findings\.csv of an earlier run: .*append=True"):
        CSVLogger(tmp_path)
    before = rows(tmp_path / "scalars.csv")
    looked_at(CSVLogger(tmp_path, append=True), 5)
    after = rows(tmp_path / "scalars.csv")
    assert after[: len(before)] == before
    assert {row["step"] for row in after[len(before) :]} == {"5"}
    (tmp_path / "scalars.csv").write_text("epoch,loss\n")
    with pytest.raises(ValueError, match=r"has the columns epoch, loss, but step, tag, value are written"):
        CSVLogger(tmp_path, append=True)


def test_several_loggers_at_once(tmp_path):
    class Scalars:
        def __init__(self) -> None:
            self.tags: list[str] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags.append(tag)

    scalars = Scalars()
    look = looked_at([scalars, CSVLogger(tmp_path)])
    assert scalars.tags == list(look.scalars) == [row["tag"] for row in rows(tmp_path / "scalars.csv")]
    with pytest.raises(DiagnosisError, match=r"or log\(look\).*but got int: .*CSVLogger"):
        looked_at([scalars, 3])


@pytest.mark.parametrize(
    ("make", "library", "extra"),
    [
        (lambda: TensorBoardLogger("runs"), "tensorboard", "tensorboard"),
        (lambda: WandbLogger(), "wandb", "wandb"),
        (lambda: integrations.LightningMonitor, "lightning", "lightning"),
        (lambda: integrations.TransformersMonitor, "transformers", "models"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, make, library, extra):
    for name in ("torch.utils.tensorboard", "normwise.integrations.lightning", "normwise.integrations.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {library}, which is not installed: .*normwise\[{extra}\]'"):
        make()


def test_a_library_that_lacks_something_itself_says_so(monkeypatch, tmp_path):
    """That error is not ours to explain."""
    (tmp_path / "wandb.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'a_module_that_is_nowhere'$"):
        WandbLogger()


def test_neither_a_folder_nor_a_writer():
    with pytest.raises(TypeError, match=r"takes a folder or a SummaryWriter, but got int"):
        TensorBoardLogger(3)


def test_the_room_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import normwise.integrations; print(*set(sys.modules) - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = {name.partition(".")[0] for name in ran.stdout.split()} - sys.stdlib_module_names
    assert not outside & {"lightning", "transformers", "wandb", "tensorboard"}


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'KerasMonitor'"):
        integrations.KerasMonitor  # noqa: B018
    assert {"LightningMonitor", "TransformersMonitor"} <= set(dir(integrations))
