"""The report's figures: one panel a batch size, one colour a norm, a band over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from normwise.lab.chart import Chart, charts
from normwise.lab.plot import Line, Panel
from normwise.lab.score import POINTS, Band, Row, band

IN_BRIEF = ("Training loss", "Held-out accuracy")
POINTS_IN_BRIEF = 15
"""Of a task that only claims need, the figures that a long report draws, and the points of a line there."""


@dataclass(frozen=True)
class Figure:
    """Panels on one y scale, with their words. ``choices`` names the groups of panels of which one is shown."""

    title: str
    caption: str
    panels: Sequence[Panel]
    log: bool = False
    percent: bool = False
    choices: Sequence[str] = ()

    @property
    def name(self) -> str:
        """For an address and a file."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    @property
    def wide(self) -> bool:
        """Whether the reader sees more than one panel at a time."""
        return sum(panel.choice == 0 for panel in self.panels) > 1

    @cached_property
    def charts(self) -> list[Chart]:
        """The panels as charts; none where there is nothing to draw."""
        return charts(self.panels, log=self.log, percent=self.percent)


def figures(rows: Sequence[Row], *, points: int = POINTS) -> list[Figure]:
    """All figures of one task; those for which no run has a series are left out. In the curves over the steps a line
    has ``points`` at most."""
    shown = [row for row in rows if row.runs]
    drawn = [
        _curves(
            shown,
            "Training loss",
            "Cross-entropy of the training batches, in nats, on a logarithmic scale.",
            "train/loss",
            log=True,
            points=points,
        ),
        _curves(
            shown,
            "Held-out accuracy",
            "On fixed held-out cases. Solid: eval mode. Dotted: the same cases in train mode, in batches of the run's "
            "own size; where a norm does not depend on the batch, both lines are one.",
            "heldout/eval/accuracy",
            dotted="heldout/train/accuracy",
            percent=True,
            points=points,
        ),
        _curves(
            shown,
            "Gap between train mode and eval mode",
            "How far the two modes' class probabilities are apart on the same held-out cases (total variation, 0 to "
            "1). It is 0 for norms that do not look at the batch.",
            "heldout/gap",
        ),
        _curves(
            shown,
            "Saturated units",
            "Share of the nonlinearities' inputs where the slope has all but vanished: |x| > 6 for a sigmoid, |x| > 3 "
            "for tanh, x ≤ 0 for a ReLU (unless the task says otherwise). Train mode, held-out cases.",
            "saturated",
            percent=True,
        ),
        _percentiles(shown),
        _gradient_profile(shown),
        _by_layer(
            shown,
            "Gradient flow over the training",
            "Euclidean norm of the loss's gradient with respect to one layer's weights.",
            "gradient/",
        ),
        _by_layer(
            shown,
            "Internal covariate shift: the gradient",
            "How much one update of the layers before it changes a layer's gradient, relative to its size (Santurkar "
            "et al. 2018, definition 2.1).",
            "shift/gradient/",
        ),
        _by_layer(
            shown,
            "Internal covariate shift: the inputs",
            "How far one update moves the distribution of what a layer gets: Wasserstein distance over standard "
            "deviation, mean over the features.",
            "shift/inputs/",
        ),
        _learning_rates(shown),
    ]
    return [figure for figure in drawn if figure is not None and figure.charts]


def sizes_of(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row.batch_size for row in rows))


def line(norm: str, curve: Band, *, style: str = "main", label: str = "") -> Line:
    """A curve with its band, which only a main line has."""
    low, high = (curve.low, curve.high) if style == "main" else ((), ())
    return Line(norm, curve.steps, curve.mean, low, high, style, label)


def _a_panel_a_size(
    rows: Sequence[Row], lines: Callable[[Row], list[Line]], *, choice: int = 0, **options: object
) -> list[Panel]:
    """A panel for each batch size that has something to draw."""
    panels = []
    for size in sizes_of(rows):
        found = [one for row in rows if row.batch_size == size for one in lines(row)]
        if found:
            panels.append(Panel(f"batch size {size}", found, choice=choice, **options))  # type: ignore[arg-type]
    return panels


