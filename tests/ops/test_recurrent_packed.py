"""Sequences run as packed rows: packed once on the way in and padded once on the way out, in few calls."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import normwise
from normwise.backends.cpu import library
from normwise.backends.protocol import LayerRequest
from normwise.ops import dispatch
from normwise.ops.rnn import packed, stack
from support.backends import ran, using
from support.recurrent_cases import LAYERS
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 6, 5, 3, 4
LENGTHS = [3, 6, 0, 5, 1]
NEEDS_KERNELS = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
WAYS = [pytest.param("cpu", marks=NEEDS_KERNELS), "aten"]


def build(cell: str = "lstm", **options: Any) -> nn.Module:
    return LAYERS[cell](INPUT, HIDDEN, 2, bidirectional=True, **options)


def requests_of(backend: str, layer: nn.Module, *args: Any, **kwargs: Any) -> list[LayerRequest]:
    """What the backend's layer is given in a call."""
    kernels, seen = dispatch.BACKENDS[backend].recurrence.kernels, []
    kernel = kernels["layer"]

    def noted(request: LayerRequest, needs_grad: bool) -> Any:
        seen.append(request)
        return kernel.forward(request, needs_grad)

    with mock.patch.dict(kernels, {"layer": kernel._replace(forward=noted)}), normwise.backend(backend):
        layer(*args, **kwargs)
    return seen


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("cell", LAYERS)
def test_every_layer_and_direction_computes_on_the_valid_rows_alone(backend: str, cell: str) -> None:
    layer = build(cell)
    by_lengths = requests_of(backend, layer, torch.randn(T, B, INPUT), lengths=LENGTHS)
    sequences = pack_sequence([torch.randn(n, INPUT) for n in LENGTHS if n], enforce_sorted=False)
    with mock.patch.object(packed, "pad_packed_sequence", side_effect=AssertionError("padded")):
        by_packing = requests_of(backend, layer, sequences)
    for seen in (by_lengths, by_packing):
        assert [r.x.shape for r in seen] == [(sum(LENGTHS), INPUT)] * 2 + [(sum(LENGTHS), 2 * HIDDEN)] * 2
        assert len({id(r.layout) for r in seen}) == 1
    assert by_packing[0].x.data_ptr() == sequences.data.data_ptr()
    assert torch.equal(by_packing[0].layout.batch_sizes, by_lengths[0].layout.batch_sizes)


@pytest.mark.parametrize("backend", WAYS)
def test_sequences_of_one_length_are_not_packed(backend: str) -> None:
    layer = build()
    x = torch.randn(T, B, INPUT)
    for given in ({"lengths": [4] * B}, {}):
        for request in requests_of(backend, layer, x, **given):
            assert request.layout.batch_sizes is None
            assert request.x.shape[:2] == (given.get("lengths", [T])[0], B)
    for request in requests_of(backend, layer, pack_sequence(list(x.unbind(1)))):
        assert request.x.shape[:2] == (T, B)
    with normwise.backend(backend):
        output, _ = layer(x, lengths=[4] * B)
        assert output.shape == (T, B, 2 * HIDDEN)
        assert not output[4:].any()
        assert torch.equal(output[:4], layer(x[:4])[0])


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("gru", "rms"), ("rnn", None)])
def test_all_wrappings_of_the_same_sequences_agree(backend: str, batch_first: bool, cell: str, norm: Any) -> None:
    lengths = [n for n in LENGTHS if n]
    layer, reset = build(cell, norm=norm, batch_first=batch_first), torch.rand(T, len(lengths)) < 0.3
    reset = reset.T if batch_first else reset
    sequences = [torch.randn(n, INPUT) for n in lengths]
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first, padding_value=float("nan"))
    for given in ({}, {"reset": reset}):
        with using(backend):
            output, state = layer(padded, lengths=lengths, **given)
            rows, state_of_rows = layer(pack_sequence(sequences, enforce_sorted=False), **given)
        assert torch.equal(pad_packed_sequence(rows, batch_first=batch_first)[0], output)
        for a, b in zip(parts(state), parts(state_of_rows), strict=True):
            assert torch.equal(a, b)
        with using("reference"):
            true, true_state = layer(padded, lengths=lengths, **given)
        for a, e in zip((output, *parts(state)), (true, *parts(true_state)), strict=True):
            assert_close(a, e, kind="composed", count=T * HIDDEN, scale=1.0)


