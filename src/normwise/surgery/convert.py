"""convert: other norm layers in the places of a model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils import parametrize

import normwise.nn as ours
from normwise.nn import BatchRenorm1d, SyncBatchNorm
from normwise.surgery import norms, recurrents
from normwise.surgery.carry import carry_mode
from normwise.surgery.centre import in_fast_path
from normwise.surgery.exact_rms import to_exact_rms
from normwise.surgery.forwards import BOUND, followers, held, is_bound, overrides_forward, own_modules
from normwise.surgery.fusing.owners import is_marked, is_touched, unfused
from normwise.surgery.groups import Met, inputs_met
from normwise.surgery.hooks import carry_hooks
from normwise.surgery.models import changeable, copied
from normwise.surgery.report import AlreadyOne, Change, Refusal, Report, Skip, Surgery
from normwise.surgery.select import (
    NORMS,
    RECURRENT,
    Layer,
    Where,
    chosen,
    class_of,
    kind_of,
    known_base,
    layers,
    option,
)
from normwise.surgery.targets import TARGETS, Shapes
from normwise.words import did_you_mean

Make: TypeAlias = Callable[[nn.Module, Shapes], tuple[nn.Module, str]]
Target: TypeAlias = Literal[
    "batch", "frozen", "group", "layer", "normwise", "original", "renorm", "rms", "sync", "torch"
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "elu": nn.ELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}

_OTHER_NAMES = {"batchrenorm": "renorm", "syncbatchnorm": "sync", "frozenbatchnorm": "frozen"}
_OTHER_NAMES |= {"bn": "batch", "gn": "group", "ln": "layer"}
_NOT_MEANT = Refusal("not meant by where=")


def convert(
    model: nn.Module,
    to: Target | None = None,
    *,
    recurrent: Literal["layer", "rms", "batch"] | None = None,
    where: Where = None,
    example: Any = None,
    subclasses: bool = False,
    exact: bool = False,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Put other norm layers in the places of a model's own, at any depth; or norms into its recurrent layers.

        model, report = normwise.convert(model, to="group")
        model, report = normwise.convert(model, recurrent="layer")

    `to` | the new layers | in the places of
    --- | --- | ---
    "group" | GroupNorm, of the most groups up to 32 that hold 16 values each, or `num_groups=` (a number, or a \
function of the channels) | BatchNorm of all kinds, InstanceNorm, GroupNorm, LayerNorm(C, dim=1)
    "layer" | LayerNorm; over the channels, `LayerNorm(C, dim=1)`, where they are on axis 1 | the same
    "batch" | BatchNorm1d/2d/3d; `spatial=`, the number of axes behind the channels, where neither the old layer \
(SyncBatchNorm, GroupNorm) nor `example` says it | the same
    "renorm" | BatchRenorm1d/2d/3d | the same
    "rms" | RMSNorm, without the bias: another norm; `exact=True`: with the same results | LayerNorm
    "sync" | SyncBatchNorm; `process_group=` | BatchNorm of all kinds
    "frozen" | FrozenBatchNorm1d/2d/3d: statistics, gain and bias are fixed | BatchNorm of all kinds
    "normwise" | the namesakes in normwise, recurrent layers included | torch.nn's layers
    "torch" | the namesakes in torch.nn, for deployment; what `fuse` did is undone | normwise's layers
    "original" | the original classes that `to="normwise"` replaced, with the current tensors | what it put there

    Carried over: gain and bias always (parameters stay the same objects, so with `inplace` an optimizer goes on, and a
    weight beside an `offset` goes only where the offset is the same); running statistics where they mean the same,
    between the kinds of BatchNorm; arguments of the same name (eps, momentum, ...); mode, device, dtype, requires_grad,
    hooks, parametrizations and `freeze`. A layer that stands in several places still does. An activation (`act=`) that
    the new layer lacks follows it as a module, and so do the modules that a class of the user's calls behind its base's
    forward (as timm's BatchNormAct2d its `drop` and `act`). The random state is left alone. What changed, what did not
    carry over, what was skipped and why is in the report.

    Norm layers of other classes (transformers' RMSNorms, timm's norms with activation, your own) are recognized by
    what they compute, not by name: each is run beside the layer of normwise that computes the same, with
    random gains, in training and evaluation, and the two must agree. With an `example` they must agree on the model's
    own inputs too, in outputs and gradients. A class that is not in the catalogue needs the example. What has no
    counterpart is left alone, and the report says why.

    A group's values are its channels times the positions of the input, which only an `example` tells: without one the
    channels alone must be 16. With fewer in all there is one group. What would be a group of fewer than 4 values, or a
    LayerNorm over fewer, is skipped: its output would be almost only its bias.

    LayerNorm(x) = RMSNorm(x) where the features of x have mean zero. `to="rms", exact=True` makes it so in a pre-norm
    net: what writes into the residual stream (embeddings, projections, position parameters) is centred over the
    features, and the norms' biases go into the linear layers behind them. It follows the `example` through the model,
    proves the result on a copy in float64 and changes a norm only where nothing but LayerNorms sees the stream. Where
    the way through the model depends on the input, the example must take the one that is meant. The same results hold
    in evaluation: dropout in the stream leaves it a mean, and a step of training is that of an RMSNorm net. Source:
    Jiang, Gu, Zhu & Pan 2023.

    What a forward passes beyond the input (`mask=`, `lengths=`, `residual=`, `segments=`, `domain=`, `scale=`,
    `shift=`, `gate=`) the new layer must know, and torch.nn's do not: with an `example` such a layer is skipped.
    LayerNorm adds a residual before it normalizes, and returns the sum too; the others add it behind the norm.

    Args:
        model: left as it is, unless `inplace`.
        to: see above.
        recurrent: instead of `to`: put norms of this kind inside RNN, GRU, LSTM and their cells; `options` are then
            those of `normwise.LSTM` (variant, eps, zoneout, ...). Weights and biases carry over, gains start as the
            variant says.
        where: which layers: a pattern of names ("backbone.*"), a class, several of these, or a function of name and
            module; None means all.
        example: the argument of one call, a tuple of them, or a mapping of them by name (as tokenizers return): the
            model runs on it once, in evaluation, and sizes are then known rather than assumed.
        subclasses: also convert layers whose class has a forward of its own, as if it had its base's.
        exact: with `to="rms"` and an `example`: only where the results stay the same.
        inplace: change `model` itself, and return it.
        options: arguments of the new layers.

    Returns:
        (model, report).

    Raises:
        ValueError: the model has no layer of the kind, `where` means none, or none can be converted (unless they are
            what they should become already); options that do not fit a layer; an unknown target; `inplace` for a model
            that is itself the layer; a model of which a copy would go on calling the original.
        TypeError: options that the new layers do not know; a compiled, scripted or distributed model. After an error
            the model is as it was.
    """
    make, kinds, verb = _plan(to, recurrent, options)
    if exact and (to != "rms" or options or subclasses):
        raise ValueError("exact=True is for to='rms', without options of the new layers and subclasses=")
    _convertible(model, inplace)
    if exact:
        return to_exact_rms(model, example, where, inplace, _to_rms)
    if not inplace:
        model = copied(model, "convert")
    if to in ("torch", "original") and where is None and any(map(is_touched, model.modules())):
        with unfused(model):
            if not _candidates(model, kinds):
                return Surgery(model, Report(verb))
            return convert(model, to, example=example, subclasses=subclasses, inplace=True, **options)
    candidates = _candidates(model, kinds)
    if not candidates and to == "original":
        raise ValueError(
            f"convert found no layer in the model ({type(model).__name__}) that convert(to='normwise') put in the "
            "place of another: what it was before is kept in the layers that it returned, and not in a state_dict"
        )
    if not candidates:
        wanted = "recurrent layer" if recurrent else "normalization layer"
        written_out = (
            "a recurrence written out in the model's own forward"
            if recurrent
            else "layers written out as functions (torch.nn.functional.batch_norm)"
        )
        raise ValueError(
            f"convert found no {wanted} in the model ({type(model).__name__}): pass the model itself, not its "
            f"state_dict or a layer without one, and note that {written_out} cannot be found"
        )
    meant = chosen(candidates, where)
    met = {} if example is None else inputs_met(model, (one.module for one in candidates), example)
    holders = held(model)
    fixed = in_fast_path(model) if to == "rms" else {}
    report = Report(verb)
    made: list[tuple[Layer, nn.Module]] = []
    done = False
    for one in candidates:
        makes = _original if to == "torch" and is_marked(one.module) else make
        result: tuple[nn.Module, str] | Refusal = fixed.get(id(one.module), _NOT_MEANT)
        if meant(one) and id(one.module) not in fixed:
            result = _replaced(one, makes, met.get(id(one.module), Met()), holders, subclasses)
        if isinstance(result, Refusal):
            done |= isinstance(result, AlreadyOne)
            report.skipped.append(Skip(one.name, one.kind, str(result)))
        else:
            made.append((one, result[0]))
            report.changed.append(Change(one.name, one.kind, _described(result[0]), result[1]))
    if not made and not done:
        raise ValueError(
            f"{verb}: none of the layers that were found can be converted, and the model is as it was; convert "
            f"others, or give a layer of your own in their places.{report.reasons}"
        )
    # Nothing can fail from here on: the model changes wholly or not at all.
    for one, new in made:
        for name in one.names:
            if not name:
                return Surgery(new, report)
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = new
    return Surgery(model, report)


