"""`normwise claims`: claims about normalization, tested by runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normwise.cli.claims_text import agreement, as_text, left_open, not_run
from normwise.cli.compare import train
from normwise.cli.json_output import AsJson, print_json
from normwise.cli.options import OUT, Jobs, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from normwise.lab.claim import Claim, Judged
    from normwise.lab.decide import State
    from normwise.lab.spec import Spec
    from normwise.lab.store import Run, Store

SEEDS, QUICK_SEEDS = 5, 3
MINUTES, QUICK_MINUTES, DECIDE_MINUTES = 10.0, 2.0, 60.0


def claims(
    only: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,..", help="Claims to test, such as faster,ics; an unknown one lists all. Default: all."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"Number of seeds, 0 to N-1. Default: {SEEDS}.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"{QUICK_SEEDS} seeds, and what fits in {QUICK_MINUTES:g} minutes."),
    ] = False,
    decide: Annotated[
        bool,
        typer.Option("--decide", help="Add seeds until each claim is decided or the time is up, cheapest first."),
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help=f"Run the claims that fit in N minutes. Default: {MINUTES:g}; with --only no limit; "
            f"with --decide {DECIDE_MINUTES:g}.",
            show_default=False,
        ),
    ] = None,
    first_seed: Annotated[
        int,
        typer.Option("--first-seed", metavar="N", min=0, help="The first seed; another one makes independent runs."),
    ] = 0,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Compare the verdicts with those in FILE, the --json output of other runs.",
        ),
    ] = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="Train nothing: judge by the runs in DIR/runs.sqlite.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where runs.sqlite is.")] = OUT,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    json: AsJson = False,
) -> None:
    """Test claims about normalization: supported, contradicted, undecided, or cannot tell here.

    Exact claims are computed. The others are decided by runs over several seeds, by rules that were written down
    before the first result. Runs are stored in DIR/runs.sqlite and never trained twice: rerun the command to resume.
    Without --only it runs what fits in ten minutes, and lists the other claims with their cost and recorded verdict.
    `normwise report` draws the runs.
    """
    from normwise.lab.claim import judge
    from normwise.lab.claims import chosen
    from normwise.lab.cost import read_record, recorded
    from normwise.lab.store import Store
    from normwise.lab.sweep import cores

    _refuse(seeds, quick, decide, minutes, stored)
    wanted = chosen([name.strip() for name in only.split(",")] if only is not None else None)
    other = read_record(against) if against else None
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    if minutes is None and only is None and not decide:
        minutes = QUICK_MINUTES if quick else MINUTES
    if not any(claim.specs for claim in wanted):
        judged = [judge(claim, (), count) for claim in wanted]
        _print(judged, {"seeds": count, "first_seed": first_seed}, {}, [], other, json)
        return
    with Store(out / "runs.sqlite", make=not stored, maker="claims") as store:
        some = Some(store, recorded(), jobs or cores(), scheduler, first_seed, stored)
        rest: dict[str, tuple[Claim, float]] = {}
        if decide:
            states = some.decided(wanted, DECIDE_MINUTES if minutes is None else minutes)
            judged, texts = [one.judged for one in states], [left_open(states, some.jobs)]
        else:
            taken, rest = some.fitting(wanted, count, minutes)
            judged = some.judged(taken, count)
            texts = [not_run(rest, some.record, minutes)] if rest and minutes is not None else []
        costs = some.costs(judged)
    about = {
        "seeds": count,
        "first_seed": first_seed,
        "not_run": {name: {"seconds": s, "recorded": some.record.get(name)} for name, (_, s) in rest.items()},
    }
    _print(judged, about, costs, texts, other, json)


def _refuse(seeds: int | None, quick: bool, decide: bool, minutes: float | None, stored: bool) -> None:
    """Options that contradict each other."""
    if quick and seeds is not None:
        raise typer.BadParameter("--quick is --seeds 3: give one of them", param_hint="'--quick'")
    if decide and (quick or seeds is not None):
        raise typer.BadParameter(
            "--decide looks at 5, 10, 20, 40 and 80 seeds: leave --seeds and --quick away", param_hint="'--decide'"
        )
    if minutes is not None and (stored or not 0 < minutes < float("inf")):
        raise typer.BadParameter(
            "--stored trains nothing and takes no time" if stored else f"{minutes} is not a positive number of minutes",
            param_hint="'--minutes'",
        )


@dataclass(frozen=True)
class Some:
    """What is done with some claims on one store."""

    store: Store
    record: Mapping[str, Mapping[str, Any]]
    jobs: int
    scheduler: str | None
    first_seed: int
    stored: bool

    def runs(self, specs: Iterable[Spec]) -> dict[str, Run]:
        keys = dict.fromkeys(spec.key() for spec in specs)
        return {run.key: run for run in self.store.runs(keys)}

    def fitting(
        self, claims: Sequence[Claim], count: int, minutes: float | None
    ) -> tuple[list[Claim], dict[str, tuple[Claim, float]]]:
        """Those to run, and those for which there is no time, with their seconds here."""
        from normwise.lab.cost import Costs
        from normwise.lab.decide import fitting

        if minutes is None or self.stored:
            return list(claims), {}
        runs = self.runs(spec for claim in claims for spec in claim.needs(count, self.first_seed))
        costs = Costs(runs.values(), self.record)
        taken = fitting(
            claims, 60 * minutes, lambda claim: claim.needs(count, self.first_seed), costs, stored=runs, jobs=self.jobs
        )
        rest = [claim for claim in claims if claim not in taken]
        return taken, {claim.id: (claim, count * costs.a_seed(claim) / self.jobs) for claim in rest}

    def judged(self, claims: Sequence[Claim], count: int) -> list[Judged]:
        """The verdicts, after what is missing has been trained."""
        from normwise.lab.claim import judge

        specs = {spec.key(): spec for claim in claims for spec in claim.needs(count, self.first_seed)}
        if specs and not self.stored:
            train(list(specs.values()), self.store, jobs=self.jobs, scheduler=self.scheduler)
        runs = self.store.runs(specs)
        return [judge(claim, runs, count, first_seed=self.first_seed) for claim in claims]

    def decided(self, claims: Sequence[Claim], minutes: float) -> list[State]:
        """Where each claim stands when all are decided or the time is up."""
        from normwise.lab.cost import Costs
        from normwise.lab.decide import decide

        end = time.monotonic() + (0 if self.stored else 60 * minutes)
        return decide(
            claims,
            self.runs,
            lambda specs: train(specs, self.store, jobs=self.jobs, scheduler=self.scheduler, until=end),
            lambda: -1.0 if self.stored else end - time.monotonic(),
            lambda runs: Costs(runs, self.record),
            jobs=self.jobs,
            first_seed=self.first_seed,
        )

    def costs(self, judged: Sequence[Judged]) -> dict[str, float]:
        """Seconds a seed of each claim that needs runs, on one core."""
        from normwise.lab.cost import Costs

        claims = [one.claim for one in judged if one.claim.specs]
        costs = Costs(self.runs(s for claim in claims for s in claim.needs(1, self.first_seed)).values(), self.record)
        return {claim.id: costs.a_seed(claim) for claim in claims}


def _print(
    judged: Sequence[Judged],
    about: Mapping[str, Any],
    costs: Mapping[str, float],
    texts: Sequence[str],
    other: Mapping[str, Mapping[str, Any]] | None,
    json: bool,
) -> None:
    import torch

    import normwise
    from normwise.lab.claim import as_json
    from normwise.lab.store import this_machine
    from normwise.lab.strict_json import to_json

    if json:
        found = [{**as_json(one), "seconds_a_seed": round(costs.get(one.claim.id, 0), 2)} for one in judged]
        made_with = {"normwise": normwise.__version__, "torch": torch.__version__, "machine": this_machine()}
        print_json(to_json({**about, "made_with": made_with, "claims": found}, indent=2))
        return
    agreed = [] if other is None else [agreement(judged, other)]
    typer.echo("\n\n".join([as_text(judged), *texts, *agreed]))
