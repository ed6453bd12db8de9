"""Recurrences of which one launch computes all steps, against the reference in float64: every preset of layer and RMS
norms, samples that fill a program and that do not, sequences of different lengths, resets, both directions, and memory
full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from normwise.backends.protocol import Layout
from normwise.backends.recurrence import Recurrence
from normwise.backends.triton import rnn, settings
from normwise.backends.triton.rnn import persistent, requests
from support.recurrent_samples import FEW_UNITS, Sample
from support.triton_recurrences import ALL, RECURRENCES, RUNS, by_triton, moved

pytestmark = pytest.mark.skipif(not RUNS, reason="runs on a GPU, or where TRITON_INTERPRET=1")

PRESETS_OF_CELLS = ["lstm ba2016", "lstm icefall", "lstm unnormalized", "gru ba2016", "gru dreamer", "rnn ba2016"]
ODD_SIZES = [
    ((1, 1, 1, 1), {}),
    ((2, 17, 3, 17), {"resets": True, "reverse": True}),
    ((2, 3, 4, 33), {"ragged": True, "resets": True}),
    ((1, 3, 2, 64), {"resets": True}),
    ((2, 0, 3, 5), {}),
    ((2, 35, 1, 3), {"ragged": True}),
]


@pytest.fixture(autouse=True)
def no_other_design(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that another design would compute fails. In float64 up to 64 units, which a GPU has no room for."""

    def other(*_: Any) -> None:
        raise AssertionError("computed step by step")

    monkeypatch.setitem(rnn.DESIGNS, "stepwise", rnn.DESIGNS["stepwise"]._replace(forward=other, backward=other))
    units = ((2, 128), (4, 64), (8, 64))
    with settings.recurrent_settings(designs=("persistent",), persistent_units=units):
        yield


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_sequence_is_the_reference(name: str) -> None:
    sample = Sample(RECURRENCES[name], (9, 3, 2, 5), torch.float64, ragged=True, resets=True, reverse=True)
    assert sample.excess(by_triton(sample)) <= 1


@pytest.mark.parametrize("name", PRESETS_OF_CELLS)
@pytest.mark.parametrize(("size", "options"), ODD_SIZES, ids=str)
def test_so_is_one_of_any_size(name: str, size: tuple[int, int, int, int], options: dict[str, bool]) -> None:
    sample = Sample(RECURRENCES[name], size, torch.float64, **options)
    assert sample.excess(by_triton(sample)) <= 1


@pytest.mark.parametrize("name", PRESETS_OF_CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_loses_no_more_digits_than_a_loop_of_torch(dtype: torch.dtype, name: str) -> None:
    sample = Sample(RECURRENCES[name], (3, 3, 5, 33), dtype, ragged=True, resets=True, reverse=True, offset=1)
    assert sample.excess(by_triton(sample)) <= 1


@pytest.mark.parametrize("config", [Recurrence("gru", None), Recurrence("lstm", None), Recurrence("gru")], ids=str)
def test_without_biases(config: Recurrence) -> None:
    sample = Sample(config, (3, 2, 2, FEW_UNITS), torch.float64)
    request = moved(sample.given)
    zeros = {
        name: torch.zeros_like(w) for name, w in request.weights._asdict().items() if w is not None and w.dim() == 1
    }
    zeros = {name: w for name, w in zeros.items() if name.startswith("bias")}
    gradients = []
    for weights in (request.weights._replace(**dict.fromkeys(zeros)), request.weights._replace(**zeros)):
        found = rnn.forward(request._replace(weights=weights), True)
        gradients.append(rnn.backward(request._replace(weights=weights), found.saved, (found.output, None, None), ALL))
    for without, with_zeros in zip(*gradients, strict=True):
        assert without is None or torch.equal(without, with_zeros)


@pytest.mark.parametrize("packed", [True, False])
def test_without_a_step_states_and_their_gradients_pass(packed: bool) -> None:
    request = moved(Sample(RECURRENCES["lstm ba2016"], (1, 2, 3, 5)).given)
    layout = Layout(0, 2, torch.empty(0, dtype=torch.int64) if packed else None)
    request = request._replace(x=request.x[:0, 0] if packed else request.x[:0], layout=layout)
    found = rnn.forward(request, True)
    gradients = rnn.backward(request, found.saved, (None, request.h0, request.c0), ALL)
    for given, after, gradient in zip((request.h0, request.c0), (found.h, found.c), gradients[1:3], strict=True):
        assert torch.equal(given, after)
        assert torch.equal(given, gradient)
    assert not any(t.any() for t in gradients[3:] if t is not None)


def test_many_rows_of_a_program() -> None:
    """Sums of gains and biases go through memory from row to row."""
    sample = Sample(RECURRENCES["lstm ba2016"], (4, 3, 2, 5), torch.float64)
    with settings.recurrent_settings(row_programs=2):
        assert sample.excess(by_triton(sample)) <= 1


def test_what_the_forward_keeps_another_design_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(RECURRENCES["lstm ba2016"], (3, 2, 2, 5), torch.float64, ragged=True, resets=True)
    request = moved(sample.given)
    upstream = [*sample.upstream_of_rows, None][:3]
    upstream = [None if t is None else t.to(request.x.device) for t in upstream]
    found = rnn.forward(request, True)
    expected = rnn.backward(request, found.saved, upstream, ALL)
    monkeypatch.undo()
    with settings.recurrent_settings(designs=()):
        again = rnn.forward(request, True)
        for a, b in zip(found.saved, again.saved, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(expected, rnn.backward(request, found.saved, upstream, ALL), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm ba2016", "gru ba2016"])
def test_results_are_the_same_bits_each_time(name: str) -> None:
    sample = Sample(RECURRENCES[name], (3, 4, 5, FEW_UNITS), torch.float32, ragged=True, resets=True)
    first = by_triton(sample)
    assert all(torch.equal(a, b) for a, b in zip(first, by_triton(sample), strict=True))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 128), (torch.float32, 64), (torch.float64, 0)], ids=str)
def test_more_units_are_refused_with_the_reason(dtype: torch.dtype, most: int) -> None:
    def asked(units: int) -> tuple[str, dict[str, str]]:
        given = moved(Sample(Recurrence("rnn", None), (1, 1, 1, units), dtype).given)
        return rnn.chosen(requests.Readable.of(given))

    with settings.recurrent_settings(persistent_units=settings.Recurrent.persistent_units):
        assert not most or asked(most) == ("persistent", {})
        name, refused = asked(most + 1)
    assert name == "stepwise"
    assert f"of at most {most} units" in refused["persistent"]


def test_products_of_float32_follow_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    readable = requests.Readable.of(moved(Sample(Recurrence("rnn", None), (1, 1, 1, 1)).given))
    for allowed, precision in ((True, "tf32"), (False, "tf32x3")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert persistent.constants_of(readable)["PRECISION"] == precision


def test_reversed_rows_and_lengths_are_where_the_kernels_look() -> None:
    given = moved(Sample(Recurrence("rnn", None), (3, 20, 1, 1)).given)
    readable = requests.Readable.of(given)
    assert persistent.rows_of_steps(readable, 16) == (None, (3, 20, 0, 20))
    assert persistent.rows_of_steps(readable._replace(reverse=True), 16) == (None, (3, 20, 40, -20))
    layout = Layout(3, 20, torch.tensor([19, 17, 4]))
    table, sizes = persistent.rows_of_steps(readable._replace(layout=layout), 16)
    assert sizes == (3, 20, 0, 0)
    assert table.tolist() == [0, 19, 36, 40, 3, 2]
