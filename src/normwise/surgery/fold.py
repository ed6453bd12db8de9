"""fold: normalization layers of a trained model that become part of the layers beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from normwise.nn.construct import channel_axis, eps_of, gain_of, offset_of
from normwise.surgery import norms
from normwise.surgery.batches import call_example, without_graph
from normwise.surgery.convert import ACTIVATIONS
from normwise.surgery.graph import CONVS, LINEAR, TRANSPOSED, Calls, ways_through
from normwise.surgery.groups import inputs_met
from normwise.surgery.models import changeable, copied
from normwise.surgery.report import Change, Refusal, Report, Skip, Surgery
from normwise.surgery.select import BATCH, INSTANCE, Layer, Where, chosen, kind_of, known_base, option
from normwise.words import counted

_BY_FEATURES = (nn.LayerNorm, nn.RMSNorm)
_LAYOUTS = {2: "rows (N, C)", 3: "shape (N, C, L)", 4: "shape (N, C, H, W)", 5: "shape (N, C, D, H, W)"}


class HasAxes(nn.Identity):
    """What `fold` leaves in the place of a norm that was folded for inputs of one number of axes: it refuses others."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, input: Tensor) -> Tensor:
        """The input. Raises ValueError if it has another number of axes."""
        return _with_axes(input, self.axes)

    def extra_repr(self) -> str:
        return f"axes={self.axes}"


@fx.wrap
def _with_axes(x: Tensor, axes: int) -> Tensor:
    """One node to torch.fx, which cannot follow a condition."""
    if x.dim() != axes:
        raise ValueError(
            f"expected {axes} axes, for which a norm was folded here, but got shape {tuple(x.shape)}: with these the "
            "norm and the layer beside it work on different axes. Pass such an input to fold as example="
        )
    return x


def fold(model: nn.Module, example: Any = None, *, where: Where = None, inplace: bool = False) -> Surgery:
    r"""Fold the norms of a model in evaluation into adjacent weights, and remove them.

        model, report = normwise.fold(model.eval())

    With s = gamma / sqrt(running_var + eps) and t = beta - s * running_mean, a BatchNorm is s * x + t, and so

        of a layer before it, W x + b:    (s W) x + (s b + t)      conv, transposed conv, linear; any groups
        of a layer behind it:             (W s) x + (b + W t)      linear, and conv without zeros in its padding

    which leaves nothing to be done (an `act=` remains, as a module). Of a LayerNorm or RMSNorm, gain and bias go into
    the linear layers behind it, and it only standardizes. Computed in float64 and rounded once.

    Only what is exact is folded: torch.fx follows the model's forward, and where the result between the two layers is
    used elsewhere too, a layer is called twice or shares a weight, or anything else looks on, the pair is left alone
    and the report says why. A linear layer works on the last axis and a BatchNorm on axis 1, which are the same in rows
    (N, C) only; nor is it the same where a convolution takes an input without a batch. So where the norm's class leaves
    the number of axes open (BatchNorm1d, SyncBatchNorm), a check stays in its place that refuses other inputs, unless
    there is an `example`.

    Args:
        model: in evaluation; left as it is, unless `inplace`.
        example: the argument of one call, a tuple of them, or a mapping of them by name; the axes are then known rather
            than checked in each call.
        where: which norms: a pattern of names, a class, several of these, or a function of name and module.
        inplace: change `model` itself, and return it.

    Returns:
        (model, report).

    Raises:
        ValueError: the model is in training mode, has no norm that can be folded, or cannot be followed.
        TypeError: not a model; a compiled, scripted or distributed one. After an error the model is as it was.
    """
    changeable("fold", model)
    if model.training:
        raise ValueError(
            "fold needs the model in evaluation, where norms are fixed numbers: call model.eval() first (in training "
            "a BatchNorm follows its batches, and cannot be folded)"
        )
    if not inplace:
        model = copied(model, "fold")
    candidates = [one for one in norms.norm_layers(model) if not isinstance(one.module, (nn.GroupNorm, *INSTANCE))]
    meant = chosen(candidates, where)
    report = Report("fold")
    with norms.Stands(model) as stands:
        met = {} if example is None else inputs_met(model, (one.module for one in candidates), example)
        refused = {id(one): stands.take(one, met) for one in candidates if meant(one)}
        _fold_all(model, candidates, refused, example, report, stands)
    if not report.changed:
        raise ValueError(
            "fold found no norm that can be folded exactly: it takes BatchNorm beside a convolution or a linear layer, "
            f"and LayerNorm before a linear layer, called one after the other and nowhere else.{report.reasons}"
        )
    return Surgery(model, report)


