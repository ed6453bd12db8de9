"""`normwise claims`: what people claim about normalization, and what runs here say."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise.cli.compare import train
from normwise.cli.json_output import AsJson, print_json
from normwise.cli.options import OUT, Jobs, Scheduler

if TYPE_CHECKING:
    from normwise.lab.claim import Judged, Part

SEEDS, QUICK_SEEDS = 5, 3
MARKS = {"supported": "+", "contradicted": "-", "undecided": "?", "cannot tell": "0"}
WIDTH = 80


def claims(
    only: Annotated[
        str | None, typer.Option(metavar="A,B,..", help="As in faster,ics; an unknown one lists all. Default: all.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"How many: seeds 0 to N-1. Default: {SEEDS}.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_SEEDS} seeds: sooner done, and more is left undecided.")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Train nothing: judge by the runs that DIR/runs.sqlite has.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where runs.sqlite is.")] = OUT,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    json: AsJson = False,
) -> None:
    """Check what is claimed about normalization: supported, contradicted or undecided here.

    Exact claims are computed. The others are decided by runs over several seeds, by rules that were written down
    before the first result. What is trained is kept in DIR/runs.sqlite and never trained twice, so it can be done in
    parts: rerun a stopped command to resume it. `normwise report` draws the runs.
    """
    from normwise.lab.claim import as_json, judge
    from normwise.lab.claims import chosen
    from normwise.lab.store import Store
    from normwise.lab.strict_json import to_json
    from normwise.lab.sweep import cores

    if quick and seeds is not None:
        raise typer.BadParameter("--quick is --seeds 3: give one of them", param_hint="'--quick'")
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    wanted = chosen([name.strip() for name in only.split(",")] if only is not None else None)
    specs = {spec.key(): spec for claim in wanted for spec in claim.needs(count)}
    judged: list[Judged] = []
    if specs:
        with Store(out / "runs.sqlite", make=not stored) as store:
            if not stored:
                train(list(specs.values()), store, jobs=jobs or cores(), scheduler=scheduler)
            runs = store.runs(specs)
        judged = [judge(claim, runs, count) for claim in wanted]
    else:
        judged = [judge(claim, (), count) for claim in wanted]
    if json:
        print_json(to_json({"seeds": count, "claims": list(map(as_json, judged))}, indent=2))
    else:
        typer.echo(as_text(judged))


def as_text(judged: Sequence[Judged]) -> str:
    """A block a claim, and how many there are of each verdict."""
    verdicts = [one.verdict for one in judged]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in MARKS)
    return "\n\n".join([*map(block, judged), f"{len(judged)} claim{'s' * (len(judged) != 1)} here: {counts}."])


def block(one: Judged) -> str:
    from normwise.lab.verdict import Check

    claim = one.claim
    checks = [part for part in one.parts if isinstance(part, Check)]
    failed = [check for check in checks if check.verdict != "supported"]
    holding = sum(part.verdict == "supported" for part in one.parts)
    share = f" ({holding} of {len(one.parts)} parts supported)" if one.verdict != "supported" and holding else ""
    lines = [f"{one.verdict.upper()}  {claim.id}{share}", *_wrapped(claim.sentence, "  ")]
    if checks:
        lines.append(f"  {'+' if not failed else '-'} {len(checks) - len(failed)} of {len(checks)} computed parts hold")
    shown: list[Part] = [part for part in one.parts if part in failed or not isinstance(part, Check)]
    for part in shown:
        lines += [*_wrapped(part.what, f"  {MARKS[part.verdict]} ", "    "), *_wrapped(numbers(part), "      ")]
    if one.wanted:
        missing = "" if one.found == one.wanted else f" of {one.wanted} that the rule asks for"
        lines.append(f"  {one.found} run{'s' * (one.found != 1)}{missing}")
    return "\n".join([*lines, *_wrapped(f"Source: {claim.source}", "  ")])


def numbers(part: Part) -> str:
    """The effect with its spread and interval, beside what is claimed."""
    from normwise.lab.verdict import Check

    if isinstance(part, Check):
        return f"{part.value:.3g}; expected at {'most' if part.at_most else 'least'} {part.limit:.3g}"
    if part.mean is None:
        return "no runs"
    text = f"{round(part.mean, 9):.3g}"  # equal runs differ by rounding: 0, not 5e-15
    if part.interval is not None and part.spread is not None:
        low, high = part.interval
        text += f" ± {part.spread:.2g} {part.unit} over {len(part.values)} seeds, 95% {low:.3g} to {high:.3g}"
    else:
        text += f" {part.unit}, one seed"
    text += f"; claimed: at least {part.minimum:g}"
    sentences = [f"{more[:1].upper()}{more[1:]}" for more in (part.reason, part.would_decide) if more]
    return ". ".join([text, *sentences]) + "." * bool(sentences)


def _wrapped(text: str, first: str, others: str | None = None) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=first if others is None else others)
