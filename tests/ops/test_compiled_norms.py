"""torch.compile makes of our norms the same loops over the input as of torch.nn's, and loses no precision by it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import normwise
from support.tolerances import assert_close

CHANNELS = 4
# More positions than ATen's kernels can be trusted to add up: RUNNING_SUM_LIMIT in backends/aten/norms.py.
LONG = (2, CHANNELS, 96, 96)

# Ours and torch.nn's, by the input that they take.
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: normwise.BatchNorm1d(CHANNELS), lambda: nn.BatchNorm1d(CHANNELS), (20000, CHANNELS)),
    "BatchNorm2d": (lambda: normwise.BatchNorm2d(CHANNELS), lambda: nn.BatchNorm2d(CHANNELS), LONG),
    "BatchNorm2d relu": (
        lambda: normwise.BatchNorm2d(CHANNELS, act="relu"),
        lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()),
        LONG,
    ),
    "BatchNorm2d no averages": (
        lambda: normwise.BatchNorm2d(CHANNELS, track_running_stats=False),
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        LONG,
    ),
    "GroupNorm": (lambda: normwise.GroupNorm(2, CHANNELS), lambda: nn.GroupNorm(2, CHANNELS), LONG),
    "GroupNorm silu": (
        lambda: normwise.GroupNorm(2, CHANNELS, act="silu"),
        lambda: nn.Sequential(nn.GroupNorm(2, CHANNELS), nn.SiLU()),
        LONG,
    ),
    "InstanceNorm2d": (
        lambda: normwise.InstanceNorm2d(CHANNELS, affine=True),
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
        LONG,
    ),
    "LayerNorm": (lambda: normwise.LayerNorm(64), lambda: nn.LayerNorm(64), (300, 64)),
    "RMSNorm": (lambda: normwise.RMSNorm(64), lambda: nn.RMSNorm(64), (300, 64)),
}
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


def input_of(shape: tuple[int, ...], layout: str) -> Tensor:
    x = torch.randn(shape)
    return (x.to(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x).requires_grad_()


def loops(layer: nn.Module, x: Tensor) -> Counter[str]:
    """The operations on tensors of the size of `x` in the graphs, forward and backward, that Inductor is given."""
    found: Counter[str] = Counter()

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        for node in graph.graph.nodes:
            sizes = [
                n.meta["val"].numel() for n in (node, *node.all_input_nodes) if hasattr(n.meta.get("val"), "numel")
            ]
            if node.op == "call_function" and x.numel() in sizes:
                found[str(node.target)] += 1
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note, decompositions=select_decomp_table())
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    if y.requires_grad:
        y.backward(torch.randn_like(y))
    return found


CASES = [(name, layout, True) for name in PAIRS for layout in LAYOUTS if layout == "first" or len(PAIRS[name][2]) == 4]
CASES += [(name, "last", False) for name in ("BatchNorm2d relu", "GroupNorm silu")]


@pytest.mark.parametrize(("name", "layout", "training"), CASES)
def test_the_graph_goes_over_the_input_as_often_as_torch_s(name: str, layout: str, training: bool) -> None:
    ours, theirs, shape = PAIRS[name]
    x = input_of(shape, layout)
    expected = loops(theirs().train(training), x)
    assert expected.total() > 4
    assert loops(ours().train(training), x) == expected


def test_a_cumulative_average_adds_nothing_over_the_input() -> None:
    """(torch.nn's has no graph: it reads the value of its counter.)"""
    x = input_of(LONG, "last")
    expected = loops(nn.BatchNorm2d(CHANNELS), x)
    assert loops(normwise.BatchNorm2d(CHANNELS, momentum=None), x) == expected


@pytest.mark.parametrize("momentum", [0.1, None])
def test_inductor_keeps_what_the_kernels_keep(momentum: float | None) -> None:
    """Long columns of channels far from zero, in generated code: outputs, gradients and averages against float64; a
    batch with a NaN moves no average and is counted."""
    torch._dynamo.reset()
    layer, exact = (normwise.BatchNorm2d(CHANNELS, momentum=momentum) for _ in range(2))
    exact.double()
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        x = (torch.randn(LONG) + 100).to(memory_format=torch.channels_last).requires_grad_()
        at, upstream = x.detach().double().requires_grad_(), torch.randn(LONG)
        y, expected = compiled(x), exact(at)
        got = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        true = torch.autograd.grad(expected, [at, *exact.parameters()], upstream.double())
        # An input near 100 is known to half a rounding of 100.
        assert_close(y, expected, scale=100.0)
        for g, t in zip(got, true, strict=True):
            assert_close(g, t, kind="grad", count=x.numel() // CHANNELS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    for name in ("running_mean", "running_var"):
        assert_close(before[name], getattr(exact, name), count=x.numel() // CHANNELS)
    spoilt = torch.randn(LONG).to(memory_format=torch.channels_last)
    spoilt[1, 2, 3, 4] = torch.nan
    compiled(spoilt.requires_grad_())
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.eval()


def test_an_exported_graph_runs_kernels_of_its_own() -> None:
    """ATen's, which an exported program runs, would add up these columns in one float32 sum."""
    layer, x = normwise.BatchNorm2d(CHANNELS), input_of(LONG, "last").detach()
    graph = torch.export.export(layer, (x,), strict=True).graph
    assert any("normwise.norm" in str(node.target) for node in graph.nodes)
