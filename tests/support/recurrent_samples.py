"""Calls of the recurrent kernels, their truth in float64, and what an eager loop in the same dtype makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from normwise.backends.aten import rnn as aten
from normwise.backends.cpu import rnn as kernels
from normwise.backends.protocol import LayerRequest, LayerResult, Layout, Moments
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import recurrence as reference
from normwise.backends.reference import rnn as reference_rnn
from normwise.backends.reference.sequences import valid_steps
from normwise.ops.rnn import packed
from normwise.ops.rnn.presets import PRESETS, preset
from support.instruction_sets import USABLE, on
from support.kernel_truth import tensor
from support.recurrences import random_weights
from support.tolerances import TABLE

CONFIGS: dict[str, Recurrence] = {f"{cell} unnormalized": Recurrence(cell, None) for cell in PRESETS} | {
    f"{cell} {name}": config
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    if config.norm != "batch"
}
CONFIGS["lstm rms"] = preset("lstm", "rms")
CONFIGS["gru paper"] = replace(PRESETS["gru"]["ba2016"], update_gate="paper")
CONFIGS["gru unnormalized candidate"] = Recurrence("gru", None, reset_after=False)
CONFIGS["gru candidate"] = replace(PRESETS["gru"]["haste"], reset_after=False)
CONFIGS["rnn relu"] = Recurrence("rnn", None, nonlinearity="relu")

# With batch norm: of every cell in every place.
BATCH_CONFIGS: dict[str, Recurrence] = {
    f"{cell} {name}": config
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    if config.norm == "batch"
}
BATCH_CONFIGS["lstm batch, state"] = replace(PRESETS["lstm"]["cooijmans2016"], cell_norm="state", gain=1.0)
BATCH_CONFIGS["lstm batch, input and state"] = replace(PRESETS["lstm"]["laurent2015"], cell_norm="state")
BATCH_CONFIGS["lstm batch, sum"] = replace(
    PRESETS["lstm"]["cooijmans2016"], norm_placement="sum", inner_bias=True, cell_norm=None
)
BATCH_CONFIGS["lstm batch, sum and readout"] = replace(PRESETS["lstm"]["torchaudio"], norm="batch", cell_norm="readout")
BATCH_CONFIGS["gru batch, sum"] = replace(PRESETS["gru"]["dreamer"], norm="batch")
BATCH_CONFIGS["gru batch, candidate"] = replace(
    PRESETS["gru"]["cooijmans2016"], reset_after=False, update_gate="paper", update_offset=0.5
)
BATCH_CONFIGS["gru batch, input and candidate"] = replace(PRESETS["gru"]["laurent2015"], reset_after=False)
BATCH_CONFIGS["rnn batch, sum"] = replace(PRESETS["rnn"]["ba2016"], norm="batch", inner_bias=True)
BATCH_CONFIGS["rnn batch, relu"] = replace(PRESETS["rnn"]["cooijmans2016"], nonlinearity="relu")


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
EAGER = {
    torch.float64: reference_rnn.layer,
    torch.float32: reference_rnn.layer,
    torch.bfloat16: aten.layer,
    torch.float16: aten.layer,
}

# How often the kernels may repeat an eager loop's error: roundings are luck, those of bfloat16 the less as our sums are
# in float32. None of 220 nets exceeded it on any of three instruction sets (the largest shares: .32, in bfloat16 .73).
TIMES = {torch.float64: 5.0, torch.float32: 5.0, torch.bfloat16: 1.5, torch.float16: 1.5}

# Over fewer units a norm may divide a rounding by next to no deviation.
FEW_UNITS = 7


class Sample:
    """Inputs of one call, its gradients from above, and what comes of them: exactly, and by a loop in their dtype.

    `ragged`: each sequence has a length of its own, one perhaps none, and NaN where it has ended. `resets`: one step in
    four starts from zeros. `offset`: every tensor's storage starts so many elements late. `tables`: batch norm reads
    running statistics from these many rows, the first step from the second; else a batch's moments are results too.
    """

    def __init__(
        self,
        config: Recurrence,
        size: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        *,
        reverse: bool = False,
        ragged: bool = False,
        resets: bool = False,
        offset: int = 0,
        tables: int | None = None,
    ) -> None:
        self.config, self.dtype, (self.steps, self.batch, inputs, units) = config, dtype, size

        def draw(*shape: int) -> Tensor:
            return tensor(*shape, dtype=dtype, offset=offset)

        # Half the size, or long recurrences are chaotic and no two orders of summation agree.
        weights = random_weights(config.shapes(inputs, units))
        self.weights = Weights(**{name: draw(*w.shape).copy_(w / 2) for name, w in weights.items()})
        self.x = draw(self.steps, self.batch, inputs)
        self.h0 = draw(self.batch, units)
        self.c0 = draw(self.batch, units) if config.cell == "lstm" else None
        self.upstream = [draw(self.steps, self.batch, units)]
        self.upstream += [draw(*t.shape) for t in (self.h0, self.c0) if t is not None]
        lengths = torch.randint(0, self.steps + 1, (self.batch,)) if ragged else None
        reset = torch.rand(self.steps, self.batch) < 0.25 if resets else None
        if lengths is not None:
            padding = ~valid_steps(self.steps, lengths)
            self.x[padding] = float("nan")
            self.upstream[0][padding] = float("inf")
        self.lengths, self.reset, self.reverse = lengths, reset, reverse
        self.running, self.start_step = None, 1 if tables else 0
        if tables is not None:
            sites = config.sites(units).items()
            self.running = {s: (torch.randn(tables, n) / 2, torch.rand(tables, n) + 0.5) for s, n in sites}
        self.rows = packed.Sequences(self.x, Layout(self.steps, self.batch))
        if lengths is not None:
            self.rows = packed.pack(self.x, lengths, batch_first=False, bidirectional=True)
        self.truth = self.by_reference()
        with without_onednn():
            self.eager = self.by_layer(EAGER[dtype])

    def by_reference(self) -> list[Tensor]:
        """Output, final state and all gradients in float64, of the padded batch as it is."""
        tensors = (self.x, self.h0, self.c0, *self.weights)
        at = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        options = {"lengths": self.lengths, "reset": self.reset, "reverse": self.reverse}
        if self.running is not None:
            running = {site: (mean.double(), var.double()) for site, (mean, var) in self.running.items()}
            options |= {"running": running, "start_step": self.start_step}
        found = reference.recurrence(*at[:3], Weights(*at[3:]), self.config, **options)
        outputs = [t for t in (found.output, found.h, found.c) if t is not None]
        leaves, upstream = [t for t in at if t is not None], [g.double() for g in self.upstream]
        grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
        return [t.detach() for t in outputs] + list(grads) + self.moments(found.statistics)

    def by_layer(self, layer: Callable[..., LayerResult]) -> list[Tensor]:
        """The same in the sample's dtype by a backend's layer that autograd differentiates."""
        given = self.given
        named = {"x": given.x, "h0": given.h0, "c0": given.c0, **given.weights._asdict()}
        at = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in named.items()}
        weights = Weights(**{name: at[name] for name in Weights._fields})
        found = layer(given._replace(x=at["x"], h0=at["h0"], c0=at["c0"], weights=weights), True)
        outputs = [t for t in (found.output, found.h, found.c) if t is not None]
        leaves = [t for t in at.values() if t is not None]
        upstream = self.upstream_of_rows[: len(outputs)]
        # Where no sequence has a step, a loop reads no weight.
        grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
        gradients = dict(zip([name for name, t in at.items() if t is not None], grads, strict=True))
        found_gradients = [gradients.get(name) for name in at]
        return self.as_given([t.detach() for t in outputs], found_gradients) + self.moments(found.statistics)

    @property
    def given(self) -> LayerRequest:
        """What a backend is given."""
        rows = self.rows
        return LayerRequest(
            self.config,
            rows.x,
            self.sorted(self.h0),
            self.sorted(self.c0),
            self.weights,
            rows.layout,
            self.reverse,
            None if self.reset is None else packed.resets(rows, self.reset, True)[self.reverse],
            running=self.running,
            start_step=self.start_step,
        )

    def moments(self, statistics: dict[str, Moments]) -> list[Tensor]:
        """Batch moments of the steps that some sequence has."""
        steps = self.rows.layout.steps
        return [t[:steps] for site in statistics.values() for t in (site.mean, site.var, site.count)]

    def sorted(self, state: Tensor | None) -> Tensor | None:
        order = self.rows.order
        return state if state is None or order is None else packed.sort(state[None], order)[0]

    def restored(self, state: Tensor | None) -> Tensor | None:
        order = self.rows.order
        return state if state is None or order is None else packed.restore(state[None], order)[0]

    @property
    def upstream_of_rows(self) -> list[Tensor]:
        """Gradients from above of what a backend gives."""
        doutput, *dstates = self.upstream
        source = self.rows.source
        rows = doutput[: self.rows.layout.steps] if source is None else doutput.flatten(0, 1)[source]
        return [rows, *[self.sorted(t) for t in dstates]]

    def padded(self, rows: Tensor) -> Tensor:
        return packed.output(rows, self.rows, (self.steps, self.batch), batch_first=False)

    def as_given(self, outputs: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
        """A backend's results and gradients (of x, h0, c0 and the weights) in the order and form of `truth`."""
        output, *states = outputs
        dx, *dstates = gradients[:3]
        every = self.padded(output), *map(self.restored, states), self.padded(dx), *map(self.restored, dstates)
        return [t for t in (*every, *gradients[3:]) if t is not None]

    def by_kernel(self, threads: int, level: str | None = None, bits: int | None = None) -> list[Tensor]:
        """The same by the kernels, on the instruction set `level`; `bits`: of weights that have lost all others."""
        if level is not None:
            with on(level):
                return self.by_kernel(threads, bits=bits)
        given = self.given
        if bits is not None:
            given = given._replace(weights=Weights(*(None if w is None else rounded(w, bits) for w in given.weights)))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = kernels.forward(given, True)
            again = kernels.forward(given, False)
            assert torch.equal(found.output, again.output)  # keeping values changes none
            assert all(map(torch.equal, self.moments(found.statistics), self.moments(again.statistics)))
            upstream = [*self.upstream_of_rows, None][:3]
            gradients = kernels.backward(given, found.saved, upstream, [True] * (3 + len(Weights._fields)))
        finally:
            torch.set_num_threads(before)
        outputs = [t for t in found[:3] if t is not None]
        return self.as_given(outputs, gradients) + self.moments(found.statistics)

    def excess(self, found: list[Tensor]) -> float:
        """The largest error of what was `found`, as a share of what is allowed: as exact as the loop, up to the luck of
        rounding. Errors are shares of a tensor's largest element."""
        slack = sum(TABLE[self.dtype, "composed"]) * (4 if self.h0.shape[1] < FEW_UNITS else 1)
        scale = max((float(t.abs().max()) for t in self.truth if t.numel()), default=1.0)
        worst = 0.0
        for got, eager, true in zip(found, self.eager, self.truth, strict=True):
            assert got.shape == true.shape
            assert got.dtype == eager.dtype
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
