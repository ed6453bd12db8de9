"""RNN, GRU, LSTM: torch.nn's layers with normalization inside the recurrence."""

from __future__ import annotations

import torch

from normwise.backends.recurrence import NormKind, Recurrence
from normwise.nn.recurrent_base import Recurrent
from normwise.nn.recurrent_parameters import no_projection
from normwise.ops.rnn.between import BetweenNorm


class RNN(Recurrent):
    r"""A multi-layer Elman RNN with normalization inside the recurrence.

    By default that of Ba et al. 2016, one norm over the summed input: with LN_g(v) = g * (v - mean(v)) /
    sqrt(var(v) + eps) over the features of one sample at one step,

        h_t = nonlinearity(LN(W_ih x_t + W_hh h_(t-1)) + b_ih)

    A drop-in for `torch.nn.RNN`: same arguments, shapes, return values and names of parameters; with `norm=None` it
    is torch's layer. Everything else is as in `LSTM`.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional: as torch.nn.RNN.
        norm: "layer", "rms", "batch", or None.
        variant: "ba2016" (default for layer and rms), "separate"; for norm="batch" "cooijmans2016" (default) or
            "laurent2015"; or a `Recurrence` of one's own, whose norm and nonlinearity then count.
        eps, zoneout, statistics, num_stat_steps, momentum, between, residual: as in `LSTM`.

    Raises:
        ValueError: unknown or unfitting norm, variant or option; see `Recurrence`.

    Source: Ba, Kiros & Hinton 2016, eq. 4; for the variants see `normwise.ops.rnn.presets.PRESETS`.
    """

    cell = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        zoneout: float | None = None,
        statistics: str | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
        between: BetweenNorm | None = None,
        residual: bool = False,
        proj_size: int = 0,
    ) -> None:
        no_projection(proj_size)
        arguments = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "device": device,
            "dtype": dtype,
        }
        self._build(
            arguments,
            norm,
            variant,
            num_stat_steps,
            momentum,
            between,
            residual,
            eps=eps,
            zoneout=zoneout,
            statistics=statistics,
            nonlinearity=nonlinearity,
        )


class GRU(Recurrent):
    r"""A multi-layer GRU with normalization inside the recurrence.

    By default that of Ba et al. 2016: with LN_g(v) = g * (v - mean(v)) / sqrt(var(v) + eps), where r and z share
    statistics and n has its own, over the features of one sample at one step,

        p = LN(W_ih x_t) + b_ih,  q = LN(W_hh h_(t-1)) + b_hh
        r, z = s(p_rz + q_rz)
        n = tanh(p_n + r * q_n)
        h_t = z * h_(t-1) + (1 - z) * n

    A drop-in for `torch.nn.GRU`: same arguments, shapes, return values and names of parameters; with `norm=None` it
    is torch's layer. Everything else is as in `LSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as torch.nn.GRU.
        norm: "layer", "rms", "batch", or None.
        variant: "ba2016" (default for layer and rms), "haste", "dreamer"; for norm="batch" "cooijmans2016" (default)
            or "laurent2015"; or a `Recurrence` of one's own, whose norm then counts.
        eps, zoneout, statistics, num_stat_steps, momentum, between, residual: as in `LSTM`.
        update_gate: "torch" blends as above and as the authors' code does, "paper" the other way round, (1-z) h + z n,
            as Ba et al.'s eq. 28 has it. None means the variant's.

    Raises:
        ValueError: unknown or unfitting norm, variant or option; see `Recurrence`.

    Source: Ba, Kiros & Hinton 2016, eq. 25-28; for the variants see `normwise.ops.rnn.presets.PRESETS`.
    """

    cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        update_gate: str | None = None,
        zoneout: float | None = None,
        statistics: str | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
        between: BetweenNorm | None = None,
        residual: bool = False,
        proj_size: int = 0,
    ) -> None:
        no_projection(proj_size)
        arguments = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "device": device,
            "dtype": dtype,
        }
        self._build(
            arguments,
            norm,
            variant,
            num_stat_steps,
            momentum,
            between,
            residual,
            eps=eps,
            zoneout=zoneout,
            statistics=statistics,
            update_gate=update_gate,
        )


class LSTM(Recurrent):
    r"""A multi-layer LSTM with normalization inside the recurrence.

    By default that of Ba et al. 2016: with LN_g(v) = g * (v - mean(v)) / sqrt(var(v) + eps) over the features of one
    sample at one step,

        i, f, g, o = LN(W_ih x_t) + b_ih + LN(W_hh h_(t-1)) + b_hh
        c_t = s(f) * c_(t-1) + s(i) * tanh(g)
        h_t = s(o) * tanh(LN(c_t) + b_c)

    A drop-in for `torch.nn.LSTM`: same arguments, shapes, return values and names of parameters; with `norm=None` it
    is torch's layer. The norms' gains are `gain_<site>_l<k>`; see `normwise.Recurrence` for the equations of all
    variants. Calls also take `lengths=` and `reset=`, and `step()` runs a single step.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size: as torch.nn.LSTM.
        norm: "layer", "rms", "batch", or None.
        variant: "ba2016" (default for layer and rms), "fastrnns", "tfa", "torchaudio", "per_gate", "icefall",
            "haste"; for norm="batch" "cooijmans2016" (default) or "laurent2015"; or a `Recurrence` of one's own,
            whose norm then counts.
        eps, forget_bias, zoneout: in place of the preset's; `zoneout` is the probability of a unit of h to keep its
            value in training.
        statistics: for laurent2015, "per_step" (default: each step its own) or "sequence" (over batch and time).
        num_stat_steps: how many steps have running batch statistics of their own; all later ones share the last row.
            1 shares one row among all steps.
        momentum: weight of the new batch in the running statistics.
        between: "layer" or "rms": normalize the D * H output features of each layer but the last before dropout and
            the next layer, as `LayerNorm` or `RMSNorm` does, with eps of its own, by `gain_between_l<k>` and, for
            "layer" unless bias=False, `bias_between_l<k>`. Any `norm` inside goes with it, None too.
        residual: from the second layer on, add a layer's input to its output. The input is what the layer got, behind
            norm and dropout. The first layer adds none, whatever `input_size`. States stay as the cells give them.

    Raises:
        ValueError: unknown or unfitting norm, variant or option; see `Recurrence`.
        TypeError: a `residual` that is not True or False.

    Source: Ba, Kiros & Hinton 2016, eq. 20-22; for the variants see `normwise.ops.rnn.presets.PRESETS`. `residual`
    is that of Wu et al. 2016 (GNMT), section 3.1; `between` the norm of Ba et al.'s eq. 3 over a layer's outputs.
    """

    cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        forget_bias: float | None = None,
        zoneout: float | None = None,
        statistics: str | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
        between: BetweenNorm | None = None,
        residual: bool = False,
    ) -> None:
        arguments = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "proj_size": proj_size,
            "device": device,
            "dtype": dtype,
        }
        self._build(
            arguments,
            norm,
            variant,
            num_stat_steps,
            momentum,
            between,
            residual,
            eps=eps,
            zoneout=zoneout,
            statistics=statistics,
            forget_bias=forget_bias,
        )
