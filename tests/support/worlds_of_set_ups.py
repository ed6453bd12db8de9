"""What runs record where a claim about a set-up of its own holds, and where it does not: numbers written by hand."""

from __future__ import annotations

from collections.abc import Callable

from normwise.lab.spec import Spec
from support.made_up_runs import Values

World = Callable[[Spec], Values]


def modes(batch_in_eval: float) -> World:
    def of(spec: Spec) -> Values:
        in_eval = batch_in_eval if spec.norm == "batch" else 0.95
        return {"final/train-mode/accuracy": [0.95], "final/eval-mode/accuracy": [in_eval]}

    return of


def dropout(before: float, again: float, behind: float) -> World:
    def of(spec: Spec) -> Values:
        if spec.task == "dropout-after-bn":
            return {"final/accuracy": [behind]}
        return {"final/accuracy": [before], "final/recalibrated/accuracy": [again]}

    return of


def tuned(slow: float, others: float) -> World:
    ways = {"slow": slow, "fast": others, "frozen": others, "recalibrated": others}
    return lambda spec: {f"final/{way}/accuracy": [right] for way, right in ways.items()}


def lagging(by: float, at_end: float) -> World:
    """A look at every step: the first half, and the end."""

    def of(spec: Spec) -> Values:
        half = spec.steps // 2 + 1
        return {"lag/running": [0.4 + by] * half + [0.2 + at_end], "lag/recalibrated": [0.4] * half + [0.2]}

    return of


def learned(norms: float, weights: float) -> World:
    return lambda spec: {"final/accuracy": [norms if spec.task.startswith("norms") else weights]}


def rates(batch_at_same: float) -> World:
    """Without norm 0.01 is the best rate and the highest; with BatchNorm 0.64 is. Accuracy there and at 0.01."""

    def of(spec: Spec) -> Values:
        best = 0.64 if spec.norm == "batch" else 0.01
        rate = spec.learning_rate
        loss = 2.3 if rate > best * 1.1 else 0.3 if rate > best / 1.1 else 0.6
        right = 0.85 if spec.norm == "none" else 0.95 if rate > 0.02 else batch_at_same
        return {"train/loss": [loss] * spec.steps, "final/accuracy": [right]}

    return of


def tiring(none: float, layer: float, decayed: float) -> World:
    """How many points the last tasks are below the first."""

    def of(spec: Spec) -> Values:
        lost = decayed if spec.task == "plasticity-decay" else layer if spec.norm == "layer" else none
        return {"train/accuracy": [0.6 - lost / 100 * task / 49 for task in range(50) for _ in range(20)]}

    return of


def bumps(batch: float) -> World:
    """How far loss and gradient change along the gradient, at the start and at two looks."""

    def of(spec: Spec) -> Values:
        later = batch if spec.norm == "batch" else 1.0
        kinds = ("loss", "gradient", "relative-loss", "relative-gradient")
        return {f"along/{kind}": [1.0, later, later] for kind in kinds}

    return of


WORLDS: dict[str, tuple[World, World]] = {
    "bn-finetune": (tuned(slow=0.5, others=0.9), tuned(slow=0.8, others=0.6)),
    "bn-leak": (modes(0.3), modes(0.94)),
    "dropout-bn": (dropout(0.9, 0.93, 0.95), dropout(0.95, 0.94, 0.9)),
    "large-lr": (rates(0.86), rates(0.95)),
    "ln-plasticity": (tiring(30, 12, 2), tiring(12, 30, 30)),
    "norm-only": (learned(0.8, 0.3), learned(0.3, 0.4)),
    "precise-bn": (lagging(0.2, 0.0), lagging(0.0, 0.0)),
    "smooth": (bumps(0.2), bumps(1.5)),
}
