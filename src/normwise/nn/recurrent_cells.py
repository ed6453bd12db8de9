"""RNNCell, GRUCell, LSTMCell: one step of the layers in `nn.recurrent`, with torch.nn's own arguments and names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normwise.backends.recurrence import Cell, NormKind, Recurrence
from normwise.backends.scalars import flags
from normwise.nn import recurrent_parameters as parameters
from normwise.nn.construct import NotScripted
from normwise.ops import hyperparameters, symbolic
from normwise.ops.rnn import stack
from normwise.ops.rnn.running_stats import StatsObserver


class _Cell(NotScripted, nn.modules.rnn.RNNCellBase):
    """What the cells share; each is a subclass of torch's own."""

    cell: ClassVar[Cell]
    recurrence: Recurrence
    stats_observer: StatsObserver | None = None

    def _build(
        self,
        norm: NormKind | None,
        variant: str | Recurrence | None,
        num_stat_steps: int,
        momentum: float,
        **changes: Any,
    ) -> None:
        """After torch's constructor: the norms and what they need."""
        parameters.forget_bias_needs_bias(changes.get("forget_bias"), self.bias)
        num_stat_steps = parameters.positive_rows(num_stat_steps)
        hyperparameters.momentum_range(momentum, may_be_none=False)
        config, self.variant = parameters.describe(self.cell, norm, variant, **changes)
        if config.statistics == "sequence":
            raise ValueError(
                f"{type(self).__name__} sees one step: statistics='sequence' needs the layer, or use 'per_step'"
            )
        self.recurrence, self.num_stat_steps, self.momentum = config, num_stat_steps, momentum
        shapes = config.shapes(self.input_size, self.hidden_size, bias=self.bias)
        parameters.register_norm_parameters(self, config, shapes, rows=num_stat_steps, hidden_size=self.hidden_size)
        parameters.reset_norms(self, config)

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), as torch; biases 0, gains as the preset says."""
        super().reset_parameters()
        if hasattr(self, "recurrence"):  # not yet while torch's constructor runs
            parameters.reset_norms(self, self.recurrence)

    def _layers(self) -> stack.Layers:
        """The cell as a call finds it."""
        stats = parameters.batch_stats_of(self, ("",))
        weights = (parameters.weights_of(self),)
        return stack.Layers(type(self).__name__, self.recurrence, weights, training=self.training, batch_stats=stats)

    def extra_repr(self) -> str:
        variant = "" if self.variant is None else f", variant={self.variant!r}"
        return f"{super().extra_repr()}, norm={self.recurrence.norm!r}{variant}"


def _checked(input_size: int, hidden_size: int, bias: bool) -> tuple[int, int, bool]:
    flags(bias=bias)
    return hyperparameters.size("input_size", input_size), hyperparameters.size("hidden_size", hidden_size), bias


class RNNCell(_Cell, nn.RNNCell):
    """One step of `RNN`: h' = cell(input, h). Arguments as torch.nn.RNNCell, and those of `RNN` that follow the star.

    `step`, its index in the sequence, is what per-step batch statistics need; see `RNN.step`.
    """

    cell = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        zoneout: float | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_checked(input_size, hidden_size, bias), nonlinearity, device, dtype)
        self._build(norm, variant, num_stat_steps, momentum, nonlinearity=nonlinearity, eps=eps, zoneout=zoneout)
        self.nonlinearity = self.recurrence.nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None, *, step: int | None = None) -> Tensor:
        """(B, I), (B, H) -> (B, H), or without a batch; see `normwise.RNN`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, step=step)  # type: ignore[no-any-return]
        return stack.cell(self._layers(), input, hx, step)  # type: ignore[return-value]


class GRUCell(_Cell, nn.GRUCell):
    """One step of `GRU`: h' = cell(input, h). Arguments as torch.nn.GRUCell, and those of `GRU` that follow the star.

    `step`, its index in the sequence, is what per-step batch statistics need; see `GRU.step`.
    """

    cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        update_gate: str | None = None,
        zoneout: float | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_checked(input_size, hidden_size, bias), device, dtype)
        self._build(norm, variant, num_stat_steps, momentum, eps=eps, zoneout=zoneout, update_gate=update_gate)

    def forward(self, input: Tensor, hx: Tensor | None = None, *, step: int | None = None) -> Tensor:
        """(B, I), (B, H) -> (B, H), or without a batch; see `normwise.GRU`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, step=step)  # type: ignore[no-any-return]
        return stack.cell(self._layers(), input, hx, step)  # type: ignore[return-value]


class LSTMCell(_Cell, nn.LSTMCell):
    """One step of `LSTM`: h', c' = cell(input, (h, c)). Arguments as torch.nn.LSTMCell, and those of `LSTM` that follow
    the star.

    `step`, its index in the sequence, is what per-step batch statistics need; see `LSTM.step`.
    """

    cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormKind | None = "layer",
        variant: str | Recurrence | None = None,
        eps: float | None = None,
        forget_bias: float | None = None,
        zoneout: float | None = None,
        num_stat_steps: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_checked(input_size, hidden_size, bias), device, dtype)
        self._build(norm, variant, num_stat_steps, momentum, eps=eps, zoneout=zoneout, forget_bias=forget_bias)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, I), ((B, H), (B, H)) -> ((B, H), (B, H)), or without a batch; see `normwise.LSTM`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, step=step)  # type: ignore[no-any-return]
        return stack.cell(self._layers(), input, hx, step)  # type: ignore[return-value]
