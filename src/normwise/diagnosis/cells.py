"""RNNCell, GRUCell, LSTMCell: a model's own loop over steps, whose calls of one pass are the steps."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from normwise.backends.recurrence import Recurrence
from normwise.backends.reference.recurrence import Step, recurrence
from normwise.diagnosis import records
from normwise.diagnosis.recurrent import PlaceWatch
from normwise.nn.recurrent_parameters import weights_of


class CellWatch:
    """A cell over the batches: step t is its t-th call of a pass; its gates are recomputed from its inputs."""

    def __init__(self, module: RNNCellBase) -> None:
        self.module = module
        self.config = description(module)
        self.watch = PlaceWatch(self.config)
        self.tape: list[Step] = []
        self.gradients: list[Tensor | None] = []

    @torch.no_grad()
    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One call."""
        x = args[0] if args else kwargs["input"]
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        new = result[0] if isinstance(result, tuple) else result
        lstm = self.config.cell == "lstm"
        given = [None, None] if state is None else (list(state) if lstm else [state])
        zeros = new.new_zeros(new.shape)
        states = [zeros if s is None else s for s in given]
        rows = [s.reshape(-1, s.shape[-1]) for s in (x, *states)]
        tape: list[Step] = []
        recurrence(rows[0][None], rows[1], rows[2] if lstm else None, weights_of(self.module), self.config, tape=tape)
        own = new.reshape(-1, new.shape[-1])
        if own.numel() and bool(own.any()):
            error = float((own - tape[0].h).abs().max() / own.abs().max())
            self.watch.error = max(self.watch.error, error)
        self.tape += tape
        self.gradients.append(None)
        if new.requires_grad:
            new.register_hook(functools.partial(self._arrived, len(self.gradients) - 1))

    def _arrived(self, step: int, gradient: Tensor | None) -> None:
        if gradient is not None and step < len(self.gradients):
            self.gradients[step] = gradient.detach()

    def look(self, gradients: bool = True) -> None:
        """After the backward pass: count what was seen, and forget it."""
        tape, arrived = self.tape, self.gradients if gradients else [None] * len(self.tape)
        self.tape, self.gradients = [], []
        # A loop may drop finished sequences: only steps of as many samples are comparable.
        same = [t for t, step in enumerate(tape) if step.h.shape == tape[0].h.shape]
        if same:
            valid = torch.ones(len(same), len(tape[0].h), dtype=torch.bool)
            self.watch.add([tape[t] for t in same], valid.to(tape[0].h.device), [arrived[t] for t in same])

    def record(self) -> list[records.Recurrence]:
        exact = not self.config.zoneout and self.config.norm != "batch"
        return [self.watch.record("cell", False, exact)] if len(self.watch.state.total) else []


def description(module: RNNCellBase) -> Recurrence:
    """What a cell computes."""
    own = getattr(module, "recurrence", None)
    if isinstance(own, Recurrence):
        return own
    if isinstance(module, nn.RNNCell):
        return Recurrence("rnn", None, nonlinearity="relu" if module.nonlinearity == "relu" else "tanh")
    return Recurrence("lstm" if isinstance(module, nn.LSTMCell) else "gru", None)
