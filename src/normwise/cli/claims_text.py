"""Judged claims as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normwise.words import counted

if TYPE_CHECKING:
    from normwise.lab.claim import Claim, Judged, Part
    from normwise.lab.decide import State

MARKS = {"supported": "+", "contradicted": "-", "undecided": "?", "cannot tell": "0"}
WIDTH = 80


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
    share = (
        f" ({holding} of {counted(len(one.parts), 'part')} supported)" if one.verdict != "supported" and holding else ""
    )
    lines = [f"{one.verdict.upper()}  {claim.id}{share}", *_wrapped(claim.sentence, "  ")]
    if checks:
        lines.append(
            f"  {'-' if failed else '+'} {len(checks) - len(failed)} of {counted(len(checks), 'computed part')} hold"
        )
    shown: list[Part] = [part for part in one.parts if part in failed or not isinstance(part, Check)]
    for part in shown:
        lines += [*_wrapped(part.what, f"  {MARKS[part.verdict]} ", "    "), *_wrapped(numbers(part), "      ")]
    if one.wanted:
        missing = "" if one.found == one.wanted else f" of {one.wanted} that the rule asks for"
        lines.append(f"  {counted(one.found, 'run')}{missing}")
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
        text += f" ± {part.spread:.2g} {part.unit} over {counted(len(part.values), 'seed')}, "
        text += f"{100 * part.confidence:g}% {low:.3g} to {high:.3g}"
    else:
        text += f" {part.unit}, one seed"
    text += f"; claimed: at least {part.minimum:g}"
    sentences = [f"{more[:1].upper()}{more[1:]}" for more in (part.reason, part.would_decide) if more]
    return ". ".join([text, *sentences]) + "." * bool(sentences)


def not_run(costs: Mapping[str, tuple[Claim, float]], record: Mapping[str, Mapping[str, Any]], minutes: float) -> str:
    """The claims that did not fit into the time: what they cost here, and the verdict that docs/claims.json has."""
    from normwise.lab.cost import in_words

    lines = _wrapped(
        f"Not run, as they do not fit into {minutes:g} minutes (--minutes N, or --only ID runs one), with their time "
        "on this machine and the verdict recorded in docs/claims.md:"
    )
    for name, (claim, seconds) in costs.items():
        known = record.get(name)
        verdict = f"{known['verdict']} ({known.get('seeds', '?')} seeds)" if known else "not recorded"
        lines += [f"  {name}: {in_words(seconds)}; {verdict}", *_wrapped(claim.sentence, "    ")]
    return "\n".join(lines)


def left_open(states: Iterable[State], jobs: int) -> str:
    """What became of the claims that no look has decided."""
    from normwise.lab.cost import in_words
    from normwise.lab.decide import LOOKS

    lines = []
    for state in states:
        if state.is_decided:
            continue
        if state.until is not None:
            said = f"{state.until} seeds may decide it, for {in_words(state.cost / jobs)} more on this machine"
        elif state.needed is not None:
            said = f"about {state.needed} seeds would decide it, more than the {LOOKS[-1]} of the last look"
        else:
            said = state.judged.reason or "no number of seeds is likely to decide it"
        lines += _wrapped(
            f"{state.claim.id} ({state.judged.verdict} after {counted(state.seeds, 'seed')}): {said}", "  ", "    "
        )
    return "\n".join(["Open:", *lines]) if lines else "Every claim is decided."


def agreement(judged: Sequence[Judged], other: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a claim with both verdicts, and whether they agree: where both are decided they should."""
    decided = {"supported", "contradicted"}
    lines, counts = [f"{'claim':<18}{'here':<14}{'there':<14}"], {"agree": 0, "DIFFER": 0, "open": 0}
    for one in judged:
        there = other[one.claim.id]["verdict"] if one.claim.id in other else "absent"
        both = {one.verdict, there}
        found = "open" if not both <= decided else "agree" if len(both) == 1 else "DIFFER"
        counts[found] += 1
        lines.append(f"{one.claim.id:<18}{one.verdict:<14}{there:<14}{found}")
    return "\n".join([*lines, ", ".join(f"{count} {word}" for word, count in counts.items())])


def _wrapped(text: str, first: str = "", others: str | None = None) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=first if others is None else others)
