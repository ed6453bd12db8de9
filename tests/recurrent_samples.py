"""Calls of the recurrent kernels, their truth in float64, and what an eager loop in the same dtype makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from instruction_sets import USABLE, on
from kernel_truth import tensor
from normwise.kernels import recurrent as kernels
from normwise.ops import recurrent_loop
from normwise.ops.recurrent_cpu import Call, kernel_layer, kernel_weights, rows_of
from normwise.reference import recurrent as reference
from normwise.reference.recurrence import PRESETS, Recurrence, Weights, preset
from normwise.reference.sequences import valid_steps
from recurrences import random_weights
from tolerances import TABLE

HOWS: dict[str, Recurrence] = {f"{cell} plain": Recurrence(cell, None) for cell in PRESETS} | {
    f"{cell} {name}": how for cell, presets in PRESETS.items() for name, how in presets.items() if how.norm != "batch"
}
HOWS["lstm rms"] = preset("lstm", "rms")
HOWS["gru paper"] = replace(PRESETS["gru"]["ba2016"], update_gate="paper")
HOWS["gru plain candidate"] = Recurrence("gru", None, reset_gate="candidate")
HOWS["gru candidate"] = replace(PRESETS["gru"]["haste"], reset_gate="candidate")
HOWS["rnn relu"] = Recurrence("rnn", None, nonlinearity="relu")


@contextmanager
def without_onednn() -> Iterator[None]:
    """oneDNN compiles its products in bfloat16 anew for every shape, which takes longer than all else here."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


# What layers of torch's operations do in that dtype.
EAGER = {torch.float32: reference.recurrence, torch.bfloat16: recurrent_loop.recurrence}

# How often the kernels may repeat an eager loop's error: roundings are luck, those of bfloat16 the less as our sums are
# in float32. None of 220 nets exceeded it on any of three instruction sets (the largest shares: .32, in bfloat16 .73).
TIMES = {torch.float32: 5.0, torch.bfloat16: 1.5}

# Over fewer units a norm may divide a rounding by next to no deviation.
FEW_UNITS = 7


