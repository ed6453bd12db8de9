"""Draws the pictures that README.md opens with, and those of pages that normwise writes: docs/images/NAME.png.

    pip install pillow
    python scripts/make_readme_figures.py [NAME ...]    # masked-statistics, lstm-speed, findings, diagnosis
    python scripts/make_readme_figures.py --report normwise-out/report.html [report] [claims]

masked-statistics is computed here, with torch.nn's layer and ours. lstm-speed draws README's own table of recurrent
layers, and keeps the numbers in the file, where a test compares them with the table. findings and diagnosis are the
page of `normwise diagnose examples/diagnose_me.py:make`, narrow and wide; report and claims are two tabs of the page
of `normwise report`, whose runs take too long to be made here. Playwright takes all of them with the machine's own
Chromium, and Pillow makes them small, by a palette.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images"
KEYWORD = "normwise"  # of the text chunk that holds a picture's numbers
MOST_BYTES = 150_000

INK, FAINT, BLUE, ORANGE = "#222222", "#dddddd", "#0072b2", "#d55e00"  # Okabe & Ito's blue and orange
CONFIG = {
    "background": "white",  # paper of its own: readable on a dark page too
    "padding": 18,
    "font": "DejaVu Sans",
    "title": {"fontSize": 19, "subtitleFontSize": 15, "anchor": "start", "frame": "group", "color": INK, "offset": 14}
    | {"subtitleColor": "#555555", "subtitlePadding": 6},
    "axis": {"labelFontSize": 15, "titleFontSize": 15, "titleFontWeight": "normal", "labelColor": INK}
    | {"gridColor": FAINT, "domainColor": "#888888", "tickColor": "#888888"},
    "view": {"stroke": None},
}


def masked_statistics() -> bytes:
    """How far the outputs at valid steps are off as a batch is padded further."""
    import torch

    import normwise
    from normwise.lab.datasets import load_japanese_vowels

    utterances = load_japanese_vowels()[0]
    lengths = utterances.lengths[::8]
    frames = utterances.frames[::8, : int(lengths.max())].transpose(1, 2)
    valid = torch.arange(frames.shape[2]) < lengths[:, None]
    values = frames.transpose(1, 2)[valid].double()  # what the statistics should be taken over
    right = (values - values.mean(0)) / (values.var(0, correction=0) + 1e-5).sqrt()

    def off(norm: Callable[..., torch.Tensor], steps: int, **given: torch.Tensor) -> float:
        padded = torch.nn.functional.pad(frames, (0, steps - frames.shape[2]))
        output = norm(padded, **given)[..., : frames.shape[2]].transpose(1, 2)[valid]
        return float((output.detach() - right).square().mean().sqrt())

    rows = []
    for steps in range(frames.shape[2], 65, 4):
        share = 1 - float(lengths.sum()) / (len(lengths) * steps)
        rows.append({"padding": share, "off": off(torch.nn.BatchNorm1d(12), steps), "norm": "torch"})
        rows.append({"padding": share, "off": off(normwise.BatchNorm1d(12), steps, lengths=lengths), "norm": "ours"})
    worst = max(row["off"] for row in rows if row["norm"] == "ours")
    last = {row["norm"]: row for row in rows}
    labels = [
        {**last["torch"], "text": "torch.nn.BatchNorm1d"},
        {**last["ours"], "text": f"normwise.BatchNorm1d with lengths=: below {_rounded_up(worst)}"},
    ]
    colour = {"field": "norm", "scale": {"domain": ["torch", "ours"], "range": [ORANGE, BLUE]}, "legend": None}
    x = {"field": "padding", "type": "quantitative", "title": "share of the batch that is padding"}
    x |= {"axis": {"format": "%", "tickCount": 6, "grid": False}, "scale": {"nice": False}}
    y = {"field": "off", "type": "quantitative", "title": None, "scale": {"domain": [0, 1.4]}}
    y |= {"axis": {"values": [0, 1], "grid": False, "format": "~g", "domain": False, "ticks": False}}
    return _drawn(
        {
            "title": {
                "text": "How far padding moves the outputs at valid steps",
                "subtitle": [
                    f"{len(lengths)} spoken vowels of {int(lengths.min())} to {int(lengths.max())} frames, padded with"
                    " zeros: root mean",
                    "square error of a batch norm's output, in its standard deviations",
                ],
            },
            "width": 520,
            "height": 250,
            "layer": [
                {
                    "data": {"values": rows},
                    "mark": {"type": "line", "strokeWidth": 4, "strokeCap": "round"},
                    "encoding": {"x": x, "y": y, "color": colour},
                },
                {
                    "data": {"values": labels},
                    "mark": {"type": "text", "align": "right", "fontSize": 16, "fontWeight": "bold", "dy": -16},
                    "encoding": {"x": x, "y": y, "color": colour, "text": {"field": "text"}},
                },
            ],
        },
        {"ours": worst, "torch": last["torch"]["off"]},
    )


def lstm_table() -> list[dict[str, Any]]:
    """README's rows on the LSTM with layer norm: a shape, what it is compared with, its share of that one's time."""
    text = (ROOT / "README.md").read_text("utf-8")

    def row(beginning: str) -> list[float]:
        (cells,) = re.findall(rf"^\| {re.escape(beginning)} \| ([^|]*) \|$", text, re.MULTILINE)
        return [float(cell) for cell in cells.split(",")]

    plain = row("`LSTM` with layer norm, four shapes, against torch.nn's LSTM *without*")
    written = row("the same against the fastest LN-LSTM that one can write (eager, jit.script, torch.compile)")
    (shapes,) = re.findall(r"Shapes \(T, B, input, hidden\): (\(.*\))\.", text)
    named = re.findall(r"\([^)]*\)", shapes)
    return [
        {"shape": shape, "against": against, "share": share}
        for against, shares in (("plain", plain), ("written", written))
        for shape, share in zip(named, shares, strict=True)
    ]


def lstm_speed() -> bytes:
    """README's table as bars, about a line at 1."""
    rows = lstm_table()
    panels = []
    for against, colour, title in (
        ("plain", BLUE, "against torch.nn.LSTM, which has no norm"),
        ("written", ORANGE, "against the fastest LN-LSTM that one can write in PyTorch"),
    ):
        x = {"field": "share", "type": "quantitative", "title": None, "scale": {"domain": [0, 1.12]}}
        x |= {"axis": {"values": [0, 1], "grid": False, "format": "~g", "domain": False, "ticks": False}}
        y = {"field": "shape", "type": "nominal", "sort": None, "title": None}
        y |= {"axis": {"domain": False, "ticks": False, "labelPadding": 8}}
        number = {"type": "text", "align": "left", "dx": 6, "fontSize": 15, "fontWeight": "bold"}
        one = {
            "mark": {"type": "rule", "strokeWidth": 2, "strokeDash": [5, 4]},
            "encoding": {"x": {"datum": 1, "type": "quantitative"}},
        }
        bars = {"mark": {"type": "bar", "color": colour, "height": 20}, "encoding": {"x": x, "y": y}}
        numbers = {
            "mark": {**number, "color": colour},
            "encoding": {"x": x, "y": y, "text": {"field": "share", "format": ".2f"}},
        }
        panels.append(
            {
                "title": {"text": title, "fontSize": 16, "offset": 8, "frame": "bounds"},
                "data": {"values": [row for row in rows if row["against"] == against]},
                "width": 400,
                "height": {"step": 29},
                "layer": [bars, one, numbers],
            }
        )
    return _drawn(
        {
            "title": {
                "text": "Training step of an LSTM with layer norm inside",
                "subtitle": [
                    "time of normwise.LSTM as a share of the other's, lower is better;",
                    "shapes are (steps, batch, inputs, units), float32, two cores",
                ],
                "frame": "bounds",
            },
            "vconcat": panels,
            "spacing": 22,
        },
        rows,
    )


