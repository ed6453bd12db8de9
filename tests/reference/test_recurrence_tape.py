"""What the reference loop shows of its inside: it changes nothing, and the output follows from what it shows."""

from __future__ import annotations

import pytest
import torch

from normwise.backends.recurrence import Weights
from normwise.backends.reference.recurrence import Step, recurrence
from normwise.ops.rnn.presets import PRESETS
from support.recurrences import random_weights
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 3, 3, 4
LENGTHS = torch.tensor([5, 2, 3])


@pytest.mark.parametrize(("cell", "name"), [(cell, name) for cell in PRESETS for name in PRESETS[cell]])
def test_each_step_follows_from_the_summed_input_and_the_state(cell, name):
    config = PRESETS[cell][name]
    w = Weights(**random_weights(config.shapes(INPUT, HIDDEN)))
    x, h0 = torch.randn(T, B, INPUT, dtype=torch.float64), torch.randn(B, HIDDEN, dtype=torch.float64)
    c0 = torch.randn(B, HIDDEN, dtype=torch.float64) if cell == "lstm" else None
    tape: list[Step] = []
    result = recurrence(x, h0, c0, w, config, lengths=LENGTHS, tape=tape)
    untaped = recurrence(x, h0, c0, w, config, lengths=LENGTHS)
    assert torch.equal(result.output, untaped.output)
    assert len(tape) == T
    valid = torch.arange(T)[:, None] < LENGTHS
    states = torch.stack([step.h for step in tape])
    assert torch.equal(states[valid], result.output[valid])
    assert torch.equal(states[-1], result.h)
    if cell == "rnn":
        assert_close(torch.tanh(torch.stack([step.summed for step in tape]))[valid], result.output[valid])
    elif cell == "lstm" and config.cell_norm is None:
        i, f, g, o = tape[0].summed.chunk(4, -1)
        c = torch.sigmoid(f) * c0 + torch.sigmoid(i) * torch.tanh(g)
        assert_close(torch.sigmoid(o) * torch.tanh(c), tape[0].h)
    elif cell == "lstm":
        assert tape[0].summed.shape == (B, 4 * HIDDEN)
        assert bool((tape[0].h.abs() <= torch.sigmoid(tape[0].summed[:, 3 * HIDDEN :])).all())  # h = s(o) * tanh(...)
    else:
        assert (tape[0].summed is None) == (config.reset_after)
        _, z, n = tape[0].gates
        z = torch.sigmoid(z if config.update_gate == "torch" else -z)
        assert_close(z * h0 + (1 - z) * torch.tanh(n), tape[0].h)
    if cell != "gru":
        assert torch.equal(torch.cat(tape[0].gates, -1), tape[0].summed)
