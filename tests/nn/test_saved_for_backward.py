"""What a norm keeps for its backward is kept as torch.nn's layers keep it: with version counters, through the hooks on
saved tensors, recomputed by checkpointing, and freed by the backward."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import normwise
from normwise.backends.cpu import library
from support.backends import without_kernels
from support.norm_cases import CASES, ROUNDED_BEFORE_GAIN, Case, added, randomize
from support.tolerances import assert_close

SIDE_BY_SIDE = [
    *CASES,
    Case("LayerNorm", (8,), (800, 8), count=8),  # by our kernel, not by ATen's
    Case("BatchNorm2d", (4,), (3, 4, 5, 6), {"affine": False}, count=90),
]
MORE = [
    Case("BatchNorm2d", (4,), (3, 4, 5, 6), {"act": "silu"}, count=90),
    Case("BatchNorm1d", (4,), (6, 4, 5), {"virtual_batch_size": 3}, count=15),
    Case("BatchRenorm1d", (4,), (6, 4, 5), count=30),
    Case("FrozenBatchNorm1d", (4,), (6, 4, 5), count=30),
    Case("SyncBatchNorm", (4,), (6, 4, 5), count=30),
    Case("GroupNorm", (2, 6), (3, 6, 4), {"act": "relu"}, count=12),
    Case("InstanceNorm1d", (4,), (3, 4, 6), {"act": "gelu", "affine": True}, count=6),
    Case("LayerNorm", (8,), (6, 8), {"act": "silu"}, count=8),
    Case("RMSNorm", (6,), (3, 6, 4), {"dim": 1}, count=6),
    *ROUNDED_BEFORE_GAIN,
]
each_pair = pytest.mark.parametrize("case", SIDE_BY_SIDE, ids=str)
each = pytest.mark.parametrize("case", [*SIDE_BY_SIDE, *MORE], ids=str)


@pytest.fixture(params=["kernels", "without kernels"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """By what is chosen, with our kernels and without."""
    if request.param == "kernels":
        yield "kernels" if library.missing() is None else "without kernels"
    else:
        with without_kernels():
            yield request.param


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    ours, theirs = randomize(case.ours()), case.theirs()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def in_place(layer: nn.Module, case: Case, changed: str, x: Tensor, dy: Tensor) -> Tensor | str:
    """The input's gradient after a change in place between forward and backward, or what torch says of it."""
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    y = layer(given)
    target = {"input": given, "output": y}.get(changed)
    if target is None:
        target = getattr(layer, changed)
    try:
        with torch.no_grad() if changed not in ("input", "output") else torch.enable_grad():
            target.add_(1)
        return torch.autograd.grad(y, leaf, dy)[0]
    except RuntimeError as error:
        return str(error)


@each_pair
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_change_in_place_is_allowed_or_an_error_as_in_torch(case: Case, training: bool) -> None:
    layers = [layer.train(training) for layer in pair(case)]
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    leaf = x.clone().requires_grad_()
    (undisturbed,) = torch.autograd.grad(copy.deepcopy(layers[1])(leaf), leaf, dy)
    names = [n for n in ("weight", "bias", "running_mean") if getattr(layers[0], n, None) is not None]
    for changed in ("input", "output", *names):
        ours, theirs = (in_place(copy.deepcopy(layer), case, changed, x, dy) for layer in layers)
        if isinstance(ours, str):
            assert "modified by an inplace operation" in ours
            # (torch's InstanceNorm works with a copy of gain and running averages, by accident.)
            assert isinstance(theirs, str) or changed in ("weight", "running_mean"), f"{changed}: torch.nn allows it"
        else:
            assert_close(ours, undisturbed, kind="grad", count=case.count, name=changed)


def test_the_values_of_a_bias_are_not_kept() -> None:
    """They count for an activation alone: without one, torch.nn's layer lets an optimizer change them."""
    for layer in (normwise.BatchNorm2d(4), normwise.GroupNorm(2, 4)):
        x, residual = (torch.randn(3, 4, 5, 6, requires_grad=True) for _ in range(2))
        y = layer(x, **added(layer, residual))
        with torch.no_grad():
            layer.bias.add_(1)
        y.sum().backward()