def parts(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("backend", [None, "cpu", "aten", "reference"])
@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_batch_without_a_step_keeps_its_states(cell: str, norm: str | None, backend: str | None) -> None:
    layer = build(cell, norm=norm).eval()
    states = [torch.randn(4, B, HIDDEN) for _ in range(2 if cell == "lstm" else 1)]
    if backend == "cpu" and (norm == "batch" or library.missing() is not None):
        pytest.skip("the kernels do not run this")
    with normwise.backend(backend):
        output, after = layer(
            torch.full((T, B, INPUT), float("nan")), tuple(states) if cell == "lstm" else states[0], lengths=[0] * B
        )
    assert output.shape == (T, B, 2 * HIDDEN)
    assert not output.any()
    for a, b in zip(states, parts(after), strict=True):
        assert torch.equal(a, b)
    output.sum().backward()


@pytest.mark.parametrize("backend", WAYS)
def test_no_backward_adds_up_rows_one_by_one(backend: str) -> None:
    """index_add and index_put, the gradients of torch's index_select and of indexing, walk through rows one by one."""
    layer, x = build(), torch.randn(T, B, INPUT, requires_grad=True)
    sequences = pack_sequence([x[:n, b] for b, n in enumerate(LENGTHS) if n], enforce_sorted=False)
    for given, options in ((x, {"lengths": LENGTHS}), (sequences, {})):
        with normwise.backend(backend):
            output, _ = layer(given, **options)
        data, rows = (output, given) if options else (output.data, given.data)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(data, [rows, *layer.parameters()], torch.randn_like(data))
        names = {event.key for event in profile.key_averages()}
        assert names
        assert not [name for name in names if "index_add" in name or "index_put" in name or "scatter" in name]


@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS}], ids=["full", "ragged"])
def test_a_backend_is_chosen_once_a_call(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    resolve = stack.resolve
    monkeypatch.setattr(stack, "resolve", lambda *a: asked.append(a) or resolve(*a))
    for cell, norm in (("lstm", "layer"), ("gru", "batch"), ("rnn", None)):
        asked.clear()
        build(cell, norm=norm)(torch.randn(T, B, INPUT), **given)
        assert len(asked) == 1


@NEEDS_KERNELS
@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS}], ids=["full", "ragged"])
def test_a_call_of_a_layer_is_at_most_seven_frames_from_the_kernel(given: dict[str, Any]) -> None:
    layer, x = build(), torch.randn(T, B, INPUT)
    depths: list[int] = []

    def trace(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "pack":  # what the C function is given
            depth = 1
            while frame.f_code.co_name != "forward" or frame.f_globals["__name__"] != "normwise.nn.recurrent_base":
                frame, depth = frame.f_back, depth + 1
            depths.append(depth)

    with ran() as found:
        layer(x, **given)
    assert found == {"cpu"}
    sys.setprofile(trace)
    try:
        layer(x, **given)
    finally:
        sys.setprofile(None)
    assert depths
    assert max(depths) <= 7


@pytest.mark.parametrize(("steps", "hidden", "backend"), [(4, 4, "aten"), (64, 64, "cpu")], ids=["small", "not small"])
@NEEDS_KERNELS
def test_a_small_layer_without_a_norm_is_torchs_own(steps: int, hidden: int, backend: str) -> None:
    layer, sequences = normwise.GRU(8, hidden, norm=None), [torch.randn(steps - n, 8) for n in range(4)]
    for given, options in (
        (torch.randn(steps, 4, 8), {}),
        (
            torch.randn(steps, 4, 8),
            {"lengths": [steps, 1, 0, 2][:4] if backend == "aten" else [steps, steps, 0, steps]},
        ),
        (pack_sequence(sequences), {}),
    ):
        with ran() as found:
            layer(given, **options)
        assert found == {backend}
