"""A recurrent layer as fast as ATen's operations allow: the mathematics of `reference.recurrent`, in fewer nodes.

What need not wait for the previous step is done for all steps at once (input projection, its norm and bias), a
norm is one fused kernel, and finished sequences are not held back step by step: they run on over zeros, and their
final states are picked out of all states at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.ops.choose import values_visible
from normwise.reference.moments import Moments, accumulation_dtype
from normwise.reference.norm import norm
from normwise.reference.recurrence import Recurrence, Weights
from normwise.reference.recurrent import Result, Running, plus
from normwise.reference.sequences import reverse as reversed_steps
from normwise.reference.sequences import reverse_reset, valid_steps

Normalize = Callable[[Tensor, int], Tensor]


def recurrence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    how: Recurrence,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    zoned: Tensor | None = None,
    running: Running | None = None,
    first: int = 0,
) -> Result:
    """As `reference.recurrent.recurrence`. Products are in the dtype of `x`, all else in at least float32."""
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)
    small = Weights(*(None if w is None else w.to(wide) for w in weights))  # type: ignore[arg-type]
    valid = None if lengths is None else valid_steps(len(x), lengths)
    if valid is not None:
        # Selected before any arithmetic: NaN in the padding would survive a multiplication by 0.
        x = x.masked_fill(~valid[..., None], 0)
        reset = None if reset is None else reset & valid
    if reverse:
        x = reversed_steps(x, lengths)
        reset = None if reset is None else reverse_reset(reset, lengths)
        zoned = None if zoned is None else reversed_steps(zoned, lengths)

    norms = _Norms(how, small, weights.weight_hh.shape[0] // how.gates, valid, running, first)
    inputs = norms.input_terms(F.linear(x, weights.weight_ih).to(wide))
    advance = _CELLS[how.cell](how, small, norms, weights, dtype)
    cleared = _steps_with_reset(reset, len(x))
    # A ReLU without a norm on its hidden term may grow without bound: it alone must not run on past the end.
    frozen = valid is not None and how.nonlinearity == "relu"

    h, c = h0.to(wide), None if c0 is None else c0.to(wide)
    hs, cs = [h], [c]
    # unbind, because indexing step by step would write a gradient of all steps at every step.
    for t, input_term in enumerate(inputs.unbind(0)):
        if reset is not None and t in cleared:
            h = h.masked_fill(reset[t, :, None], 0)
            c = None if c is None else c.masked_fill(reset[t, :, None], 0)
        new_h, c = advance(input_term, h, c, t)
        if zoned is not None:
            new_h = torch.where(zoned[t], h, new_h)
        elif how.zoneout:
            new_h = torch.lerp(new_h, h, how.zoneout)
        if frozen and valid is not None:
            new_h = torch.where(valid[t, :, None], new_h, h)
        h = new_h
        hs.append(h)
        cs.append(c)

    states = torch.stack(hs)
    output = states[1:]
    if valid is not None and lengths is not None:
        output = output.masked_fill(~valid[..., None], 0)
        h = _at(states, lengths)
        c = None if c is None else _at(torch.stack(cs), lengths)  # type: ignore[arg-type]
    if reverse:
        output = reversed_steps(output, lengths)
    return Result(output.to(dtype), h.to(dtype), None if c is None else c.to(dtype), norms.statistics())


def _at(states: Tensor, lengths: Tensor) -> Tensor:
    """(T+1, B, H) -> (B, H): each sample's state after `lengths` steps."""
    return states.gather(0, lengths.view(1, -1, 1).expand(1, *states.shape[1:]))[0]


def _steps_with_reset(reset: Tensor | None, steps: int) -> set[int] | range:
    """The steps that have any reset; all of them where looking would be slow or impossible."""
    if reset is None or reset.device.type != "cpu" or not values_visible(reset):
        return range(steps)
    return set(reset.any(1).nonzero().flatten().tolist())


def _alive(valid: Tensor | None) -> list[Tensor | None] | None:
    """For each step the samples still running, None where all are; None at all where looking is slow or impossible."""
    if valid is None or valid.device.type != "cpu" or not values_visible(valid):
        return None
    return [None if row.all() else row.nonzero().flatten() for row in valid.unbind(0)]


def _batch_norm(rows: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Moments]:
    """N_g over axis 0 by ATen's kernel, and the moments, which that kernel gives only rounded."""
    y = torch.batch_norm(rows, gain.contiguous(), None, None, None, True, 0.0, eps, False)
    with torch.no_grad():
        mean = rows.sum(0, keepdim=True) / max(len(rows), 1)
        var = (rows - mean).square().sum(0, keepdim=True) / max(len(rows), 1)
    return y, Moments(mean, var, mean.new_full((1, 1), len(rows)))


Advance = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]


