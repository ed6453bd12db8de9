"""`normwise reproduce`: the experiments of three papers at their size, on a folder of IDX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normwise.cli.json_output import AsJson
from normwise.cli.options import OUT, Jobs, Scheduler, Seeds, listed


def reproduce(
    paper: Annotated[str, typer.Argument(metavar="PAPER", help="bn-mnist, ln-mnist or rbn-pmnist.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder with MNIST's four IDX files, or others under the same names, .gz or not."
        ),
    ],
    norms: Annotated[
        str | None,
        typer.Option(metavar="A,B,..", help="Some of the set-up's norms; an unknown one lists them. Default: all."),
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,..", help="Some of the paper's batch sizes. Default: all.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Training steps of each run. Default: the paper's.")
    ] = None,
    seeds: Seeds = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few updates, to see that it runs: minutes.")] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Where runs.sqlite and PAPER.html go.")
    ] = OUT,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    json: AsJson = False,
) -> None:
    """Repeat a paper's experiment at full size and redraw its figure.

    bn-mnist: Ioffe & Szegedy 2015, section 4.1: accuracy over the steps with and without BatchNorm, and the
    percentiles of one sigmoid's input. Minutes.

    ln-mnist: Ba et al. 2016, section 6.6: likelihood and test error at batch size 128 and 4. Hours.

    rbn-pmnist: Cooijmans et al. 2016, section 5.1: an LSTM on permuted pixels, and the norm of its gradient over the
    784 time steps. Most of a day: the paper makes 100,000 updates.

    A run writes a checkpoint to DIR/checkpoints every half minute: rerun the command to resume, with the same results.
    """
    from normwise.cli.compare import print_rows, print_tables, train
    from normwise.lab.report import write_report
    from normwise.lab.reproduce import reference, specs
    from normwise.lab.score import score
    from normwise.lab.store import Store
    from normwise.lab.sweep import cores
    from normwise.lab.tasks import load_task

    wanted = specs(
        paper,
        data,
        seeds=seeds,
        norms=listed(norms, str, "--norms"),
        batch_sizes=listed(batch_sizes, int, "--batch-sizes"),
        steps=steps,
        quick=quick,
    )
    with Store(out / "runs.sqlite") as store:
        train(wanted, store, jobs=jobs or cores(), scheduler=scheduler, checkpoints=out.absolute() / "checkpoints")
        rows = score(store.runs(spec.key() for spec in wanted))
    page = write_report(rows, {paper: load_task(reference(paper, data)).task}, out / f"{paper}.html")
    (print_rows if json else print_tables)(rows, store.path, page)
