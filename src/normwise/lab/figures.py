"""The report's figures, as Plotly figures: one panel a batch size, one colour a norm, a band over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normwise.lab.score import Band, Row, band

# Okabe & Ito's colours, which people of every colour vision tell apart on white.
COLOURS = {
    "none": "#6e6e6e",
    "batch": "#0072b2",
    "layer": "#d55e00",
    "group": "#009e73",
    "instance": "#cc79a7",
    "rms": "#e69f00",
    "batch-masked": "#56b4e9",
    "batch-per-step": "#0072b2",
    "batch-time-average": "#56b4e9",
    "batch-input": "#009e73",
}
OTHER_COLOURS = ("#56b4e9", "#000000", "#8c564b", "#7f3c8d")
INK, FAINT = "#2b2f36", "#e6e8ec"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Figure:
    """A figure with its words. ``choices`` names groups of traces of which one is shown at a time."""

    title: str
    caption: str
    plot: go.Figure
    choices: tuple[str, ...] = ()


def colour(norm: str) -> str:
    """The norm's colour; a name of a user's own gets one of four more."""
    return COLOURS.get(norm) or OTHER_COLOURS[sum(map(ord, norm)) % len(OTHER_COLOURS)]


def figures(rows: Sequence[Row]) -> list[Figure]:
    """All figures of one task; those for which no run has a series are left out."""
    shown = [row for row in rows if row.runs]
    if not shown:
        return []
    drawn = [
        _curves(
            shown,
            "Training loss",
            "Cross-entropy of the training batches, in nats, on a logarithmic scale.",
            [("train/loss", "solid")],
            "log",
        ),
        _curves(
            shown,
            "Held-out accuracy",
            "On fixed held-out cases. Solid: eval mode. Dotted: the same cases in train mode, in batches of the run's "
            "own size; where a norm does not depend on the batch, both lines are one.",
            [("heldout/eval/accuracy", "solid"), ("heldout/train/accuracy", "dot")],
            "~%",
        ),
        _curves(
            shown,
            "Training accuracy",
            "Of the training batches, before each update.",
            [("train/accuracy", "solid")],
            "~%",
        ),
        _curves(
            shown,
            "Gap between train mode and eval mode",
            "How far the two modes' class probabilities are apart on the same held-out cases (total variation, 0 to "
            "1). It is 0 for norms that do not look at the batch.",
            [("heldout/gap", "solid")],
            "",
        ),
        _gradient_profile(shown),
        _gradient_curves(shown),
        _curves(
            shown,
            "Saturated units",
            "Share of the nonlinearities' inputs where the slope has all but vanished: |x| > 6 for a sigmoid, |x| > 3 "
            "for tanh, x ≤ 0 for a ReLU (unless the task says otherwise). Train mode, held-out cases.",
            [("saturated", "solid")],
            "~%",
        ),
        _percentiles(shown),
        _learning_rates(shown),
        _times(shown),
    ]
    return [figure for figure in drawn if figure is not None]


def _sizes(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row.batch_size for row in rows))


def _norms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.norm for row in rows))


def _panels(rows: Sequence[Row], x: str, y: str, axis: str, *, height: int = 330) -> go.Figure:
    """One empty panel a batch size, on a common y axis of kind ``axis``: "log", a number format, or ""."""
    sizes = _sizes(rows)
    figure = make_subplots(
        1,
        len(sizes),
        shared_yaxes=True,
        horizontal_spacing=0.035,
        subplot_titles=[f"batch size {size}" for size in sizes],
    )
    _style(figure, height)
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(type="log" if axis == "log" else "linear", tickformat="" if axis == "log" else axis)
    figure.update_yaxes(title_text=y, col=1)
    return figure


def _log_ticks(figure: go.Figure) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, or at the powers alone where there are many."""
    values = [y for trace in figure.data for y in trace.y if y is not None and y > 0]
    if not values:
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    if high - low > 3:
        figure.update_yaxes(dtick=math.ceil((high - low) / 6), exponentformat="power")
        return
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        margin={"l": 64, "r": 12, "t": 64, "b": 48},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 13, "color": INK},
        hoverlabel={"bgcolor": "white", "font": {"family": FONT, "size": 12}},
        legend={"orientation": "h", "x": 0, "y": 1.13, "yanchor": "bottom", "itemwidth": 30},
        hovermode="closest",
    )
    figure.update_xaxes(gridcolor=FAINT, linecolor="#b8bcc4", zeroline=False, ticks="outside", tickcolor="#b8bcc4")
    figure.update_yaxes(gridcolor=FAINT, linecolor="#b8bcc4", zeroline=False)
    figure.update_xaxes(title_font_size=13)
    figure.update_annotations(font={"size": 13, "color": INK})