def _to_rms(model: nn.Module, names: list[str]) -> Surgery:
    return convert(model, "rms", where=lambda name, _: name in names, inplace=True)


def _plan(to: str | None, recurrent: str | None, options: dict[str, Any]) -> tuple[Make, tuple[type, ...], str]:
    """What makes a new layer of an old one and the shapes that it meets, the kinds of layers it is for, and how to call
    it."""
    if (to is None) == (recurrent is None):
        raise ValueError(
            "convert takes one of to= (for norm layers) and recurrent= (for RNN, GRU, LSTM), once for each"
        )
    if recurrent is not None:
        if recurrent not in ("layer", "rms", "batch"):
            raise ValueError(
                f"unknown recurrent={recurrent!r}: expected 'layer', 'rms' or 'batch' (to='torch' gives plain layers)"
                f"{did_you_mean(recurrent, ('layer', 'rms', 'batch'), _OTHER_NAMES)}"
            )
        return (
            lambda old, met: recurrents.normalized(old, recurrent, **options),
            RECURRENT,
            f"norms inside: {recurrent}",
        )
    if to == "original":
        return _original, (nn.Module,), "convert to original"
    if not isinstance(to, str) or to not in TARGETS:
        known = (*TARGETS, "original")
        raise ValueError(
            f"unknown to={to!r}: expected one of {', '.join(map(repr, known))}{did_you_mean(to, known, _OTHER_NAMES)}"
        )
    target = TARGETS[to]
    if to not in ("torch", "normwise"):
        return lambda old, met: target(old, met, **options), NORMS, f"convert to {to}"
    home = nn if to == "torch" else ours

    def namesake(old: nn.Module, met: Shapes) -> tuple[nn.Module, str]:
        return recurrents.namesake(old, home) if isinstance(old, RECURRENT) else target(old, met, **options)

    return namesake, (*NORMS, *RECURRENT), f"convert to {to}"


