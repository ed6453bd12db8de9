"""no-affine: does LayerNorm need its gain and bias?"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

# batch size, steps, learning rates, and how many points less count as none: 5 of 1,000 or 4 of 370 held-out cases
NETS: dict[str, tuple[int, int, list[float], float]] = {
    "mlp": (64, 400, [0.01, 0.1], 0.5),
    "cnn": (64, 150, [0.005, 0.03], 0.5),
    "transformer": (32, 150, [0.003, 0.01], 1),
}


def specs(seeds: int) -> list[Spec]:
    norms = ["layer", "layer-plain"]
    return [
        spec
        for task, (size, steps, rates, _) in NETS.items()
        for spec in expand(task, seeds=seeds, norms=norms, batch_sizes=[size], learning_rates=rates, steps=steps)
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for task, (size, _, _, margin) in NETS.items():
        plain, full = (100 * evidence.measure(task, norm, size, accuracy) for norm in ("layer-plain", "layer"))
        what = f"{task}, held-out accuracy: without - with"
        found.append(Effect(what, "points", -margin, plain - full, headroom=lacks(100, plain, full, worst=10)))
    return found


CLAIM = Claim(
    id="no-affine",
    sentence="LayerNorm without gain and bias is no worse.",
    source="Xu et al. 2019",
    measured="Held-out accuracy of mlp, cnn and transformer with LayerNorm without gain and bias less that with "
    "them, each at its best learning rate.",
    rule="No more than 0.5 points less in mlp and cnn, 1 in transformer.",
    specs=specs,
    effects=effects,
)
