"""Double backward, torch.func, torch.compile and torch.export through the public layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.backends import using
from support.norm_cases import Case, added, each_case_of_ours, randomize
from support.tolerances import assert_close

MASKED = {
    "BatchNorm1d": (lambda: normwise.BatchNorm1d(4), (3, 4, 5)),
    "InstanceNorm1d": (lambda: normwise.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "InstanceNorm1d tracked": (lambda: normwise.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    "GroupNorm": (lambda: normwise.GroupNorm(2, 4), (3, 4, 5)),
    "LayerNorm dim": (lambda: normwise.LayerNorm(4, dim=1), (3, 4, 5)),
    "RMSNorm dim": (lambda: normwise.RMSNorm(4, dim=1), (3, 4, 5)),
    "LayerNorm dim, offset": (lambda: normwise.LayerNorm(4, dim=1, offset=1.0), (3, 4, 5)),
    "RMSNorm dim, offset, cast": (lambda: normwise.RMSNorm(4, dim=1, offset=-0.5, cast="input"), (3, 4, 5)),
    "LayerNorm two axes": (lambda: normwise.LayerNorm((4, 5)), (3, 4, 5)),
}
each_masked = pytest.mark.parametrize("name", MASKED)
LENGTHS = torch.tensor([2, 5, 4])


def fresh_compiler() -> None:
    torch._dynamo.reset()


@each_case_of_ours
@pytest.mark.parametrize("backend", ["chosen", "kernels", "no kernels", "reference"])
def test_double_backward(case: Case, backend: str) -> None:
    layer = randomize(case.ours(dtype=torch.float64)).train(True)
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    buffers = [b for n, b in layer.named_buffers()]

    def f(x: Tensor) -> Tensor:
        kept = [b.clone() for b in buffers]
        y = layer(x)
        with torch.no_grad():
            for b, k in zip(buffers, kept, strict=True):
                b.copy_(k)
        return y

    with using(backend):
        assert torch.autograd.gradcheck(f, x)
        if case.shape[0] > 1 or len(case.shape) < 4:
            assert torch.autograd.gradgradcheck(f, x)


@each_case_of_ours
def test_functional_call_and_grad(case: Case) -> None:
    layer = randomize(case.ours()).eval()
    x, upstream = torch.randn(case.shape), torch.randn(case.shape)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) * upstream).sum()

    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    expected = torch.autograd.grad(y, [*layer.parameters(), leaf], upstream)
    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    for got, truth in zip([*grads.values(), grad_x], expected, strict=True):
        assert_close(got, truth, kind="grad", count=x.numel())
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (upstream,))
    assert_close(tangent, (expected[-1].double() * upstream.double()).sum(), kind="grad", count=x.numel(), scale=10.0)


@each_case_of_ours
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vmap(case: Case, training: bool) -> None:
    """A batch of models' inputs at once; running averages cannot move inside vmap, in torch.nn neither."""
    layer = randomize(case.ours()).train(training)
    if training and getattr(layer, "track_running_stats", False):
        layer = case.ours(**{} if "track_running_stats" in case.kwargs else {"track_running_stats": False})
        if layer.track_running_stats:
            layer.eval()
    x = torch.randn(3, *case.shape)
    assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]), count=case.count)


def test_per_sample_gradients() -> None:
    layer = randomize(normwise.LayerNorm(6))
    x, upstream = torch.randn(5, 6), torch.randn(5, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) * u).sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(layer.named_parameters()), x, upstream)
    for i in range(5):
        truth = torch.autograd.grad(layer(x[i]), list(layer.parameters()), upstream[i])
        assert_close(got["weight"][i], truth[0], kind="grad")
        assert_close(got["bias"][i], truth[1], kind="grad")


