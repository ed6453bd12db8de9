"""By the C++ kernels a sample's results are the same bits whatever else is in the batch, and wherever in it the sample
stands: outputs, and the gradients of what belongs to the sample. Gradients of parameters are sums over the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.backends import ran, using
from support.instruction_sets import LEVELS, LEVELS_FOR_NORMS, on
from support.norm_cases import added, randomize
from support.pairwise import pairwise
from support.recurrent_cases import away_from_start

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def each_level(levels: Sequence[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("level", levels, indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def batches(samples: int) -> list[tuple[int, Tensor]]:
    """What of a batch makes another one, and by how many threads: alone, first and last, in part, in another order,
    several times."""
    backwards, some = list(range(samples))[::-1], list(range(samples // 2 + 1))
    of_one_thread = [[0], [samples - 1], some, backwards, [1, 0, 0, samples - 1, 1]]
    of_several = [(2, [samples - 1]), (3, some), (2, backwards)]
    return [(n, torch.tensor(rows)) for n, rows in [*((1, rows) for rows in of_one_thread), *of_several]]


def chosen(t: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """These samples, in memory of their own, laid out as before."""
    format = torch.contiguous_format
    if t.dim() == 4 and not t.is_contiguous():
        format = torch.channels_last
    return t.index_select(dim, rows).contiguous(memory_format=format)


def trained(layer: nn.Module, x: Tensor, upstream: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of the input and of every floating tensor in the call."""
    floating = {name: t.clone().requires_grad_() for name, t in given.items() if t.is_floating_point()}
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    found = layer(leaf, **given | floating)
    outputs = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(outputs, [leaf, *floating.values()], [upstream] * len(outputs))
    return [*(t.detach() for t in outputs), *gradients]


def check(layer: nn.Module, x: Tensor, given: dict[str, Any]) -> None:
    """Every tensor of `given` has the samples on its first axis."""
    upstream = torch.randn_like(x)
    with using("cpu"):
        torch.set_num_threads(1)
        whole = trained(layer, x, upstream, given)
        for threads, rows in batches(len(x)):
            part = chosen(x, rows), chosen(upstream, rows), {name: chosen(t, rows) for name, t in given.items()}
            torch.set_num_threads(threads)
            for n, (of_part, of_whole) in enumerate(zip(trained(layer, *part), whole, strict=True)):
                assert torch.equal(of_part, of_whole[rows]), f"{n} of samples {rows.tolist()}, {threads} threads"


# Short rows go four at once, long ones alone; 33,000 elements are the first that several threads share.
ROWS = [(7, 5), (6, 63), (3, 5, 33), (6, 513), (70, 480), (5, 3, 1023)]
IMAGES = [(5, 6, 7), (4, 6, 5, 3), (9, 4, 17, 13), (3, 32, 30, 31), (2, 12, 3, 4, 5), (3, 2, 9000)]
ARGUMENTS = ["bare", "mask", "residual", "mask and residual", "scale and shift"]


def arguments(names: str, x: Tensor, positions: tuple[int, ...], channels: int, layer: nn.Module) -> dict[str, Tensor]:
    given = {}
    if "mask" in names:
        given["mask"] = torch.rand(positions) < 0.7
    if "residual" in names:
        given |= added(layer, torch.randn_like(x))
    if "scale" in names:
        given |= {name: torch.randn(len(x), channels).to(x.dtype) for name in ("scale", "shift")}
    return given


# On each instruction set, of the others by pairs.
@each_level(LEVELS_FOR_NORMS)
@pytest.mark.parametrize(
    ("names", "dtype", "cls"), pairwise(ARGUMENTS, DTYPES, [normwise.LayerNorm, normwise.RMSNorm]), ids=str
)
def test_of_features(cls: type[nn.Module], names: str, dtype: torch.dtype, level: str) -> None:
    for shape in ROWS:
        for act in (None, "relu") if "scale" in names else ("silu",):
            layer = randomize(cls(shape[-1], act=act, dtype=dtype))
            x = (3 * torch.randn(shape) + 1).to(dtype)
            check(layer, x, arguments(names, x, shape[:-1], shape[-1], layer))


