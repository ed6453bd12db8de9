"""The truth about every recurrent layer: a loop over steps in plain PyTorch, computed in at least float32."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends.protocol import Moments, Running, accumulation_dtype
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference.norm import norm
from normwise.backends.reference.sequences import reverse as reversed_steps
from normwise.backends.reference.sequences import reverse_reset, valid_steps


class Step(NamedTuple):
    """One step as it was computed, differentiable.

    summed: (B, G*H) the summed input that the gates or the nonlinearity saw, norms and biases included; None for a
        GRU with reset_after=True, whose candidate has no such sum.
    h: (B, H) the state after it; that of a finished sequence stays what it was.
    gates: (B, H) each, what went into the sigmoid or tanh of every gate, in the order of `GATES`.
    """

    summed: Tensor | None
    h: Tensor
    gates: tuple[Tensor, ...]


class Result(NamedTuple):
    """What one layer in one direction gives.

    output: (T, B, H) h of each step, 0 where a sequence has ended.
    h, c: (B, H) the state after each sequence's last valid step; `c` is None without a cell state.
    statistics: batch norm in training: for each site the moments that were used, (T, features) or (1, features) for
        sequence-wise statistics, with `count` (T, 1) or (1, 1); steps are in the order of processing. Else empty.
    """

    output: Tensor
    h: Tensor
    c: Tensor | None
    statistics: dict[str, Moments]


def recurrence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    config: Recurrence,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    zoneout_mask: Tensor | None = None,
    running: Running | None = None,
    start_step: int = 0,
    tape: list[Step] | None = None,
) -> Result:
    """One layer in one direction over a whole batch of sequences.

    A backward direction turns each sequence round within its length, runs, and turns the output back: step 0 of its
    per-step statistics is each sequence's last.

    Args:
        x: (T, B, I) input; padding may hold anything.
        h0: (B, H) initial hidden state, H being `proj_size` if there is a projection.
        c0: (B, hidden_size) initial cell state; None unless `config.cell` is "lstm".
        weights: see `Recurrence.shapes`.
        config: the recurrence.
        lengths: (B,) integer, valid steps of each sample; None means T.
        reset: (T, B) bool, True where the state is zeroed between steps t-1 and t.
        reverse: run from the last step to the first.
        zoneout_mask: (T, B, H) bool, True where zoneout keeps the previous h; None takes zoneout's expectation.
        running: batch norm's statistics; None takes those of the batch, over the samples whose length exceeds t.
        start_step: the index of the first step in `running`'s tables.
        tape: to look inside: each step is appended to it, in the order of processing.

    Returns:
        `Result`, in the dtype of `x`.
    """
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)
    weights = Weights(*(None if w is None else w.to(wide) for w in weights))  # type: ignore[arg-type]
    valid = None if lengths is None else valid_steps(len(x), lengths)
    x = x.to(wide)
    if valid is not None:
        # Selected before any arithmetic: NaN in the padding would survive a multiplication by 0.
        x = x.masked_fill(~valid[..., None], 0)
        # After its end a sequence keeps its state, whatever the flags there say.
        reset = None if reset is None else reset & valid
    if reverse:
        x = reversed_steps(x, lengths)
        reset = None if reset is None else reverse_reset(reset, lengths)
        zoneout_mask = None if zoneout_mask is None else reversed_steps(zoneout_mask, lengths)

    step = _Step(weights, config, running, start_step)
    advance = {"lstm": step.lstm, "gru": step.gru, "rnn": step.rnn}[config.cell]
    inputs = step.input_terms(F.linear(x, weights.weight_ih), valid)
    h, c = h0.to(wide), None if c0 is None else c0.to(wide)
    outputs = []
    # unbind, because indexing step by step would write a gradient of all steps at every step.
    for t, input_term in enumerate(inputs.unbind(0)):
        step.begin(t, None if valid is None else valid[t, :, None])
        if reset is not None:
            h = h.masked_fill(reset[t, :, None], 0)
            c = None if c is None else c.masked_fill(reset[t, :, None], 0)
        new_h, new_c = advance(input_term, h, c)
        if zoneout_mask is not None:
            new_h = torch.where(zoneout_mask[t], h, new_h)
        elif config.zoneout:
            new_h = config.zoneout * h + (1 - config.zoneout) * new_h
        if valid is None:
            h, c = new_h, new_c
            outputs.append(h)
        else:
            running_on = valid[t, :, None]
            h = torch.where(running_on, new_h, h)
            c = None if c is None or new_c is None else torch.where(running_on, new_c, c)
            outputs.append(h.masked_fill(~running_on, 0))
        if tape is not None:
            tape.append(Step(step.seen, h, step.gates))
    output = torch.stack(outputs)
    if reverse:
        output = reversed_steps(output, lengths)
    return Result(output.to(dtype), h.to(dtype), None if c is None else c.to(dtype), step.statistics())


class _Step:
    """One step of each kind of cell, with the norms where the description puts them."""

    def __init__(self, weights: Weights, config: Recurrence, running: Running | None, start_step: int) -> None:
        self.weights, self.config, self.running, self.start_step = weights, config, running, start_step
        self.sites = config.sites(weights.weight_hh.shape[0] // config.gates)
        self.used: dict[str, list[Moments]] = {}
        self.t = 0
        self.valid: Tensor | None = None
        self.seen: Tensor | None = None  # the summed input of the present step
        self.gates: tuple[Tensor, ...] = ()

    def begin(self, t: int, valid: Tensor | None) -> None:
        """Go to step `t`, at which `valid` (B, 1) says who is still running."""
        self.t, self.valid = t, valid

    def lstm(self, input_term: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert c is not None
        self.gates = i, f, g, o = self.summed(input_term, h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = c
        if self.config.cell_norm is not None:
            shown = plus(self.normalize("c", c), self.weights.bias_c)
            if self.config.cell_norm == "state":
                c = shown
        h = torch.sigmoid(o) * torch.tanh(shown)
        if self.weights.weight_hr is not None:
            h = F.linear(h, self.weights.weight_hr)
        return h, c

    def gru(self, input_term: Tensor, h: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.config.reset_after:
            r, z, n = self.summed(input_term, h).chunk(3, -1)
            n = torch.sigmoid(r) * n
        else:
            input_r, input_z, input_n = input_term.chunk(3, -1)
            hidden_r, hidden_z, hidden_n = self.hidden_term(h).chunk(3, -1)
            r, z = input_r + hidden_r, input_z + hidden_z
            n = input_n + torch.sigmoid(r) * hidden_n
        self.gates = r, z + self.config.update_offset, n
        z, candidate = torch.sigmoid(self.gates[1]), torch.tanh(n)
        if self.config.update_gate == "paper":
            z = 1 - z
        return z * h + (1 - z) * candidate, None

    def rnn(self, input_term: Tensor, h: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed = self.summed(input_term, h)
        self.gates = (summed,)
        return (torch.tanh(summed) if self.config.nonlinearity == "tanh" else torch.relu(summed)), None

    def input_terms(self, projected: Tensor, valid: Tensor | None) -> Tensor:
        """N_ih(W_ih x) + b_ih of all steps; W_ih x as it is where the norm is over the sum."""
        if "sum" in self.sites:
            return projected
        if "ih" in self.sites:
            mask = None if valid is None else valid[..., None]
            if self.config.statistics == "sequence" and self.config.norm == "batch":
                projected = self.normalize("ih", projected, (0, 1), mask)
            else:
                steps = []
                for t, row in enumerate(projected.unbind(0)):
                    self.begin(t, None if mask is None else mask[t])
                    steps.append(self.normalize("ih", row))
                projected = torch.stack(steps)
        return plus(projected, self.weights.bias_ih)

    def hidden_term(self, h: Tensor) -> Tensor:
        """N_hh(W_hh h) + b_hh."""
        hidden = F.linear(h, self.weights.weight_hh)
        if "hh" in self.sites:
            hidden = self.normalize("hh", hidden)
        return plus(hidden, self.weights.bias_hh)

    def summed(self, input_term: Tensor, h: Tensor) -> Tensor:
        """The summed input of the step, biases included."""
        if "sum" not in self.sites:
            self.seen = input_term + self.hidden_term(h)
        else:
            both = plus(input_term + F.linear(h, self.weights.weight_hh), self.weights.bias_inner)
            self.seen = plus(plus(self.normalize("sum", both), self.weights.bias_ih), self.weights.bias_hh)
        return self.seen

    def normalize(self, site: str, v: Tensor, batch_dims: tuple[int, ...] = (0,), mask: Tensor | None = None) -> Tensor:
        """N_g(v) at `site`. `batch_dims` and `mask` are batch norm's; by default those of the present step."""
        gain: Tensor = getattr(self.weights, f"gain_{site}")
        eps = self.config.eps
        if self.config.norm != "batch":
            groups = self.config.groups if self.config.groups and site != "c" else (1,)
            parts = v.split([v.shape[-1] // sum(groups) * n for n in groups], -1)
            centre = self.config.norm == "layer"
            return torch.cat([norm(p, (-1,), eps=eps, center=centre)[0] for p in parts], -1) * gain
        if self.running is not None:
            mean, var = self.running[site]
            row = min(self.start_step + self.t, len(mean) - 1)
            return norm(v, batch_dims, gain, mean=mean[row], var=var[row], eps=eps)[0]
        y, moments = norm(v, batch_dims, gain, mask=self.valid if mask is None else mask, eps=eps)
        self.used.setdefault(site, []).append(moments)
        return y

    def statistics(self) -> dict[str, Moments]:
        """The batch moments of all steps so far, (steps, features), without their gradients."""
        return {
            site: Moments(*(torch.stack([m.flatten() for m in column]).detach() for column in zip(*used, strict=True)))
            for site, used in self.used.items()
        }


def plus(v: Tensor, bias: Tensor | None) -> Tensor:
    """v + bias, or v where there is no bias."""
    return v if bias is None else v + bias
