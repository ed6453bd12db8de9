"""RNNCell, GRUCell, LSTMCell: one step of the layers in `nn.recurrent`, with torch.nn's own arguments and names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normwise.nn import recurrent_parameters as parameters
from normwise.nn.construct import NotScripted
from normwise.ops import check, recurrent, symbolic
from normwise.reference.recurrence import Cell, NormKind, Recurrence


class _Cell(NotScripted, nn.modules.rnn.RNNCellBase):
    """What the cells share; each is a subclass of torch's own, which runs it if there is no norm."""

    cell: ClassVar[Cell]
    recurrence: Recurrence
    meets: parameters.Meets | None = None

    def _build(
        self,
        norm: NormKind | None,
        variant: str | Recurrence | None,
        max_length: int,
        momentum: float,
        **changes: Any,
    ) -> None:
        """After torch's constructor: the norms and what they need."""
        parameters.forget_bias_needs_bias(changes.get("forget_bias"), self.bias)
        max_length = parameters.positive_rows(max_length)
        check.momentum_range(momentum)
        how, self.variant = parameters.describe(self.cell, norm, variant, **changes)
        if how.statistics == "sequence":
            raise ValueError(
                f"{type(self).__name__} sees one step: statistics='sequence' needs the layer, or use 'frame'"
            )
        self.recurrence, self.max_length, self.momentum = how, max_length, momentum
        shapes = how.shapes(self.input_size, self.hidden_size, bias=self.bias)
        parameters.add_to(self, how, shapes, rows=max_length, hidden_size=self.hidden_size)
        parameters.reset_norms(self, how)

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), as torch; biases 0, gains as the preset says."""
        super().reset_parameters()
        if hasattr(self, "recurrence"):  # not yet while torch's constructor runs
            parameters.reset_norms(self, self.recurrence)

    def _step(self, input: Tensor, states: list[Tensor | None], t: int | None) -> list[Tensor]:
        """(B, I) or (I,) and its states in, the next states out."""
        how = self.recurrence
        name = type(self).__name__
        check.tensor(name, input)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise check.ShapeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}"
            )
        first = parameters.step_index(how, self.max_length, t)
        x = input.reshape(1, input.shape[0] if input.dim() == 2 else 1, self.input_size)
        expected = (*input.shape[:-1], self.hidden_size)
        for n, state in enumerate(states):
            if state is not None and tuple(state.shape) != expected:
                raise check.ShapeError(
                    f"{name}: Expected hidden[{n}] to be of shape {expected}, got {tuple(state.shape)}"
                )
        size = (1, x.shape[1], self.hidden_size)
        given = [x.new_zeros(size) if s is None else s.reshape(size) for s in states]
        table = parameters.running_of(self, how)
        learns = how.norm == "batch" and (self.training or self.meets is not None)
        output = recurrent.stack(
            x,
            given[0],
            given[1] if len(given) > 1 else None,
            [parameters.weights_of(self)],
            how,
            training=self.training,
            running=None if learns else [table],
            first=first,
        )
        parameters.learn(self, table, output.statistics[0], first)
        return [s[0].reshape(expected) for s in (output.h, output.c) if s is not None]

    def extra_repr(self) -> str:
        variant = "" if self.variant is None else f", variant={self.variant!r}"
        return f"{super().extra_repr()}, norm={self.recurrence.norm!r}{variant}"


def _sizes(input_size: int, hidden_size: int) -> tuple[int, int]:
    return check.whole_number("input_size", input_size), check.whole_number("hidden_size", hidden_size)


class RNNCell(_Cell, nn.RNNCell):
    """One step of `RNN`: h' = cell(input, h). Arguments as torch.nn.RNNCell, and those of `RNN` that follow the star.

    `t`, the index of the step, is what per-step batch statistics need; see `RNN.step`.
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
        max_length: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_sizes(input_size, hidden_size), bias, nonlinearity, device, dtype)
        self._build(norm, variant, max_length, momentum, nonlinearity=nonlinearity, eps=eps, zoneout=zoneout)
        self.nonlinearity = self.recurrence.nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None, *, t: int | None = None) -> Tensor:
        """(B, I), (B, H) -> (B, H), or without a batch; see `normwise.RNN`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, t=t)  # type: ignore[no-any-return]
        if recurrent.is_plain(self.recurrence, None):
            return nn.RNNCell.forward(self, input, hx)
        return self._step(input, [hx], t)[0]


class GRUCell(_Cell, nn.GRUCell):
    """One step of `GRU`: h' = cell(input, h). Arguments as torch.nn.GRUCell, and those of `GRU` that follow the star.

    `t`, the index of the step, is what per-step batch statistics need; see `GRU.step`.
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
        max_length: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_sizes(input_size, hidden_size), bias, device, dtype)
        self._build(norm, variant, max_length, momentum, eps=eps, zoneout=zoneout, update_gate=update_gate)

    def forward(self, input: Tensor, hx: Tensor | None = None, *, t: int | None = None) -> Tensor:
        """(B, I), (B, H) -> (B, H), or without a batch; see `normwise.GRU`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, t=t)  # type: ignore[no-any-return]
        if recurrent.is_plain(self.recurrence, None):
            return nn.GRUCell.forward(self, input, hx)
        return self._step(input, [hx], t)[0]


class LSTMCell(_Cell, nn.LSTMCell):
    """One step of `LSTM`: h', c' = cell(input, (h, c)). Arguments as torch.nn.LSTMCell, and those of `LSTM` that follow
    the star.

    `t`, the index of the step, is what per-step batch statistics need; see `LSTM.step`.
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
        max_length: int = 256,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(*_sizes(input_size, hidden_size), bias, device, dtype)
        self._build(norm, variant, max_length, momentum, eps=eps, zoneout=zoneout, forget_bias=forget_bias)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, t: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, I), ((B, H), (B, H)) -> ((B, H), (B, H)), or without a batch; see `normwise.LSTM`."""
        if symbolic.is_traced(input, hx):
            return symbolic.call_layer(self, input, hx=hx, t=t)  # type: ignore[no-any-return]
        if recurrent.is_plain(self.recurrence, None):
            return nn.LSTMCell.forward(self, input, hx)
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            raise TypeError(f"LSTMCell: expected hx to be a pair (h, c), but got {type(hx).__name__}")
        h, c = self._step(input, [None, None] if hx is None else list(hx), t)
        return h, c
