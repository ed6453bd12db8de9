"""`normwise compare`: train the same network with different norms, and show which to use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise.cli.json_output import AsJson, print_json
from normwise.cli.options import OUT, Jobs, Scheduler, Seeds, listed
from normwise.cli.status import INTERRUPTED
from normwise.cli.user_code import calling
from normwise.words import counted

if TYPE_CHECKING:
    from rich.table import Table

    from normwise.lab.score import Row
    from normwise.lab.spec import Spec
    from normwise.lab.store import Store

DEFAULT_TASKS = ("mlp", "cnn")
SEEDS = 3
QUICK_SEEDS, QUICK_STEPS = 1, 30
MARKS = {"best": "*", "tied": "=", "": " "}


def compare(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK",
            help="mlp, cnn, rnn, lstm, transformer; charlm: the three tasks on text. Default: mlp cnn.",
            show_default=False,
        ),
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,..",
            help="Norms to compare, such as none,batch,layer; an unknown one lists the task's. Default: all.",
        ),
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(metavar="N,N,..", help="Default: the task's own.")] = None,
    seeds: Seeds = SEEDS,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Training steps, one batch each. Default: the task's own.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"One seed and {QUICK_STEPS} batches, to see that it runs."),
    ] = False,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="X,X,..",
            help="Learning rates to try with every norm; the training loss decides. Default: the task's own.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py:function", help="A task of your own, beside any TASK given; see examples/custom_task.py."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What charlm reads, in UTF-8. Default: Python's own help topics."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Where runs.sqlite and report.html go.")
    ] = OUT,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    json: AsJson = False,
) -> None:
    """Train the same network with different norms, batch sizes and seeds on real data, and show which to use.

    Runs are stored in DIR/runs.sqlite and never trained twice: rerun the command to resume. The curves are in
    DIR/report.html, one file that needs no network. With no arguments: mlp and cnn at their defaults, in two to four
    minutes on two cores.
    """
    from normwise.lab.report import write_report
    from normwise.lab.score import score
    from normwise.lab.spec import expand
    from normwise.lab.store import Store
    from normwise.lab.sweep import cores
    from normwise.lab.tasks import is_own, load_task

    if quick and (seeds != SEEDS or steps is not None):
        few = f"--quick is --seeds {QUICK_SEEDS} --steps {QUICK_STEPS}: give it alone, or those"
        raise typer.BadParameter(few, param_hint="'--quick'")
    if quick:
        seeds, steps = QUICK_SEEDS, QUICK_STEPS
    names = _references(tasks or [], task or [], text)
    specs = []
    for name in names:
        with calling(name) if is_own(name) else nullcontext():
            specs += expand(
                name,
                seeds=seeds,
                norms=listed(norms, str, "--norms"),
                batch_sizes=listed(batch_sizes, int, "--batch-sizes"),
                learning_rates=listed(lr, float, "--lr"),
                steps=steps,
            )
    loaded = {name: load_task(name).task for name in names}
    own = " or ".join(filter(is_own, names))
    with Store(out / "runs.sqlite") as store, calling(own) if own else nullcontext():
        train(specs, store, jobs=jobs or cores(), scheduler=scheduler)
        rows = score(store.runs(spec.key() for spec in specs))
    report = write_report(
        rows,
        {task.name: task for task in loaded.values()},
        out / "report.html",
        references={task.name: name for name, task in loaded.items() if is_own(name)},
    )
    if json:
        print_rows(rows, store.path, report)
    else:
        print_tables(rows, store.path, report)


def _references(tasks: Sequence[str], own: Sequence[str], text: Path | None) -> list[str]:
    """What ``load_task`` takes: groups of tasks as their members, tasks on text with their file, each once."""
    from normwise.lab.tasks import GROUPS, TEXTS

    asked = [*tasks, *own] or list(DEFAULT_TASKS)
    names = dict.fromkeys(name for group in asked for name in GROUPS.get(group, (group,)))
    if text is None:
        return list(names)
    if not names.keys() & set(TEXTS):
        raise typer.BadParameter(f"only tasks on text read a file: {', '.join([*GROUPS, *TEXTS])}", param_hint="--text")
    return [f"{name}@{text.absolute()}" if name in TEXTS else name for name in names]


def train(
    specs: Sequence[Spec],
    store: Store,
    *,
    jobs: int,
    scheduler: str | None = None,
    checkpoints: Path | None = None,
    until: float | None = None,
) -> bool:
    """The sweep under a progress bar on stderr; Ctrl-C leaves with status 130.

    Past ``until`` (of ``time.monotonic``) it stops with the next run that is finished. Returns whether all were.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from normwise.lab.sweep import sweep

    console = Console(stderr=True)
    keys = [spec.key() for spec in specs]
    before = len(store.keys().intersection(keys))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs, left"),
        TimeRemainingColumn(compact=True),
        TextColumn("of"),
        TimeElapsedColumn(),
    )

    class TimeIsUp(Exception):
        pass

    def finished(*_: object) -> None:
        progress.advance(bar)
        if until is not None and time.monotonic() > until:
            raise TimeIsUp

    try:
        with Progress(*columns, console=console, speed_estimate_period=600) as progress:
            bar = progress.add_task("training", total=len(specs), completed=before)
            sweep(
                specs,
                store,
                jobs=jobs,
                finished=finished,
                scheduler=scheduler,
                checkpoints=checkpoints,
            )
    except TimeIsUp:
        return False
    except KeyboardInterrupt:
        done = len(store.keys().intersection(keys))
        whole = f"{counted(len(specs), 'run')} {'is' if len(specs) == 1 else 'are'}"
        console.print(f"Stopped: {done} of {whole} kept in {store.path}; rerun the command to resume.")
        raise typer.Exit(INTERRUPTED) from None
    return True


