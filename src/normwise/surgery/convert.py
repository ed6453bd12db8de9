"""convert: other norm layers in the places of a model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

import normwise.nn as ours
from normwise.surgery import recurrents
from normwise.surgery.carry import carry_rest, overrides_forward
from normwise.surgery.report import Change, Refusal, Report, Skip, Surgery
from normwise.surgery.select import NORMS, RECURRENT, Layer, Where, chosen, kind_of, known_base, layers, require_module
from normwise.surgery.targets import TARGETS

Target: TypeAlias = Literal["batch", "frozen", "group", "layer", "normwise", "renorm", "sync", "torch"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def convert(
    model: nn.Module,
    to: Target | None = None,
    *,
    recurrent: Literal["layer", "rms", "batch"] | None = None,
    where: Where = None,
    subclasses: bool = False,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Put other norm layers in the places of a model's own, at any depth; or norms into its recurrent layers.

        model, report = normwise.convert(model, to="group")
        model, report = normwise.convert(model, recurrent="layer")

    `to` | the new layers | in the places of
    --- | --- | ---
    "group" | GroupNorm, of the most groups up to 32 that divide the channels, or `num_groups=` (a number, or a \
function of the channels) | BatchNorm of all kinds, InstanceNorm, GroupNorm, LayerNorm(C, dim=1)
    "layer" | LayerNorm; over the channels, `LayerNorm(C, dim=1)`, where they are on axis 1 | the same
    "batch" | BatchNorm1d/2d/3d; `spatial=`, the number of axes behind the channels, where the old layer does not say \
it (SyncBatchNorm, GroupNorm) | the same
    "renorm" | BatchRenorm1d/2d/3d | the same
    "sync" | SyncBatchNorm; `process_group=` | BatchNorm of all kinds
    "frozen" | FrozenBatchNorm1d/2d/3d: statistics, gain and bias are fixed | BatchNorm of all kinds
    "normwise" | the namesakes in normwise, recurrent layers included | torch.nn's layers
    "torch" | the namesakes in torch.nn, for deployment | normwise's layers

    Carried over: gain and bias always (parameters stay the same objects, so with `inplace` an optimizer goes on);
    running statistics where they mean the same, between the kinds of BatchNorm; arguments of the same name (eps,
    momentum, ...); mode, device, dtype, requires_grad, hooks, parametrizations and `freeze`. A layer that stands in
    several places still does. An activation (`act=`) that the new layer lacks follows it as a module. The random state
    is left alone. What changed, what did not carry over, and what was skipped and why is in the report.

    What a forward passes beyond the input (`mask=`, `lengths=`, `residual=`) the new layer must know, and torch.nn's do
    not. LayerNorm adds a residual before it normalizes, and returns the sum too; the others add it behind the norm.

    Args:
        model: left as it is, unless `inplace`.
        to: see above.
        recurrent: instead of `to`: put norms of this kind inside RNN, GRU, LSTM and their cells; `options` are then
            those of `normwise.LSTM` (variant, eps, zoneout, ...). Weights and biases carry over, gains start as the
            variant says.
        where: which layers: a pattern of names ("backbone.*"), a class, several of these, or a function of name and
            module; None means all.
        subclasses: also convert layers whose class has a forward of its own, as if it had its base's.
        inplace: change `model` itself, and return it.
        options: arguments of the new layers.

    Returns:
        (model, report).

    Raises:
        ValueError: the model has no layer of the kind, or `where` means none; options that do not fit a layer; an
            unknown target; `inplace` for a model that is itself the layer.
        TypeError: options that the new layers do not know; a compiled, scripted or distributed model.
        After an error the model is as it was.
    """
    make, kinds, verb = _plan(to, recurrent, options)
    _convertible(model, inplace)
    if not inplace:
        model = copied(model, "convert")
    candidates = layers(model, kinds)
    if not candidates:
        wanted = "recurrent layer" if recurrent else "normalization layer"
        raise ValueError(
            f"convert found no {wanted} in the model ({type(model).__name__}): pass the model itself, not its "
            "state_dict or a layer without one. Layers written out as functions (torch.nn.functional.batch_norm) "
            "cannot be found"
        )
    meant = chosen(candidates, where)
    report = Report(verb)
    made: list[tuple[Layer, nn.Module]] = []
    for one in candidates:
        result = _made(one, make, subclasses) if meant(one) else Refusal("not meant by where=")
        if isinstance(result, Refusal):
            report.skipped.append(Skip(one.name, one.kind, str(result)))
        else:
            made.append((one, result[0]))
            report.changed.append(Change(one.name, one.kind, _described(result[0]), result[1]))
    # Nothing can fail from here on: the model changes wholly or not at all.
    for one, new in made:
        for name in one.names:
            if not name:
                return Surgery(new, report)
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = new
    return Surgery(model, report)