def _candidates(model: nn.Module, kinds: tuple[type, ...]) -> list[Layer]:
    """The layers of these kinds; where norms are among them, those of other classes that behave like one too."""
    if kinds == (nn.Module,):
        return [one for one in layers(model, kinds) if norms.original_of(one.module) is not None]
    if nn.LayerNorm not in kinds:
        return layers(model, kinds)
    found = {id(one.module) for one in norms.norm_layers(model)}
    return [one for one in layers(model, (nn.Module,)) if id(one.module) in found or isinstance(one.module, kinds)]


def _original(new: nn.Module, met: Shapes) -> tuple[nn.Module, str]:
    """The layer that `to="normwise"` replaced, in the place of what it put there."""
    return norms.restored(new), ""


class _Source(NamedTuple):
    """What a new layer is made of: a layer of torch.nn or normwise, the old one or what computes the same.

    behind: modules of the old layer's own that follow it; None where whatever else it does is to be left out.
    """

    norm: nn.Module
    behind: list[nn.Module] | None
    exchange: norms.Exchange | None = None


def _replaced(
    one: Layer, make: Make, met: Met, holders: dict[int, str], subclasses: bool
) -> tuple[nn.Module, str] | Refusal:
    """What comes in the place of a layer and what to say about it, or why nothing does."""
    try:
        _exchangeable(one.module, holders)
        return (
            make(one.module, met.shapes) if make is _original else _made(one, make, met, _source(one, met, subclasses))
        )
    except Refusal as why:
        return why


