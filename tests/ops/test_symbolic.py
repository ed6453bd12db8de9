"""torch.fx traces models that hold any layer or call any functional: each call is one node."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normwise
from support.layer_samples import Sample, each_layer, each_norm, same, trained_once


class Model(nn.Module):
    """A layer within a layer within a model, its output used as its users do."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.block = nn.Sequential(OrderedDict(inner=sample.make()))
        self.pair = sample.name in ("LSTM", "GRU", "RNN", "LSTMCell")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.inner(x + 1)
        if self.pair:
            y, _ = y
        return y * 2


@each_layer
def test_a_traced_model_does_the_same(sample: Sample) -> None:
    model, x = Model(sample), sample.input()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    again = fx.symbolic_trace(copy.deepcopy(traced))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["block.inner"]
    assert list(traced.state_dict()) == list(model.state_dict())
    state = copy.deepcopy(model.state_dict())
    expected = trained_once(model, x)
    for other in (traced, again, copy.deepcopy(again)):
        other.load_state_dict(state)
        for name, value in trained_once(other, x).items():
            same(value, expected[name])
        same(other.eval()(x), model.eval()(x))


class PathTracer(fx.Tracer):
    """What torchvision's create_feature_extractor and timm's FeatureGraphNet do: every node gets the dotted name of the
    module that it came from, by which users name the outputs that they want."""

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__(autowrap_modules=(torch.nn.functional,))
        self.leaves, self.current, self.names = leaves, "", OrderedDict[fx.Node, str]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.current = self.current, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.current):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.current, args, kwargs)
        finally:
            self.current = before

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        called = proxy.node.op == "call_module"
        self.names[proxy.node] = self.current if called else f"{self.current}.{proxy.node}".lstrip(".")
        return proxy


@each_layer
@pytest.mark.parametrize("as_leaves", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_features_are_extracted_by_the_name_of_the_layer(sample: Sample, as_leaves: bool, training: bool) -> None:
    model, x = Model(sample).train(training), sample.input()
    kinds = (type(model.block.inner),) if as_leaves else ()
    tracer = PathTracer(kinds)
    graph = tracer.trace(model)
    (wanted,) = [node for node, name in tracer.names.items() if name == "block.inner"]
    for output in [n for n in graph.nodes if n.op == "output"]:
        graph.erase_node(output)
    graph.output({"block.inner": wanted})
    extractor = fx.GraphModule(tracer.root, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    other = copy.deepcopy(model)
    same(extractor(x)["block.inner"], other.block.inner(x + 1))
    same(list(extractor.state_dict().values()), list(other.state_dict().values()))


@each_layer
def test_a_graph_is_interpreted_node_by_node(sample: Sample) -> None:
    model, x = Model(sample).eval(), sample.input()
    traced = fx.symbolic_trace(model)
    same(fx.Interpreter(traced).run(x), model(x))
    same(fx.Transformer(traced).transform()(x), model(x))


class Told(nn.Module):
    """A model whose inputs say what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normwise.BatchNorm1d(4, act="relu")
        self.lstm = normwise.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor, h: Tensor, c: Tensor) -> Tensor:
        y = self.norm(x, lengths=lengths, residual=x).transpose(1, 2)
        return self.lstm(y, (h, c), lengths=lengths, reset=reset)[0]


def test_lengths_masks_residuals_and_states_are_traced() -> None:
    model = Told()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    x, lengths, reset = torch.randn(3, 4, 5), torch.tensor([5, 2, 3]), torch.rand(3, 5) < 0.3
    state = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    same(traced(x, lengths, reset, *state), model(x, lengths, reset, *state))
    same(list(traced.buffers()), list(model.buffers()))


def test_functions_are_nodes() -> None:
    f = normwise.functional

    def forward(x: Tensor, mask: Tensor, gain: Tensor) -> list[Tensor]:
        return [
            f.batch_norm(x, weight=gain, training=True, mask=mask, act="relu"),
            f.instance_norm(x, weight=gain, mask=mask),
            f.group_norm(x, 2, gain, mask=mask, residual=x),
            f.layer_norm(x, (4,), gain, dim=1, mask=mask),
            f.rms_norm(x, (4,), gain, dim=1, add=x)[0],
        ]

    arguments = torch.randn(3, 4, 5), torch.rand(3, 5) < 0.8, torch.randn(4)
    traced = fx.symbolic_trace(forward)
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert called[:4] == [f.batch_norm, f.instance_norm, f.group_norm, f.layer_norm]
    same(copy.deepcopy(traced)(*arguments), forward(*arguments))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm"])
def test_layers_that_torch_traces_by_themselves(name: str) -> None:
    args = (2, 4) if name == "GroupNorm" else (4,)
    layer, x = getattr(normwise, name)(*args), torch.randn(3, 4)
    assert fx.symbolic_trace(getattr(nn, name)(*args)).graph
    same(fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize("make", [lambda: normwise.BatchNorm2d(3), lambda: normwise.LSTM(3, 4)])
def test_a_layer_that_torch_does_not_trace_by_itself_says_how(make) -> None:
    with pytest.raises(TypeError, match=r"trace a model of which the layer is a part, e\.g\. torch.nn.Sequential"):
        fx.symbolic_trace(make())


@each_norm
def test_hooks_would_run_twice_and_are_refused(sample: Sample) -> None:
    model = nn.Sequential(sample.make())
    hook = model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(RuntimeError, match=r"0 \(\w+\) has forward hooks.*remove them first, or use a Tracer"):
        fx.symbolic_trace(model)
    tracer = PathTracer((type(model[0]),))
    traced, x = fx.GraphModule(model, tracer.trace(model)), sample.input()
    same(traced.eval()(x), model.eval()(x))
    hook.remove()
    same(fx.symbolic_trace(model).eval()(x), model.eval()(x))
    model[0].forward = lambda x, forward=model[0].forward: forward(x) + 1
    with pytest.raises(RuntimeError, match=r"or a forward of its own"):
        fx.symbolic_trace(model)


def test_torch_s_own_fusion_by_graph_keeps_what_the_model_computes() -> None:
    from torch.fx.experimental.optimization import fuse

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), normwise.BatchNorm2d(4, act="relu"), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    x = torch.randn(2, 3, 5, 5)
    model(x)
    torch.testing.assert_close(fuse(model.eval())(x), model(x))
