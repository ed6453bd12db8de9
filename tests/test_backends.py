"""The tests' own tool: a backend that did not run is noticed."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

import normwise
from normwise.backends.cpu import library
from normwise.backends.cpu import norms as cpu
from normwise.backends.triton import rows, tiles
from support.backends import ran, using

needs_kernels = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


LAYERS = {
    "LayerNorm": lambda: normwise.LayerNorm(8),
    "RMSNorm": lambda: normwise.RMSNorm(8),
    "BatchNorm1d": lambda: normwise.BatchNorm1d(8),
    "GroupNorm": lambda: normwise.GroupNorm(2, 8),
    "LSTM": lambda: normwise.LSTM(8, 3),
}


@pytest.mark.parametrize("backend", ["kernels", "cpu", "no kernels", "aten", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_backend_can_be_had(name: str, backend: str) -> None:
    with using(backend):
        LAYERS[name]()(torch.randn(4, 8))


@needs_kernels
def test_another_backend_than_the_named_one_is_an_error() -> None:
    layer, x = normwise.BatchNorm1d(8), torch.randn(4, 8)
    with mock.patch("support.backends._switched_to", return_value=nullcontext()):
        for named in ("no kernels", "aten", "reference"):
            with pytest.raises(AssertionError, match=f"asked for {named!r}, but cpu ran"), using(named):
                layer(x)


def test_the_kernels_of_norms_take_the_same_arguments_on_every_backend() -> None:
    """Those of the C++ library and of Triton; the others leave out by `*_` what they do not read."""
    ours = {
        cpu.features_forward: rows.forward,
        cpu.features_backward: rows.backward,
        cpu.groups_forward: tiles.groups_forward,
        cpu.groups_backward: tiles.backward,
        cpu.channels_forward: tiles.channels_forward,
        cpu.channels_backward: tiles.backward,
    }
    for theirs, mine in ours.items():
        names, others = (
            [(name.lstrip("_"), p.annotation) for name, p in inspect.signature(f).parameters.items()]
            for f in (theirs, mine)
        )
        assert names == others


def test_a_block_in_which_nothing_is_computed_names_no_backend() -> None:
    with pytest.raises(AssertionError, match="asked for 'reference', but no backend ran"), using("reference"):
        nn.LayerNorm(8)(torch.randn(4, 8))  # torch.nn's own does not count


def test_what_the_second_derivative_computes_by_is_not_counted() -> None:
    layer, x = normwise.LayerNorm(8), torch.randn(64, 8, requires_grad=True)
    with ran() as found:
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert len(found) == 1
