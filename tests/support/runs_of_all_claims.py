"""What a store holds when `normwise claims` has run everything, with made-up numbers: nothing is trained."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable

from normwise.lab import watch
from normwise.lab.claims import claims
from normwise.lab.errors import LabError
from normwise.lab.run import GRADIENT_POINTS, TRAIN_POINTS, Result, Series
from normwise.lab.shift import LAYERS
from normwise.lab.spec import Spec
from normwise.lab.store import Curve, Run
from normwise.lab.tasks import load_task
from normwise.lab.tasks.charlm_deep import DEEP
from normwise.measure.shift import evenly_spread

TIME_STEPS = 24


def all_specs(seeds: int) -> list[Spec]:
    """Every run that some claim asks for, each once."""
    return list(dict.fromkeys(spec for claim in claims().values() for spec in claim.needs(seeds)))


def runs_of_all_claims(seeds: int) -> list[Run]:
    runs = []
    for spec in all_specs(seeds):
        result = made_up_result(spec)
        curves = {name: Curve(series.steps, series.values) for name, series in result.series.items()}
        runs.append(Run(spec.key(), spec.identity(), result.status, result.reason, "made up", curves))
    return runs


@functools.cache
def _weights(task: str, norm: str) -> tuple[str, ...]:
    """The layers whose gradients a run records, by the names of the net itself; () where the norm is undefined."""
    try:
        return tuple(watch.weights(load_task(task).task.model(norm, 0)))
    except LabError:
        return ()


def made_up_result(spec: Spec) -> Result:
    """As many series, of the names and lengths that ``lab/run.py`` records, as a real run of the spec has."""
    task, draws = load_task(spec.task).task, random.Random(repr(spec))
    names = _weights(spec.task, spec.norm)
    if not names:
        return Result("undefined", "made up")
    rate = math.exp(draws.uniform(-1, 1))

    def falling(steps: Iterable[int], start: float, end: float) -> Series:
        steps = list(steps)
        shares = [math.exp(-4 * rate * step / spec.steps) for step in steps]
        return Series(steps, [(end + (start - end) * share) * draws.uniform(0.8, 1.25) for share in shares])

    def rising(steps: Iterable[int]) -> Series:
        return Series(list(steps), [min(1.0, 0.95 - value) for value in falling(steps, 0.8, 0.1).values])

    result = Result("done")
    every = range(0, spec.steps, math.ceil(spec.steps / TRAIN_POINTS))
    seldom = range(0, spec.steps, max(1, spec.steps // GRADIENT_POINTS))
    apart = max(task.looks_apart, spec.steps // task.looks)
    before = range(0, spec.steps - apart + 1, apart)
    looks = [*before, spec.steps]
    result.series |= {
        "train/cases": Series([0], [1000.0]),
        "train/loss": falling(every, 2.3, 0.1),
        "train/accuracy": rising(every),
        "time/step": falling(every, 0.002, 0.001),
        **{f"gradient/{name}": falling(seldom, 1.0, 0.01) for name in names},
        **{f"heldout/{mode}/accuracy": rising(looks) for mode in ("train", "eval")},
        **{f"heldout/{mode}/loss": falling(looks, 2.3, 0.2) for mode in ("train", "eval")},
        "heldout/gap": falling(looks, 0.3, 0.05),
        "saturated": falling(looks, 0.4, 0.2),
        "final/accuracy": Series([spec.steps], [draws.uniform(0.8, 1)]),
        "final/loss": Series([spec.steps], [draws.uniform(0.1, 0.5)]),
    }
    if spec.task == "precise-bn":
        result.series |= {f"lag/{by}": falling(looks, 1.0, 0.1) for by in ("running", "recalibrated")}
    if spec.task in DEEP:
        result.series |= {
            name: falling(looks[::3], 1.0, 0.5) for name in ("residual/growth", "attention/max-logit", "skipped/late")
        }
    result.series |= {f"final/{part}/accuracy": Series([spec.steps], [draws.random()]) for part in task.parts()}
    if task.watched is not None:
        result.series |= {f"preactivation/p{p}": falling(looks, p - 50, 2 * p - 100) for p in watch.PERCENTILES}
    for name in evenly_spread(list(names), LAYERS):
        result.series |= {f"shift/{kind}/{name}": falling(before, 1.0, 0.1) for kind in ("gradient", "inputs")}
    if task.cases[0].lengths is not None:
        result.series["train/longest"] = Series([0], [TIME_STEPS / 2])
        for kind in ("summed", "unnormalized", "gradient"):
            for mode in ("train", "eval"):
                for when in ("start", "end"):
                    result.series[f"over-time/{kind}/{mode}/{when}"] = falling(range(TIME_STEPS), 1.0, 0.1)
    if task.derived(1.0):
        result.series["heldout/eval/bits-per-character"] = falling(looks, 4.0, 2.0)
        result.series["final/bits-per-character"] = Series([spec.steps], [draws.uniform(1.5, 3)])
    return result
