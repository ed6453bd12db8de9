"""The tests' own tool: a backend that did not run is noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

import normwise
from normwise.backends.cpu import library
from normwise.backends.cpu import norms as cpu
from normwise.backends.protocol import NormRequest
from normwise.backends.triton import rows, tiles
from support.backends import using

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
    """Those of the C++ library and of Triton; the others leave out by `*_` what they do not read. Triton's forwards
    take the request as it is; norms of features take a gate, last."""

    def arguments(function: Callable[..., Any]) -> list[tuple[str, str]]:
        return [(name.lstrip("_"), p.annotation) for name, p in inspect.signature(function).parameters.items()]

    forwards = (cpu.features_forward, cpu.groups_forward, cpu.channels_forward)
    of_request = [*NormRequest._fields, "needs_grad"]
    shortened = {"mean": "running_mean", "var": "running_var", "tracked": "num_batches_tracked"}
    for theirs in forwards:
        gate = [("gate", "Gate | None")] if theirs is cpu.features_forward else []
        assert arguments(theirs)[len(of_request) :] == gate
        assert [shortened.get(name, name) for name, _ in arguments(theirs)[: len(of_request)]] == of_request
    for mine in (rows.forward, tiles.groups_forward, tiles.channels_forward):
        gate = [("gate", "Gate | None")] if mine is rows.forward else []
        assert arguments(mine) == [("request", "NormRequest"), ("needs_grad", "bool"), *gate]
    for theirs, mine in (
        (cpu.groups_backward, tiles.backward),
        (cpu.channels_backward, tiles.backward),
        (cpu.features_backward, rows.backward),
    ):
        assert arguments(theirs) == arguments(mine)