def _exchangeable(old: nn.Module, holders: dict[int, str]) -> None:
    """Raises `Refusal` where another layer in the place of this one would not be called, or cannot be made yet."""
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in old.parameters()):
        raise Refusal("it is lazy and does not know its size yet: run one batch through the model first")
    if is_bound(old):
        raise Refusal(BOUND)
    if id(old) in holders:
        raise Refusal(f"the forward that is bound to {holders[id(old)]} holds it, and would go on calling it")


def _source(one: Layer, met: Met, subclasses: bool) -> _Source:
    """What the new layer is made of.

    Raises:
        Refusal: no layer of torch.nn or normwise computes what this one does.
    """
    old = one.module
    if not isinstance(old, (*NORMS, *RECURRENT)):
        return _equivalent(old, met)
    base = known_base(old)
    if not overrides_forward(old, base):
        return _Source(old, [])
    chain = followers(old)
    if chain is not None or (subclasses and not own_modules(old)):
        return _Source(old, chain)
    own = ", ".join(own_modules(old))
    if own and not norms.proposed(old):
        raise Refusal(
            f"it has a forward and modules of its own ({own}), which would be lost: only modules that are called one "
            f"after the other on what {base.__name__} computes can follow the new layer"
        )
    try:
        return _equivalent(old, met)
    except Refusal as why:
        cure = "" if own else f". subclasses=True converts it as a {base.__name__}"
        raise Refusal(f"it has a forward of its own: {why}{cure}") from None


def _equivalent(old: nn.Module, met: Met) -> _Source:
    found = norms.exchange(old, met.calls)
    return _Source(found.norm, found.following, found)


def _made(one: Layer, make: Make, met: Met, source: _Source) -> tuple[nn.Module, str]:
    """What comes in the place of a layer, and what to say about it."""
    old, behind = one.module, source.behind
    norm, note = _norm(one, make, met, source)
    names = {} if source.exchange is None else source.exchange.names
    notes = [note, carry_mode(old, norm, names)]
    following = list(behind or ())
    act = option(source.norm, "act")
    if act is not None and option(norm, "act") is None:
        following.insert(0, ACTIVATIONS[act]().train(old.training))
        notes.append("its activation follows, so the names of its parameters begin with '0.'")
    if behind:
        notes.append(f"its own {', '.join(own_modules(old))} follow, so the names of its parameters begin with '0.'")
    elif behind is None:
        notes.append(f"converted as a {known_base(old).__name__}: what its own forward does else is gone")
    new = nn.Sequential(norm, *following) if following else norm
    if source.exchange is None:
        _takes(new, met.given)
    new.training = old.training
    if not behind:
        notes.append(_carry_modules(old, new))
    carry_hooks(old, new)
    if class_of(norm).__module__.startswith("normwise.") and not isinstance(old, RECURRENT):
        _remember(new, old, source)
    if getattr(old, "_compiled_call_impl", None) is not None:
        notes.append("it was compiled by itself: call its compile() again")
    return new, "; ".join(filter(None, notes))