def findings() -> bytes:
    """The page of the example with four faults, on a narrow screen: its head and the first two findings."""
    return _taken(_page_of_the_example(), 600, 1.5, end="li.finding:nth-child(3)")


def diagnosis() -> bytes:
    """The same page on a wide screen, down to the charts over all layers."""
    return _taken(_page_of_the_example(), 1000, 1.2, end="#layers")


def report(page: str) -> bytes:
    """The tab of the first task that was trained, mlp for `normwise compare`: its table and the first curves."""
    return _taken(page, 1000, 1.2, height=1120, clicks=["#tab-mlp"])


def claims(page: str) -> bytes:
    """The tab of the claims, with the first opened that was decided by runs."""
    return _taken(page, 1000, 1.2, height=1120, clicks=["#tab-claims", "details.claim:has(svg) summary >> nth=0"])


def _page_of_the_example() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            Path(sys.executable).parent / "normwise",
            "diagnose",
            "examples/diagnose_me.py:make",
            "--out",
            folder,
        ]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return (Path(folder) / "diagnosis.html").read_text("utf-8")


def numbers_of(png: bytes) -> Any:
    """What a chart of this script was drawn from. Read without Pillow, for the tests."""
    at = png.index(b"tEXt" + KEYWORD.encode() + b"\0")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    return json.loads(png[at + 4 : at + 4 + length].partition(b"\0")[2])