def _lstm(how: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    summed, normalize_c = norms.summed(weights.weight_hh, dtype), norms.at("c", small.bias_c)

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        assert c is not None
        i, f, g, o = summed(input_term, h, t).chunk(4, -1)
        c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        shown = c
        if normalize_c is not None:
            shown = normalize_c(c, t)
            if how.cell_norm == "carried":
                c = shown
        h = torch.sigmoid(o) * torch.tanh(shown)
        if weights.weight_hr is not None:
            h = F.linear(h.to(dtype), weights.weight_hr).to(h.dtype)
        return h, c

    return advance


def _gru(how: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    units = weights.weight_hh.shape[1]
    on_sum = how.reset_gate == "candidate"
    summed = norms.summed(weights.weight_hh, dtype) if on_sum else None
    hidden_term = norms.hidden_term(weights.weight_hh, dtype)

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        if summed is not None:
            r, z, n = summed(input_term, h, t).chunk(3, -1)
            candidate = torch.tanh(torch.sigmoid(r) * n)
            z = torch.sigmoid(z + how.update_offset)
        else:
            input_rz, input_n = input_term.split((2 * units, units), -1)
            hidden_rz, hidden_n = hidden_term(h, t).split((2 * units, units), -1)
            rz = input_rz + hidden_rz
            if how.update_offset:
                rz = torch.cat([rz[:, :units], rz[:, units:] + how.update_offset], -1)
            r, z = torch.sigmoid(rz).chunk(2, -1)
            candidate = torch.tanh(torch.addcmul(input_n, r, hidden_n))
        new, old = (h, candidate) if how.update_gate == "torch" else (candidate, h)
        return torch.lerp(old, new, z), None

    return advance


def _rnn(how: Recurrence, small: Weights, norms: _Norms, weights: Weights, dtype: torch.dtype) -> Advance:
    summed = norms.summed(weights.weight_hh, dtype)
    activation = torch.tanh if how.nonlinearity == "tanh" else torch.relu

    def advance(input_term: Tensor, h: Tensor, c: Tensor | None, t: int) -> tuple[Tensor, Tensor | None]:
        return activation(summed(input_term, h, t)), None

    return advance


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}


class _Norms:
    """The norms of one layer in one direction, each with the bias that follows it, as the fewest kernels there are."""

    def __init__(
        self,
        how: Recurrence,
        small: Weights,
        units: int,
        valid: Tensor | None,
        running: Running | None,
        first: int,
    ) -> None:
        self.how, self.small, self.units, self.valid, self.running, self.first = (
            how,
            small,
            units,
            valid,
            running,
            first,
        )
        self.sites = how.sites(units)
        self.alive = _alive(valid)
        self.used: dict[str, list[Moments]] = {}

    def at(self, site: str, bias: Tensor | None) -> Normalize | None:
        """v (B, features), t -> N_g(v) + bias of step t; None if the site has no norm."""
        if site not in self.sites:
            return None
        gain: Tensor = getattr(self.small, f"gain_{site}")
        if self.how.norm != "batch":
            fused = self.by_features(site, gain, bias)
            return lambda v, t: fused(v)
        if self.running is None:
            return lambda v, t: plus(self.by_batch(site, v, gain, t), bias)
        mean, scale = self.given(site, gain)
        last = len(mean) - 1

        def with_running(v: Tensor, t: int) -> Tensor:
            row = min(self.first + t, last)
            return plus((v - mean[row]) * scale[row], bias)

        return with_running

    def by_features(self, site: str, gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Layer or RMS norm of (..., features)."""
        groups = self.how.groups if self.how.groups and site != "c" else (1,)
        sizes = [gain.numel() // sum(groups) * n for n in groups]
        biases = [None] * len(groups) if bias is None else bias.split(sizes)
        parts = [self.fused(size, g, b) for size, g, b in zip(sizes, gain.split(sizes), biases, strict=True)]
        if len(parts) == 1:
            return parts[0]
        return lambda v: torch.cat([part(p) for part, p in zip(parts, v.split(sizes, -1), strict=True)], -1)

    def fused(self, size: int, gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if self.how.norm == "layer":
            return lambda v: F.layer_norm(v, (size,), gain, bias, self.how.eps)
        return lambda v: plus(F.rms_norm(v, (size,), gain, self.how.eps), bias)

    def by_batch(self, site: str, v: Tensor, gain: Tensor, t: int) -> Tensor:
        """Batch norm over the samples still running at step t, whose moments are kept."""
        if self.valid is not None and self.alive is None:
            y, moments = norm(v, (0,), gain, mask=self.valid[t, :, None], eps=self.how.eps)
        else:
            alive = None if self.alive is None else self.alive[t]
            rows = v if alive is None else v.index_select(0, alive)
            y, moments = _batch_norm(rows, gain, self.how.eps)
            if alive is not None:
                y = torch.zeros_like(v).index_copy(0, alive, y)
        self.used.setdefault(site, []).append(moments)
        return y

    def given(self, site: str, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of running means, and of gain / sqrt(var + eps)."""
        assert self.running is not None
        mean, var = self.running[site]
        return mean.to(gain.dtype), torch.rsqrt(var.to(gain.dtype) + self.how.eps) * gain

    def input_terms(self, projected: Tensor) -> Tensor:
        """N_ih(W_ih x) + b_ih of all steps at once; W_ih x as it is where the norm is over the sum."""
        if "sum" in self.sites:
            return projected
        bias = self.small.bias_ih
        if "ih" not in self.sites:
            return plus(projected, bias)
        gain = self.small.gain_ih
        assert gain is not None
        if self.how.norm != "batch":
            return self.by_features("ih", gain, bias)(projected)
        if self.running is not None:
            mean, scale = self.given("ih", gain)
            rows = torch.arange(self.first, self.first + len(projected), device=mean.device)
            rows = rows.clamp(max=len(mean) - 1)
            return plus((projected - mean[rows, None]) * scale[rows, None], bias)
        if self.how.statistics == "frame":
            steps = enumerate(projected.unbind(0))
            return plus(torch.stack([self.by_batch("ih", v, gain, t) for t, v in steps]), bias)
        mask = None if self.valid is None else self.valid[..., None]
        y, moments = norm(projected, (0, 1), gain, mask=mask, eps=self.how.eps)
        self.used["ih"] = [moments]
        return plus(y, bias)

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
