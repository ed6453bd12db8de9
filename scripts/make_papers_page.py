"""Writes the tables of docs/papers.md, from docs/papers.json, and draws its pictures.

    normwise reproduce bn-mnist --data MNIST --seeds 5 --out papers
    python scripts/make_papers_page.py papers     # takes what papers/runs.sqlite has of papers, then writes the page
    python scripts/make_papers_page.py            # writes the page from docs/papers.json as it is

Of each paper, norm and batch size the longest training counts; what a paper had before is replaced. Pictures are drawn
where a store is given: docs/images/PAPER-1.png and so on, in the order of the paper's page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import vl_convert

from normwise.lab.figures import Figure
from normwise.lab.figures_of_papers import of_paper
from normwise.lab.pictures import SCALE, light, together
from normwise.lab.score import Row, score
from normwise.lab.store import Run, Store
from normwise.lab.tasks import PAPERS, Task

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = "| Norm | Batch | Steps (epochs) | Seeds | Test errors, % | Test loss | Training loss | Hours |"
STATS = ("accuracy", "loss", "train_loss")
BEGIN, END = "<!-- {} by scripts/make_papers_page.py -->", "<!-- end of {} -->"


def longest(runs: Sequence[Run], paper: str) -> list[str]:
    """The keys of the runs of a paper that trained longest, of each norm and batch size."""
    mine = [run for run in runs if run.identity["task"] == paper]
    most: dict[tuple[str, int], int] = {}
    for run in mine:
        most[_arm(run)] = max(most.get(_arm(run), 0), run.identity["steps"])
    return [run.key for run in mine if run.identity["steps"] == most[_arm(run)]]


def _place(task: type[Task], row: Row) -> tuple[int, int]:
    """Where the paper's task lists a row."""
    return task.batch_sizes.index(row.batch_size), task.norms.index(row.norm)


def _arm(run: Run) -> tuple[str, int]:
    return run.identity["norm"], run.identity["batch_size"]


def as_record(row: Row) -> dict[str, Any]:
    """What the page says of one norm at one batch size. Hours are those of the steps, without the looks between."""
    steps = row.runs[0].identity["steps"]
    a_step = fmean(fmean(run.series["time/step"].values) for run in row.runs)
    return {
        "norm": row.norm,
        "batch_size": row.batch_size,
        "steps": steps,
        "epochs": short(steps * row.batch_size / row.runs[0].series["train/cases"].values[0]),
        "seeds": len(row.seeds),
        "status": row.status,
        **{name: [short(value) for value in row.stats[name].values] for name in STATS if name in row.stats},
        "hours": short(steps * a_step / 3600),
    }


def short(value: float) -> float:
    return float(f"{value:.5g}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
    for row in rows:
        about = [row["norm"], row["batch_size"], f"{row['steps']:,} ({row['epochs']:.3g})", row["seeds"]]
        error = [100 * (1 - value) for value in row.get("accuracy", [])]
        found = [spoken(error, 2), spoken(row.get("loss"), 4), spoken(row.get("train_loss"), 5)]
        lines.append(f"| {' | '.join(map(str, [*about, *found, format(row['hours'], '.2g')]))} |")
    return "\n".join(lines) + "\n"


def spoken(values: Sequence[float] | None, digits: int) -> str:
    """Mean, and sample standard deviation over the seeds."""
    if not values:
        return "diverged"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def taken_in(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with what the store of a folder has of papers in the place of what there was; draws their pictures."""
    found = {}
    with Store(folder / "runs.sqlite", make=False) as store:
        index = store.index()
        for paper in PAPERS:
            if keys := longest(index, paper):
                rows = sorted(score(store.runs(keys)), key=partial(_place, PAPERS[paper]))
                found[paper] = [as_record(row) for row in rows]
                for number, figure in enumerate(of_paper(rows), start=1):
                    draw(figure, DOCS / "images" / f"{paper}-{number}.png")
    if not found:
        sys.exit(f"{folder}/runs.sqlite has no run of {', '.join(PAPERS)}")
    return {**record, **found}


def draw(figure: Figure, path: Path) -> None:
    path.write_bytes(vl_convert.vegalite_to_png(light(together(figure)), scale=SCALE))
    print(f"{path}: {figure.title}")


def page(record: dict[str, Any], before: str) -> str:
    """The page with what stands between the marks of each paper made anew."""
    for paper, rows in record.items():
        begin, end = BEGIN.format(paper), END.format(paper)
        head, _, rest = before.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            sys.exit(f"docs/papers.md lacks the marks {begin} and {end}")
        before = f"{head}{begin}\n\n{table(rows)}\n{end}{tail}"
    return before


def main(folders: Sequence[str]) -> None:
    stored, text = DOCS / "papers.json", DOCS / "papers.md"
    record = json.loads(stored.read_text("utf-8")) if stored.exists() else {}
    for folder in folders:
        record = taken_in(record, Path(folder))
    stored.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    text.write_text(page(record, text.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
