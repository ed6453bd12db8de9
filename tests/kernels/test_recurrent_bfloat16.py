"""What is particular to the recurrent kernels in bfloat16: they are exact but for the rounding of what a matrix product
multiplies, and take vectors in float32. The tests of test_recurrent.py run in both dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normwise.backends.cpu import rnn as kernels
from normwise.backends.protocol import LayerRequest, Layout
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import recurrence as reference
from support.recurrent_samples import CONFIGS, Sample

BF16 = torch.bfloat16
EVERYTHING = [True] * (3 + len(Weights._fields))
RELU = Recurrence("rnn", None, nonlinearity="relu")
# Where a rounding decides on which side of 0 a unit is, nothing can be said of its gradient.
SMOOTH = [name for name in CONFIGS if name != "rnn relu"]


def signs(*shape: int) -> Tensor:
    """Random -1, 0 and 1."""
    return torch.randint(-1, 2, shape).double()


def small_integers(steps: int, batch: int, inputs: int, units: int) -> list[Tensor]:
    """x, h0, W_ih, W_hh and the gradient of the output, so small that bfloat16 holds every result without rounding."""
    weight_hh = torch.zeros(units, units, dtype=torch.float64)
    weight_hh[torch.arange(units), torch.randperm(units)] = signs(units)
    x, upstream = signs(steps, batch, inputs), signs(steps, batch, units) * (torch.rand(steps, batch, units) < 0.2)
    return [x, signs(batch, units), signs(units, inputs), weight_hh, upstream]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "size",
    [
        # (T, B, I, H): I > 4, or the cells multiply. Rows, columns and depth below, at and above tiles and panels;
        # few samples and many units, which threads share; more rows than are made ready at once, or than a chunk has.
        (1, 1, 5, 1),
        (2, 2, 5, 3),
        (2, 3, 31, 7),
        (9, 5, 64, 17),
        (2, 33, 5, 33),
        (3, 16, 32, 32),
        (2, 17, 63, 63),
        (1, 15, 33, 31),
        (3, 2, 65, 257),
        (2, 1, 9, 300),
        (1, 300, 8, 19),
        (2, 290, 7, 34),
    ],
    ids=str,
)
def test_products_of_small_integers_are_exact(
    size: tuple[int, int, int, int], threads: int, isa_with_tiles: str
) -> None:
    x, h0, weight_ih, weight_hh, upstream = small_integers(*size)
    leaves = [t.requires_grad_() for t in (x, h0, weight_ih, weight_hh)]
    true = reference.recurrence(x, h0, None, Weights(weight_ih, weight_hh), RELU)
    expected = [true.output, *torch.autograd.grad(true.output, leaves, upstream)]
    assert max(float(e.detach().abs().max()) for e in expected) <= 256  # or bfloat16 would round them
    given = LayerRequest(
        RELU,
        x.detach().to(BF16),
        h0.detach().to(BF16),
        None,
        Weights(*(w.detach().to(BF16) for w in (weight_ih, weight_hh))),
        Layout(*size[:2]),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernels.forward(given, True)
        dx, dh0, _, *dweights = kernels.backward(given, found.saved, (upstream.to(BF16), None, None), EVERYTHING)
    finally:
        torch.set_num_threads(before)
    got = found.output, dx, dh0, *dweights[:2]
    for name, g, e in zip(("output", "x", "h0", "weight_ih", "weight_hh"), got, expected, strict=True):
        assert g.dtype == BF16
        assert torch.equal(g.double().view_as(e), e.detach()), name


@pytest.mark.parametrize("name", SMOOTH)
def test_errors_are_no_larger_than_those_of_an_eager_loop_in_bfloat16(name: str) -> None:
    sample = Sample(CONFIGS[name], (20, 5, 31, 63), BF16)

    def error(found: list[Tensor]) -> float:
        shares = [float((f.double() - t).norm() / t.norm()) for f, t in zip(found, sample.truth, strict=True)]
        return math.sqrt(sum(s * s for s in shares))

    assert error(sample.by_kernel(2)) <= 1.1 * error(sample.eager)


def test_gains_and_biases_may_be_float32() -> None:
    sample = Sample(CONFIGS["lstm ba2016"], (5, 3, 7, 20), BF16)
    given = sample.given
    named = given.weights._asdict().items()
    wide = given._replace(
        weights=given.weights._replace(**{n: w.float() for n, w in named if w is not None and w.dim() == 1})
    )
    found = kernels.forward(wide, True)
    assert torch.equal(found.output, sample.by_kernel(1)[0])
    gradients = kernels.backward(wide, found.saved, (sample.upstream[0], None, None), EVERYTHING)[3:]
    for gradient, w in zip(gradients, wide.weights, strict=True):
        assert (gradient is None) == (w is None)
        assert gradient is None or gradient.dtype == w.dtype


def test_bad_arguments_are_refused() -> None:
    given = Sample(CONFIGS["lstm unnormalized"], (2, 3, 4, 5), BF16).given
    with pytest.raises(ValueError, match=r"weight_ih: expected \(20, 4\) of torch.float32 on the CPU, but got"):
        kernels.forward(given._replace(x=given.x.float()), False)
    half = given.weights._replace(bias_ih=given.weights.bias_ih.half())
    with pytest.raises(ValueError, match=r"bias_ih: expected \(20,\) of torch.bfloat16 or torch.float32 on the CPU"):
        kernels.forward(given._replace(weights=half), False)
