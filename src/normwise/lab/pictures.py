"""The report's figures as PNG files for papers, drawn by vl-convert: no browser is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from normwise.lab.chart import CONFIG, still
from normwise.lab.errors import LabError
from normwise.lab.figures import Figure
from normwise.lab.plot import colour
from normwise.lab.report import Section, section
from normwise.lab.score import Row
from normwise.lab.tasks import Task

SCALE = 2
COLUMNS = 3


def write_pictures(rows: Sequence[Row], tasks: Mapping[str, Task | None], folder: Path) -> list[Path]:
    """Write every figure of a report to ``folder/TASK-FIGURE.png``, light, at twice the pixels; return the paths.

    Raises:
        LabError: the folder cannot be made or written.
    """
    import vl_convert

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{folder} cannot be made ({error.strerror}): give another --png") from error
    written = []
    for name, task in tasks.items():
        part = section(name, task, [row for row in rows if row.task == name])
        for figure, spec in specs(part).items():
            path = folder / f"{part.anchor}-{figure}.png"
            try:
                path.write_bytes(vl_convert.vegalite_to_png(light(spec), scale=SCALE))
            except OSError as error:
                raise LabError(f"{path} cannot be written ({error.strerror}): give another --png") from error
            written.append(path)
    return written


def specs(part: Section) -> dict[str, dict[str, Any]]:
    """The figures of one task by the name of their file: the heat map and, of each figure, the panels first seen."""
    return {
        "held-out-accuracy-by-norm-and-batch-size": part.heat_map,
        **{figure.name: together(figure) for figure in part.figures},
    }


def together(figure: Figure) -> dict[str, Any]:
    """The panels of a figure as one chart, with a legend. The page's script does the same for its own files."""
    shown = [still(chart.spec) for chart in figure.charts if chart.panel.choice == 0]
    norms = list(dict.fromkeys(line.norm for panel in figure.panels for line in panel.lines))
    return {
        "title": figure.title,
        "concat": shown if len(norms) < 2 else with_legend(shown, norms),
        "columns": COLUMNS,
        "resolve": {"scale": {"color": "shared"}},
    }


def with_legend(place: Any, norms: Sequence[str]) -> Any:
    """One scale for all panels: a panel's own knows its norms alone, and of several Vega would take the first."""
    if isinstance(place, dict):
        if place.get("field") == "norm":
            scale = {"domain": list(norms), "range": [colour(norm) for norm in norms]}
            return {**place, "scale": scale, "legend": {"title": None, "symbolType": "circle", "orient": "bottom"}}
        return {name: with_legend(part, norms) for name, part in place.items()}
    return [with_legend(part, norms) for part in place] if isinstance(place, list) else place


def light(spec: Mapping[str, Any]) -> str:
    """The spec with its style and the light page's colours in it."""
    style = (files("normwise.lab") / "templates" / "report.css").read_text("utf-8")
    colours: dict[str, str] = {}
    for name, value in re.findall(r"--(\w+): (#\w+)", style):
        colours.setdefault(name, value)  # the first are the light ones
    text = json.dumps({**spec, "config": {**CONFIG, "background": "#fff"}})
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], text)