def compare_compiled(
    layer: nn.Module,
    compiled_layer: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    backend: str = "aot_eager",
    **kwargs: Tensor,
) -> None:
    """Results, gradients and buffers of two steps in one graph, against the layer as it is."""
    fresh_compiler()
    compiled = torch.compile(compiled_layer, fullgraph=True, backend=backend)
    upstream = [torch.randn_like(x), torch.randn_like(x)]
    for _ in range(2):
        results = []
        for f in (layer, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
            more = kwargs if residual is None else kwargs | added(layer, leaves[1])
            y = f(leaves[0], **more)
            outputs = list(y) if isinstance(y, tuple) else [y]
            parameters = list((layer if f is layer else compiled_layer).parameters())
            grads = torch.autograd.grad(outputs, [*leaves, *parameters], upstream[: len(outputs)])
            results.append([*outputs, *grads])
        for expected, got in zip(*results, strict=True):
            assert_close(got, expected, kind="grad", count=x.numel())
    for name, buffer in layer.named_buffers():
        assert_close(compiled_layer.get_buffer(name).double(), buffer.double(), dtype=torch.float32, name=name)


@each_case_of_ours
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(case: Case, training: bool) -> None:
    layer, other = randomize(case.ours()).train(training), case.ours().train(training)
    other.load_state_dict(layer.state_dict())
    compare_compiled(layer, other, torch.randn(case.shape))


@each_masked
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph_masked(name: str, training: bool) -> None:
    build, shape = MASKED[name]
    layer, other = randomize(build()).train(training), build().train(training)
    other.load_state_dict(layer.state_dict())
    mask = torch.arange(shape[-1]) < LENGTHS[:, None]
    compare_compiled(layer, other, torch.randn(shape), mask=mask[:, None].expand(shape))


@pytest.mark.parametrize("mode", ["train", "eval", "train masked"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: normwise.BatchNorm1d(4, act="relu"), (3, 4, 5)),
        (lambda: normwise.BatchNorm2d(4, act="silu"), (3, 4, 2, 5)),
        (lambda: normwise.LayerNorm(4, act="gelu"), (3, 5, 4)),
        (lambda: normwise.LayerNorm(4, dim=1, act="leaky_relu"), (3, 4, 5)),
        (lambda: normwise.RMSNorm(4, act="silu"), (3, 5, 4)),
        (lambda: normwise.GroupNorm(2, 4, act="silu"), (3, 4, 2, 5)),
        (lambda: normwise.InstanceNorm1d(4, affine=True, act="relu"), (3, 4, 5)),
        (lambda: normwise.InstanceNorm2d(4, track_running_stats=True, act="gelu"), (3, 4, 2, 5)),
    ],
    ids=[
        "BatchNorm1d",
        "BatchNorm2d",
        "LayerNorm",
        "LayerNorm dim",
        "RMSNorm",
        "GroupNorm",
        "InstanceNorm1d",
        "InstanceNorm2d tracked",
    ],
)
def test_compile_fullgraph_fused(build: Callable[[], nn.Module], shape: tuple[int, ...], mode: str) -> None:
    training = mode != "eval"
    layer, other = randomize(build()).train(training), build().train(training)
    other.load_state_dict(layer.state_dict())
    x, residual = torch.randn(shape), torch.randn(shape)
    if "masked" not in mode:
        compare_compiled(layer, other, x, residual)
        return
    features = 1 if shape[1] == 4 else 2
    without_features = [size for axis, size in enumerate(shape) if axis != features]
    mask = torch.rand(without_features) < 0.6
    for t in (x, residual):
        t.movedim(features, -1)[~mask] = float("nan")
    compare_compiled(layer, other, x, residual, mask=mask)


@pytest.mark.parametrize("name", ["BatchNorm1d", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_inductor_trains_fused_layers(name: str) -> None:
    """Through the default backend, with generated code."""
    size = (2, 4) if name == "GroupNorm" else (4,)
    layer, other = (randomize(getattr(normwise, name)(*size, act="gelu")) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    by_step = name in ("BatchNorm1d", "GroupNorm")  # (N, C, L)
    call = {"lengths": LENGTHS} if by_step else {"mask": torch.rand(3, 4) < 0.6}
    x, residual = torch.randn(2, 3, 4, 5 if by_step else 4)
    compare_compiled(layer, other, x, residual, backend="inductor", **call)


def test_compiled_function_follows_a_forced_backend() -> None:
    fresh_compiler()
    layer = normwise.LayerNorm(6)
    graphs: list[set[str]] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=note)
    x = torch.randn(2, 6)
    compiled(x)
    with normwise.backend("reference"):
        compiled(x)
    assert "normwise.norm.default" not in graphs[0]
    assert "normwise.norm.default" in graphs[1]


@each_masked
def test_export_is_one_node(name: str) -> None:
    build, shape = MASKED[name]
    layer = randomize(build()).eval()
    x, mask = torch.randn(shape), (torch.arange(shape[-1]) < LENGTHS[:, None])[:, None].expand(shape)
    program = torch.export.export(layer, (x,), {"mask": mask})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(t == "normwise.norm.default" for t in targets) == 1
    assert_close(program.module()(x, mask=mask), layer(x, mask=mask), count=20)


@each_case_of_ours
def test_export(case: Case) -> None:
    layer = randomize(case.ours()).eval()
    x = torch.randn(case.shape)
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), count=case.count)