def _rounded_up(value: float) -> str:
    """1.3e-7 for 1.24e-7."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa) + 0.1:.1f}e{int(exponent)}"


def _drawn(spec: dict[str, Any], numbers: Any) -> bytes:
    """The chart at twice the pixels, with its numbers in a text chunk."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg({"config": CONFIG, **spec})
    (width,) = re.findall(r'^<svg[^>]* width="(\d+)', svg)
    return _taken(f"<body style='margin: 0; line-height: 0'>{svg}", int(width), 2, numbers=numbers)


def _taken(
    page: str,
    width: int,
    scale: float,
    *,
    height: int = 0,
    end: str = "",
    clicks: Sequence[str] = (),
    numbers: Any = None,
) -> bytes:
    """A picture of a page of this width after some clicks: of this height, or down to the element `end`, or whole."""
    from PIL import Image, PngImagePlugin
    from playwright.sync_api import sync_playwright

    chromium = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        opened = browser.new_page(viewport={"width": width, "height": 100}, device_scale_factor=scale)
        opened.set_content(page)
        for button in clicks:
            opened.locator(button).evaluate("one => one.click()")  # the bar of tabs may lie above it
        if end:
            height = opened.locator(end).bounding_box()["y"]
        height = height or opened.evaluate("document.documentElement.scrollHeight")
        taken = opened.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
        browser.close()
    text = PngImagePlugin.PngInfo()
    if numbers is not None:
        text.add_text(KEYWORD, json.dumps(numbers))
    picture = io.BytesIO()
    # By coverage: the median cut spends all colours on greys and mixes those of the norms.
    small = Image.open(io.BytesIO(taken)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    small.save(picture, "PNG", optimize=True, pnginfo=text)
    return picture.getvalue()


PICTURES = {
    "masked-statistics": masked_statistics,
    "lstm-speed": lstm_speed,
    "findings": findings,
    "diagnosis": diagnosis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the page of `normwise report`")
    given = parser.parse_args()
    make: dict[str, Callable[[], bytes]] = PICTURES
    if given.report is not None:
        page = given.report.read_text("utf-8")
        make = {"report": lambda: report(page), "claims": lambda: claims(page)}
    for name in given.names or make:
        picture = make[name]()
        if len(picture) > MOST_BYTES:
            raise SystemExit(f"{name}.png would have {len(picture):,} bytes; at most {MOST_BYTES:,} for a phone")
        (OUT / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
