"""Writes the verdicts into docs/claims.md, from docs/claims.json.

    normwise claims --json > results.json
    python scripts/make_claims_page.py results.json   # takes these results into docs/claims.json, then writes the page
    python scripts/make_claims_page.py                # writes the page from docs/claims.json as it is
    python scripts/make_claims_page.py --again two.json   # takes these in as the independent runs to compare with

Results replace those of the same claims; claims that they lack stay as they were. `normwise claims` reads
docs/claims.json too, for what a claim costs and for the verdicts of claims that it does not run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/make_claims_page.py -->", "<!-- end of what is made -->"
BEGIN_TWICE, END_TWICE = "<!-- compared by scripts/make_claims_page.py -->", "<!-- end of what is compared -->"
DECIDED = {"supported", "contradicted"}
OF_CLAIM = ("id", "verdict", "reason", "sentence", "source", "kind", "seeds", "first_seed", "seconds_a_seed")
OF_CHECK = ("what", "verdict", "value", "limit", "at_most")
OF_EFFECT = (
    "what", "verdict", "unit", "minimum", "mean", "interval", "confidence", "headroom", "no_ceiling", "power", "reason",
    "seeds_needed", "would_decide",
)  # fmt: skip
MOST_BYTES = 200_000


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """What the page and `normwise claims` need of a claim's JSON; numbers to four digits."""
    parts = [
        {name: short(part.get(name)) for name in (OF_EFFECT if "unit" in part else OF_CHECK)} for part in found["parts"]
    ]
    return {**{name: short(found.get(name)) for name in OF_CLAIM}, "parts": parts}


def short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [short(one) for one in value] if isinstance(value, list) else value


def taken_in(record: dict[str, Any], results: dict[str, Any], where: str = "claims") -> dict[str, Any]:
    """The record with the results in the place of what it had of the same claims; those that lack runs are left out."""
    ran = [compact(claim) for claim in results["claims"] if claim["runs_found"] == claim["runs_wanted"]]
    if where == "again":
        ran = [claim for claim in ran if claim["kind"] != "exact"]  # computed: the same whatever the seeds
        first = {claim["id"]: set(seeds_of(claim)) for claim in record["claims"]}
        shared = [claim["id"] for claim in ran if first.get(claim["id"], set()) & set(seeds_of(claim))]
        if shared:
            sys.exit(f"not independent, some seeds are the same: {', '.join(shared)}. Give --first-seed.")
    claims = {claim["id"]: claim for claim in [*record.get(where, []), *ran]}
    exact_first = sorted(claims.values(), key=lambda claim: (claim["kind"] == "run", claim["id"]))
    made_with = record.get("made_with", {}) if where == "again" else results["made_with"]
    return {**record, "made_with": made_with, where: exact_first}


def seeds_of(claim: dict[str, Any]) -> range:
    return range(claim["first_seed"], claim["first_seed"] + claim["seeds"])


def page(record: dict[str, Any], before: str) -> str:
    """The page with what stands between the marks made anew."""
    return between(BEGIN_TWICE, twice(record), END_TWICE, between(BEGIN, made(record), END, before))


def between(begin: str, made: str, end: str, before: str) -> str:
    head, _, rest = before.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"docs/claims.md lacks the marks {begin} and {end}")
    return f"{head}{begin}\n\n{made}\n{end}{tail}"


def twice(record: dict[str, Any]) -> str:
    """Both runs side by side: verdicts of claims and, since one open part leaves a claim open, of parts."""
    first = {claim["id"]: claim for claim in record["claims"]}
    rows, claims, parts = [], [], []
    for again in record.get("again", []):
        one = first[again["id"]]
        pairs = [(a, b) for a in one["parts"] for b in again["parts"] if a["what"] == b["what"] and "unit" in a]
        of_parts = [outcome(a, b) for a, b in pairs]
        claims.append(outcome(one, again))
        parts += of_parts
        runs = " | ".join(f"{run['verdict']}, seeds {seeds_of(run)[0]}-{seeds_of(run)[-1]}" for run in (one, again))
        rows.append(f"| `{again['id']}` | {runs} | {claims[-1]} | {counted(of_parts)} |")
        for (a, b), found in zip(pairs, of_parts, strict=True):
            if found == "differ":
                rows.append(
                    f"| {a['what']} | {measured(a)}: {a['verdict']} | {measured(b)}: {b['verdict']} | differ | |"
                )
    if not rows:
        return "Not compared yet.\n"
    said = f"{len(claims)} trained claims ran twice: {counted(claims)}; of their parts {counted(parts)}."
    head = ["| Claim | Recorded | Again | Verdicts | Parts |", "|---|---|---|---|---|"]
    return "\n".join([said, "", *head, *rows]) + "\n"


