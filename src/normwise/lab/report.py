"""One HTML page out of judged claims and scored rows: verdicts, tables, curves, the rules behind them. It needs no
network, and what it shows is there before any script runs."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import normwise
from normwise.lab import user_file
from normwise.lab.chart import CONFIG, library, template
from normwise.lab.claim import Judged
from normwise.lab.errors import LabError
from normwise.lab.figures import IN_BRIEF, POINTS_IN_BRIEF, Figure, figures, sizes_of
from normwise.lab.figures_of_papers import of_paper
from normwise.lab.figures_over_time import over_time
from normwise.lab.norms import NORMS
from normwise.lab.plot import colour
from normwise.lab.plot_effect import effect_svg
from normwise.lab.plot_heat import heat_map
from normwise.lab.score import BITS, Row, parts_of
from normwise.lab.strict_json import to_json
from normwise.lab.tasks import BUILT_IN, CLAIM_TASKS, PAPERS, TEXTS, VARIANTS, Task
from normwise.lab.verdict import Check
from normwise.words import counted

MOST_TABS = 8
"""Of a page. With more, the tasks that only claims need share one tab, in brief."""

FAINTEST, STRONGEST = 6, 52  # per cent of the heat map's colour behind the lowest and the highest number


@dataclass(frozen=True)
class Cell:
    """A square of the heat map; ``heat`` is how much of its colour it gets, in per cent."""

    row: Row
    heat: float


@dataclass(frozen=True)
class Section:
    """One task's part of the page."""

    name: str
    summary: str
    facts: list[str]
    in_short: list[tuple[int, str]]
    sizes: list[int]
    norms: list[str]
    cells: dict[tuple[str, int], Cell]
    parts: list[str]
    figures: list[Figure]
    settings: list[tuple[str, str]]
    commands: list[tuple[Row, float, str]]
    left_out: tuple[str, ...] = ()
    """The titles of figures that it has and that are not drawn."""
    claims: tuple[str, ...] = ()
    """The ids of the claims that its runs decide."""
    notes: tuple[str, ...] = ()
    """Sentences on its runs that are stored and not drawn."""

    @property
    def criterion(self) -> str:
        """What decides between norms."""
        found = {cell.row.criterion for cell in self.cells.values() if cell.row.stats}
        return "bits per character" if found == {BITS} else "accuracy"

    @property
    def anchor(self) -> str:
        """The name as an element's id and part of a file's name."""
        return anchor(self.name)

    @property
    def own(self) -> bool:
        """A task of the user's: the page opens on it, and otherwise on the claims if runs here decided any."""
        return self.name not in BUILT_IN and self.name not in PAPERS

    @property
    def heat_map(self) -> dict[str, Any]:
        """The table of numbers as a chart, for files."""

        def text(row: Row) -> str:
            return f"{shown(row, row.merit().mean)}{unit(row)}" if row.stats else row.status

        squares = [(norm, size, cell.heat, text(cell.row)) for (norm, size), cell in self.cells.items()]
        return heat_map(f"Held-out {self.criterion}, {self.name}", squares)

    @property
    def part_columns(self) -> list[tuple[str, str, int]]:
        """Of the table of all numbers, those on parts of the held-out cases: name, format, scale."""
        return [(f"accuracy/{part}", "%.1f%%", 100) for part in self.parts]


def anchor(task: str) -> str:
    return re.sub(r"[^\w]+", "-", task)


