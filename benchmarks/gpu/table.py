"""The figures of `python -m benchmarks gpu` as Markdown, for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]
Figure = dict[str, Any]

DRY = "dry"
DRY_LINE = (
    "**Dry run: Triton's interpreter on the CPU with tiny shapes. Nothing was measured, and nothing here says how fast "
    "anything is.**"
)


def markdown(results: Results) -> str:
    phases = results["phases"]
    parts = [_machine_line(results["machine"], results.get("seconds"))]
    if results["dry"]:
        parts.insert(0, DRY_LINE)
    for phase, title in (
        ("device", "What the device can do"),
        ("correct", "Proof"),
        ("recurrent", "Recurrent layers, us a step"),
        ("norms", "Norms, us a call"),
    ):
        if phase in phases:
            parts.append(f"### {title}\n\n{_phase(phase, phases[phase])}")
    return "\n\n".join(parts)


def _machine_line(machine: dict[str, Any], seconds: float | None) -> str:
    line = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    took = "" if seconds is None else f" Took {seconds:.0f} s."
    return (
        f"Measured on: {line}.{took} Medians; in brackets the ratio to the first column, taken in neighbouring samples "
        "(20%..80%): lower is better."
    )


def _phase(name: str, found: Results) -> str:
    if "stopped" in found:
        return f"Not measured: {found['stopped']}."
    parts = []
    figures = [figure for figure in found["figures"] if "failed" not in figure]
    if figures:
        parts.append({"device": _device, "correct": _proof, "recurrent": _recurrent, "norms": _norms}[name](figures))
    if failed := [f"- {figure['case']}: {figure['failed']}" for figure in found["figures"] if "failed" in figure]:
        parts.append("Failed:\n\n" + "\n".join(failed))
    if found["died"]:
        parts.append(f"The phase {found['died']}; what it had until then stands here.")
    if left := found["not_measured"]:
        parts.append(f"Not measured, {len(left)} cases for which there was no time: {'; '.join(left)}.")
    return "\n\n".join(parts) or "No case."


def _device(figures: Sequence[Figure]) -> str:
    return _table(["what", "figure"], [[f["case"], _value(f["value"], f["unit"])] for f in figures])


def _value(value: float | None, unit: str) -> str:
    return DRY if value is None else f"{value:.2f} {unit}"


def _proof(figures: Sequence[Figure]) -> str:
    wrong = [f for f in figures if f["error"] > 1]
    refused = [f for f in figures if "refused" in f]
    worst = max(figures, key=lambda f: f["error"])
    right = len(figures) - len(wrong) - len(refused)
    lines = [
        f"{right} of {len(figures)} cases right, {len(refused)} refused; the largest error is {worst['error']:.2f} of "
        f"what is allowed ({worst['case']})."
    ]
    lines += [f"- WRONG: {f['case']}, {f['error']:.1f} times the allowed error" for f in wrong]
    lines += sorted({f"- refused: {f['refused']}" for f in refused})
    return "\n".join(lines[:1] + ([""] if lines[1:] else []) + lines[1:])


def _recurrent(figures: Sequence[Figure]) -> str:
    for figure in figures:
        figure["row"] = [f"LN-{figure['cell']} {tuple(figure['shape'])}", figure["dtype"], figure["mode"]]
        figure["unit"] = figure["shape"][0]
    return _by_way(figures, "launches a step")


def _norms(figures: Sequence[Figure]) -> str:
    for figure in figures:
        figure["row"], figure["unit"] = [figure["norm"], figure["dtype"], figure["mode"]], 1
    return _by_way(figures, "launches")


def _by_way(figures: Sequence[Figure], launches: str) -> str:
    """A row a case, a column a way, and the reasons of those that were refused below."""
    ways = list(dict.fromkeys(way for f in figures for way in (*f["ways"], *f["refused"])))
    rows = []
    reasons: dict[str, None] = {}
    for f in figures:
        cells = [_cell(f["ways"].get(way), f["unit"], way in f["refused"]) for way in ways]
        counts = ", ".join(f"{way} {n:g}" for way, n in f["launches"].items() if n is not None)
        rows.append([*f["row"], *cells, counts])
        reasons |= dict.fromkeys(f"- {way}: {why}" for way, why in f["refused"].items())
    table = _table(["case", "dtype", "pass", *ways, launches], rows)
    return table if not reasons else f"{table}\n\nRefused:\n\n" + "\n".join(reasons)


def _cell(found: dict[str, Any] | None, unit: int, refused: bool) -> str:
    if found is None:
        return "refused" if refused else ""
    if found["median"] is None:
        return DRY
    text = f"{found['median'] * 1e6 / unit:.4g}"
    if ratio := found.get("ratio"):
        text += f" ({ratio['median']:.2f}, {ratio['p20']:.2f}..{ratio['p80']:.2f})"
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
