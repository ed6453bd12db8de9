"""The figures of `--json FILE` as Markdown: a table a suite, under the line that says what they were measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, dict[str, Any]]  # by allocator: what was measured on, and a list of figures
KEPT, DEFAULT, RETURNED = "memory kept", "default", "memory returned"


def markdown(results: Figures) -> str:
    """All tables. A wrong result has no ratio, and says so."""
    about = next(iter(results.values()))["machine"]
    suites = list(dict.fromkeys(figure["suite"] for part in results.values() for figure in part["figures"]))
    parts = [_machine_line(about)]
    for suite in suites:
        found = [
            f | {"allocator": name} for name, part in results.items() for f in part["figures"] if f["suite"] == suite
        ]
        if suite == "models":
            parts += _steps(results)
            continue
        timed = found[0]["allocator"] != RETURNED
        parts.append(f"### {suite}\n\n" + (_times(found) if timed else _bytes(found)))
    return "\n\n".join(parts)


def _steps(results: Figures) -> list[str]:
    """Whole steps: a table for each level and count of threads, a row a net, a column a way. Compiled ones are compared
    with torch.nn's compiled, and that with torch.nn's eager."""
    parts = []
    for level, part in results.items():
        if part.get("unmeasured"):
            parts.append(f"### {level}\n\nUnmeasured: {part['unmeasured']}.")
        figures = [f for f in part["figures"] if f["suite"] == "models"]
        for threads in dict.fromkeys(f["threads"] for f in figures):
            some = [f for f in figures if f["threads"] == threads]
            ways = list(dict.fromkeys(way for f in some for way in f.get("ratios", ())))
            rows = [
                [
                    f["case"],
                    f"{f['theirs'] * 1e3:.1f}" if "theirs" in f else "wrong result",
                    *[_ratio(f["ratios"][way] | {"error": 0}) if way in f.get("ratios", ()) else "" for way in ways],
                    "" if f["must"] is None else f"{f['must']:.2f}",
                ]
                for f in some
            ]
            title = f"### {level}: {part['machine']['isa']}, {threads} thread{'s' if threads > 1 else ''}"
            parts.append(title + "\n\n" + _table(["step", "torch.nn, ms", *ways, "must"], rows))
    return parts


def _machine_line(about: dict[str, Any]) -> str:
    return (
        f"Measured on {about['processor']}, {about['cores']} cores, {about['isa']}; torch {about['torch']}, "
        f"Python {about['python']}. Ratios are ours/theirs, medians of neighbouring pairs (20%..80%): lower is better."
    )


def _times(figures: Sequence[dict[str, Any]]) -> str:
    """A row a case: the ratio at most threads, with one thread, with the default allocator, and what nothing beats."""
    most = max(f["threads"] for f in figures)
    columns: dict[str, Callable[[dict[str, Any]], bool]] = {
        f"{most} threads": lambda f: f["allocator"] == KEPT and f["threads"] == most,
        "1 thread": lambda f: f["allocator"] == KEPT and f["threads"] == 1,
        "default allocator": lambda f: f["allocator"] == DEFAULT,
    }
    if most == 1:
        del columns["1 thread"]
    rows = []
    for case, against in dict.fromkeys((f["case"], f["against"]) for f in figures):
        own = [f for f in figures if (f["case"], f["against"]) == (case, against)]
        cells = [next((_ratio(f) for f in own if wanted(f)), "") for wanted in columns.values()]
        rows.append([case, against, *cells, _limit(own[0])])
    return _table(["case", "against", *columns, "limit"], rows)


def _ratio(figure: dict[str, Any]) -> str:
    if figure["error"] > 1:
        return "wrong result"
    return f"{figure['median']:.2f} ({figure['p20']:.2f}..{figure['p80']:.2f})"


def _limit(figure: dict[str, Any]) -> str:
    """The share of their time that cannot be avoided."""
    if figure.get("limit") is None:
        return ""
    return f"{figure['limit'] / figure['theirs']:.2f}"


def _bytes(figures: Sequence[dict[str, Any]]) -> str:
    mib = 1 << 20
    rows = [
        [
            f["case"],
            f["against"],
            f"{f['kept'] / mib:.1f}",
            f"{f['their_kept'] / mib:.1f}",
            f"{f['peak'] / mib:.1f}",
            f"{f['their_peak'] / mib:.1f}",
            f"{f['median']:.2f}",
        ]
        for f in figures
    ]
    head = ["layer", "against", "kept for backward, MiB", "theirs", "peak, MiB", "theirs", "ratio of peaks"]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