def write_report(
    rows: Sequence[Row],
    tasks: Mapping[str, Task | None],
    path: Path,
    *,
    judged: Sequence[Judged] = (),
    references: Mapping[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    brief: bool = True,
) -> Path:
    """Write the page and return its path.

    Args:
        rows: of all tasks.
        tasks: by name, in the order of the page; None for one whose code is not at hand.
        path: the file.
        judged: the claims, for the top of the page.
        references: for a task of the user's, by its name, what it was called by: FILE.py:function. The commands say
            where that file is another one by now.
        notes: by task, sentences on the stored runs that are not among the rows.
        brief: whether tasks that only claims need may share a tab (``in_brief``).

    Raises:
        LabError: the file cannot be written; a page that was there stays.
    """
    environment = Environment(
        loader=PackageLoader("normwise.lab", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = in_brief(tasks, with_claims=bool(judged)) if brief else set()
    drawn = []
    for name, task in tasks.items():
        of_task = [row for row in rows if row.task == name]
        one = section(name, task, of_task, (references or {}).get(name), brief=name in shared)
        drawn.append(replace(one, claims=decided_by(of_task, judged), notes=tuple((notes or {}).get(name, ()))))
    page = environment.get_template("report.html.j2").render(
        sections=[one for one in drawn if one.name not in shared],
        more=[one for one in drawn if one.name in shared],
        draw_all=lambda name: shlex.join(["normwise", "report", "--out", str(path.parent), "--task", name]),
        norms={name: text for name, text in NORMS.items() if any(row.norm == name for row in rows)},
        filters=list(dict.fromkeys(norm for one in drawn for norm in one.norms)),
        judged=[one for one in judged if one.found or not one.wanted],
        decided=any(one.found for one in judged),
        not_run=[one.claim.id for one in judged if one.wanted and not one.found],
        verdicts={mark: sum(one.verdict == mark for one in judged if one.found or not one.wanted) for mark in MARKS},
        marks=MARKS,
        colour=colour,
        effect_svg=effect_svg,
        charts=to_json(drawing(drawn), compact=True).replace("<", "\\u003c"),
        library=library() if any(one.figures for one in drawn) else "",
        to_json=to_json,
        shown=shown,
        unit=unit,
        is_check=lambda part: isinstance(part, Check),
        made_with=made_with(rows),
        **{kind: (files("normwise.lab") / "templates" / f"report.{kind}").read_text("utf-8") for kind in ("css", "js")},
    )
    _write_whole(path, page)
    return path


def drawing(sections: Sequence[Section]) -> dict[str, Any]:
    """What the page's script draws the charts with, beside their numbers: style and templates."""
    names = {chart.template for one in sections for figure in one.figures for chart in figure.charts}
    return {"config": CONFIG, "templates": {name: template(name) for name in sorted(names)}}


def _write_whole(path: Path, text: str) -> None:
    """All of it or none: a page that is there stays until the new one is on the disk."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise LabError(
            f"{path} cannot be written ({error.strerror}): free some space, or see who may write there; the runs are "
            "kept, and `normwise report` draws them"
        ) from error


MARKS = {"supported": "✓", "contradicted": "✗", "undecided": "?", "cannot tell": "∅"}


def in_brief(tasks: Iterable[str], *, with_claims: bool) -> set[str]:
    """Which of the tasks share a tab, so that the page has ``MOST_TABS`` at most where these are what makes it more."""
    names = list(tasks)
    if len(names) + with_claims + 1 <= MOST_TABS:
        return set()
    return {name for name in names if name in CLAIM_TASKS or name in VARIANTS}


def decided_by(rows: Sequence[Row], judged: Sequence[Judged]) -> tuple[str, ...]:
    """The claims that look at runs of these rows."""
    keys = {run.key for row in rows for run in row.runs}
    return tuple(one.claim.id for one in judged if not keys.isdisjoint(one.runs))


def section(
    name: str, task: Task | None, rows: Sequence[Row], reference: str | None = None, *, brief: bool = False
) -> Section:
    """What the page says about one task; `reference` is what a user's was called by, where that is known. In brief it
    has the figures of ``IN_BRIEF`` alone, with fewer points."""
    sizes = sizes_of(rows)
    means = [row.merit().mean for row in rows if row.stats]
    drawn = [*of_paper(rows), *figures(rows), *over_time(rows)]
    left_out = tuple(figure.title for figure in drawn if figure.title not in IN_BRIEF) if brief else ()
    if brief:
        drawn = [figure for figure in figures(rows, points=POINTS_IN_BRIEF) if figure.title in IN_BRIEF]
    return Section(
        name=name,
        summary=task.summary if task else "",
        facts=facts(task, rows),
        in_short=[(size, verdict([row for row in rows if row.batch_size == size])) for size in sizes],
        sizes=sizes,
        norms=list(dict.fromkeys(row.norm for row in rows)),
        cells={(row.norm, row.batch_size): Cell(row, heat(row, means)) for row in rows},
        parts=parts_of(rows),
        figures=drawn,
        settings=settings(rows),
        commands=commands(rows, reference),
        left_out=left_out,
    )


def heat(row: Row, means: Sequence[float]) -> float:
    """Where the row lies between the task's worst and best, as per cent of the heat map's colour."""
    if not row.stats:
        return 0
    span = max(means) - min(means)
    share = (row.merit().mean - min(means)) / span if span else 1.0
    return round(FAINTEST + (STRONGEST - FAINTEST) * share)


def facts(task: Task | None, rows: Sequence[Row]) -> list[str]:
    """How much was run."""
    steps = {row.batch_size: row.runs[0].identity["steps"] for row in rows if row.runs}
    same = len(set(steps.values())) == 1
    seeds = max((len(row.seeds) for row in rows), default=0)
    return [
        *([f"{len(task.cases[0]):,} cases to train on, {len(task.cases[1]):,} held out"] if task else []),
        *([counted(next(iter(steps.values())), "step")] if same else []),
        *([] if same else [f"{counted(count, 'step')} at batch size {size}" for size, count in steps.items()]),
        *([counted(seeds, "seed")] if seeds else []),
    ]


def settings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """All that the runs have in common and that determines them, by name."""
    identities = [run.identity for row in rows for run in row.runs]
    if not identities:
        return []
    one = identities[0]
    found: dict[str, Any] = {
        **one["settings"],
        **{k: one[k] for k in ("source", "lab", "normwise", "torch", "backend")},
    }
    words = {"source": "sha256 of the task's code", "lab": "revision of the lab"}
    return [(words.get(name, name.replace("_", " ")), str(value)) for name, value in found.items()]


def commands(rows: Sequence[Row], reference: str | None = None) -> list[tuple[Row, float, str]]:
    """For each norm, batch size and learning rate the command that makes its runs again."""
    found = []
    since: dict[str, str] = {}
    for row in rows:
        for rate in row.offered:
            identity = row.runs[0].identity
            asked = ["--norms", row.norm, "--batch-sizes", str(row.batch_size)]
            words = ["normwise", *_task_words(row.task, identity, reference), *asked]
            words += [] if row.task in PAPERS else ["--lr", f"{rate:g}"]
            words += ["--steps", str(identity["steps"]), "--seeds", str(max(row.seeds) + 1)]
            backend = identity["backend"]
            prefix = "" if backend == "auto" else f"NORMWISE_BACKEND={shlex.quote(backend)} "
            source = identity["source"]
            if source not in since:
                since[source] = _since(reference, source)
            found.append((row, rate, f"{prefix}{shlex.join(words)} --out again{since[source]}"))
    return found


def _since(reference: str | None, source: str) -> str:
    """A comment behind a command whose file is another one now, or gone: it would not train these runs."""
    if reference is None:
        return ""
    path = Path(reference.rpartition(":")[0])
    if not path.is_file():
        return "  # the file is not there any more, seen from the folder where this page was made"
    if user_file.source_of(path) != source.rpartition(":")[0]:
        return "  # the file, or a module of its own, has been edited since: this trains what it is now"
    return ""


def _task_words(name: str, identity: Mapping[str, Any], reference: str | None) -> list[str]:
    """The command for a task, with a word in capitals for what only the user knows: where a file or folder is."""
    if name in PAPERS:
        return ["reproduce", name, "--data", "DIR"]
    if name not in BUILT_IN:
        return ["compare", "--task", reference or f"FILE.py:{identity['source'].rpartition(':')[2]}"]
    own_text = name in TEXTS and identity["settings"].get("data") != BUILT_IN[name]().fingerprint
    return ["compare", name, *(["--text", "FILE"] if own_text else [])]


def shown(row: Row, value: float) -> str:
    """A value of what decides between norms, as the page prints it; ``unit`` goes behind."""
    return f"{100 * value:.1f}" if row.criterion == "accuracy" else f"{value:.3f}"


def unit(row: Row) -> str:
    return "%" if row.criterion == "accuracy" else ""


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on which norm to use at one batch size."""
    means = {row.norm: f"{shown(row, row.stats[row.criterion].mean)}{unit(row)}" for row in rows if row.stats}
    marked = [row for row in rows if row.mark]
    marked.sort(key=lambda row: -row.merit().mean)
    behind = [row for row in rows if row.stats and not row.mark]
    if not means:
        return "no norm finished."
    if not marked:
        return "one seed or one norm: no spread to tell norms apart by."
    named = ", ".join(f"{row.norm} {means[row.norm]}" for row in marked)
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
