"""docs/claims.md is what the command makes of docs/claims.json."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from normwise.lab.claims import claims
from normwise.lab.cost import read_record
from normwise.lab.errors import LabError
from normwise.lab.verdict import VERDICTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = {verdict: verdict for verdict in VERDICTS}
CHINESE = dict(zip(("支持", "否定", "未定", "无法判断"), VERDICTS, strict=True))


@pytest.fixture
def script(tmp_path):
    """The command, on a copy of docs/."""
    found = importlib.util.spec_from_file_location("make_claims_page", ROOT / "scripts" / "make_claims_page.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.DOCS = tmp_path
    for name in ("claims.json", "claims.md"):
        (tmp_path / name).write_bytes((ROOT / "docs" / name).read_bytes())
    return module


def test_the_page_is_what_the_command_makes(script, tmp_path):
    page = (tmp_path / "claims.md").read_text("utf-8")
    (tmp_path / "claims.md").write_text(page.replace("supported", "unsupported", 1).replace("| supported |", "| ? |"))
    script.main([])
    made = (tmp_path / "claims.md").read_text("utf-8")
    start = page.index(script.BEGIN)
    assert made[made.index(script.BEGIN) :] == page[start:]
    assert (tmp_path / "claims.json").read_text("utf-8") == (ROOT / "docs" / "claims.json").read_text("utf-8")
    assert (tmp_path / "claims.json").stat().st_size < script.MOST_BYTES


def test_the_record_is_of_today_s_claims():
    for name, found in read_record(ROOT / "docs" / "claims.json").items():
        assert (found["sentence"], found["source"]) == (claims()[name].sentence, claims()[name].source)


def test_results_replace_those_of_the_same_claims_and_leave_the_others(script, tmp_path):
    before = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    new = {
        "id": "cnn", "verdict": "cannot tell", "reason": "no room", "sentence": "S.", "source": "T.", "kind": "run",
        "seeds": 9, "first_seed": 0, "seconds_a_seed": 1.23456, "runs": ["a" * 64], "runs_found": 4, "runs_wanted": 4,
        "parts": [
            {"what": "x", "verdict": "cannot tell", "unit": "points", "minimum": 1, "mean": 0.123456,
             "interval": [0.0, 0.2], "confidence": 0.95, "headroom": 0.5, "no_ceiling": "", "power": 0.9,
             "reason": "no room", "seeds_needed": None, "would_decide": "", "by_seed": {"0": 1.0}}
        ],
    }  # fmt: skip
    absent = {**new, "id": "rnn", "runs_found": 0}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"made_with": {"torch": "9"}, "claims": [new, absent]}))
    script.main([str(results)])
    after = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    found = {claim["id"]: claim for claim in after["claims"]}
    assert (found["cnn"]["verdict"], found["cnn"]["seconds_a_seed"]) == ("cannot tell", 1.235)
    assert "runs" not in found["cnn"]
    assert "by_seed" not in found["cnn"]["parts"][0]
    others = [claim for claim in before["claims"] if claim["id"] != "cnn"]
    assert [found[claim["id"]] for claim in others] == others
    assert "| [`cnn`](#cnn) | cannot tell | 9 | 1 | x: 0.12 points (0 to 0.2), at least 1 |" in (
        tmp_path / "claims.md"
    ).read_text("utf-8")


def test_independent_runs_are_set_beside_the_record(script, tmp_path):
    def part(what, verdict, mean):
        numbers = {"minimum": 1, "mean": mean, "interval": [mean, mean], "confidence": 0.95, "headroom": 9.0}
        texts = {"what": what, "verdict": verdict, "unit": "points", "no_ceiling": "", "reason": "", "would_decide": ""}
        return {**texts, **numbers, "power": 0.9, "seeds_needed": None}

    def runs(first_seed, *verdicts):
        parts = [part("x", verdicts[1], 1.5), part("y", verdicts[2], 0.5)]
        claim = {"id": "cnn", "verdict": verdicts[0], "reason": "", "sentence": "S.", "source": "T.", "kind": "run",
                 "seeds": 5, "first_seed": first_seed, "seconds_a_seed": 1.0, "runs_found": 4, "runs_wanted": 4,
                 "parts": parts}  # fmt: skip
        results = tmp_path / "results.json"
        results.write_text(json.dumps({"made_with": {"torch": "9"}, "claims": [claim]}))
        return str(results)

    def compared():
        text = (tmp_path / "claims.md").read_text("utf-8")
        return text[text.index(script.BEGIN_TWICE) : text.index(script.END_TWICE)]

    record = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    (tmp_path / "claims.json").write_text(json.dumps({**record, "again": []}))
    script.main([runs(0, "contradicted", "supported", "contradicted")])
    with pytest.raises(SystemExit, match=r"cnn\. Give --first-seed"):
        script.main(["--again", runs(4, "supported", "supported", "supported")])
    script.main(["--again", runs(1000, "supported", "supported", "supported")])
    assert "1 trained claims ran twice: 1 differ; of their parts 1 agree, 1 differ." in compared()
    assert "| `cnn` | contradicted, seeds 0-4 | supported, seeds 1000-1004 | differ | 1 agree, 1 differ |" in compared()
    assert "| y | 0.5 points (0.5 to 0.5), at least 1: contradicted | 0.5 points (0.5 to 0.5), at least 1" in compared()
    script.main(["--again", runs(1000, "undecided", "supported", "undecided")])
    assert "| open | 1 agree, 1 open |" in compared()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"claims": [{"id": "cnn"}]}', '{"claims": 3}', "\xff"])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "claims.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LabError, match=r"claims.json is no record of claims: expected the JSON that `normwise claims"):
        read_record(path)


@pytest.mark.parametrize(("page", "words"), [("tutorial/index.md", ENGLISH), ("zh/tutorial.md", CHINESE)])
def test_the_tutorial_quotes_the_verdicts_on_record(page, words):
    record = {claim["id"]: claim["verdict"] for claim in json.loads((DOCS / "claims.json").read_text())["claims"]}
    quoted = re.findall(
        r"\[`([\w-]+)`\]\(\.\./claims\.md#\1\)[:\uff1a] ?([\w ]+)", (DOCS / page).read_text(encoding="utf-8")
    )
    assert len(quoted) > 10
    assert [(claim, words[verdict.strip()]) for claim, verdict in quoted] == [(c, record[c]) for c, _ in quoted]
