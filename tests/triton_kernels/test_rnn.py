"""Triton's recurrent kernels, a step a launch, against the reference in float64: every preset of layer and RMS norms,
over sizes that fill a block and that do not, sequences of different lengths, resets, both directions, and memory full
of NaN.

They run on a GPU where there is one. Elsewhere Triton's interpreter runs them on the CPU, where TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from normwise.backends.protocol import LayerRequest, Layout, RecurrenceRequest
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import rnn, settings
from normwise.backends.triton.backend import BACKEND
from normwise.ops.rnn import stack
from normwise.ops.rnn.presets import PRESETS
from support.recurrences import random_weights
from support.recurrent_samples import FEW_UNITS, Sample
from support.triton_recurrences import ALL, DEVICE, RUNS, by_triton, moved
from support.triton_recurrences import RECURRENCES as CONFIGS

on_kernels = pytest.mark.skipif(not RUNS, reason="runs on a GPU, or where TRITON_INTERPRET=1")
each_config = pytest.mark.parametrize("name", CONFIGS)

Size = tuple[int, int, int, int]  # T, B, I, H
ROWS: dict[str, bool] = {"ragged": True, "resets": True}


@pytest.fixture(autouse=True)
def fresh_memory_of_nan(poisoned_memory: None) -> None:
    """For every test here."""


@pytest.fixture(autouse=True)
def step_by_step() -> Iterator[None]:
    """For every test here, without the designs that would be asked before."""
    with settings.recurrent_settings(designs=()):
        yield


# In float64, in which a norm over one unit or a few is as well defined as any other, and no slip is taken for rounding.
EXACT = [
    ((1, 1, 1, 1), {}),
    ((5, 3, 2, 5), ROWS),
    ((2, 3, 4, 33), {"resets": True, "reverse": True}),
    ((1, 3, 3, 64), {"resets": True}),
    ((2, 0, 3, 5), {}),
]


@on_kernels
@each_config
@pytest.mark.parametrize(("size", "options"), EXACT, ids=str)
def test_the_kernels_are_the_reference(name: str, size: Size, options: dict[str, bool]) -> None:
    sample = Sample(CONFIGS[name], size, torch.float64, **options)
    assert sample.excess(by_triton(sample)) <= 1


@on_kernels
@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_lose_no_more_digits_than_a_loop_of_torch(dtype: torch.dtype, name: str) -> None:
    if dtype != torch.float32 and CONFIGS[name].nonlinearity == "relu":
        pytest.skip("half precision decides on which side of 0 a ReLU is")
    sample = Sample(CONFIGS[name], (3, 3, 5, 33), dtype, ragged=True, resets=True, reverse=True, offset=1)
    assert sample.excess(by_triton(sample)) <= 1


@on_kernels
@pytest.mark.parametrize("name", ["lstm ba2016", "gru ba2016", "rnn ba2016"])
def test_more_samples_and_steps(name: str) -> None:
    sample = Sample(CONFIGS[name], (4, 17, 5, 33), torch.float32, **ROWS)
    assert sample.excess(by_triton(sample)) <= 1


@on_kernels
@pytest.mark.parametrize("name", ["lstm ba2016", "lstm icefall", "gru ba2016", "rnn ba2016"])
def test_results_are_the_same_bits_each_time(name: str) -> None:
    sample = Sample(CONFIGS[name], (3, 4, 5, FEW_UNITS), torch.float32, **ROWS)
    first = by_triton(sample)
    assert all(torch.equal(a, b) for a, b in zip(first, by_triton(sample), strict=True))


@on_kernels
@pytest.mark.parametrize("name", ["lstm ba2016", "gru haste", "rnn separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_and_biases_may_be_wider_than_matrices(name: str, dtype: torch.dtype) -> None:
    """As under autocast: results are the same, and gradients come in the dtype of what they belong to."""
    request = moved(Sample(CONFIGS[name], (2, 2, 3, 9), dtype).given)
    weights = request.weights
    wide = Weights(*weights[:2], *(None if w is None else w.float() for w in weights[2:]))
    results = [rnn.forward(request._replace(weights=w), True) for w in (weights, wide)]
    assert torch.equal(results[0].output, results[1].output)
    upstream = torch.randn_like(results[0].output), None, None
    narrow, found = (
        rnn.backward(request._replace(weights=w), r.saved, upstream, ALL)
        for w, r in zip((weights, wide), results, strict=True)
    )
    for a, b, w in zip(narrow[3:], found[3:], wide, strict=True):
        assert (w is None and b is None) or (b.dtype == w.dtype and torch.equal(a, b.to(a.dtype)))


@on_kernels
@pytest.mark.parametrize("name", ["lstm ba2016", "gru ba2016", "rnn ba2016"])
def test_autograd_goes_through_them(name: str) -> None:
    """With the dense and the packed layout, by the function that every layer calls."""
    for options in ({}, ROWS | {"reverse": True}):
        sample = Sample(CONFIGS[name], (2, 3, 3, 7), torch.float64, **options)

        def layer(request: LayerRequest, _: bool) -> Any:
            return stack.layer(BACKEND.recurrence.kernels["layer"], moved(request))

        assert sample.excess([t.cpu() for t in sample.by_layer(layer)]) <= 1


@on_kernels
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("packed", [True, False])
def test_without_a_step_states_and_their_gradients_pass(cell: str, packed: bool) -> None:
    config = PRESETS[cell]["ba2016"]
    weights = Weights(**{k: w.float().to(DEVICE) for k, w in random_weights(config.shapes(3, 5)).items()})
    h, dh = torch.randn(2, 2, 5, device=DEVICE)
    c, dc = torch.randn(2, 2, 5, device=DEVICE) if cell == "lstm" else (None, None)
    sizes = torch.empty(0, dtype=torch.int64) if packed else None
    x = torch.zeros(*((0, 3) if packed else (0, 2, 3)), device=DEVICE)
    request = LayerRequest(config, x, h, c, weights, Layout(0, 2, sizes))
    found = rnn.forward(request, True)
    assert found.output.shape == (*x.shape[:-1], 5)
    assert torch.equal(found.h, h)
    assert found.h is not h
    dx, dh0, dc0, *rest = rnn.backward(request, found.saved, (None, dh, dc), ALL)
    assert dx.shape == x.shape
    assert torch.equal(dh0, dh)
    assert (c is None and dc0 is None) or (torch.equal(found.c, c) and torch.equal(dc0, dc))
    assert all(
        (w is None and d is None) or (d.shape == w.shape and not d.any()) for w, d in zip(weights, rest, strict=True)
    )


@on_kernels
def test_missing_upstream_gradients_are_zeros_and_unwanted_ones_are_not_computed() -> None:
    sample = Sample(CONFIGS["lstm ba2016"], (2, 2, 3, 5), torch.float64)
    request = moved(sample.given)
    found = rnn.forward(request, True)
    zeros = [torch.zeros_like(t) for t in (found.output, found.h, found.c)]
    ones = torch.ones_like(found.h)
    whole = rnn.backward(request, found.saved, (zeros[0], ones, zeros[2]), ALL)
    part = rnn.backward(request, found.saved, (None, ones, None), ALL)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    states = rnn.backward(request, found.saved, (None, ones, None), [False, True, True, *[False] * 11])
    assert [t is None for t in states] == [True, False, False, *[True] * 11]
    assert torch.equal(states[1], whole[1])


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[str]]]:
    """Names of torch's operations, and of the kernels that are launched."""
    from normwise.backends.triton.kernels import recurrent

    launches: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(recurrent, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                launches.append(self.name)
                with torch.utils._python_dispatch._disable_current_modes():
                    self.kernel[grid](*args, **kwargs)

            return launch

    with monkeypatch.context() as patch, _Ops() as ops:
        for name in ("step_forward", "step_backward"):
            patch.setattr(recurrent, name, Counting(name))
        yield ops.names, launches


@on_kernels
@pytest.mark.parametrize("name", ["lstm ba2016", "gru ba2016", "rnn ba2016"])
@pytest.mark.parametrize("resets", [False, True])
def test_a_step_is_one_product_and_one_kernel_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch, name: str, resets: bool
) -> None:
    counts = []
    for steps in (2, 5):
        request = moved(Sample(CONFIGS[name], (steps, 2, 3, 5), resets=resets).given)
        with counted(monkeypatch) as (ops, launches):
            found = rnn.forward(request, True)
            forward = len(ops)
            rnn.backward(request, found.saved, (found.output, None, None), ALL)
        assert launches == ["step_forward"] * steps + ["step_backward"] * steps
        assert "_local_scalar_dense" not in ops
        assert ops.count("mm") == 2 * steps + 4  # and of all steps: x W_ih, and dx, dW_ih, dW_hh
        # A slice of rows takes no launch.
        launched = [[op for op in part if op not in ("slice", "t", "view", "detach")] for part in (ops[:forward], ops)]
        counts.append([len(part) for part in launched])
    assert [b - a for a, b in zip(*counts, strict=True)] == [3, 6]


