"""Recurrences by torch's operations: its own multi-layer kernels where there is no norm, else a loop over steps.

The loop has the mathematics of the reference in fewer nodes: what need not wait for the previous step is done for all
steps at once (input projection, its norm and bias), a norm is one fused kernel, and each step computes on the rows of
the sequences that still run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from normwise.backends._torch_internals import lstm_fails_under_autocast
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import (
    LayerKernel,
    LayerRequest,
    LayerResult,
    Layout,
    Moments,
    RecurrenceRequest,
    RecurrenceResult,
    Running,
    StackKernel,
    accumulation_dtype,
)
from normwise.backends.recurrence import Recurrence, Weights

Normalize = Callable[[Tensor, int], Tensor]


def supports(request: RecurrenceRequest) -> str | None:
    """What neither torch's kernels nor the loop can do."""
    of_batch = request.config.norm == "batch" and request.running is None
    if request.layout.lengths is not None and (on_cpu(request.x) or of_batch) and supports_stack(request) is not None:
        return "the loop of torch's operations takes the steps of each sequence, and must know how many they are"
    return None


def supports_stack(request: RecurrenceRequest) -> str | None:
    """What torch's own multi-layer kernels cannot do."""
    if not request.config.is_torch_layer:
        return "torch's own layers have no norm inside, no zoneout, and one kind of GRU"
    if request.resets[0] is not None:
        return "torch's own layers take no reset"
    autocast = request.autocast
    if autocast and request.config.cell == "lstm" and on_cpu(request.x) and lstm_fails_under_autocast(autocast):
        return f"torch's own LSTM fails under autocast to {autocast} on this CPU"
    if request.layout.batch_sizes is not None and request.layout.steps == 0:
        return "torch's own layers take no batch without a step"
    return None


# torch's own layers, by the cell or the RNN's nonlinearity.
KERNELS_OF_TORCH: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "tanh": torch.rnn_tanh,
    "relu": torch.rnn_relu,
}


CELLS_OF_TORCH: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
    "tanh": torch.rnn_tanh_cell,
    "relu": torch.rnn_relu_cell,
}


