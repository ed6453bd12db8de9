"""The report's figures over the time steps of sequences: a small panel for each batch size (row) and norm (column)."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normwise.lab.figures import Figure, _faint, _log_ticks, _norms, _sizes, _style, colour
from normwise.lab.score import Band, Row, band

# What each quantity is called, the modes that are drawn, and its caption.
QUANTITIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "summed": (
        "Size of the summed inputs over the time steps",
        ("eval", "train"),
        "Root mean square, over the units and over the held-out sequences that are still running at a step, of what "
        "the nonlinearities see, behind the norms.",
    ),
    "unnormalized": (
        "Size of the summed inputs before any norm",
        ("eval", "train"),
        "The same for W_ih x + W_hh h alone: what the norms, where there are any, have to deal with.",
    ),
    "gradient": (
        "Gradient norm over the time steps",
        ("train",),
        "Root mean square, over the held-out sequences that are still running at a step, of the norm of the gradient "
        "of a sequence's own loss with respect to the hidden state of that step (in the transformer: to the embedded "
        "frame). Where a curve falls to the left, little of the loss reaches the early steps; a sequence that the net "
        "is sure of has a small one throughout. Train mode.",
    ),
}
HOW_TO_READ = {
    (
        "eval",
        "train",
    ): " Thick: after the training, eval mode; dotted: also in train mode; thin: before, eval mode.",
    ("train",): " Thick: after the training; thin: before it.",
}


def over_time(rows: Sequence[Row]) -> list[Figure]:
    """The figures of one task for which its runs have series."""
    shown = [row for row in rows if row.stats]
    found = [name for name in QUANTITIES if any(f"over-time/{name}/" in s for r in shown for s in r.runs[0].series)]
    return [_figure(shown, name) for name in found]


def _figure(rows: Sequence[Row], quantity: str) -> Figure:
    title, modes, caption = QUANTITIES[quantity]
    sizes, norms = _sizes(rows), _norms(rows)
    figure = make_subplots(
        len(sizes),
        len(norms),
        shared_xaxes=True,
        shared_yaxes="all",
        horizontal_spacing=0.015,
        vertical_spacing=0.06,
        column_titles=norms,
    )
    _style(figure, 130 + 170 * len(sizes))
    figure.update_yaxes(type="log")
    for row in rows:
        place = (sizes.index(row.batch_size) + 1, norms.index(row.norm) + 1)
        for mode in modes:
            for when in ("start", "end"):
                curve = band(row.runs, f"over-time/{quantity}/{mode}/{when}")
                if curve is not None and (when == "end" or mode == modes[0]):
                    _draw(figure, row.norm, curve, mode != modes[0], when, place, f"{mode} mode, {when}")
        _beyond_training(figure, row, *place)
    _log_ticks(figure)
    figure.update_layout(margin={"t": 40})
    for at, size in enumerate(sizes):
        figure.update_yaxes(title={"text": f"batch size {size}", "font": {"size": 13}}, row=at + 1, col=1)
    figure.update_xaxes(nticks=5, tickfont_size=11, range=[0.5, None])
    figure.update_xaxes(title_text="time step", row=len(sizes))
    shade = " Grey: steps beyond the longest sequence in training." if _longest(rows[0]) else ""
    return Figure(title, caption + HOW_TO_READ[modes] + shade, figure)


def _draw(
    figure: go.Figure, norm: str, curve: Band, dotted: bool, when: str, place: tuple[int, int], label: str
) -> None:
    """A line with its band over the seeds, which only the main line has. Time steps are counted from 1."""
    row, column = place
    steps = [step + 1 for step in curve.steps]
    main = when == "end" and not dotted
    if main and curve.low != curve.high:
        figure.add_scatter(
            x=steps + steps[::-1],
            y=curve.high + curve.low[::-1],
            fill="toself",
            fillcolor=_faint(colour(norm)),
            line={"width": 0},
            hoverinfo="skip",
            mode="lines",
            showlegend=False,
            row=row,
            col=column,
        )
    figure.add_scatter(
        x=steps,
        y=curve.mean,
        mode="lines",
        line={"color": colour(norm), "width": 2.4 if main else 1.1 if when == "start" else 1.8}
        | ({"dash": "dot"} if dotted else {}),
        showlegend=False,
        hovertemplate=f"{norm}, {label}, time step %{{x}}: %{{y:.3~g}}<extra></extra>",
        row=row,
        col=column,
    )


def _longest(row: Row) -> float:
    """Steps of the longest sequence in training; 0 where the runs do not say."""
    series = row.runs[0].series.get("train/longest")
    return series.values[0] if series else 0


def _beyond_training(figure: go.Figure, row: Row, panel_row: int, panel_column: int) -> None:
    """Shade the steps that no sequence in training had."""
    longest = _longest(row)
    drawn = [curve for run in row.runs for name, curve in run.series.items() if name.startswith("over-time/")]
    last = max((len(curve.steps) for curve in drawn), default=0)
    if longest and last > longest:
        figure.add_vrect(
            x0=longest + 0.5,
            x1=last + 0.5,
            fillcolor="#5d6470",
            opacity=0.1,
            line_width=0,
            layer="below",
            row=panel_row,
            col=panel_column,
        )
