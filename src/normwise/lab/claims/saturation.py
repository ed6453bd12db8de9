"""saturation: units in the flat part, and what reaches the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from normwise.lab.claim import Claim, Evidence, average
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, lacks, log2_ratio

SIZE, RATES, STEPS = 64, [0.01, 0.1], 200
FEWER, MORE = 1, 1


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task in ("mlp", "mlp-bad-start")
        for spec in expand(
            task, seeds=seeds, norms=["none", "batch", "layer"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS
        )
    ]


def reaching(run: Run) -> float:
    """The first layer's gradient norm over the last layer's: median over the training."""
    layers = [series.values for name, series in run.series.items() if name.startswith("gradient/")]
    return median(first / last for first, last in zip(layers[0], layers[-1], strict=True)) if layers else 0.0


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for norm, short in (("batch", "BN"), ("layer", "LN")):
        flat = [100 * evidence.measure("mlp-bad-start", n, SIZE, average("saturated")) for n in ("none", norm)]
        what = f"bad start, saturated units: none - {short}"
        found.append(Effect(what, "points", FEWER, flat[0] - flat[1], headroom=lacks(0, *flat)))
        for task, where in (("mlp", "small weights"), ("mlp-bad-start", "bad start")):
            none, with_norm = (evidence.measure(task, n, SIZE, reaching) for n in ("none", norm))
            what = f"{where}, first over last layer's gradient: log2({short} / none)"
            found.append(Effect(what, "doublings", MORE, log2_ratio(with_norm, none), headroom=UNBOUNDED))
    return found


CLAIM = Claim(
    id="saturation",
    sentence="With BatchNorm or LayerNorm fewer units sit in the sigmoid's flat part (|x| > 6), and more gradient "
    "reaches the first layer.",
    source="tutorials; Ioffe & Szegedy 2015, section 3",
    measured=f"At batch size {SIZE}, {STEPS} steps: the share of saturated units, mean over the training, from "
    "weights of deviation 1 (mlp-bad-start), where units do saturate; and the first layer's gradient norm over the "
    "last one's, median over the training, there and in mlp.",
    rule=f"For both norms: at least {FEWER} point fewer saturated units and {2**MORE} times the ratio, in both nets.",
    specs=specs,
    effects=effects,
)
