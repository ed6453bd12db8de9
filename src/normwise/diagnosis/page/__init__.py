"""A diagnosis as one HTML file that needs nothing else: no network, no server."""

from __future__ import annotations

import contextlib
import html
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from normwise.diagnosis.records import Diagnosis
from normwise.diagnosis.table import place
from normwise.words import counted


def page(diagnosis: Diagnosis) -> str:
    """The page. Findings are text; what is drawn comes from the diagnosis's JSON, which the page carries."""
    import jinja2  # only here: a diagnosis itself needs torch alone

    here = files(__package__)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["short"] = short
    return environment.from_string((here / "page.html.j2").read_text("utf-8")).render(
        d=diagnosis,
        place=place,
        facts=_facts(diagnosis),
        css=(here / "page.css").read_text("utf-8"),
        js=(here / "page.js").read_text("utf-8"),
        # A name may hold anything: "</script>" must not end the element.
        data=diagnosis.to_json().replace("<", "\\u003c"),
    )


def framed(diagnosis: Diagnosis) -> str:
    """The page as an element of another, such as a notebook: in a frame, which keeps its style and script to itself."""
    try:
        inside = page(diagnosis)
    except ModuleNotFoundError:
        note = "The page needs jinja2: pip install 'normwise[lab]'."
        return f"<pre>{html.escape(str(diagnosis))}</pre><p>{note}</p>"
    # Links to "#layer=..." are meant within the frame, whose base is otherwise the notebook's address.
    inside = inside.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
    # Scripts may run, but reach nothing outside the frame.
    style = "width: 100%; height: 48rem; border: 0"
    return f'<iframe title="normwise" sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(inside)}"></iframe>'


def write_page(diagnosis: Diagnosis, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`; a file that is there is replaced only by a whole one. OSError where it cannot be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(page(diagnosis), encoding="utf-8")
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def short(value: Any) -> str:
    """A number to three digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(short(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def _facts(d: Diagnosis) -> list[str]:
    facts = [f"{counted(d.parameters, 'parameter')}, of which trained {d.trainable:,}", counted(len(d.layers), "layer")]
    sizes = sorted(set(d.data.sizes))
    facts.append(
        f"{counted(d.data.batches, 'batch')} of " + (f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}")
        if sizes
        else counted(d.data.batches, "batch")
    )
    if d.data.padding is not None:
        facts.append(f"{100 * d.data.padding:.3g} % padding")
    if d.gap is not None and not math.isnan(d.gap.output):
        facts.append(f"train and eval mode differ by {d.gap.output:.3g} deviations of the output")
    if d.wrapper is not None:
        facts.append(f"inside {d.wrapper}")
    return facts
