"""Which LayerNorms of a model are RMSNorms once what writes into the residual stream is centred, and the centring.

LayerNorm(x) = RMSNorm(x) where the features of x have mean zero, and a LayerNorm does not notice what mean they have.
So with P = I - 11'/C the writers of the stream may become P W x + P b (of embeddings each row P e), if nobody but
LayerNorms reads the stream. RMSNorm has no bias: beta goes into the linear layers that read the norm, b + W beta.

Source: Jiang, Gu, Zhu & Pan 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.surgery.forwards import followers, is_bound, overrides_forward
from normwise.surgery.observe import Observed, Product, Step, Value
from normwise.surgery.report import Refusal
from normwise.surgery.select import Layer, class_of, known_base, option
from normwise.words import counted


class Fold(NamedTuple):
    """The bias of a norm goes into a linear layer: their places, and which axis of its weight is that of the inputs."""

    norm: str
    weight: str
    bias: str
    axis: int


@dataclass
class Plan:
    """What is to be done to a model, all of it by the names of its tensors.

    norms: by name, what there is to say about each norm that becomes an RMSNorm.
    centred: tensors, and which of their axes is that of the features.
    refused: by the id of each other norm, why it stays.
    """

    norms: dict[str, str] = field(default_factory=dict)
    centred: dict[str, int] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    refused: dict[int, Refusal] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Fold the biases and centre the writers, in float64, rounded once."""
        for one in self.folds:
            norm: Any = model.get_submodule(one.norm)
            beta, weight = norm.bias.double(), model.get_parameter(one.weight)
            more = (weight.double() * (beta if one.axis else beta[:, None])).sum(one.axis)
            owner, _, key = one.bias.rpartition(".")
            layer: Any = model.get_submodule(owner)
            bias = getattr(layer, key)
            if bias is None:
                bias = nn.Parameter(weight.new_zeros(more.shape), requires_grad=weight.requires_grad)
                setattr(layer, key, bias)
            bias.copy_(bias.double() + more)
        tensors = _named(model)
        for name, axis in self.centred.items():
            values = tensors[name].double()
            tensors[name].copy_(values - values.mean(axis, keepdim=True))


def plan(model: nn.Module, candidates: Iterable[Layer], example: Any) -> Plan:
    """What makes the norms RMSNorms, as far as they can be; the model stays as it is."""
    return _Search(model, list(candidates), example).found


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class _Writer(NamedTuple):
    """A tensor of the model, and whether it is the weight of products rather than what is itself added."""

    value: Value
    multiplies: bool


