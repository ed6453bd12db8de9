"""One HTML page out of scored rows: tables, curves and the rules behind them. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

import normwise
from normwise.lab.figures import Figure, colour, figures
from normwise.lab.figures_over_time import over_time
from normwise.lab.norms import NORMS
from normwise.lab.score import Row, parts_of
from normwise.lab.tasks import Task


@dataclass(frozen=True)
class Section:
    """One task's part of the page."""

    name: str
    summary: str
    facts: list[str]
    in_short: list[tuple[int, str]]
    sizes: list[int]
    norms: list[str]
    cells: dict[tuple[str, int], Row]
    parts: list[str]
    figures: list[Figure]

    @property
    def part_columns(self) -> list[tuple[str, str, int]]:
        """Of the table of all numbers, those on parts of the held-out cases: name, format, scale."""
        return [(f"accuracy/{part}", "%.1f%%", 100) for part in self.parts]


def write_report(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> Path:
    """Write the page for the ``rows`` of ``tasks`` and return its path."""
    environment = Environment(
        loader=PackageLoader("normwise.lab", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        sections=[section(task, [row for row in rows if row.task == task.name]) for task in tasks],
        norms={name: text for name, text in NORMS.items() if any(row.norm == name for row in rows)},
        colour=colour,
        plotly=get_plotlyjs(),
        made_with=made_with(rows),
    )
    path.write_text(page, encoding="utf-8")
    return path


def section(task: Task, rows: Sequence[Row]) -> Section:
    """What the page says about one task."""
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    return Section(
        name=task.name,
        summary=task.summary,
        facts=facts(task, rows),
        in_short=[(size, verdict([row for row in rows if row.batch_size == size])) for size in sizes],
        sizes=sizes,
        norms=list(dict.fromkeys(row.norm for row in rows)),
        cells={(row.norm, row.batch_size): row for row in rows},
        parts=parts_of(rows),
        figures=[*figures(rows), *over_time(rows)],
    )


def facts(task: Task, rows: Sequence[Row]) -> list[str]:
    """How much was run, and with which hyperparameters."""
    steps = sorted({run.identity["steps"] for row in rows for run in row.runs})
    seeds = max(len(row.seeds) for row in rows)
    train, held_out = task.cases
    return [
        f"{len(train):,} cases to train on, {len(held_out):,} held out",
        *(f"{number} steps at every batch size" for number in steps),
        *([f"{seeds} seed{'s' * (seeds != 1)}"] if seeds else []),
        *(f"{name.replace('_', ' ')} {value}" for name, value in task.settings.items()),
    ]


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on which norm to use at one batch size."""
    accuracy = {row.norm: f"{100 * row.stats['accuracy'].mean:.1f}%" for row in rows if row.stats}
    marked = [row for row in rows if row.mark]
    marked.sort(key=lambda row: -row.stats["accuracy"].mean)
    behind = [row for row in rows if row.stats and not row.mark]
    if not accuracy:
        return "no norm finished."
    if not marked:
        return "one seed or one norm: no spread to tell norms apart by."
    named = ", ".join(f"{row.norm} {accuracy[row.norm]}" for row in marked)
    if marked[0].mark == "best":
        return f"{named} is best."
    if not behind:
        return f"all that finished tie ({named})."
    return f"{named} tie."


def made_with(rows: Sequence[Row]) -> str:
    """Versions and machines, for the foot of the page."""
    runs = [run for row in rows for run in row.runs]
    torches = sorted({run.identity["torch"] for run in runs})
    machines = sorted({run.machine for run in runs})
    return "; ".join([f"normwise {normwise.__version__}", *(f"torch {version}" for version in torches), *machines])
