"""The papers' own figures, drawn from the runs of their set-ups (``lab/reproduce.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from normwise.lab.figures import Figure, line, sizes_of
from normwise.lab.plot import Line, Panel
from normwise.lab.score import Band, Row, band

PERCENTILES = {"p15": "15th", "p50": "50th", "p85": "85th"}


def of_paper(rows: Sequence[Row]) -> list[Figure]:
    """The figures of one task; none where it is no set-up of a paper, or where no run has finished."""
    shown = [row for row in rows if row.stats]
    if not shown or shown[0].task not in FIGURES:
        return []
    return [figure for figure in FIGURES[shown[0].task](shown) if figure.charts]


def _bn_mnist(rows: Sequence[Row]) -> list[Figure]:
    panels = []
    for row in rows:
        bands = {name: band(row.runs, f"preactivation/{name}", bins=100) for name in PERCENTILES}
        lines = [
            line(row.norm, found, style="main" if name == "p50" else "dotted", label=f"{PERCENTILES[name]} percentile")
            for name, found in bands.items()
            if found is not None
        ]
        panels.append(Panel(row.norm, lines))
    return [
        _accuracy(rows, "Figure 1a of the paper: test accuracy over the steps"),
        Figure(
            "Figure 1b and 1c of the paper: what one sigmoid gets",
            "The 15th, 50th (solid) and 85th percentile of the input of one sigmoid of the last hidden layer, over "
            "test cases in train mode. Without a norm they drift; with BatchNorm they should stay.",
            panels,
        ),
    ]


def _ln_mnist(rows: Sequence[Row]) -> list[Figure]:
    def lines(row: Row, name: str, convert: Callable[[float], float]) -> list[Line]:
        found = band(row.runs, name, bins=60)
        if found is None:
            return []
        epochs = [step * row.batch_size / _cases(row) for step in found.steps]
        low, high = sorted((list(map(convert, found.low)), list(map(convert, found.high))))
        return [replace(line(row.norm, found), x=epochs, y=list(map(convert, found.mean)), low=low, high=high)]

    def panels(name: str, convert: Callable[[float], float]) -> list[Panel]:
        return [
            Panel(
                f"batch size {size}",
                [one for row in rows if row.batch_size == size for one in lines(row, name, convert)],
                x_label="epoch",
            )
            for size in sizes_of(rows)
        ]

    return [
        Figure(
            "Figure 6 of the paper, above: negative log-likelihood in training",
            "Mean over the training batches, in nats, on a logarithmic scale.",
            panels("train/loss", float),
            log=True,
        ),
        Figure(
            "Figure 6 of the paper, below: test error",
            "On all test cases, in eval mode, on a logarithmic scale.",
            panels("test/accuracy", lambda accuracy: 1 - accuracy),
            log=True,
            percent=True,
        ),
    ]


def _cases(row: Row) -> int:
    """How many cases there are to train on."""
    return int(row.runs[0].series["train/cases"].values[0])


def _rbn_pmnist(rows: Sequence[Row]) -> list[Figure]:
    panels = []
    for when, title in (("start", "before the training"), ("end", "after it")):
        found = {row.norm: band(row.runs, f"over-time/gradient/train/{when}", bins=100) for row in rows}
        lines = [line(norm, _from_one(curve)) for norm, curve in found.items() if curve is not None]
        panels.append(Panel(title, lines, x_label="time step"))
    return [
        _accuracy(rows, "Accuracy over the steps"),
        Figure(
            "Gradient norm over the time steps, all nets in one panel",
            "Root mean square over test cases of the norm of the gradient of a case's loss with respect to the hidden "
            "state of each time step. Where it falls to the left, early pixels have little say in what is learnt.",
            panels,
            log=True,
        ),
    ]


def _from_one(curve: Band) -> Band:
    return replace(curve, steps=[step + 1 for step in curve.steps])


def _accuracy(rows: Sequence[Row], title: str) -> Figure:
    curves = {row.norm: band(row.runs, "test/accuracy", bins=100) for row in rows}
    lines = [line(norm, curve) for norm, curve in curves.items() if curve is not None]
    panel = Panel(f"batch size {rows[0].batch_size}", lines)
    return Figure(title, "On test cases, in eval mode.", [panel], percent=True)


FIGURES: dict[str, Callable[[Sequence[Row]], list[Figure]]] = {
    "bn-mnist": _bn_mnist,
    "ln-mnist": _ln_mnist,
    "rbn-pmnist": _rbn_pmnist,
}
