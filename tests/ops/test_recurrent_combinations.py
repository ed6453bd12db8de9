"""Any combination of a description's options: the fast loop is the reference, forwards and in all gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import recurrence as reference
from support import recurrent_calls
from support.recurrences import random_weights
from support.tolerances import assert_close

GROUPS = {"lstm": [(), (1, 1, 1, 1), (2, 1, 1), (3, 1)], "gru": [(), (1, 1, 1), (2, 1), (1, 2)], "rnn": [(), (1,)]}


@st.composite
def descriptions(draw):
    """Every field free, except where `Recurrence` says that one excludes another."""
    cell = draw(st.sampled_from(["lstm", "gru", "rnn"]))
    norm = draw(st.sampled_from(["layer", "rms", "batch", None]))
    placement = draw(st.sampled_from(["separate", "sum", "input"]))
    reset_after = draw(st.booleans())
    if cell == "gru" and placement == "sum":
        reset_after = False
    cell_norm = draw(st.sampled_from(["readout", "state", None])) if norm and cell == "lstm" else None
    sequence = (norm, placement, cell_norm) == ("batch", "input", None) and draw(st.booleans())
    return Recurrence(
        cell,
        norm,
        placement,
        groups=draw(st.sampled_from(GROUPS[cell])),
        hidden_bias=draw(st.booleans()),
        inner_bias=norm is not None and placement == "sum" and draw(st.booleans()),
        cell_norm=cell_norm,
        cell_bias=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 0.1])),
        zoneout=draw(st.sampled_from([0.0, 0.3])),
        statistics="sequence" if sequence else "per_step",
        reset_after=reset_after,
        update_gate=draw(st.sampled_from(["torch", "paper"])),
        update_offset=draw(st.sampled_from([0.0, -1.0])),
        nonlinearity=draw(st.sampled_from(["tanh", "relu"])),
    )


@settings(max_examples=150)
@given(
    config=descriptions(),
    bias=st.booleans(),
    proj_size=st.sampled_from([0, 2]),
    ragged=st.booleans(),
    backwards=st.booleans(),
    zoneout_mask=st.booleans(),
    evaluate=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_fast_loop_is_the_reference(config, bias, proj_size, ragged, backwards, zoneout_mask, evaluate, seed):
    torch.manual_seed(seed)
    steps, batch, units = 4, 5, 3
    proj_size = proj_size if config.cell == "lstm" else 0
    weights = random_weights(config.shapes(2, units, proj_size=proj_size, bias=bias))
    x = torch.randn(steps, batch, 2, dtype=torch.float64)
    h0 = torch.randn(batch, proj_size or units, dtype=torch.float64)
    c0 = torch.randn(batch, units, dtype=torch.float64) if config.cell == "lstm" else None
    leaves = [t.requires_grad_() for t in (x, h0, c0, *weights.values()) if t is not None]
    rows = 1 if config.statistics == "sequence" else 2
    running = {
        site: (torch.randn(rows, n, dtype=torch.float64), torch.rand(rows, n, dtype=torch.float64) + 0.5)
        for site, n in config.sites(units).items()
    }
    options = {
        "lengths": torch.tensor([4, 0, 3, 4, 2]) if ragged else None,
        "reset": torch.rand(steps, batch) < 0.2,
        "reverse": backwards,
        "zoneout_mask": torch.rand(steps, batch, h0.shape[1]) < 0.3 if zoneout_mask else None,
        "running": running if evaluate and config.norm == "batch" else None,
    }
    results = [run.recurrence(x, h0, c0, Weights(**weights), config, **options) for run in (recurrent_calls, reference)]
    fast, true = ([t for t in result[:3] if t is not None] for result in results)
    upstream = [torch.randn_like(t) for t in true]
    for a, e in zip(fast, true, strict=True):
        assert_close(a, e, kind="composed", scale=max(1.0, e.abs().max().item()))
    # Batch statistics of two samples that hardly differ have derivatives of up to 1 / sqrt(eps).
    grads = [torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (fast, true)]
    for a, e in zip(*grads, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_close(a, e, kind="composed", count=steps * batch, scale=max(1.0, e.abs().max().item()))
