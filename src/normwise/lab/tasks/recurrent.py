"""What tasks on whole sequences share: one recurrent layer, its last state, one linear map; and a look inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from normwise.backends.reference.recurrence import Step, recurrence
from normwise.lab.norms import recurrent_norm
from normwise.lab.tasks.base import Batch, Task
from normwise.lab.tasks.vowels import COEFFICIENTS, SPEAKERS, Vowels
from normwise.measure.time_steps import summed_inputs
from normwise.nn.recurrent_parameters import running_of, weights_of


class LastState(nn.Module):
    """A recurrent layer, and scores from its state after each sequence's last valid step.

    With ``noise`` h starts in training from normal numbers of this deviation, else from zeros.
    """

    def __init__(self, layer: normwise.RNN | normwise.LSTM, classes: int, noise: float = 0.0) -> None:
        super().__init__()
        self.recurrent = layer
        self.linear = nn.Linear(layer.hidden_size, classes)
        self.noise = noise

    def initial(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The h of (N, T, I) that training starts from, (N, H)."""
        if not self.noise:
            return x.new_zeros(len(x), self.recurrent.hidden_size)
        return self.noise * torch.randn(len(x), self.recurrent.hidden_size, generator=generator, dtype=x.dtype)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        start: Any = None
        if self.noise and self.training:
            start = self.initial(x)[None]
            start = (start, torch.zeros_like(start)) if self.recurrent.cell == "lstm" else start
        _, state = self.recurrent(x, start, lengths=lengths)
        h = state[0] if isinstance(state, tuple) else state
        scores: Tensor = self.linear(h[-1])
        return scores


@dataclass(frozen=True)
class RecurrentTask(Vowels):
    """One layer of ``cell``. Orthogonal hidden-to-hidden weights, gate by gate; the others keep a unit variance."""

    cell: ClassVar[type[normwise.RNN] | type[normwise.LSTM]]
    norms: ClassVar[tuple[str, ...]] = ("none", "layer", "rms", "batch-per-step", "batch-time-average", "batch-input")

    hidden: int = 32

    def model(self, norm: str, seed: int) -> nn.Module:
        layer = self.cell(COEFFICIENTS, self.hidden, batch_first=True, **recurrent_norm(norm, self.longest))
        layer.warned_of_length = True  # longer sequences than in training are meant here
        model = LastState(layer, SPEAKERS)
        draws = torch.Generator().manual_seed(seed)
        nn.init.normal_(layer.get_parameter("weight_ih_l0"), std=COEFFICIENTS**-0.5, generator=draws)
        for gate in layer.get_parameter("weight_hh_l0").detach().split(self.hidden):
            nn.init.orthogonal_(gate, generator=draws)
        nn.init.normal_(model.linear.weight, std=self.hidden**-0.5, generator=draws)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
        self.start(layer)
        return model

    def start(self, layer: normwise.RNN | normwise.LSTM) -> None:
        """Biases that do not start from 0."""

    def over_time(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """As ``over_steps`` says."""
        assert isinstance(model, LastState)
        return over_steps(self, model, batch)


def over_steps(task: Task, model: LastState, batch: Batch) -> dict[str, Tensor]:
    """Of each case and step, (N, T), from the reference loop, which computes what the layer does:

    - "unnormalized": mean square of W_ih x_t + W_hh h_(t-1);
    - "summed": mean square of the summed input that the gates see, after norms and biases;
    - "gradient": squared norm of the gradient of the case's own loss with respect to h_t.

    In training and evaluation alike h starts as in training, with noise that is the same at every look: from zeros a
    norm of zeros would multiply the gradient of each step by 1 / sqrt(eps).
    """
    assert batch.lengths is not None
    layer, x = model.recurrent, batch.inputs.transpose(0, 1)
    weights, tape = weights_of(layer, "_l0"), list[Step]()
    start = model.initial(batch.inputs, torch.Generator().manual_seed(0))
    with torch.enable_grad():
        result = recurrence(
            x,
            start,
            torch.zeros_like(start) if layer.cell == "lstm" else None,
            weights,
            layer.recurrence,
            lengths=batch.lengths,
            running=None if layer.training else running_of(layer, layer.recurrence, "_l0"),
            tape=tape,
        )
        loss = task.loss(model.linear(result.h), batch) * len(batch)
        states = [step.h for step in tape]
        gradients = torch.stack(torch.autograd.grad(loss, states))
    before = torch.stack([start, *states[:-1]])
    sums = F.linear(x, weights.weight_ih) + F.linear(before, weights.weight_hh)
    return {
        "unnormalized": sums.detach().square().mean(-1).T,
        "summed": summed_inputs(tape).square().mean(-1).T,
        "gradient": gradients.square().sum(-1).T,
    }
