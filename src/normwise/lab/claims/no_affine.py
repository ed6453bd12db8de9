"""no-affine: does LayerNorm need its gain and bias?"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import ENTROPY, Claim, Evidence, accuracy, bits
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

# batch size, steps, learning rates, and how much worse counts as none: 5 of 1,000 held-out cases, or so many bits
NETS: dict[str, tuple[int, int, list[float], float]] = {
    "mlp": (64, 400, [0.01, 0.1], 0.5),
    "cnn": (64, 150, [0.005, 0.03], 0.5),
    "charlm-transformer": (16, 200, [0.003, 0.01], 0.02),
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
        if task == "charlm-transformer":
            plain, full = (evidence.measure(task, norm, size, bits) for norm in ("layer-plain", "layer"))
            room = lacks(ENTROPY, plain, full)
            what = f"{task}, held-out text: with - without"
            found.append(Effect(what, "bits", -margin, full - plain, headroom=room))
            continue
        plain, full = (100 * evidence.measure(task, norm, size, accuracy) for norm in ("layer-plain", "layer"))
        what = f"{task}, held-out accuracy: without - with"
        found.append(Effect(what, "points", -margin, plain - full, headroom=lacks(100, plain, full, worst=10)))
    return found


CLAIM = Claim(
    id="no-affine",
    sentence="LayerNorm without gain and bias is no worse.",
    source="Xu et al. 2019",
    measured="Held-out accuracy of mlp and cnn with LayerNorm without gain and bias less that with them, and bits per "
    "character of charlm-transformer with them less those without, each at its best learning rate.",
    rule="No more than 0.5 points lost in mlp and cnn, no more than 0.02 bits in charlm-transformer.",
    specs=specs,
    effects=effects,
)