class _Search:
    def __init__(self, model: nn.Module, candidates: list[Layer], example: Any) -> None:
        self.model = model
        self.seen = Observed(model, [one.module for one in candidates if _is_layer_norm(one.module)], example)
        self.makers = {value: step for step in self.seen.steps for value in step.outputs}
        self.readers: defaultdict[Value, list[Step]] = defaultdict(list)
        for step in self.seen.steps:
            for value in dict.fromkeys(step.inputs):
                self.readers[value].append(step)
        self.names = {id(tensor): name for name, tensor in reversed(_named(model).items())}
        places: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)
        for module in model.modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    places[id(tensor)].add((id(module), key))
        self.tied = {key for key, found in places.items() if len(found) > 1}
        self.inside = in_fast_path(model)
        for step in self.seen.steps:
            step.absorbs |= step.norm is not None and len(step.inputs) == 1
        self._faults: dict[_Writer, str] = {}
        self.found = Plan()
        for one in candidates:
            self._take_or_refuse(one)

    def _take_or_refuse(self, one: Layer) -> None:
        try:
            self._take(one)
        except Refusal as why:
            self.found.refused[id(one.module)] = why

    def _take(self, one: Layer) -> None:
        """Plan for a norm. Raises `Refusal` where it stays."""
        norm: Any = one.module
        if not _is_layer_norm(norm):
            raise Refusal("it is no LayerNorm over the last axis, which alone can become an RMSNorm exactly")
        if id(norm) in self.inside:
            raise self.inside[id(norm)]
        if norm._forward_hooks or norm._forward_pre_hooks:
            raise Refusal("it has hooks, which would see other numbers")
        calls = [step for step in self.seen.steps if step.norm is norm]
        if not calls:
            raise Refusal("the example does not call it")
        if not all(step.absorbs for step in calls):
            raise Refusal("it is called with more than its input")
        writers: dict[_Writer, int] = {}
        dropout = 0.0
        for step in calls:
            dropout = max(dropout, self._sources(step.inputs[0], norm.normalized_shape[0], writers))
        for writer in writers:
            if writer not in self._faults:
                self._faults[writer] = self._fault(writer)
            if self._faults[writer]:
                raise Refusal(self._faults[writer])
        centred = self._centred(writers)
        folds = [] if norm.bias is None else self._folds(one, calls)
        for name, axis in centred.items():
            if self.found.centred.get(name, axis) != axis:
                raise Refusal(f"{name} would have to be centred along two of its axes")
        self.found.centred.update(centred)
        self.found.folds += folds
        into = ", ".join(dict.fromkeys(fold.weight.rpartition(".")[0] for fold in folds))
        notes = [f"its bias is in {into}"] if folds else []
        if dropout:
            notes.append(f"in evaluation: in training dropout (p={dropout:g}) leaves the stream a mean")
        self.found.norms[one.names[0]] = "; ".join(notes)

    def _sources(self, value: Value, features: int, writers: dict[_Writer, int]) -> float:
        """Add the writers of a stream, and the axes of the features in them; returns the largest dropout on the way.

        Raises:
            Refusal: something writes into it that cannot be centred.
        """
        left, seen, dropout = [value], set(), 0.0
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            step = self.makers.get(value)
            if step is None:
                writers[_Writer(value, False)] = self._axis(value, features)
            elif step.obstacle:
                raise Refusal(step.obstacle)
            elif step.passes:
                left += step.passes
                dropout = max(dropout, step.dropout)
            elif step.product is not None:
                writers[_Writer(step.product.weight, True)] = self._product_axis(step.product, features)
            elif step.norm is not None or step.name == "layer_norm":
                raise Refusal("a norm's output goes on in its stream, as in a post-norm net")
            else:
                raise Refusal(f"{step.name} writes into its stream, of which the result cannot be centred")
        return dropout

    def _axis(self, value: Value, features: int) -> int:
        """The axis of the features in a tensor that is itself in the stream."""
        tensor = self.seen.tensors.get(value)
        if tensor is None:
            raise Refusal("what the model is given, or makes by itself, goes into its stream as it is")
        sizes = list(tensor.shape)
        if sizes[-1:] == [features]:
            return len(sizes) - 1
        if sizes.count(features) != 1:
            raise Refusal(
                f"{self._name(value)} of shape {tuple(sizes)} has no axis of the {counted(features, 'feature')}"
            )
        return sizes.index(features)

    def _product_axis(self, product: Product, features: int) -> int:
        weight = self.seen.tensors.get(product.weight)
        if weight is None or (product.bias is not None and product.bias not in self.seen.tensors):
            raise Refusal("the weight of a layer that writes into its stream is computed in each call (parametrized?)")
        written = weight.shape[product.axis]
        if features % written:
            raise Refusal(
                f"{self._name(product.weight)} writes {counted(written, 'feature')}, of which it normalizes {features}"
            )
        return product.axis

    def _centred(self, writers: dict[_Writer, int]) -> dict[str, int]:
        found = {}
        for writer, axis in writers.items():
            found[self._name(writer.value)] = axis
            if writer.multiplies:
                biases = {step.product.bias for step in self._products(writer.value)}  # type: ignore[union-attr]
                found |= {self._name(bias): 0 for bias in biases if bias is not None}
        return found

    def _products(self, weight: Value) -> list[Step]:
        return [step for step in self.readers[weight] if step.product is not None and step.product.weight == weight]

    def _fault(self, writer: _Writer) -> str:
        """Why a writer may not be centred, "" if it may: who else would notice."""
        name = self._name(writer.value)
        tensors = [writer.value]
        changed = [writer.value]
        if writer.multiplies:
            products = self._products(writer.value)
            changed = [value for step in products for value in step.outputs]
            tensors += {step.product.bias for step in products if step.product and step.product.bias is not None}
            if len(products) != len(self.readers[writer.value]):
                return f"{name}, which writes into its stream, is read by something else too{_UNTIE}"
        for value in tensors:
            if id(self.seen.tensors[value]) in self.tied:
                return f"{self._name(value)}, which writes into its stream, is a parameter of another layer too{_UNTIE}"
        for bias in tensors[1:] if writer.multiplies else ():
            if any(step.product is None or step.product.weight != writer.value for step in self.readers[bias]):
                return f"{self._name(bias)}, which writes into its stream, is read by something else too"
        seen: set[Value] = set()
        while changed:
            value = changed.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.seen.outputs:
                return f"the model returns the stream itself, which {name} writes into"
            for step in self.readers[value]:
                if step.product is not None and value == step.product.weight:
                    return f"{name}, which writes into its stream, is the weight of a linear layer too{_UNTIE}"
                if step.inputs.count(value) == step.passes.count(value) > 0:
                    changed += step.outputs
                elif not step.absorbs or step.inputs[0] != value or step.inputs.count(value) > 1:
                    return f"{self._reader(step)} reads the stream that {name} writes into, and not through a LayerNorm"
        return ""

    def _folds(self, one: Layer, calls: list[Step]) -> list[Fold]:
        """Where the bias of a norm goes. Raises `Refusal` where it cannot go into linear layers alone."""
        found: dict[Value, Step] = {}
        left = [(step.outputs[0]) for step in calls]
        from_here = set(left)
        while left:
            value = left.pop()
            if value in self.seen.outputs:
                raise Refusal("it stays: the model returns its result, from which its bias may not be missing")
            for step in self.readers[value]:
                if step.moves and step.passes == [value]:
                    left += set(step.outputs) - from_here
                    from_here |= set(step.outputs)
                elif step.product is not None and step.product.x == value and step.name in ("linear", "addmm"):
                    found[step.product.weight] = step
                else:
                    raise Refusal(
                        f"it stays: {self._reader(step)} reads its result, and an RMSNorm has no bias; only linear "
                        "layers alone behind it can take its bias"
                    )
        return [self._fold(one, step.product, from_here) for step in found.values()]  # type: ignore[arg-type]

    def _fold(self, one: Layer, product: Product, from_here: set[Value]) -> Fold:
        weight = self.seen.tensors.get(product.weight)
        if weight is None:
            raise Refusal(
                "it stays: the weight of a layer behind it, which would take its bias, is computed in each call"
            )
        name = self._name(product.weight)
        others = [step.product for step in self._products(product.weight)]
        if any(other is None or other.x not in from_here or other.bias != product.bias for other in others):
            raise Refusal(f"it stays: {name}, which would take its bias, has other inputs too")
        if product.bias is None:
            owner = name.rpartition(".")[0]
            layer = self.model.get_submodule(owner)
            plain = class_of(layer).forward is nn.Linear.forward and not is_bound(layer)
            if id(weight) in self.tied or not plain:
                raise Refusal(f"it stays: the layer of {name} has no bias of its own that could take its bias")
            bias = f"{owner}.bias"
        else:
            shared = id(self.seen.tensors.get(product.bias)) in self.tied or product.bias not in self.seen.tensors
            if shared or any(step.product not in others for step in self.readers[product.bias]):
                raise Refusal(f"it stays: the bias beside {name}, which would take its bias, is used elsewhere too")
            bias = self._name(product.bias)
        return Fold(one.names[0], name, bias, 1 - product.axis)

    def _name(self, value: Value) -> str:
        return self.names[id(self.seen.tensors[value])]

    def _reader(self, step: Step) -> str:
        if step.product is not None and step.product.weight in self.seen.tensors:
            return self._name(step.product.weight).rpartition(".")[0] or "a linear layer"
        if step.norm is None:
            return step.name
        return "another norm" if step.absorbs else "a norm that is called with more than its input"


_UNTIE = (
    ", where centring would change the result: untie them first (give the other a copy of its own, "
    "`head.weight = torch.nn.Parameter(head.weight.detach().clone())`, and tie_word_embeddings=False in a config)"
)


def in_fast_path(model: nn.Module) -> dict[int, Refusal]:
    """By id, the norms that torch's own encoder layer reads instead of calling them, and why they stay LayerNorms."""
    owners = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    why = Refusal("it stands in nn.TransformerEncoderLayer, whose fast path in evaluation computes a LayerNorm itself")
    return {id(part): why for owner in owners for part in owner.modules()}


def _is_layer_norm(layer: nn.Module) -> bool:
    """Whether it is a LayerNorm over the last axis and nothing else."""
    if not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) != 1 or option(layer, "act") is not None:
        return False
    if option(layer, "dim") not in (None, -1, (-1,)) or option(layer, "process_group") is not None:
        return False
    return not overrides_forward(layer, known_base(layer)) or followers(layer) == []