def _request(config: Recurrence, dtype: torch.dtype = torch.float32, **changes: Any) -> RecurrenceRequest:
    options = {"proj_size": changes.pop("proj_size", 0)}
    weights = Weights(**{k: w.to(dtype) for k, w in random_weights(config.shapes(3, 5, **options)).items()})
    h = torch.zeros(1, 2, 5)
    request = RecurrenceRequest(config, torch.zeros(4, 2, 3, dtype=dtype), h, None, (weights,), Layout(4, 2))
    return request._replace(**changes)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request(PRESETS["lstm"]["cooijmans2016"]), "no batch statistics inside a recurrence"),
        (_request(Recurrence("lstm", zoneout=0.1)), "no zoneout"),
        (_request(Recurrence("lstm"), proj_size=2), "no projection"),
        (_request(Recurrence("lstm"), layout=Layout(4, 2, lengths=torch.tensor([4, 2]))), "must know how many"),
        (_request(Recurrence("lstm"), x=torch.zeros(4, 2, 3).to(torch.complex64)), "not torch.complex64"),
        (_request(Recurrence("lstm"), x=torch.zeros(4, 2, 3).double()), "not torch.float32, torch.float64"),
        (_request(Recurrence("lstm"), x=torch.zeros(4, 2, 3, device="meta")), "tensors on a GPU, not on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_they_cannot_run_is_refused_with_the_reason(request_: RecurrenceRequest, reason: str) -> None:
    assert reason in (rnn.supports(request_) or "")


@on_kernels
def test_everything_else_is_taken() -> None:
    for config in CONFIGS.values():
        for dtype in rnn.DTYPES:
            request = _request(config, dtype)
            weights = Weights(*(None if w is None else w.to(DEVICE) for w in request.weights[0]))
            assert rnn.supports(request._replace(x=request.x.to(DEVICE), weights=(weights,))) is None


@on_kernels
def test_bad_arguments_are_refused() -> None:
    given = moved(Sample(CONFIGS["lstm unnormalized"], (2, 3, 4, 5)).given)
    with pytest.raises(ValueError, match=r"x: expected \(2, 3, 4\) of torch.float32 .* but got \(1, 3, 4\)"):
        rnn.forward(given._replace(x=given.x[:1]), False)
    rows = given.x.flatten(0, 1)
    layout = Layout(2, 3, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match=r"x: expected \(5, 4\) of torch.float32 .* but got \(6, 4\)"):
        rnn.forward(given._replace(x=rows, layout=layout), False)
    with pytest.raises(ValueError, match="batch_sizes: expected 2 that fall from at most 3"):
        rnn.forward(given._replace(x=rows[:5], layout=Layout(2, 3, torch.tensor([2, 3]))), False)
    with pytest.raises(ValueError, match="flip: missing"):
        rnn.forward(given._replace(x=rows[:5], layout=layout, reverse=True), False)
    with pytest.raises(ValueError, match="an LSTM, and it alone, has a cell state c0"):
        rnn.forward(given._replace(c0=None), False)
    with pytest.raises(ValueError, match="needs_grad=True"):
        rnn.backward(given, (), (None, None, None), ALL)
