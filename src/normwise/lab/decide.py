"""Which seeds to add so that open claims become decided, and when to stop.

Looking again and again at growing evidence, with an interval of 95% each time, goes wrong more often than one time in
20: after looks at 5, 10, 20, 40 and 80 seeds, one of the five intervals has missed the mean in 18% of experiments
(simulated). So the looks are fixed beforehand, at ``LOOKS`` seeds, and each has an interval of ``LOOK_CONFIDENCE``,
with which it is 5% for all five together (a constant level over the looks: Pocock 1977, Biometrika 64). The first look
that decides is the verdict, whatever more seeds the store may have.

The most informative claim comes first: the open one whose expected cost to a decision is least. That cost is the
seconds of all runs up to the look at which it would be decided, if effects and spreads stay what they are. A claim is
contradicted with the first of its parts that is, and supported with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from normwise.lab.claim import Claim, Judged, judge
from normwise.lab.cost import Costs
from normwise.lab.spec import Spec
from normwise.lab.store import Run
from normwise.lab.verdict import CONTRADICTED, SUPPORTED, Effect

LOOKS = (5, 10, 20, 40, 80)
LOOK_CONFIDENCE = 0.988


@dataclass(frozen=True)
class State:
    """A claim at its last look. ``seeds`` is 0 before the first; ``needed`` the seeds that would decide it, None where
    no number of them would; ``missing`` the runs up to ``until``, the look that may decide, and ``cost`` their seconds
    on one core."""

    judged: Judged
    seeds: int
    needed: int | None = None
    until: int | None = None
    missing: tuple[Spec, ...] = ()
    cost: float = 0.0

    @property
    def claim(self) -> Claim:
        return self.judged.claim

    @property
    def is_decided(self) -> bool:
        return self.judged.verdict in (SUPPORTED, CONTRADICTED)

    def next_runs(self) -> list[Spec]:
        """Those of the next look, among the missing ones."""
        after = next((look for look in LOOKS if look > self.seeds), 0)
        keys = {spec.key() for spec in self.claim.needs(after, self.judged.first_seed)}
        return [spec for spec in self.missing if spec.key() in keys]


def state(claim: Claim, runs: Mapping[str, Run], costs: Costs, first_seed: int = 0) -> State:
    """Where a claim stands by the runs that are there, by key."""
    judged, seeds = judge(claim, (), 0, first_seed=first_seed, confidence=LOOK_CONFIDENCE), 0
    for look in LOOKS if claim.specs else ():
        specs = claim.needs(look, first_seed)
        if any(spec.key() not in runs for spec in specs):
            break
        found = [runs[spec.key()] for spec in specs]
        judged, seeds = judge(claim, found, look, first_seed=first_seed, confidence=LOOK_CONFIDENCE), look
        if judged.verdict in (SUPPORTED, CONTRADICTED):
            break
    if not claim.specs or judged.verdict in (SUPPORTED, CONTRADICTED):
        return State(judged, seeds)
    needed = seeds_needed(judged) if seeds else LOOKS[0]
    until = next((look for look in LOOKS if look > seeds and look >= (needed or 0)), None) if needed else None
    missing = [s for s in claim.needs(until, first_seed) if s.key() not in runs] if until else []
    return State(judged, seeds, needed, until, tuple(missing), costs.seconds(claim, missing))


def seeds_needed(judged: Judged) -> int | None:
    """About how many seeds would decide an open claim: as many as its first part takes that heads for a contradiction,
    else as many as its last part takes."""
    effects = [part for part in judged.parts if isinstance(part, Effect)]
    against = [e.seeds_needed for e in effects if e.mean is not None and e.mean < e.minimum]
    failing = [needed for needed in against if needed is not None]
    if failing:
        return min(failing)
    needed = [effect.seeds_needed for effect in effects]
    known = [seeds for seeds in needed if seeds is not None]
    return max(known) if known and len(known) == len(needed) else None


def decide(
    claims: Sequence[Claim],
    stored: Callable[[Iterable[Spec]], Mapping[str, Run]],
    train: Callable[[Sequence[Spec]], bool],
    seconds_left: Callable[[], float],
    costs: Callable[[Iterable[Run]], Costs],
    *,
    jobs: int,
    first_seed: int = 0,
) -> list[State]:
    """Add seeds until every claim is decided, none that is open fits into the time that is left, or it is up.

    Args:
        claims: which.
        stored: the stored runs among some specs, by key.
        train: trains and stores runs; False if it had to stop before all were done.
        seconds_left: of the time that was given.
        costs: what runs cost, from the runs that there are.
        jobs: how many runs are trained at once.
        first_seed: seeds from this one on.

    Returns: the state of each claim at the end.
    """
    is_up = False
    while True:
        runs = stored(spec for claim in claims for spec in claim.needs(LOOKS[-1], first_seed))
        prices = costs(runs.values())
        states = [state(claim, runs, prices, first_seed) for claim in claims]
        hopeful = sorted((one for one in states if one.missing), key=lambda one: one.cost)
        left = seconds_left()
        nexts = ((one, one.next_runs()) for one in hopeful)
        following = next((runs for one, runs in nexts if prices.seconds(one.claim, runs) / jobs <= left), None)
        if is_up or following is None:
            return states
        is_up = not train(following)


def fitting(
    claims: Sequence[Claim],
    seconds: float,
    wanted: Callable[[Claim], Sequence[Spec]],
    costs: Costs,
    *,
    stored: Iterable[str],
    jobs: int,
) -> list[Claim]:
    """The claims whose missing runs take no longer than ``seconds`` together, the cheapest first; claims share runs,
    and what is stored costs nothing."""
    there, left, chosen = set(stored), seconds * jobs, set()
    missing = {claim.id: [spec for spec in wanted(claim) if spec.key() not in there] for claim in claims}
    for claim in sorted(claims, key=lambda claim: costs.seconds(claim, missing[claim.id])):
        price = costs.seconds(claim, [spec for spec in missing[claim.id] if spec.key() not in there])
        if price <= left:
            left -= price
            chosen.add(claim.id)
            there |= {spec.key() for spec in missing[claim.id]}
    return [claim for claim in claims if claim.id in chosen]