# On each instruction set, of the others by pairs.
@each_level(LEVELS_FOR_NORMS)
@pytest.mark.parametrize(("names", "dtype", "channels_last"), pairwise(ARGUMENTS, DTYPES, [False, True]), ids=str)
def test_of_channels(channels_last: bool, names: str, dtype: torch.dtype, level: str) -> None:
    for shape in IMAGES:
        if channels_last and len(shape) != 4:
            continue
        act = "relu" if "scale" in names else "gelu"
        makes: list[Callable[..., nn.Module]] = [
            lambda c, **more: normwise.GroupNorm(2, c, **more),
            getattr(normwise, f"InstanceNorm{len(shape) - 2}d"),
        ]
        for make in makes:
            layer = randomize(make(shape[1], affine=True, act=act, dtype=dtype))
            x = (3 * torch.randn(shape) + 1).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            check(layer, x, arguments(names, x, (shape[0], *shape[2:]), shape[1], layer))


@each_level(LEVELS_FOR_NORMS)
def test_lengths_and_gates(level: str) -> None:
    """Of one padded length; a gate's activation is torch's, of which sigmoid's kin differ at the ends of vectors."""
    x, lengths = torch.randn(6, 8, 45), torch.tensor([45, 3, 17, 2, 45, 30])
    for layer in (normwise.GroupNorm(4, 8, act="silu"), normwise.InstanceNorm1d(8, affine=True)):
        check(randomize(layer), x, {"lengths": lengths})
    for gate_act in (None, "relu"):
        layer = randomize(normwise.RMSNorm(45, gate_act=gate_act))
        check(layer, x, {"gate": torch.randn_like(x)})


def test_the_choice_of_a_backend_goes_by_the_size_of_the_batch() -> None:
    """Why the promise is of a named backend: a small LayerNorm with a gradient is ATen's, a larger one the kernels'."""
    x = torch.randn(4096, 16, requires_grad=True)
    layer = normwise.LayerNorm(16)
    with ran() as of_whole:
        layer(x)
    with ran() as of_part:
        layer(x[:8])
    if of_whole == of_part:
        pytest.skip("one backend for both here")
    assert of_part == {"aten"}
    assert of_whole == {"cpu"}


RECURRENT = [
    ("LSTM", {"norm": "layer"}),
    ("LSTM", {"norm": None, "bidirectional": True}),
    ("GRU", {"norm": "rms", "num_layers": 2, "between": "layer", "residual": True}),
    ("GRU", {"norm": None}),
    ("RNN", {"norm": "layer", "num_layers": 2, "between": "rms"}),
]
# (steps, batch, inputs, units): odd; few inputs, which cells take directly; threads share samples, and share units.
SIZES = [(7, 5, 9, 13), (5, 19, 3, 40), (3, 33, 70, 65), (3, 9, 128, 200)]


# On each instruction set, of the others by pairs.
@each_level(LEVELS)
@pytest.mark.parametrize(
    ("of", "with_lengths", "dtype"), pairwise(RECURRENT, [False, True], [torch.float32, torch.bfloat16]), ids=str
)
def test_of_recurrent_layers(
    of: tuple[str, dict[str, Any]], with_lengths: bool, dtype: torch.dtype, level: str
) -> None:
    name, options = of
    for steps, batch, size, units in SIZES:
        layer = away_from_start(getattr(normwise, name)(size, units, dtype=dtype, **options))
        directions = 1 + bool(options.get("bidirectional"))
        states = directions * options.get("num_layers", 1)
        x = torch.randn(steps, batch, size).to(dtype)
        hx = [torch.randn(states, batch, units).to(dtype) for _ in range(1 + (name == "LSTM"))]
        upstream = [torch.randn(steps, batch, directions * units).to(dtype), *(torch.randn_like(t) for t in hx)]
        lengths = torch.randint(0, steps + 1, (batch,)) if with_lengths else None
        if lengths is not None:
            lengths[[0, -1]] = steps

        def run(rows: Tensor) -> list[Tensor]:
            leaves = [chosen(t, rows, 1).requires_grad_() for t in (x, *hx)]  # noqa: B023  of this turn
            state = leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
            found, last = layer(leaves[0], state, lengths=None if lengths is None else lengths[rows])  # noqa: B023  of this turn
            outputs = [found, *(last if isinstance(last, tuple) else (last,))]
            gradients = torch.autograd.grad(outputs, leaves, [chosen(t, rows, 1) for t in upstream])  # noqa: B023  of this turn
            return [*(t.detach() for t in outputs), *gradients]

        with using("cpu"):
            torch.set_num_threads(1)
            whole = run(torch.arange(batch))
            for threads, rows in batches(batch):
                torch.set_num_threads(threads)
                for n, (of_part, of_whole) in enumerate(zip(run(rows), whole, strict=True)):
                    same = torch.equal(of_part, of_whole[:, rows])
                    assert same, f"{n} of samples {rows.tolist()} at {(steps, batch, size, units)}, {threads} threads"