def _curves(
    rows: Sequence[Row],
    title: str,
    caption: str,
    name: str,
    *,
    dotted: str = "",
    log: bool = False,
    percent: bool = False,
    points: int = POINTS,
) -> Figure:
    def lines(row: Row) -> list[Line]:
        main = band(row.runs, name, bins=points)
        other = band(row.runs, dotted, bins=points) if dotted else None
        label = "eval mode" if dotted else ""
        found = [line(row.norm, main, label=label)] if main else []
        return found + ([line(row.norm, other, style="dotted", label="train mode")] if other else [])

    return Figure(title, caption, _a_panel_a_size(rows, lines), log=log, percent=percent)


def _layers(rows: Sequence[Row], prefix: str) -> list[str]:
    """The layers that all runs have, in their order; a run that diverged at once has recorded none and is no bar."""
    of_runs = [[name for name in run.series if name.startswith(prefix)] for row in rows for run in row.runs]
    of_runs = [names for names in of_runs if names]
    return [name for name in of_runs[0] if all(name in names for names in of_runs)] if of_runs else []


def _short(layer: str) -> str:
    return layer.rpartition("/")[2].removesuffix(".weight")


def _gradient_profile(rows: Sequence[Row]) -> Figure | None:
    layers = _layers(rows, "gradient/")
    if not layers:
        return None

    def lines(row: Row) -> list[Line]:
        recorded = [run for run in row.runs if layers[0] in run.series]
        values = [[median(run.series[layer].values) for run in recorded] for layer in layers] if recorded else []
        if not values:
            return []
        mean, low, high = ([of(seeds) for seeds in values] for of in (fmean, min, max))
        return [Line(row.norm, list(range(len(layers))), mean, low, high)]

    caption = (
        "Euclidean norm of the loss's gradient with respect to each layer's weights, from the input (left) to the "
        "output: median over the training, with the lowest and highest seed."
    )
    panels = _a_panel_a_size(rows, lines, x_label="layer", x_names=[_short(layer) for layer in layers])
    return Figure("Gradient flow, layer by layer", caption, panels, log=True)


def _by_layer(rows: Sequence[Row], title: str, caption: str, prefix: str) -> Figure | None:
    layers = _layers(rows, prefix)
    panels = []
    for choice, layer in enumerate(layers):

        def lines(row: Row, layer: str = layer) -> list[Line]:
            curve = band(row.runs, layer)
            return [line(row.norm, curve)] if curve else []

        panels += _a_panel_a_size(rows, lines, choice=choice)
    return Figure(title, caption, panels, log=True, choices=[_short(layer) for layer in layers]) if panels else None


def _percentiles(rows: Sequence[Row]) -> Figure:
    """A panel a batch size and norm."""
    panels = []
    for row in rows:
        low, middle, high = (band(row.runs, f"preactivation/p{p}") for p in (15, 50, 85))
        if low and middle and high:
            curve = Line(
                row.norm, middle.steps, middle.mean, low.mean, high.mean, label="median, 15th to 85th percentile"
            )
            panels.append(Panel(f"{row.norm}, batch size {row.batch_size}", [curve]))
    caption = (
        "Median and, as the band, 15th to 85th percentile, over held-out cases in train mode, of what one unit gets to "
        "see (as Ioffe & Szegedy 2015, figure 1); mean over the seeds."
    )
    return Figure("The input of one nonlinearity", caption, panels)


def _learning_rates(rows: Sequence[Row]) -> Figure | None:
    if all(len(row.offered) < 2 for row in rows):
        return None

    def lines(row: Row) -> list[Line]:
        finite = {rate: stat for rate, stat in row.offered.items() if math.isfinite(stat.mean)}
        if not finite:
            return []
        values = [stat.values for stat in finite.values()]
        marked = list(finite).index(row.learning_rate) if row.learning_rate in finite else None
        mean, low, high = ([of(seeds) for seeds in values] for of in (fmean, min, max))
        return [Line(row.norm, list(finite), mean, low, high, marked=marked)]

    caption = (
        "Training loss at the end, for each rate that the norms were offered, with the lowest and highest seed. The "
        "large dot is the rate taken. Where a seed diverged there is no dot."
    )
    panels = _a_panel_a_size(rows, lines, x_label="learning rate", x_log=True)
    return Figure("How much the learning rate matters", caption, panels, log=True)