def stack(request: RecurrenceRequest) -> RecurrenceResult:
    """All layers and directions by torch's own kernel."""
    config, x, h0, c0, weights, layout, *_, bidirectional, dropout, training, is_cell, _ = request
    if is_cell:
        return _cell(request)
    flat = [w for layer in weights for w in layer if w is not None]
    tail = (flat, weights[0].bias_ih is not None, len(weights) // (1 + bidirectional), dropout, training, bidirectional)
    run = KERNELS_OF_TORCH[config.nonlinearity if config.cell == "rnn" else config.cell]
    states = [h0] if c0 is None else [h0, c0]
    if layout.lengths is not None:
        output, finals = _padded(run, x, layout.lengths, states, tail)
    elif layout.batch_sizes is None:
        output, *finals = run(x, _hx(states), *tail, False)
    else:
        present = int(layout.batch_sizes[0])
        started = [s[:, :present] for s in states]
        output, *finals = run(x, layout.batch_sizes, _hx(started), *tail)
        if present < layout.batch:  # sequences without a step come last, and keep their states
            finals = [torch.cat([f, s[:, present:].to(f.dtype)], 1) for f, s in zip(finals, states, strict=True)]
    return RecurrenceResult(output, finals[0], None if c0 is None else finals[1], [{}] * len(weights))


def _cell(request: RecurrenceRequest) -> RecurrenceResult:
    config, h0, c0, (w,) = request.config, request.h0, request.c0, request.weights
    run = CELLS_OF_TORCH[config.nonlinearity if config.cell == "rnn" else config.cell]
    states = [h0[0]] if c0 is None else [h0[0], c0[0]]
    found = run(request.x[0], _hx(states), w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh)
    h, *c = found if c0 is not None else (found,)
    h = h.unsqueeze(0)
    return RecurrenceResult(h, h, c[0].unsqueeze(0) if c else None, [{}])


def _hx(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else tuple(states)


def _padded(
    run: Callable[..., tuple[Tensor, ...]], x: Tensor, lengths: Tensor, states: list[Tensor], tail: tuple[object, ...]
) -> tuple[Tensor, list[Tensor]]:
    """A padded batch whose lengths torch.compile did not know."""
    # A packed sequence has at least one step: an empty one runs over a zero, and what came of it is put back.
    valid = (torch.arange(len(x), device=lengths.device)[:, None] < lengths)[..., None]
    packed = pack_padded_sequence(x.masked_fill(~valid, 0), lengths.clamp(min=1).cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    data, *finals = run(packed.data, packed.batch_sizes, _hx([s[:, order] for s in states]), *tail)
    output, _ = pad_packed_sequence(packed._replace(data=data), total_length=len(x))
    started = (lengths > 0)[:, None]
    finals = [torch.where(started, f[:, back], s.to(f.dtype)) for f, s in zip(finals, states, strict=True)]
    return output.masked_fill(~valid, 0), finals


def layer(request: LayerRequest, needs_grad: bool = False) -> LayerResult:
    """One layer in one direction. Products are in the dtype of `x`, all else in at least float32."""
    config, x, h0, c0, weights, layout, reverse, reset, zoneout_mask, running, start_step = request
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)
    small = Weights(*(None if w is None else w.to(wide) for w in weights))  # type: ignore[arg-type]
    steps = _Steps(layout, reverse)
    x, valid = steps.processing_order(x), None
    if layout.lengths is not None:
        # A GPU's, which is not waited for: each step runs on all samples, and the last ones are picked at the end.
        valid = (torch.arange(layout.steps, device=x.device)[:, None] < layout.lengths)[..., None]
        x = x.masked_fill(~valid, 0)  # what a NaN at padding came to would be a gradient of NaN, times 0 or not

    norms = _Norms(config, small, weights.weight_hh.shape[0] // config.gates, steps, running, start_step)
    inputs = norms.input_terms(F.linear(x, weights.weight_ih).to(wide))
    advance = _CELLS[config.cell](config, small, norms, weights, dtype)
    cleared = steps.with_reset(reset)
    if reset is not None:
        reset = steps.processing_order(reset)
        reset = reset if valid is None else reset & valid[..., 0]  # what has ended keeps its state
    resets = None if reset is None else steps.split(reset)
    zoneouts = None if zoneout_mask is None else steps.split(steps.processing_order(zoneout_mask))

    h, c = h0.to(wide), None if c0 is None else c0.to(wide)
    ended: list[tuple[Tensor, Tensor | None]] = []  # states of sequences that have ended, the shortest first
    outputs, cells = [], []
    # All other states stay finite whatever padding does; this one keeps what it was at the end of a sequence.
    unbounded = valid is not None and config.cell == "rnn" and config.nonlinearity == "relu"
    for t, input_term in enumerate(steps.split(inputs)):
        if len(input_term) < len(h):
            running_on = len(input_term)
            ended.append((h[running_on:], None if c is None else c[running_on:]))
            h, c = h[:running_on], None if c is None else c[:running_on]
        if resets is not None and t in cleared:
            h = h.masked_fill(resets[t][:, None], 0)
            c = None if c is None else c.masked_fill(resets[t][:, None], 0)
        new_h, new_c = advance(input_term, h, c, t)
        if zoneouts is not None:
            new_h = torch.where(zoneouts[t], h, new_h)
        elif config.zoneout:
            new_h = torch.lerp(new_h, h, config.zoneout)
        if valid is not None and unbounded:
            new_h = torch.where(valid[t], new_h, h)
        h, c = new_h, new_c
        outputs.append(h)
        if valid is not None and c is not None:
            cells.append(c)
    output = steps.join(outputs) if outputs else inputs[:, : h.shape[1]]
    if layout.lengths is not None and outputs and not unbounded:
        h = _at_the_end(output, layout.lengths, h0)
        c = None if c0 is None else _at_the_end(torch.stack(cells), layout.lengths, c0)
    if ended:
        ended.append((h, c))
        h = torch.cat([s for s, _ in reversed(ended)])
        c = None if c is None else torch.cat([s for _, s in reversed(ended) if s is not None])
    output = steps.given_order(output.to(dtype))
    output = output if valid is None else output.masked_fill(~valid, 0)
    return LayerResult(output, h.to(dtype), None if c is None else c.to(dtype), norms.statistics())


def _at_the_end(states: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The state of (T, B, H) after each sequence's last step; the `first` one of a sequence without a step."""
    last = (lengths - 1).clamp(min=0)[:, None].expand_as(first)[None]
    return torch.where((lengths > 0)[:, None], states.gather(0, last)[0], first.to(states.dtype))


class _Steps:
    """The rows of a batch step by step, in the order of processing."""

    def __init__(self, layout: Layout, reverse: bool) -> None:
        self.layout = layout
        self.sizes = None if layout.batch_sizes is None else layout.batch_sizes.tolist()
        self.flip = layout.flip if reverse else None
        self.reverse = reverse and self.sizes is None and layout.lengths is None
        self.turned = layout.lengths if reverse else None

    def processing_order(self, rows: Tensor) -> Tensor:
        """Packed or padded rows such that all sequences run forwards; dense ones stay where they are."""
        if self.turned is not None:
            step = torch.arange(len(rows), device=rows.device)[:, None]
            source = torch.where(step < self.turned, self.turned - 1 - step, step)
            return rows.gather(0, source.view(source.shape + (1,) * (rows.dim() - 2)).expand_as(rows))
        if self.flip is None:
            return rows
        # What `index_select` gives too, since flip is its own inverse; but the gradient of that adds row by row.
        return torch.empty_like(rows).index_copy(0, self.flip, rows)

    def given_order(self, rows: Tensor) -> Tensor:
        return self.processing_order(rows)

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each step. Not by indexing, which would write a gradient of all steps at every step."""
        if self.sizes is not None:
            return rows.split(self.sizes)  # type: ignore[no-any-return]
        steps: Sequence[Tensor] = rows.unbind(0)
        return steps[::-1] if self.reverse else steps

    def join(self, steps: list[Tensor]) -> Tensor:
        """Undoes `split`."""
        if self.sizes is not None:
            return torch.cat(steps)
        return torch.stack(steps[::-1] if self.reverse else steps)

    def index_of_rows(self, device: torch.device) -> Tensor:
        """The step at which each row is processed: (rows,), or (steps, 1) where rows are dense."""
        sizes = self.layout.batch_sizes
        if sizes is not None:  # on the CPU, where these are: a GPU would have to say how many rows there are
            rows = torch.arange(self.layout.steps, device="cpu").repeat_interleave(sizes)
            return rows.to(device, non_blocking=True)
        steps = torch.arange(self.layout.steps, device=device)
        return (steps.flip(0) if self.reverse else steps)[:, None]

    def with_reset(self, reset: Tensor | None) -> set[int] | range:
        """The steps that have any reset; all of them where looking would be slow or impossible."""
        every = range(self.layout.steps)
        if reset is None or not on_cpu(reset) or not self.layout.visible:
            return every
        if self.layout.batch_sizes is not None:
            rows = self.processing_order(reset).nonzero().flatten()
            return set(torch.searchsorted(self.layout.batch_sizes.cumsum(0), rows, right=True).tolist())
        found = reset.any(1)
        return set((found.flip(0) if self.reverse else found).nonzero().flatten().tolist())


def _batch_norm(rows: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Moments]:
    """N_g over axis 0 by ATen's kernel, and the moments, which that kernel gives only rounded."""
    y = torch.batch_norm(rows, gain.contiguous(), None, None, None, True, 0.0, eps, False)
    with torch.no_grad():
        mean = rows.sum(0, keepdim=True) / max(len(rows), 1)
        var = (rows - mean).square().sum(0, keepdim=True) / max(len(rows), 1)
    return y, Moments(mean, var, mean.new_full((1, 1), len(rows)))


def _sequence_norm(rows: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Moments]:
    """N_g over axis 0, which may be long: ATen's kernel would sum it up in one float32 variable."""
    count = max(len(rows), 1)
    mean = rows.sum(0, keepdim=True) / count
    centered = rows - mean
    var = centered.square().sum(0, keepdim=True) / count
    # Squares that overflow give NaN, not zeros.
    rstd = torch.rsqrt(var + eps).masked_fill(var.isinf(), float("nan"))
    return centered * rstd * gain, Moments(mean, var, mean.new_full((1, 1), len(rows)))


def plus(v: Tensor, bias: Tensor | None) -> Tensor:
    """v + bias, or v where there is no bias."""
    return v if bias is None else v + bias


Advance = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]


def _lstm(config: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    summed, normalize_c = norms.summed(weights.weight_hh, dtype), norms.at("c", small.bias_c)

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        assert c is not None
        i, f, g, o = summed(input_term, h, t).chunk(4, -1)
        c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        shown = c
        if normalize_c is not None:
            shown = normalize_c(c, t)
            if config.cell_norm == "state":
                c = shown
        h = torch.sigmoid(o) * torch.tanh(shown)
        if weights.weight_hr is not None:
            h = F.linear(h.to(dtype), weights.weight_hr).to(h.dtype)
        return h, c

    return advance


def _gru(config: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    units = weights.weight_hh.shape[1]
    on_sum = not config.reset_after
    summed = norms.summed(weights.weight_hh, dtype) if on_sum else None
    hidden_term = norms.hidden_term(weights.weight_hh, dtype)

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        if summed is not None:
            r, z, n = summed(input_term, h, t).chunk(3, -1)
            candidate = torch.tanh(torch.sigmoid(r) * n)
            z = torch.sigmoid(z + config.update_offset)
        else:
            input_rz, input_n = input_term.split((2 * units, units), -1)
            hidden_rz, hidden_n = hidden_term(h, t).split((2 * units, units), -1)
            rz = input_rz + hidden_rz
            if config.update_offset:
                rz = torch.cat([rz[:, :units], rz[:, units:] + config.update_offset], -1)
            r, z = torch.sigmoid(rz).chunk(2, -1)
            candidate = torch.tanh(torch.addcmul(input_n, r, hidden_n))
        new, old = (h, candidate) if config.update_gate == "torch" else (candidate, h)
        return torch.lerp(old, new, z), None

    return advance


def _rnn(config: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    summed = norms.summed(weights.weight_hh, dtype)
    activation = torch.tanh if config.nonlinearity == "tanh" else torch.relu

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        return activation(summed(input_term, h, t)), None

    return advance


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}


class _Norms:
    """The norms of one layer in one direction, each with the bias that follows it, as the fewest kernels there are."""

    def __init__(
        self,
        config: Recurrence,
        small: Weights,
        units: int,
        steps: _Steps,
        running: Running | None,
        start_step: int,
    ) -> None:
        self.config, self.small, self.units = config, small, units
        self.steps, self.running, self.start_step = steps, running, start_step
        self.sites = config.sites(units)
        self.used: dict[str, list[Moments]] = {}

    def at(self, site: str, bias: Tensor | None) -> Normalize | None:
        """v (B, features), t -> N_g(v) + bias of step t; None if the site has no norm."""
        if site not in self.sites:
            return None
        gain: Tensor = getattr(self.small, f"gain_{site}")
        if self.config.norm != "batch":
            fused = self.by_features(site, gain, bias)
            return lambda v, t: fused(v)
        if self.running is None:
            return lambda v, t: plus(self.by_batch(site, v, gain), bias)
        mean, scale = self.given(site, gain)
        last = len(mean) - 1

        def with_running(v: Tensor, t: int) -> Tensor:
            row = min(self.start_step + t, last)
            return plus((v - mean[row]) * scale[row], bias)

        return with_running

    def by_features(self, site: str, gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Layer or RMS norm of (..., features)."""
        groups = self.config.groups if self.config.groups and site != "c" else (1,)
        sizes = [gain.numel() // sum(groups) * n for n in groups]
        biases = [None] * len(groups) if bias is None else bias.split(sizes)
        parts = [self.fused(size, g, b) for size, g, b in zip(sizes, gain.split(sizes), biases, strict=True)]
        if len(parts) == 1:
            return parts[0]
        return lambda v: torch.cat([part(p) for part, p in zip(parts, v.split(sizes, -1), strict=True)], -1)

    def fused(self, size: int, gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if self.config.norm == "layer":
            return lambda v: F.layer_norm(v, (size,), gain, bias, self.config.eps)
        return lambda v: plus(F.rms_norm(v, (size,), gain, self.config.eps), bias)

    def by_batch(self, site: str, v: Tensor, gain: Tensor) -> Tensor:
        """Batch norm over the samples of a step, whose moments are kept."""
        y, moments = _batch_norm(v, gain, self.config.eps)
        self.used.setdefault(site, []).append(moments)
        return y

    def given(self, site: str, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of running means, and of gain / sqrt(var + eps)."""
        assert self.running is not None
        mean, var = self.running[site]
        return mean.to(gain.dtype), torch.rsqrt(var.to(gain.dtype) + self.config.eps) * gain

    def input_terms(self, projected: Tensor) -> Tensor:
        """N_ih(W_ih x) + b_ih of all steps at once; W_ih x as it is where the norm is over the sum."""
        if "sum" in self.sites:
            return projected
        bias = self.small.bias_ih
        if "ih" not in self.sites:
            return plus(projected, bias)
        gain = self.small.gain_ih
        assert gain is not None
        if self.config.norm != "batch":
            return self.by_features("ih", gain, bias)(projected)
        if self.running is not None:
            mean, scale = self.given("ih", gain)
            rows = (self.steps.index_of_rows(mean.device) + self.start_step).clamp(max=len(mean) - 1)
            return plus((projected - mean[rows]) * scale[rows], bias)
        if self.config.statistics == "per_step":
            steps = [self.by_batch("ih", v, gain) for v in self.steps.split(projected)]
            return plus(self.steps.join(steps) if steps else projected, bias)
        rows, moments = _sequence_norm(projected.reshape(-1, projected.shape[-1]), gain, self.config.eps)
        self.used["ih"] = [moments]
        return plus(rows.view_as(projected), bias)

    def hidden_term(self, weight_hh: Tensor, dtype: torch.dtype) -> Normalize:
        """h, t -> N_hh(W_hh h) + b_hh."""
        bias = self.small.bias_hh
        normalize = self.at("hh", bias)
        if normalize is not None:
            return lambda h, t: normalize(F.linear(h.to(dtype), weight_hh).to(h.dtype), t)
        narrow = None if bias is None else bias.to(dtype)
        return lambda h, t: F.linear(h.to(dtype), weight_hh, narrow).to(h.dtype)

    def summed(self, weight_hh: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor, int], Tensor]:
        """input term, h, t -> the summed input of the step, biases included."""
        small = self.small
        after = small.bias_ih if small.bias_hh is None else plus(small.bias_hh, small.bias_ih)
        normalize = self.at("sum", after)
        if normalize is None:
            hidden_term = self.hidden_term(weight_hh, dtype)
            return lambda input_term, h, t: input_term + hidden_term(h, t)
        inner = None if small.bias_inner is None else small.bias_inner.to(dtype)
        return lambda input_term, h, t: normalize(input_term + F.linear(h.to(dtype), weight_hh, inner).to(h.dtype), t)

    def statistics(self) -> dict[str, Moments]:
        """The batch moments of all steps, (steps, features), without their gradients."""
        return {
            site: Moments(*(torch.stack([m.flatten() for m in column]).detach() for column in zip(*used, strict=True)))
            for site, used in self.used.items()
        }


KERNELS = {"layer": LayerKernel(layer), "stack": StackKernel(supports_stack, stack)}