def print_rows(rows: Sequence[Row], store: Path, report: Path) -> None:
    from normwise.lab.score import as_json
    from normwise.lab.strict_json import to_json

    print_json(to_json({"rows": as_json(rows), "store": str(store), "report": str(report)}, indent=2))


def print_tables(rows: Sequence[Row], store: Path, report: Path) -> None:
    from rich.console import Console

    console = Console()
    for name in dict.fromkeys(row.task for row in rows):
        console.print(_table(name, [row for row in rows if row.task == name]))
    if any(stat.spread is not None for row in rows for stat in row.stats.values()):
        console.print(
            "Mean ± standard deviation over the seeds, at the learning rate with the lowest training loss.\n"
            "* best; = ties with the best: the 95% interval of the differences, paired by seed, contains 0."
        )
    else:
        console.print(
            "Of one seed, at the learning rate with the lowest training loss: what is best by chance and what is not "
            "takes more, as --seeds 3."
        )
    for line in _reasons(rows):
        console.print(line, style="dim")
    console.print(f"Curves: {report}\nRuns:   {store}", soft_wrap=True)


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why some norms have no number: one line a reason."""
    where: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        if row.status != "done":
            where.setdefault((row.task, row.norm, row.status, row.reason), []).append(row.batch_size)
    return [
        f"{task}, {norm} at batch size {', '.join(map(str, sizes))}: {status}. {reason}"
        for (task, norm, status, reason), sizes in where.items()
    ]


def _table(task: str, rows: Sequence[Row]) -> Table:
    """A column a batch size; what decides above, accuracies also on parts of the cases, training losses below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from normwise.lab.score import BITS, parts_of

    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    cells = {(row.norm, row.batch_size): row for row in rows}
    norms = list(dict.fromkeys(row.norm for row in rows))
    table = Table(title=task, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD)
    table.add_column(
        "held-out bits per character" if any(row.criterion == BITS for row in rows) else "held-out accuracy, %"
    )
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    for norm in norms:
        table.add_row(norm, *(_criterion(cells[norm, size]) for size in sizes))
    for part in parts_of(rows):
        table.add_section()
        table.add_row(f"accuracy on {part}, %")
        for norm in norms:
            table.add_row(norm, *(_part(cells[norm, size], part) for size in sizes))
    table.add_section()
    table.add_row("training loss")
    for norm in norms:
        table.add_row(norm, *(_loss(cells[norm, size]) for size in sizes))
    return table


def _criterion(row: Row) -> str:
    if row.status != "done":
        return f"[dim]{row.status}[/dim]  "
    in_percent = row.criterion == "accuracy"
    number = _number(row, "accuracy", ".1f", 100) if in_percent else _number(row, row.criterion, ".3f")
    text = f"{number} {MARKS[row.mark]}"
    return f"[bold]{text}[/bold]" if row.mark else text


def _part(row: Row, part: str) -> str:
    return "" if row.status != "done" else f"{_number(row, f'accuracy/{part}', '.1f', 100)}  "


def _loss(row: Row) -> str:
    return "" if row.status != "done" else f"{_number(row, 'train_loss', '.3f')}  "


def _number(row: Row, name: str, style: str, scale: float = 1) -> str:
    """Mean and spread of one quantity, as in "95.1 ± 0.3"."""
    stat = row.stats[name]
    mean = f"{scale * stat.mean:{style}}"
    return mean if stat.spread is None else f"{mean} ± {scale * stat.spread:{style}}"