def _plan(
    to: str | None, recurrent: str | None, options: dict[str, Any]
) -> tuple[Callable[[nn.Module], tuple[nn.Module, str]], tuple[type, ...], str]:
    """What makes a new layer of an old one, the kinds of layers it is for, and how to call it."""
    if (to is None) == (recurrent is None):
        raise ValueError(
            "convert takes one of to= (for norm layers) and recurrent= (for RNN, GRU, LSTM), once for each"
        )
    if recurrent is not None:
        if recurrent not in ("layer", "rms", "batch"):
            raise ValueError(
                f"unknown recurrent={recurrent!r}: expected 'layer', 'rms' or 'batch'; to='torch' gives plain layers"
            )
        return lambda old: recurrents.normalized(old, recurrent, **options), RECURRENT, f"norms inside: {recurrent}"
    if to not in TARGETS:
        raise ValueError(f"unknown to={to!r}: expected one of {', '.join(map(repr, TARGETS))}")
    target = TARGETS[to]
    if to not in ("torch", "normwise"):
        return lambda old: target(old, **options), NORMS, f"convert to {to}"
    home = nn if to == "torch" else ours

    def namesake(old: nn.Module) -> tuple[nn.Module, str]:
        return recurrents.namesake(old, home) if isinstance(old, RECURRENT) else target(old, **options)

    return namesake, (*NORMS, *RECURRENT), f"convert to {to}"


def _made(
    one: Layer, make: Callable[[nn.Module], tuple[nn.Module, str]], subclasses: bool
) -> tuple[nn.Module, str] | Refusal:
    """What comes in the place of a layer and what to say about it, or why nothing does."""
    old, base = one.module, known_base(one.module)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in old.parameters()):
        return Refusal("it is lazy and does not know its size yet: run one batch through the model first")
    if overrides_forward(old, base) and not subclasses:
        return Refusal(
            f"it has a forward of its own, which need not be {base.__name__}'s: subclasses=True converts it as one"
        )
    try:
        new, note = make(old)
    except Refusal as why:
        return why
    except (TypeError, ValueError) as error:
        raise type(error)(f"{one.name or 'the model'} ({one.kind}): {error}") from error
    notes = [note]
    act = getattr(old, "act", None)
    if isinstance(act, str) and getattr(new, "act", None) is None:
        new = nn.Sequential(new, ACTIVATIONS[act]())
        notes.append("its activation follows, so the names of its parameters begin with '0.'")
    notes.append(carry_rest(old, new))
    return new, "; ".join(filter(None, notes))


def _described(new: nn.Module) -> str:
    if isinstance(new, nn.Sequential):
        return f"{_described(new[0])}, {type(new[1]).__name__}"
    return f"{kind_of(new)}({new.extra_repr()})"


def _convertible(model: nn.Module, inplace: bool) -> None:
    changeable("convert", model)
    if inplace and isinstance(model, (*NORMS, *RECURRENT)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot become another layer in place: use the "
            "returned one, without inplace=True"
        )


def changeable(verb: str, model: nn.Module) -> None:
    """Raises TypeError for what is no model, or one whose layers something outside has taken note of."""
    require_module(verb, model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a ScriptModule, whose layers are fixed: {verb} before scripting")
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
            raise TypeError(
                f"{name or 'the model'} is of class {kind}, which has taken note of the layers inside: {verb} the "
                "model before it is wrapped"
            )


def copied(model: nn.Module, verb: str) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise type(error)(f"{error}\n{verb} could not copy the model: pass inplace=True to change it itself") from error