def _legend(figure: go.Figure, rows: Sequence[Row]) -> None:
    """One entry a norm, in the rows' order, whichever panels the norm is in."""
    for norm in _norms(rows):
        line = {"color": colour(norm), "width": 3}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=norm, legendgroup=norm, line=line)


def _draw(figure: go.Figure, row: Row, panel: int, curve: Band, dash: str, name: str, form: str, visible: bool) -> None:
    shade = colour(row.norm)
    common = {"legendgroup": row.norm, "showlegend": False, "visible": visible}
    if len(row.runs) > 1:
        figure.add_scatter(
            x=curve.steps + curve.steps[::-1],
            y=curve.high + curve.low[::-1],
            fill="toself",
            fillcolor=_faint(shade),
            line={"width": 0},
            hoverinfo="skip",
            mode="lines",
            row=1,
            col=panel,
            **common,
        )
    figure.add_scatter(
        x=curve.steps,
        y=curve.mean,
        mode="lines",
        line={"color": shade, "width": 2, "dash": dash},
        hovertemplate=f"{name}, step %{{x}}: %{{y:{form}}}<extra></extra>",
        row=1,
        col=panel,
        **common,
    )


def _faint(hexadecimal: str) -> str:
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"


def _curves(
    rows: Sequence[Row], title: str, caption: str, series: Sequence[tuple[str, str]], axis: str
) -> Figure | None:
    """Series over steps; ``series`` gives each one's name and the dash of its line."""
    figure = _panels(rows, "step", "", axis)
    drawn = False
    for row in rows:
        for name, dash in series:
            curve = band(row.runs, name)
            if curve is None:
                continue
            drawn = True
            label = row.norm if len(series) == 1 else f"{row.norm}, {name.split('/')[1]} mode"
            form = ".3~g" if axis in ("log", "") else ".1%"
            _draw(figure, row, _sizes(rows).index(row.batch_size) + 1, curve, dash, label, form, True)
    if axis == "log":
        _log_ticks(figure)
    _legend(figure, rows)
    return Figure(title, caption, figure) if drawn else None


def _layers(rows: Sequence[Row]) -> list[str]:
    """The layers that all runs have, in their order; a run that diverged at once has recorded none and is no bar."""
    of_runs = [[name for name in run.series if name.startswith("gradient/")] for row in rows for run in row.runs]
    of_runs = [names for names in of_runs if names]
    return [name for name in of_runs[0] if all(name in names for names in of_runs)] if of_runs else []


def _short(layer: str) -> str:
    return layer.removeprefix("gradient/").removesuffix(".weight")


def _gradient_profile(rows: Sequence[Row]) -> Figure | None:
    layers = _layers(rows)
    if not layers:
        return None
    figure = _panels(rows, "", "", "log", height=380)
    for row in rows:
        recorded = [run for run in row.runs if layers[0] in run.series]
        if not recorded:
            continue
        medians = [[median(run.series[layer].values) for run in recorded] for layer in layers]
        figure.add_scatter(
            x=[_short(layer) for layer in layers],
            y=[fmean(values) for values in medians],
            error_y=_reach(medians),
            mode="lines+markers",
            line={"color": colour(row.norm), "width": 2},
            marker={"size": 6},
            legendgroup=row.norm,
            showlegend=False,
            hovertemplate=f"{row.norm}, %{{x}}: %{{y:.3~g}}<extra></extra>",
            row=1,
            col=_sizes(rows).index(row.batch_size) + 1,
        )
    _log_ticks(figure)
    _legend(figure, rows)
    figure.update_xaxes(tickangle=-40)
    figure.update_layout(margin={"b": 92})
    caption = (
        "Euclidean norm of the loss's gradient with respect to each layer's weights, from the input (left) to the "
        "output: median over the training, with the lowest and highest seed."
    )
    return Figure("Gradient norm, layer by layer", caption, figure)


def _gradient_curves(rows: Sequence[Row]) -> Figure | None:
    layers = _layers(rows)
    if not layers:
        return None
    figure = _panels(rows, "step", "", "log")
    _legend(figure, rows)
    for place, layer in enumerate(layers):
        for row in rows:
            curve = band(row.runs, layer)
            if curve is not None:
                panel = _sizes(rows).index(row.batch_size) + 1
                _draw(figure, row, panel, curve, "solid", row.norm, ".3~g", place == 0)
                for trace in figure.data[-2 if len(row.runs) > 1 else -1 :]:
                    trace.meta = place
    _log_ticks(figure)
    caption = "The same over the steps, for one layer at a time."
    return Figure("Gradient norm over the training", caption, figure, tuple(map(_short, layers)))