def _takes(new: nn.Module, given: Set[str]) -> None:
    """Raises `Refusal` where the calls of the example give by name what the new layer does not take."""
    known = inspect.signature(new.forward).parameters
    norm = new[0] if isinstance(new, nn.Sequential) else new
    # Segments are batches of their own in training, which these do not know; they take the argument to say so.
    refused = {"segments"} if isinstance(norm, (BatchRenorm1d, SyncBatchNorm)) else set()
    unknown = [f"{name}=" for name in sorted(given) if name not in known or name in refused]
    if unknown:
        behind = ", with what follows it," if norm is not new else ""
        raise Refusal(
            f"it is called with {', '.join(unknown)}, which {kind_of(norm)}{behind} does not take: the forward that "
            "calls it has to do that otherwise first"
        )
    if "segments" in given and isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and option(norm, "dim") is not None:
        raise Refusal(
            "it is called with segments=, of whose rows (R, C) a LayerNorm takes the last axis, without dim=: put "
            f"{kind_of(norm)}({tuple(norm.normalized_shape)}) there yourself"
        )


def _norm(one: Layer, make: Make, met: Met, source: _Source) -> tuple[nn.Module, str]:
    """The new layer without what follows it, and what to say about it."""
    exchange = source.exchange
    try:
        norm, note = make(source.norm, met.shapes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{one.name or 'the model'} ({one.kind}): {error}") from error
    except AlreadyOne:
        if exchange is None:
            raise
        return source.norm, exchange.note
    if exchange is None:
        return norm, note
    if class_of(norm).__module__.startswith("torch."):  # which may round otherwise than ours
        what = norms.proved(one.module, norm, exchange.following, exchange.names, met.calls)
    else:
        what = f"taken for a {kind_of(source.norm)}"
    return norm, "; ".join(filter(None, [note, what]))


def _remember(new: nn.Module, old: nn.Module, source: _Source) -> None:
    """The way back, of what computes the same: see `to="original"`."""
    norm = new[0] if isinstance(new, nn.Sequential) else new
    names = (
        {name: name for name in (*old._parameters, *old._buffers)} if source.exchange is None else source.exchange.names
    )
    same = source.exchange is not None or class_of(norm).__name__ == known_base(old).__name__
    if same and not parametrize.is_parametrized(old) and all(hasattr(norm, mine) for mine in names.values()):
        norms.remember(new, old, {theirs: mine for theirs, mine in names.items() if getattr(old, theirs) is not None})


def _carry_modules(old: nn.Module, new: nn.Module) -> str:
    """Modules of a user's class that its forward does not call stay where somebody else may look for them."""
    own = own_modules(old)
    for name, module in own.items():
        if isinstance(new, nn.Sequential) or hasattr(new, name):
            raise Refusal(f"it has a module of its own, {name}, which has no place in a {type(new).__name__}")
        new.add_module(name, module)
    return f"its own {', '.join(own)} carried" if own else ""


def _described(new: nn.Module) -> str:
    if isinstance(new, nn.Sequential):
        return ", ".join([_described(new[0]), *(type(module).__name__ for module in list(new)[1:])])
    return f"{kind_of(new)}({new.extra_repr()})"


def _convertible(model: nn.Module, inplace: bool) -> None:
    changeable("convert", model)
    if inplace and (isinstance(model, (*NORMS, *RECURRENT)) or norms.proposed(model)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot become another layer in place: use the "
            "returned one, without inplace=True"
        )