@each
def test_a_graph_is_run_twice_only_if_it_was_kept(case: Case) -> None:
    layer = randomize(case.ours())
    x, dy = torch.randn(case.shape, requires_grad=True), torch.randn(case.shape)
    y = layer(x)
    first, again = (torch.autograd.grad(y, x, dy, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, dy)


class Box:
    """A packed tensor that can be watched."""

    def __init__(self, t: Tensor) -> None:
        self.t = t


@each
def test_the_backward_frees_what_was_saved_and_reads_nothing_else(case: Case, way: str) -> None:
    layer = randomize(case.ours())
    x, dy = torch.randn(case.shape, requires_grad=True), torch.randn(case.shape)
    boxes: list[weakref.ref[Box]] = []

    def pack(t: Tensor) -> Box:
        box = Box(t)
        boxes.append(weakref.ref(box))
        return box

    def nodes(node: Any) -> Iterator[Any]:
        yield node
        for following, _ in node.next_functions:
            if following is not None:
                yield from nodes(following)

    with saved_tensors_hooks(pack, lambda box: box.t):
        y = layer(x)
    assert boxes
    for node in nodes(y.grad_fn):
        for name, value in getattr(node, "__dict__", {}).items():
            kept = value if isinstance(value, tuple | list) else [value]
            assert not any(isinstance(v, Tensor) or hasattr(v, "buffer_info") for v in kept), f"ctx.{name}"
    torch.autograd.grad(y, [x, *layer.parameters()], dy)
    assert y.grad_fn is not None
    if case.name != "GroupNorm" or way == "kernels":  # ATen's own GroupNorm keeps something
        assert not any(box() is not None for box in boxes)


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], float]] = {
    "elsewhere": (lambda t: t.clone(), lambda t: t.clone(), 0.0),
    "turned": (lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t, 1e-5),
    "single": (lambda t: t.float() if t.is_floating_point() else t, lambda t: t, 1e-5),
    "half": (
        lambda t: t.half() if t.is_floating_point() else t,
        lambda t: t.float() if t.is_floating_point() else t,
        2e-2,
    ),
}


@each
@pytest.mark.parametrize("kind", [*HOOKS, "save_on_cpu"])
def test_hooks_may_give_back_other_memory(case: Case, kind: str, way: str) -> None:
    """Compressed, or lying otherwise: a kernel reads what comes back, and not as what was once saved."""
    if kind == "turned" and way == "without kernels":
        pytest.skip("ATen's kernels read as what was once saved")
    layer = randomize(case.ours())
    x, dy = torch.randn(case.shape, requires_grad=True), torch.randn(case.shape)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)[0]
    pack, unpack, tolerance = HOOKS.get(kind, (None, None, 0.0))
    with save_on_cpu() if pack is None else saved_tensors_hooks(pack, unpack):
        y = layer(x)
    found = torch.autograd.grad(y, inputs, dy)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=max(tolerance, 1e-6) * scale)


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_it(case: Case, reentrant: bool) -> None:
    if case.name == "BatchRenorm1d":
        pytest.skip("refused: its recomputation would see running averages that have moved")
    layer = randomize(case.ours())
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(case.shape, requires_grad=True), torch.randn(case.shape)
    expected = torch.autograd.grad(twin(x), [x, *twin.parameters()], dy)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        checkpoint(layer, x * 1, use_reentrant=reentrant)
    assert sum(t.numel() for t in saved) <= x.numel() + 16  # at most the input itself
    leaf = x.detach().clone().requires_grad_()
    checkpoint(copy.deepcopy(layer), leaf, use_reentrant=reentrant).backward(dy)
    assert leaf.grad is not None
    assert_close(leaf.grad, expected[0], kind="grad", count=case.count)


@each
def test_batches_of_gradients(case: Case) -> None:
    layer = randomize(case.ours())
    x, dy = torch.randn(case.shape, requires_grad=True), torch.randn(3, *case.shape)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, inputs, d, retain_graph=True) for d in dy]
    for got, each_one in zip(found, zip(*one_by_one, strict=True), strict=True):
        assert_close(got, torch.stack(each_one), kind="grad", count=x.numel())


@pytest.mark.parametrize("name", ["BatchNorm1d", "GroupNorm", "InstanceNorm1d", "LayerNorm"])
def test_batches_of_gradients_of_masked_layers(name: str) -> None:
    layer = {
        "BatchNorm1d": lambda: normwise.BatchNorm1d(4, act="silu"),
        "GroupNorm": lambda: normwise.GroupNorm(2, 4, act="silu"),
        "InstanceNorm1d": lambda: normwise.InstanceNorm1d(4, act="silu"),
        "LayerNorm": lambda: normwise.LayerNorm(4, act="silu", dim=1),
    }[name]()
    x, residual = (torch.randn(5, 4, 6, requires_grad=True) for _ in range(2))
    y = layer(x, mask=torch.rand(5, 6) < 0.7, **added(layer, residual))
    outputs = list(y) if isinstance(y, tuple) else [y]
    dy = [torch.randn(3, *x.shape) for _ in outputs]
    found = torch.autograd.grad(outputs, [x, residual], dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(outputs, [x, residual], [d[i] for d in dy], retain_graph=True)
        for got, truth in zip(found, expected, strict=True):
            assert_close(got[i], truth, kind="grad", count=24)
