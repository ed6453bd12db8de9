"""The custom op `normwise::recurrence`: torch's opcheck, and compiled layers as one node, equal to eager ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import normwise
from normwise.backends.cpu import library
from normwise.backends.recurrence import Weights
from normwise.ops.rnn.presets import preset
from support.recurrences import random_weights
from support.tolerances import assert_close

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")

T, B, INPUT, HIDDEN = 4, 3, 3, 5
KINDS = [
    ("lstm", "layer", None, "full"),
    ("lstm", "rms", None, "ragged"),
    ("gru", "layer", "haste", "full"),
    ("gru", "layer", None, "ragged"),
    ("rnn", "layer", None, "ragged"),
    ("lstm", None, None, "full"),
]
LENGTHS = {"full": None, "ragged": torch.tensor([2, 4, 0])}


def arguments(
    cell: str, norm: str | None, variant: str | None, lengths: Tensor | None, dtype: torch.dtype
) -> list[Any]:
    """What the op takes, `save` left out."""
    config = preset(cell, norm, variant)
    shapes = config.shapes(INPUT, HIDDEN)
    weights = Weights(**{name: w.to(dtype).requires_grad_() for name, w in random_weights(shapes).items()})
    shapes_of_x = (T, B, INPUT), (B, HIDDEN), (B, HIDDEN)
    x, h0, c0 = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes_of_x)
    described = [config.cell, config.norm, config.norm_placement, list(config.groups), config.cell_norm, config.eps]
    described += [config.reset_after, config.update_gate, config.update_offset, config.nonlinearity, "cpu"]
    return [x, h0, c0 if cell == "lstm" else None, *weights, lengths, torch.rand(T, B) < 0.3, True, *described]


@pytest.mark.parametrize(
    ("cell", "norm", "variant", "lengths", "dtype"),
    [(*kind, torch.float32) for kind in KINDS] + [(*kind, torch.bfloat16) for kind in KINDS[1:3]],
)
def test_opcheck(cell: str, norm: str | None, variant: str | None, lengths: str, dtype: torch.dtype) -> None:
    args = arguments(cell, norm, variant, LENGTHS[lengths], dtype)
    torch.library.opcheck(torch.ops.normwise.recurrence.default, [*args, True])
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(torch.ops.normwise.recurrence.default, [*detached, False])
    output, _, c, *kept = torch.ops.normwise.recurrence(*detached, True)
    grads = torch.randn_like(output), None, torch.randn_like(c) if cell == "lstm" else None
    needs = [True] * (3 + len(Weights._fields))
    torch.library.opcheck(torch.ops.normwise.recurrence_backward.default, [*grads, *detached, [output, *kept], needs])


def recurrences_in(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """The names of the nodes that are our op."""
    return [str(n.target) for g in graphs for n in g.graph.nodes if "normwise.recurrence" in str(n.target)]


@pytest.mark.parametrize(
    ("kind", "options", "nodes", "lengths"),
    [
        ("LSTM", {"bidirectional": True}, 2, "ragged"),
        ("GRU", {"variant": "haste"}, 1, "full"),
        ("RNN", {"num_layers": 2}, 2, "ragged"),
        ("LSTM", {"dtype": torch.bfloat16}, 1, "ragged"),
    ],
)
def test_a_compiled_layer_is_one_node_a_direction(kind: str, options: dict[str, Any], nodes: int, lengths: str) -> None:
    torch._dynamo.reset()
    layer = getattr(normwise, kind)(INPUT, HIDDEN, **options)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g))(graph, example)

    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(T, B, INPUT, dtype=options.get("dtype"), requires_grad=True)
    call = {"lengths": LENGTHS[lengths], "reset": torch.rand(T, B) < 0.3}
    results = []
    for net in (compiled, twin):
        output, state = net(x, **call)
        outputs = [output, *(state if isinstance(state, tuple) else (state,))]
        torch.manual_seed(0)
        upstream = [torch.randn_like(o) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [x, *net.parameters()], upstream)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert len(recurrences_in(graphs)) == nodes
    assert sum(len(g.graph.nodes) for g in graphs) < 100
    with torch.no_grad():
        assert torch.equal(compiled(x, **call)[0], twin(x, **call)[0])


def test_inductor_compiles_the_node() -> None:
    torch._dynamo.reset()
    layer = normwise.LSTM(INPUT, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(T, B, INPUT, requires_grad=True)
    upstream = torch.randn(T, B, HIDDEN)
    leaves = [x, *layer.parameters()]
    got, expected = ([net(x)[0], *torch.autograd.grad(net(x)[0], leaves, upstream)] for net in (compiled, layer))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, kind="composed")


def test_export_has_the_node_and_runs() -> None:
    layer = normwise.GRU(INPUT, HIDDEN).eval()
    x = torch.randn(T, B, INPUT)
    program = torch.export.export(layer, (x,))
    assert len(recurrences_in([program.graph_module])) == 1
    assert torch.equal(program.module()(x)[0], layer(x)[0])


class WithLengths(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = normwise.LSTM(INPUT, HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(x, lengths=lengths)[0]


def test_an_export_where_steps_and_batch_happen_to_be_equal_takes_others() -> None:
    """Who compares the two, if only for the words of an error, ties the program to the sizes of its example."""
    model, x, lengths = WithLengths().eval(), torch.randn(3, 3, INPUT), torch.tensor([1, 3, 2])
    steps, batch = (torch.export.Dim(name, min=2, max=64) for name in ("steps", "batch"))
    shapes = {"x": {0: steps, 1: batch}, "lengths": {0: batch}}
    program = torch.export.export(model, (x, lengths), dynamic_shapes=shapes)
    assert len(recurrences_in([program.graph_module])) == 1
    for call in ((x, lengths), (torch.randn(5, 2, INPUT), torch.tensor([5, 1]))):
        assert torch.equal(program.module()(*call), model(*call))


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_forced_backend_unrolls_as_before(backend: str) -> None:
    torch._dynamo.reset()
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(2, B, INPUT)
    program: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        program.append(graph)
        return graph

    with normwise.backend(backend):
        torch.compile(layer, fullgraph=True, backend=look)(x)
    assert not recurrences_in(program)


def test_what_the_kernels_lack_is_left_to_the_compiler() -> None:
    torch._dynamo.reset()
    layer, x = normwise.LSTM(INPUT, HIDDEN, dtype=torch.float64), torch.randn(2, B, INPUT, dtype=torch.float64)
    program: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        program.append(graph)
        return graph

    assert_close(torch.compile(layer, fullgraph=True, backend=look)(x)[0], layer(x)[0], kind="composed")
    assert not recurrences_in(program)
