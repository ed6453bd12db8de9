"""Silencing by code and layer, in the call and in pyproject.toml."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normwise.diagnosis import Diagnosis, DiagnosisError, diagnose, silence


def found(**arguments: object) -> Diagnosis:
    torch.manual_seed(0)
    net = nn.Sequential()
    for part in ("encoder", "decoder"):
        net.add_module(part, nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.99)))
    net.add_module("head", nn.Linear(6, 3))
    batches = [(torch.randn(32, 6), torch.randint(3, (32,)))]
    return diagnose(net, batches, loss=nn.functional.cross_entropy, **arguments)


def places(findings: list) -> set[str]:
    return {f"{finding.code}:{finding.layer}" for finding in findings}


ALL = {"NW005:encoder.0", "NW005:decoder.0", "NW006:encoder.1", "NW006:decoder.1"}


@pytest.mark.parametrize(
    ("ignore", "silenced"),
    [
        ([], set()),
        (["NW005"], {"NW005:encoder.0", "NW005:decoder.0"}),
        (["NW005:encoder.*"], {"NW005:encoder.0"}),
        (["NW006:decoder.1", "NW005:*.0"], {"NW006:decoder.1", "NW005:encoder.0", "NW005:decoder.0"}),
        (["NW001", "NW005:head"], set()),
    ],
)
def test_in_the_call(ignore, silenced):
    diagnosis = found(ignore=ignore)
    assert places(diagnosis.silenced) == silenced
    assert places(diagnosis.findings) == ALL - silenced


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("NW005", "ignore must be a list such as"),
        (["NW5"], "unknown code 'NW5': did you mean 'NW0"),
        (["nw005"], "did you mean 'NW005'"),
        ([5], "must hold strings"),
    ],
)
def test_what_is_not_understood_is_refused(ignore, message):
    with pytest.raises(DiagnosisError, match=message):
        found(ignore=ignore)


def test_in_pyproject(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.normwise.diagnose]\nignore = ["NW005:encoder.*"]\n')
    below = tmp_path / "src" / "nets"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert places(found(ignore=["NW006"]).silenced) == {"NW005:encoder.0", "NW006:encoder.1", "NW006:decoder.1"}
    assert places(found(use_pyproject=False).silenced) == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.normwise.diagnose]\nignored = []\n", "unknown key 'ignored'"),
        ('[tool.normwise.diagnose]\nignore = ["NW099"]\n', "pyproject.toml: ignore names the unknown code 'NW099'"),
        ("[tool.normwise.diagnose]\nignore = [\n", "no valid TOML"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, monkeypatch, text, message):
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiagnosisError, match=message):
        found()


def test_without_a_reader_of_toml(tmp_path, monkeypatch):
    """Python 3.10 has none: where the table is there, that is said; where it is not, nobody is bothered."""
    monkeypatch.setattr(silence, "_toml", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert places(found().findings) == ALL
    (tmp_path / "pyproject.toml").write_text('[tool.normwise.diagnose]\nignore = ["NW005"]\n')
    with pytest.raises(DiagnosisError, match=r"before 3.11 cannot read TOML: pip install tomli"):
        found()


def test_a_pattern_that_means_no_layer_is_said():
    (note,) = found(ignore=["NW006:decodr.1", "NW005:head", "NW001", "NW005:*.0"]).notes
    assert note == "ignore=NW006:decodr.1 silences nothing, since no layer has such a name: did you mean 'decoder.1'?"


def test_a_projects_patterns_may_be_meant_for_another_model(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.normwise.diagnose]\nignore = ["NW005:generator.*"]\n')
    monkeypatch.chdir(tmp_path)
    assert found().notes == []