class Sample:
    """Inputs of one call, its gradients from above, and what comes of them: exactly, and by a loop in their dtype.

    `ragged`: each sequence has a length of its own, one perhaps none, and NaN where it has ended. `resets`: one step in
    four starts from zeros. `offset`: every tensor's storage starts so many elements late.
    """

    def __init__(
        self,
        how: Recurrence,
        size: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        *,
        reverse: bool = False,
        ragged: bool = False,
        resets: bool = False,
        offset: int = 0,
    ) -> None:
        self.how, self.dtype, (self.steps, self.batch, inputs, units) = how, dtype, size

        def draw(*shape: int) -> Tensor:
            return tensor(*shape, dtype=dtype, offset=offset)

        # Half the size, or long recurrences are chaotic and no two orders of summation agree.
        weights = random_weights(how.shapes(inputs, units))
        self.weights = Weights(**{name: draw(*w.shape).copy_(w / 2) for name, w in weights.items()})
        self.x = draw(self.steps, self.batch, inputs)
        self.h0 = draw(self.batch, units)
        self.c0 = draw(self.batch, units) if how.cell == "lstm" else None
        self.upstream = [draw(self.steps, self.batch, units)]
        self.upstream += [draw(*t.shape) for t in (self.h0, self.c0) if t is not None]
        lengths = torch.randint(0, self.steps + 1, (self.batch,)) if ragged else None
        reset = torch.rand(self.steps, self.batch) < 0.25 if resets else None
        if lengths is not None:
            padding = ~valid_steps(self.steps, lengths)
            self.x[padding] = float("nan")
            self.upstream[0][padding] = float("inf")
        self.call = Call(how, lengths, reset, reverse)
        self.rows = rows_of(self.call, self.x)
        self.truth = self.by_loop(reference.recurrence, torch.float64)
        with without_onednn():
            self.eager = self.by_loop(EAGER[dtype], dtype)

    def by_loop(self, recurrence: Callable[..., reference.Result], dtype: torch.dtype) -> list[Tensor]:
        """Output, final state and all gradients by a loop over steps."""
        tensors = (self.x, self.h0, self.c0, *self.weights)
        at = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        _, lengths, reset, reverse = self.call
        found = recurrence(*at[:3], Weights(*at[3:]), self.how, lengths=lengths, reset=reset, reverse=reverse)
        outputs = [t for t in (found.output, found.h, found.c) if t is not None]
        leaves, upstream = [t for t in at if t is not None], [g.to(dtype) for g in self.upstream]
        return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))

    @property
    def given(self) -> tuple[kernels.Layer, kernels.Weights, Tensor, Tensor, Tensor | None, kernels.Steps]:
        """What the kernels are called with."""
        of = self.rows
        tensors = of.take(self.x), of.sort(self.h0), of.sort(self.c0)
        return kernel_layer(self.how), kernel_weights(self.weights), *tensors, of.steps

    def by_kernel(self, threads: int, level: str | None = None, bits: int | None = None) -> list[Tensor]:
        """The same by the kernels, on the instruction set `level`; `bits`: of weights that have lost all others."""
        if level is not None:
            with on(level):
                return self.by_kernel(threads, bits=bits)
        of, given = self.rows, self.given
        if bits is not None:
            worse = kernels.Weights(*(None if w is None else rounded(w, bits) for w in given[1]))
            given = given[0], worse, *given[2:]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = kernels.forward(*given, save=True)
            again = kernels.forward(*given, save=False)
            assert torch.equal(found.output, again.output)  # keeping values changes none
            doutput, *dstate = self.upstream
            dstate = [of.sort(t) for t in dstate] + [None] * (2 - len(dstate))
            back = kernels.backward(*given, found.output, found.saved, of.take(doutput), *dstate)
        finally:
            torch.set_num_threads(before)
        gradients = dict(back.weights._asdict(), gain_sum=back.weights.gain_hh)
        weights = [gradients[name] for name, w in self.weights._asdict().items() if w is not None]
        states = [of.restore(t) for t in (found.h, found.c)], [of.restore(t) for t in (back.h0, back.c0)]
        every = of.put(found.output, self.x), *states[0], of.put(back.x, self.x), *states[1]
        return [t for t in every if t is not None] + weights

    def excess(self, found: list[Tensor]) -> float:
        """The largest error of what was `found`, as a share of what is allowed: as exact as the loop, up to the luck of
        rounding. Errors are shares of a tensor's largest element."""
        slack = sum(TABLE[self.dtype, "composed"]) * (4 if self.h0.shape[1] < FEW_UNITS else 1)
        scale = max((float(t.abs().max()) for t in self.truth if t.numel()), default=1.0)
        worst = 0.0
        for got, eager, true in zip(found, self.eager, self.truth, strict=True):
            assert got.shape == true.shape
            assert got.dtype == self.dtype
            assert got.isfinite().all()
            if true.numel():
                size = max(float(true.abs().max()), 1e-3 * scale, 1e-30)
                error, allowed = (float((t.double() - true).abs().max()) / size for t in (got, eager))
                worst = max(worst, error / (slack + TIMES[self.dtype] * allowed))
        return worst


def check(draw: Callable[[], Sample], threads: Sequence[int] = (1,)) -> None:
    """A call of these numbers of threads, on every instruction set, is right."""
    sample = draw()
    found = {f"{level}, {n} threads": sample.excess(sample.by_kernel(n, level)) for level in USABLE for n in threads}
    assert max(found.values()) <= 1, f"errors, as shares of what is allowed: {found}"


def error(found: Tensor, true: Tensor) -> float:
    """The norm of an error, as a share of the truth's."""
    return float((found.double() - true).norm() / true.norm())


def rounded(t: Tensor, bits: int) -> Tensor:
    """`t` with so many binary digits left, of 24."""
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent)
