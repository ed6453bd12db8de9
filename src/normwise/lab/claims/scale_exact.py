"""scale-exact: what a norm behind them makes of weights' scale, of SGD and of weight decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import normwise
from normwise.lab.claim import Claim
from normwise.lab.claims.bn_columns import TINY
from normwise.lab.verdict import Check

CASES, INPUTS, UNITS, CLASSES = 256, 12, 8, 5
BATCH, RATE, DECAY, STEPS = 32, 0.1, 0.01, 200
FACTOR = 3.0
ROUNDING, AFTER_STEPS, APART = 1e-10, 1e-7, 1e-2
LONG_DECAY, LONG_STEPS, NEAR = 0.05, 1000, 0.05
A = 1 - RATE * DECAY

Norm = Callable[[], nn.Module]
NORMS: dict[str, Norm] = {
    "BN": lambda: normwise.BatchNorm1d(UNITS, eps=TINY, affine=False, dtype=torch.float64),
    "LN": lambda: normwise.LayerNorm(UNITS, eps=TINY, elementwise_affine=False, dtype=torch.float64),
}


class Net:
    """softmax(V tanh(N(x W^T))) on random cases of random classes, with N one of NORMS. W is what N makes scale-free;
    V is left as it is."""

    def __init__(self, norm: str) -> None:
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(CASES, INPUTS, dtype=torch.float64, generator=draws)
        self.classes = torch.randint(CLASSES, (CASES,), generator=draws)
        # As small as decay leaves them in the long run, so that the run towards equilibrium is short.
        self.w = 0.1 * torch.randn(UNITS, INPUTS, dtype=torch.float64, generator=draws)
        self.v = torch.randn(CLASSES, UNITS, dtype=torch.float64, generator=draws)
        self.norm = NORMS[norm]()

    def gradient(self, w: Tensor, cases: Tensor) -> Tensor:
        """That of the mean cross-entropy of ``cases`` at weights w."""
        w = w.clone().requires_grad_()
        scores = torch.tanh(self.norm(self.x[cases] @ w.T)) @ self.v.T
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(scores, self.classes[cases]), w)
        return gradient


def batches(steps: int) -> Iterator[Tensor]:
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randperm(CASES, generator=draws)[:BATCH]


def sgd(net: Net, steps: int, decay: float, rate: Callable[[int], float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights before each update and the gradient there: w <- (1 - rate * decay) w - rate * gradient."""
    w = net.w
    for step, cases in enumerate(batches(steps)):
        gradient = net.gradient(w, cases)
        yield w, gradient
        w = (1 - rate(step) * decay) * w - rate(step) * gradient


def constant(_: int) -> float:
    return RATE


def growing(step: int) -> float:
    """The rate without decay that does what RATE does with DECAY.

    With v_t = w_t / a^t and a = 1 - RATE * DECAY, the update w_{t+1} = a w_t - RATE g(w_t) is
    v_{t+1} = v_t - RATE a^-(t+1) g(a^t v_t), and g(a^t v) = a^-t g(v): a rate of RATE a^-(2t+1).
    """
    return RATE * A ** -(2 * step + 1)


def growing_by_half(step: int) -> float:
    """As if the gradient did not depend on the scale: what `growing` must be told from."""
    return RATE * A ** -(step + 1)


def directions_apart(net: Net, rate: Callable[[int], float]) -> float:
    """The largest distance, over the steps, between w/|w| by SGD with decay and by SGD without it at ``rate``."""
    both = zip(sgd(net, STEPS, DECAY, constant), sgd(net, STEPS, 0.0, rate), strict=True)
    return max(float((w / w.norm() - v / v.norm()).norm()) for (w, _), (v, _) in both)


def checks() -> Sequence[Check]:
    # Thousands of steps of so small a net: on a busy machine two threads wait for each other longer than they compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [check for name in NORMS for check in _checks(name)]
    finally:
        torch.set_num_threads(threads)


def _checks(name: str) -> Iterator[Check]:
    net, cases = Net(name), torch.arange(CASES)
    g, scaled = net.gradient(net.w, cases), net.gradient(FACTOR * net.w, cases)
    off = float((FACTOR * scaled - g).norm() / g.norm())
    yield Check(f"{name}: gradient at {FACTOR:g} w, times {FACTOR:g}, less that at w, relative", off, ROUNDING)
    along = float((g * net.w).sum().abs() / (g.norm() * net.w.norm()))
    yield Check(f"{name}: cosine between gradient and weights", along, ROUNDING)
    seen = list(sgd(net, STEPS, 0.0, constant))
    grown = float(net.w.square().sum()) + RATE**2 * sum(float(g.square().sum()) for _, g in seen[:-1])
    off = abs(float(seen[-1][0].square().sum()) / grown - 1)
    yield Check(
        f"{name}: |w|^2 after {STEPS - 1} steps over |w_0|^2 + rate^2 times the sum of |g|^2, less 1", off, ROUNDING
    )
    what = f"{name}: directions with decay and without it, {STEPS} steps, at rate * a^-(2t+1)"
    yield Check(f"{what}: apart by", directions_apart(net, growing), AFTER_STEPS)
    what = f"{name}: the same at rate * a^-(t+1), which leaves the gradient's own scale out"
    yield Check(f"{what}: apart by", directions_apart(net, growing_by_half), APART, at_most=False)
    yield Check(f"{name}: angle of a step at equilibrium over sqrt(2 rate decay), less 1", angle(net), NEAR)


def angle(net: Net) -> float:
    """How far the root mean square, over the second half of a long run, of the angle between the weights before and
    after an update is from sqrt(2 RATE LONG_DECAY), relative to it."""
    weights = [w for w, _ in sgd(net, LONG_STEPS, LONG_DECAY, constant)][LONG_STEPS // 2 :]
    pairs = itertools.pairwise(weights)
    # Twice the arc sine of half the distance: the arc cosine of a cosine next to 1 loses half of the digits.
    angles = [2 * math.asin(float((w / w.norm() - v / v.norm()).norm()) / 2) for w, v in pairs]
    mean = math.sqrt(math.fsum(a * a for a in angles) / len(angles))
    return abs(mean / math.sqrt(2 * RATE * LONG_DECAY) - 1)


CLAIM = Claim(
    id="scale-exact",
    sentence="Behind weights of any scale a norm makes the gradient the smaller the larger they are, and orthogonal to "
    "them: SGD makes them grow, weight decay is a growing learning rate, and both together turn them by the same angle "
    "every step.",
    source="van Laarhoven 2017; Arora et al. 2019; Li & Arora 2020; Wan et al. 2020",
    measured=f"A linear layer of {UNITS} units behind which BatchNorm or LayerNorm stands (no gain, no bias, eps next "
    f"to 0), in float64: the gradient at {FACTOR:g} w and at w; the cosine of gradient and w; |w|^2 under plain SGD; "
    f"{STEPS} steps of SGD with decay {DECAY:g} at a rate of {RATE:g}, and of SGD without decay at the rate that this "
    "derives to, rate * a^-(2t+1) with a = 1 - rate * decay; and the angle of a step after half of "
    f"{LONG_STEPS:,} steps with decay {LONG_DECAY:g}, beside sqrt(2 * rate * decay).",
    rule=f"Gradients and |w|^2 agree to {ROUNDING:g}, directions to {AFTER_STEPS:g} after {STEPS} steps, where the "
    f"rate without the gradient's own scale is {APART:g} off; the angle agrees to {100 * NEAR:g}%.",
    against="With eps as layers have it, momentum or Adam, none of this is exact; and a gain behind the norm has a "
    "scale of its own.",
    checks=checks,
)