def _reach(values: Sequence[Sequence[float]]) -> dict[str, object]:
    """Error bars from the mean to the lowest and the highest of each group of values."""
    means = [fmean(group) for group in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(group) - mean for group, mean in zip(values, means, strict=True)],
        "arrayminus": [mean - min(group) for group, mean in zip(values, means, strict=True)],
        "thickness": 1,
        "width": 2,
    }


def _percentiles(rows: Sequence[Row]) -> Figure | None:
    """A grid of small panels: a row a batch size, a column a norm."""
    found = {(row.batch_size, row.norm): [band(row.runs, f"preactivation/p{p}") for p in (15, 50, 85)] for row in rows}
    if not any(bands[0] for bands in found.values()):
        return None
    sizes, norms = _sizes(rows), _norms(rows)
    figure = make_subplots(
        len(sizes),
        len(norms),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.04,
        column_titles=norms,
    )
    _style(figure, 120 + 150 * len(sizes))
    for (size, norm), bands in found.items():
        for quantile, curve in zip((15, 50, 85), bands, strict=True):
            if curve is not None:
                figure.add_scatter(
                    x=curve.steps,
                    y=curve.mean,
                    mode="lines",
                    line={"color": colour(norm), "width": 2.4 if quantile == 50 else 1.3},
                    showlegend=False,
                    fill=None if quantile == 15 else "tonexty",
                    fillcolor=_faint(colour(norm)),
                    hovertemplate=f"{norm}, {quantile}th percentile, step %{{x}}: %{{y:.3~g}}<extra></extra>",
                    row=sizes.index(size) + 1,
                    col=norms.index(norm) + 1,
                )
    figure.update_layout(margin={"t": 40})
    for place, size in enumerate(sizes):
        figure.update_yaxes(title={"text": f"batch size {size}", "font": {"size": 13}}, row=place + 1, col=1)
    figure.update_xaxes(nticks=4, tickfont_size=11)
    figure.update_xaxes(title_text="step", row=len(sizes))
    caption = (
        "15th, 50th and 85th percentile, over held-out cases in train mode, of what one unit gets to see (as Ioffe & "
        "Szegedy 2015, figure 1); mean over the seeds."
    )
    return Figure("The input of one nonlinearity", caption, figure)


def _learning_rates(rows: Sequence[Row]) -> Figure | None:
    if all(len(row.offered) < 2 for row in rows):
        return None
    figure = _panels(rows, "learning rate", "", "log")
    for row in rows:
        finite = {rate: stat for rate, stat in row.offered.items() if math.isfinite(stat.mean)}
        figure.add_scatter(
            x=list(finite),
            y=[stat.mean for stat in finite.values()],
            error_y=_reach([stat.values for stat in finite.values()]),
            mode="lines+markers",
            line={"color": colour(row.norm), "width": 2},
            marker={"size": [12 if rate == row.learning_rate else 6 for rate in finite], "opacity": 1},
            legendgroup=row.norm,
            showlegend=False,
            hovertemplate=f"{row.norm}, learning rate %{{x}}: loss %{{y:.3~g}}<extra></extra>",
            row=1,
            col=_sizes(rows).index(row.batch_size) + 1,
        )
    _log_ticks(figure)
    rates = sorted({rate for row in rows for rate in row.offered})
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{rate:g}" for rate in rates])
    _legend(figure, rows)
    caption = (
        "Training loss at the end, for each rate that the norms were offered, with the lowest and highest seed. The "
        "large dot is the rate taken. Where a seed diverged there is no dot."
    )
    return Figure("How much the learning rate matters", caption, figure)


def _times(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if row.stats]
    if not rows:
        return None
    figure = _panels(rows, "milliseconds", "", "", height=150 + 26 * len(_norms(rows)))
    for row in rows:
        values = row.stats["ms_per_step"].values
        figure.add_scatter(
            x=values,
            y=[row.norm] * len(values),
            mode="markers",
            marker={"color": colour(row.norm), "size": 10, "opacity": 0.75},
            showlegend=False,
            hovertemplate=f"{row.norm}: %{{x:.2f}} ms<extra></extra>",
            row=1,
            col=_sizes(rows).index(row.batch_size) + 1,
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=_norms(rows)[::-1])
    figure.update_layout(margin={"l": 84, "t": 40})
    caption = (
        "Forward, backward and update, on one thread: the median of each run, a dot a seed. Other runs were training "
        "on the other cores meanwhile, so small differences mean little."
    )
    return Figure("Time per step", caption, figure)