def outcome(one: dict[str, Any], again: dict[str, Any]) -> str:
    if not {one["verdict"], again["verdict"]} <= DECIDED:
        return "open"
    return "agree" if one["verdict"] == again["verdict"] else "differ"


def counted(outcomes: list[str]) -> str:
    counts = ((word, outcomes.count(word)) for word in ("agree", "differ", "open"))
    return ", ".join(f"{count} {word}" for word, count in counts if count)


def made(record: dict[str, Any]) -> str:
    claims = record["claims"]
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    with_what = ", ".join(f"{name} {version}" for name, version in record["made_with"].items())
    lines = [
        f"{len(claims)} claims: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}. Made with "
        f'{with_what}. "Doublings" are log2 of a ratio; a seed\'s seconds are those of one core.',
        "",
        "| Claim | Verdict | Seeds | Seconds a seed | Found |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        seeds, seconds = (claim["seeds"], f"{claim['seconds_a_seed']:.0f}") if claim["kind"] != "exact" else ("", "")
        anchor = f"[`{claim['id']}`](#{claim['id']})"
        lines.append(f"| {anchor} | {claim['verdict']} | {seeds} | {seconds} | {in_short(claim)} |")
    for claim in claims:
        lines += ["", f"### {claim['id']}", "", f"**{claim['verdict']}**. {claim['sentence']} ({claim['source']})", ""]
        lines += of_parts(claim["parts"])
    return "\n".join(lines) + "\n"


def in_short(claim: dict[str, Any]) -> str:
    """The part that stands for the verdict."""
    deciding = next((part for part in claim["parts"] if part["verdict"] == claim["verdict"]), None)
    if deciding is None:
        return ""
    if "unit" not in deciding:
        holding = sum(part["verdict"] == "supported" for part in claim["parts"])
        return f"{holding} of {len(claim['parts'])} parts hold"
    return f"{deciding['what']}: {measured(deciding)}"


def measured(part: dict[str, Any]) -> str:
    if part["mean"] is None:
        return "no runs"
    low, high = part["interval"] or (part["mean"], part["mean"])
    return f"{number(part['mean'])} {part['unit']} ({number(low)} to {number(high)}), at least {part['minimum']:g}"


def number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def of_parts(parts: list[dict[str, Any]]) -> list[str]:
    lines = []
    checks = [part for part in parts if "unit" not in part]
    failed = [check for check in checks if check["verdict"] != "supported"]
    if checks:
        lines.append(f"- {len(checks) - len(failed)} of {len(checks)} computed parts hold.")
    lines += [f"- {part['what']}: {part['value']:.2g}, contradicted." for part in failed]
    for part in parts:
        if "unit" in part:
            level = f", {100 * part['confidence']:g}% interval" if part["mean"] is not None else ""
            more = "".join(f" {text[:1].upper()}{text[1:]}." for text in (part["reason"], part["would_decide"]) if text)
            lines.append(f"- {part['what']}: {measured(part)}{level}; {room(part)}: {part['verdict']}.{more}")
    return lines


def room(part: dict[str, Any]) -> str:
    return "no ceiling" if part["headroom"] is None else f"room for {number(part['headroom'])}"


def main(arguments: list[str]) -> None:
    stored, text = DOCS / "claims.json", DOCS / "claims.md"
    record = json.loads(stored.read_text("utf-8")) if stored.exists() else {"claims": []}
    where = "claims"
    for argument in arguments:
        if argument == "--again":
            where = "again"
        else:
            record = taken_in(record, json.loads(Path(argument).read_text("utf-8")), where)
    written = json.dumps(record, indent=1, ensure_ascii=True) + "\n"
    if len(written) > MOST_BYTES:
        sys.exit(f"docs/claims.json would have {len(written):,} bytes, more than {MOST_BYTES:,}")
    stored.write_text(written, "utf-8")
    text.write_text(page(record, text.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
