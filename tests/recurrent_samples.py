"""Calls of the recurrent kernels, their truth in float64, and what an eager loop in the same dtype makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from normwise.kernels import recurrent as kernels
from normwise.ops import recurrent_loop
from normwise.ops.recurrent_cpu import kernel_layer, kernel_weights
from normwise.reference import recurrent as reference
from normwise.reference.recurrence import PRESETS, Recurrence, Weights, preset
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

# What the kernels may add to an eager loop's error, as a share of the largest element, and how often they may repeat
# that: roundings are luck, those of bfloat16 the less as our sums are in float32.
SLACK = {torch.float32: (3e-5, 5.0), torch.bfloat16: (sum(TABLE[torch.bfloat16, "composed"]), 1.5)}


class Sample:
    """Inputs of one call, its gradients from above, and what comes of them: exactly, and by a loop in their dtype."""

    def __init__(
        self,
        how: Recurrence,
        size: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        *,
        reverse: bool = False,
    ) -> None:
        self.how, self.dtype, (self.steps, self.batch, self.inputs, self.units) = how, dtype, size
        shapes = how.shapes(self.inputs, self.units)
        # Half the size, or long recurrences are chaotic and no two orders of summation agree.
        self.weights = Weights(**{name: (w.float() / 2).to(dtype) for name, w in random_weights(shapes).items()})
        self.x = torch.randn(self.steps, self.batch, self.inputs).to(dtype)
        self.h0 = torch.randn(self.batch, self.units).to(dtype)
        self.c0 = torch.randn(self.batch, self.units).to(dtype) if how.cell == "lstm" else None
        self.order = kernels.Steps(self.steps, self.batch, reverse=reverse)
        self.upstream = [torch.randn(self.steps, self.batch, self.units).to(dtype)]
        self.upstream += [torch.randn(t.shape).to(dtype) for t in (self.h0, self.c0) if t is not None]
        self.truth = self.by_loop(reference.recurrence, torch.float64)
        with without_onednn():
            self.eager = self.by_loop(EAGER[dtype], dtype)

    def by_loop(self, recurrence: Callable[..., reference.Result], dtype: torch.dtype) -> list[Tensor]:
        """Output, final state and all gradients by a loop over steps."""
        tensors = (self.x, self.h0, self.c0, *self.weights)
        at = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        found = recurrence(*at[:3], Weights(*at[3:]), self.how, reverse=self.order.reverse)
        outputs = [t for t in (found.output, found.h, found.c) if t is not None]
        leaves, upstream = [t for t in at if t is not None], [g.to(dtype) for g in self.upstream]
        return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))

    def by_kernel(self, threads: int) -> list[Tensor]:
        """The same by the kernels."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            given = (
                kernel_layer(self.how),
                kernel_weights(self.weights),
                self.x.flatten(0, 1),
                self.h0,
                self.c0,
                self.order,
            )
            found = kernels.forward(*given, save=True)
            again = kernels.forward(*given, save=False)
            assert torch.equal(found.output, again.output)  # keeping values changes none
            doutput, *dstate = self.upstream
            dstate += [None] * (2 - len(dstate))
            back = kernels.backward(*given, found.output, found.saved, doutput.flatten(0, 1), *dstate)
        finally:
            torch.set_num_threads(before)
        of = dict(back.weights._asdict(), gain_sum=back.weights.gain_hh)
        weights = [of[name] for name, w in self.weights._asdict().items() if w is not None]
        found_first = found.output.view_as(self.upstream[0]), found.h, found.c, back.x.view_as(self.x), back.h0, back.c0
        return [t for t in found_first if t is not None] + weights

    def check(self, threads: int) -> None:
        """As exact as the loop, up to the luck of rounding: errors are shares of the largest element."""
        slack, times = SLACK[self.dtype]
        scale = max((float(t.abs().max()) for t in self.truth if t.numel()), default=1.0)
        for got, eager, true in zip(self.by_kernel(threads), self.eager, self.truth, strict=True):
            assert got.shape == true.shape
            assert got.dtype == self.dtype
            if true.numel():
                size = max(float(true.abs().max()), 1e-3 * scale, 1e-30)
                error, allowed = (float((t.double() - true).abs().max()) / size for t in (got, eager))
                assert error <= slack + times * allowed  # fails for NaN too