def _fold_all(
    model: nn.Module,
    candidates: list[Layer],
    refused: dict[int, Refusal | None],
    example: Any,
    report: Report,
    stands: norms.Stands,
) -> None:
    """Fold the candidates, each by itself or by what stands for it; `refused` has those that are meant, and what is
    known against them."""
    inside = any(one.module is not model for one in candidates)
    ways, note = ways_through(model) if inside else ([], "")
    if example is not None:
        with without_graph(model):
            call_example(model, example)  # ShapeProp would say what is wrong with it in words of its own
            arguments = _positional(model, example)
            for way in ways[:1]:
                ShapeProp(fx.GraphModule(model, way.graph)).propagate(*arguments)
    for one in candidates:
        against = refused.get(id(one), Refusal("not meant by where="))
        result = _fold(model, stands.of(one), ways) if against is None else against
        if isinstance(result, Refusal):
            report.skipped.append(Skip(one.name, one.kind, str(result)))
        else:
            into, *notes = result
            stands.keep(one)
            report.changed.append(Change(one.name, one.kind, into, "; ".join(filter(None, [*notes, note]))))


def _positional(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The arguments of `call(model, example)` in their order."""
    if isinstance(example, Mapping):
        bound = inspect.signature(model.forward).bind(**example)
        bound.apply_defaults()
        return bound.args
    return tuple(example) if type(example) in (tuple, list) else (example,)


def _fold(model: nn.Module, one: Layer, ways: list[Calls]) -> list[str] | Refusal:
    """Fold one norm; where it went and what the result relies on, or why it stays."""
    norm = one.module
    if norm is model:
        return Refusal("it is the whole model: there is no layer beside it")
    try:
        _foldable(norm, ways)
        if isinstance(norm, _BY_FEATURES):
            return _gain_into_next(model, norm, ways)
        try:
            return _into_previous(model, one, ways)
        except Refusal as before:
            try:
                return _into_next(model, one, ways)
            except Refusal as behind:
                return Refusal(f"{before}; {behind}")
    except Refusal as why:
        return why


def _foldable(norm: nn.Module, ways: list[Calls]) -> None:
    for way in ways:
        way.call(norm)
    if norm.training:
        raise Refusal("it is in training mode: call model.eval()")
    if channel_axis(norm) != 1:
        raise Refusal(f"its channels are on axis {channel_axis(norm)} (dim=), those of the layer beside it on axis 1")
    domains: int | None = getattr(norm, "domains", None)
    if domains is not None:
        raise Refusal(
            f"it keeps the statistics of {counted(domains, 'domain')}, of which a weight could hold those of one"
        )
    if isinstance(norm, BATCH) and norm.running_mean is None:
        raise Refusal("track_running_stats=False: it follows its batches in evaluation too")
    if isinstance(norm, _BY_FEATURES) and (norm.weight is None or len(norm.normalized_shape) != 1):
        raise Refusal("it has no gain to fold" if norm.weight is None else "it normalizes several axes")
    if isinstance(norm, _BY_FEATURES) and option(norm, "dim") not in (None, -1, (-1,)):
        raise Refusal("it does not normalize the last axis, on which a linear layer works")
    if isinstance(norm, _BY_FEATURES) and option(norm, "act") is not None:
        raise Refusal("an activation follows its gain and bias")


def _into_previous(model: nn.Module, one: Layer, ways: list[Calls]) -> list[str]:
    norm = one.module
    found = {_before(way, norm) for way in ways}
    if len(found) != 1:
        raise Refusal("the layer before it depends on the arguments of the call")
    (layer,) = found
    if layer.weight.shape[1 if isinstance(layer, TRANSPOSED) else 0] * _groups(layer, TRANSPOSED) != norm.num_features:
        raise Refusal(f"the {kind_of(layer)} before it has another number of channels")
    axes = _open_axes(ways, norm, layer)
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.double()
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, ...), and group after group along `in`
        by_group = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
        weight = weight * by_group.view(*by_group.shape, *(1,) * (weight.dim() - 2))
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    bias = shift if layer.bias is None else shift + scale * layer.bias.double()
    _set(layer, weight, bias)
    _take_out(model, one, ways, axes)
    return [f"folded into {_named(model, layer)}", _assumed(axes)]


def _into_next(model: nn.Module, one: Layer, ways: list[Calls]) -> list[str]:
    norm = one.module
    if option(norm, "act") is not None:
        raise Refusal("its activation comes between it and the next layer")
    behind = _behind(ways, norm, (*CONVS, nn.Linear))
    found = set()
    for layer in behind:
        if isinstance(layer, CONVS) and any(layer._reversed_padding_repeated_twice) and layer.padding_mode == "zeros":
            raise Refusal("the convolution behind it pads with zeros, which the norm does not see")
        if layer.weight.shape[1] * _groups(layer, CONVS) != norm.num_features:
            raise Refusal(f"the {kind_of(layer)} behind it takes another number of channels")
        found.add(_open_axes(ways, norm, layer))
    if len(found) > 1:
        raise Refusal("the layers behind it work on inputs of different numbers of axes")
    (axes,) = found
    for layer in behind:
        _scale_input(layer, *_scale_and_shift(norm))
    _take_out(model, one, ways, axes)
    into = ", ".join(_named(model, layer) for layer in behind)
    return [f"folded into {into}", _assumed(axes)]


def _gain_into_next(model: nn.Module, norm: Any, ways: list[Calls]) -> list[str]:
    behind = _behind(ways, norm, (nn.Linear,))
    if any(layer.in_features != norm.normalized_shape[0] for layer in behind):
        raise Refusal("a linear layer behind it takes another number of features")
    shift = getattr(norm, "bias", None)
    gain = gain_of(norm)
    assert gain is not None
    for layer in behind:
        _scale_input(layer, gain.double(), None if shift is None else shift.double())
    if offset_of(norm):
        norm.offset = 0.0  # there is no weight left that it is added to
    norm.elementwise_affine = False
    norm.weight = None
    if hasattr(norm, "bias"):
        norm.bias = None
    return [f"only standardizes; gain and bias in {', '.join(_named(model, layer) for layer in behind)}"]


def _before(way: Calls, norm: nn.Module) -> Any:
    """The layer whose result the norm takes, and nobody else."""
    source = way.call(norm).args[0]
    layer = way.module(source)
    if not isinstance(layer, LINEAR):
        raise Refusal("no convolution or linear layer comes before it")
    way.call(layer)
    assert isinstance(source, fx.Node)
    if len(source.users) != 1:
        raise Refusal(f"the result of the {kind_of(layer)} before it is used elsewhere too")
    return layer


def _behind(ways: list[Calls], norm: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    """The layers that take the norm's result, of these kinds all of them."""
    found = []
    for way in ways:
        users = [way.module(user) for user in way.call(norm).users]
        if not users or not all(isinstance(layer, kinds) for layer in users):
            raise Refusal("it is followed by something other than a convolution or linear layer")
        for layer in users:
            assert layer is not None
            way.call(layer)
        found.append(users)
    if any({*map(id, users)} != {*map(id, found[0])} for users in found):
        raise Refusal("the layers behind it depend on the arguments of the call")
    return found[0]


def _open_axes(ways: list[Calls], norm: nn.Module, layer: nn.Module) -> int | None:
    """How many axes the norm's input must have for both layers to work on the same one; None where that is certain.

    Raises:
        Refusal: it has another number.
    """
    axes = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()  # type: ignore[operator]
    taken = {"1d": (2, 3), "2d": (4,), "3d": (5,)}.get(known_base(norm).__name__[-2:], (2, 3, 4, 5))
    known = ways[0].call(norm).meta.get("tensor_meta")
    if known is not None:
        taken = (len(known.shape),)
    if axes not in taken:
        has = taken[0] if len(taken) == 1 else taken
        raise Refusal(f"beside a {kind_of(layer)} its input must have {counted(axes, 'axis')}, but has {has}")
    return axes if len(taken) > 1 else None


def _assumed(axes: int | None) -> str:
    """What a report says of it."""
    return f"taken to be of {_LAYOUTS[axes]}: pass example= to be sure; other inputs are refused" if axes else ""


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """s and t of a BatchNorm in evaluation, s * x + t, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + eps_of(norm))
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * norm.running_mean.double()
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias.double()).detach()


def _scale_input(layer: Any, scale: Tensor, shift: Tensor | None) -> None:
    """W (s x + t) + b = (W s) x + (b + W t)."""
    weight = layer.weight.double()
    groups = _groups(layer, CONVS)
    shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    by_group = weight.unflatten(0, (groups, -1))
    bias = None if layer.bias is None else layer.bias.double()
    if shift is not None:
        more = (by_group * shift.view(shape)).flatten(2).sum(2).flatten()
        bias = more if bias is None else bias + more
    _set(layer, (by_group * scale.view(shape)).flatten(0, 1), bias)


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is None:
            return
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(bias.shape), requires_grad=layer.weight.requires_grad)
        layer.bias.copy_(bias)


def _take_out(model: nn.Module, one: Layer, ways: list[Calls], axes: int | None) -> None:
    """An identity stands in all its places from now on, or what remains: a check of the axes, the norm's activation."""
    act = option(one.module, "act")
    if act is None:
        for way in ways:
            way.remove(one.module)
    left: nn.Module = nn.Identity() if axes is None else HasAxes(axes)
    if act is not None:
        left = ACTIVATIONS[act]() if axes is None else nn.Sequential(left, ACTIVATIONS[act]())
    left.train(False)
    for name in one.names:
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = left


def _groups(layer: Any, kinds: tuple[type[nn.Module], ...]) -> int:
    return int(getattr(layer, "groups", 1)) if isinstance(layer, kinds) else 1


def _named(model: nn.Module, layer: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is layer)
    return f"{kind_of(layer)} {name}"
