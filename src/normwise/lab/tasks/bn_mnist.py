"""The MNIST experiment of Ioffe & Szegedy 2015, section 4.1 and figure 1, at its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from normwise.lab.tasks.mlp import Mlp
from normwise.lab.tasks.on_idx import OnIdx


@dataclass(frozen=True)
class BnMnist(OnIdx, Mlp):
    """784-100-100-100-10 with sigmoids, binary input, batch 60, 50,000 steps.

    The paper gives neither the optimiser nor the rate nor the deviation of the Gaussian weights: here SGD with
    momentum 0.9, rate 0.01, deviation 0.1.
    """

    name: ClassVar[str] = "bn-mnist"
    summary: ClassVar[str] = (
        "784-100-100-100-10 with sigmoids on binary images, batch 60, 50,000 steps (Ioffe & Szegedy 2015, section "
        "4.1). Optimiser and rates, which the paper does not give: SGD with momentum 0.9, rate 0.01, Gaussian weights "
        "of deviation 0.1"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch")
    batch_sizes: ClassVar[tuple[int, ...]] = (60,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01,)
    steps: ClassVar[int] = 50_000
    quick_steps: ClassVar[int] = 2000

    def inputs(self, images: Tensor) -> Tensor:
        return (images.flatten(1) > 127).float()
