"""fuse: norms, what is added to them and their activations in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

import normwise.nn as ours
from normwise.surgery import norms
from normwise.surgery.carry import carry_mode
from normwise.surgery.convert import convert
from normwise.surgery.forwards import BOUND, held, is_bound, own_modules
from normwise.surgery.fusing.activations import is_hooked, named
from normwise.surgery.fusing.calls import WITH_ADD, WITH_RESIDUAL
from normwise.surgery.fusing.observe import activations_behind, swap
from normwise.surgery.fusing.owners import State, fuse_forward, mark
from normwise.surgery.fusing.plan import Plan, calls_met, owners, plan
from normwise.surgery.fusing.proof import difference, results
from normwise.surgery.groups import Met, inputs_met
from normwise.surgery.hooks import carry_hooks
from normwise.surgery.models import changeable, copied
from normwise.surgery.report import Change, Refusal, Report, Skip, Surgery
from normwise.surgery.select import Layer, Where, chosen, class_of, kind_of, known_base


def fuse(model: nn.Module, *, example: Any = None, where: Where = None, inplace: bool = False) -> Surgery:
    """Make each norm and the activation, or the sum and the activation, behind it one pass, in training and evaluation.

        model, report = normwise.fuse(model)

    found | becomes one call of
    --- | ---
    norm, activation | any norm of normwise
    norm, sum, activation; norm, sum | BatchNorm of all kinds, GroupNorm, InstanceNorm
    sum, norm; sum, norm, activation | LayerNorm, RMSNorm

    with ReLU, LeakyReLU, SiLU, GELU and the like, as modules or functions, in place or not. Outputs and gradients are
    the same up to rounding.

    A module that calls such layers in its forward, a residual block or a torch.nn.Sequential, keeps its class (it gets
    one derived from it), parameters, state_dict and layers: they stand where they stood, and a norm of torch.nn becomes
    its namesake in normwise. Its forward is followed by torch.fx, with the modules inside as single steps; where a call
    is of another kind than those that were followed, or anything else that the forward goes by (flags, numbers, the
    mode) is not what it was, its own forward runs, as it does now. So does every layer by itself where hooks look on,
    or where it was replaced.

    What cannot be fused exactly is left alone, and the report says why: the result between the two is used elsewhere,
    returned or kept; the layers have hooks; the forward cannot be followed because it goes by the values or sizes of
    tensors, by random numbers, or by objects of the user's.

    Norms of other classes that end in an activation by themselves (timm's BatchNormAct2d) become the norm of normwise
    with that activation. `convert(model, to="torch")` undoes all of it.

    Args:
        model: left as it is, unless `inplace`.
        example: the argument of one call, a tuple of them, or a mapping of them by name: the model runs on it, which
            tells with what each module is called, and proves that outputs and gradients stay the same.
        where: which norms: a pattern of names, a class, several of these, or a function of name and module.
        inplace: change `model` itself, and return it.

    Returns:
        (model, report).

    Raises:
        ValueError: nothing was fused (the error says why, norm by norm); or on the example the results differ.
        TypeError: not a model; a compiled, scripted or distributed one. After an error the model is as it was.
    """
    changeable("fuse", model)
    if not inplace:
        model = copied(model, "fuse")
    candidates = norms.norm_layers(model)
    if not candidates:
        raise ValueError(
            f"fuse found no normalization layer in the model ({type(model).__name__}): pass the model itself. Norms "
            "written out as functions (torch.nn.functional.batch_norm) cannot be found"
        )
    state = State(model)
    wanted = _Wanted(model, candidates, where, example)
    before = None if example is None else results(model, example)
    plans = _plans(model, wanted, example)
    seen = _seen(model, candidates, wanted, example)
    try:
        _convert_norms(model, candidates, wanted, plans, seen)
        for one in candidates:
            if id(one.module) in wanted.with_act:
                _put(model, one, wanted.with_act[id(one.module)])
        for made in plans:
            if made.pairs:
                fuse_forward(made.owner, made.ways)
        swap(model, seen, {id(one.module): model.get_submodule(one.names[0]) for one in candidates})
        report = _report(candidates, wanted, plans, seen)
        if not report.changed:
            raise ValueError(f"fuse found nothing in the model that can be fused.{report.reasons}")
        if before is not None:
            what, apart = difference(before, results(model, example))
            if what:
                raise ValueError(
                    f"fuse: on the example {what} differs by {apart:.1g} of its largest element, and the model is as "
                    f"it was. Leave layers out by where=: fused were {', '.join(c.name for c in report.changed)}"
                )
    except BaseException:
        state.put_back()
        raise
    return Surgery(model, report)


class _Foreign(NamedTuple):
    """What takes the place of a norm of another class; act: the activation in which that ends by itself."""

    norm: nn.Module
    act: str | None
    exchange: norms.Exchange


class _Wanted:
    """Which of the norms may be fused, by their ids.

    Attributes:
        by_features: of those that stand beside an activation or sum, whether they are LayerNorm or RMSNorm.
        with_act: of those that end in an activation by themselves, what takes their place.
        foreign: of others of classes that are not torch.nn's or normwise's, what takes their place.
        refused: of all others why not.
        unfollowed: those among them that no forward that can be followed calls.
    """

    def __init__(self, model: nn.Module, candidates: list[Layer], where: Where, example: Any) -> None:
        meant = chosen(candidates, where)
        met = {} if example is None else inputs_met(model, (one.module for one in candidates), example)
        holders = held(model)
        self.by_features: dict[int, bool] = {}
        self.with_act: dict[int, _Foreign] = {}
        self.foreign: dict[int, _Foreign] = {}
        self.refused: dict[int, str] = {}
        self.unfollowed: set[int] = set()
        for one in candidates:
            key = id(one.module)
            try:
                if not meant(one):
                    raise Refusal("not meant by where=")
                _changeable(one.module, model, holders)
                found = _what_it_becomes(one.module, met.get(key, Met()))
            except Refusal as why:
                self.refused[key] = str(why)
                continue
            if isinstance(found, _Foreign) and found.act is not None:
                self.with_act[key] = found
                continue
            if isinstance(found, _Foreign):
                self.foreign[key] = found
                found = type(found.norm)
            self.by_features[key] = found in WITH_ADD


def _changeable(norm: nn.Module, model: nn.Module, holders: dict[int, str]) -> None:
    """Raises `Refusal` for a norm that must be called by itself, or as it is."""
    if norm is model:
        raise Refusal("it is the whole model: there is no layer beside it")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in norm.parameters()):
        raise Refusal("it is lazy and does not know its size yet: run one batch through the model first")
    if is_bound(norm):
        raise Refusal(BOUND)
    if id(norm) in holders:
        raise Refusal(f"the forward that is bound to {holders[id(norm)]} holds it by itself")
    if any(map(is_hooked, norm.modules())):
        raise Refusal("it has hooks, which see what fusing takes away")
    if parametrize.is_parametrized(norm):
        raise Refusal("it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first")


def _what_it_becomes(norm: nn.Module, met: Met) -> type[nn.Module] | _Foreign:
    """The class of normwise whose call does what the norm does, and more.

    Raises:
        Refusal: there is none, or its state_dict would change.
    """
    if norms.is_own(norm):
        base = known_base(norm)
        namesake = getattr(ours, base.__name__, None)
        if namesake not in (*WITH_RESIDUAL, *WITH_ADD):
            raise Refusal(f"a {base.__name__} takes no activation in its call")
        if getattr(norm, "act", None) is not None and base is namesake:
            raise Refusal("it has an activation already")
        if base is namesake and class_of(norm) is not base:
            raise Refusal(f"its class is derived from normwise.{base.__name__}, and may do more")
        if own := own_modules(norm):
            raise Refusal(f"it has modules of its own ({', '.join(own)}), which would be lost")
        return namesake  # type: ignore[no-any-return]
    found = norms.exchange(norm, met.calls)
    renamed = [theirs for theirs, mine in found.names.items() if theirs != mine]
    reshaped = [
        name for name, mine in found.names.items() if getattr(norm, name).shape != getattr(found.norm, mine).shape
    ]
    if renamed or reshaped:
        raise Refusal(
            f"its {', '.join(dict.fromkeys([*renamed, *reshaped]))} would have another name or shape in the "
            "state_dict: normwise.convert(model, to='normwise') first"
        )
    if type(found.norm) not in (*WITH_RESIDUAL, *WITH_ADD):
        raise Refusal(f"a {kind_of(found.norm)}, which computes the same, takes no activation in its call")
    if getattr(found.norm, "act", None) is not None:
        raise Refusal("its class computes its activation by itself")
    following = [module for module in found.following if type(module) is not nn.Identity]
    if not following:
        return _Foreign(found.norm, None, found)
    act = named(following[0]) if len(following) == 1 else None
    if act is None:
        behind = ", ".join(map(kind_of, following))
        raise Refusal(f"its own {behind} behind what it normalizes cannot be part of one call")
    return _Foreign(found.norm, act, found)


def _plans(model: nn.Module, wanted: _Wanted, example: Any) -> list[Plan]:
    """What is to be done with each module that calls norms; what cannot be is entered into `wanted`."""
    found = owners(model, wanted.by_features)
    met = {} if example is None else calls_met(model, [module for _, module, _ in found], example)
    made: list[Plan] = []
    why: dict[int, str] = {}
    for name, module, inside in found:
        one = plan(module, wanted.by_features, met.get(id(module), ()))
        if isinstance(one, Refusal):
            why.update(dict.fromkeys(inside, f"{one} ({name or 'the model'})"))
        else:
            made.append(one)
    wanted.unfollowed = {*wanted.by_features}
    for one in made:
        why.update(one.refused)
        wanted.unfollowed -= {*one.refused, *(id(pair.norm) for pair in one.pairs)}
    done = {id(pair.norm) for one in made for pair in one.pairs}
    for key in wanted.by_features:
        if key not in done:
            wanted.refused[key] = why.get(key, "no forward that was followed calls it")
    return made


def _seen(model: nn.Module, candidates: list[Layer], wanted: _Wanted, example: Any) -> dict[int, nn.Module]:
    """Activations behind norms in forwards that cannot be followed, by the norm's id."""
    unknown = [one.module for one in candidates if id(one.module) in wanted.unfollowed]
    if example is None or not unknown:
        return {}
    seen, why = activations_behind(model, unknown, example)
    for key in wanted.unfollowed:
        if key in seen:
            del wanted.refused[key]
        else:
            wanted.refused[key] += f"; on the example {why[key]}"
    return seen


def _convert_norms(
    model: nn.Module,
    candidates: list[Layer],
    wanted: _Wanted,
    plans: list[Plan],
    seen: dict[int, nn.Module],
) -> None:
    """Put norms of normwise in the places of those that are to be fused. What cannot be is entered into `wanted`, and
    its pairs taken out: in its forward it is then called by itself."""
    meant = {*seen, *(id(pair.norm) for made in plans for pair in made.pairs)}
    others = [
        one for one in candidates if id(one.module) in meant and type(one.module) not in (*WITH_RESIDUAL, *WITH_ADD)
    ]
    for one in others:
        if id(one.module) in wanted.foreign:
            _put(model, one, wanted.foreign[id(one.module)])
    ids = {id(one.module) for one in others if id(one.module) not in wanted.foreign}
    if ids:
        report = convert(model, "normwise", where=lambda name, module: id(module) in ids, inplace=True).report
        why = {skip.name: skip.reason for skip in report.skipped}
        wanted.refused.update(
            {id(one.module): why[one.name] for one in others if id(one.module) in ids and one.name in why}
        )
    for made in plans:
        made.pairs[:] = [pair for pair in made.pairs if id(pair.norm) not in wanted.refused]
    for key in [key for key in seen if key in wanted.refused]:
        del seen[key]


def _put(model: nn.Module, one: Layer, new: _Foreign) -> None:
    """The norm of normwise in all the places of one of another class."""
    norm: Any = new.norm
    norm.act = new.act
    carry_mode(one.module, norm, new.exchange.names)
    carry_hooks(one.module, norm)
    norms.remember(norm, one.module, new.exchange.names)
    mark(norm)
    for name in one.names:
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = norm


def _report(candidates: list[Layer], wanted: _Wanted, plans: list[Plan], seen: dict[int, nn.Module]) -> Report:
    report = Report("fuse")
    for one in candidates:
        key = id(one.module)
        found = [pair for made in plans for pair in made.pairs if pair.norm is one.module]
        if key in wanted.with_act:
            with_act = wanted.with_act[key]
            report.changed.append(
                Change(one.name, one.kind, f"{kind_of(with_act.norm)}(act={with_act.act!r})", with_act.exchange.note)
            )
        elif key in seen:
            note = "its forward cannot be followed: as seen on the example, in evaluation and in training"
            report.changed.append(Change(one.name, one.kind, f"one call: {one.kind} + {kind_of(seen[key])}", note))
        elif found:
            elsewhere = next((made.refused[key] for made in plans if key in made.refused), "")
            note = f"not in another call: {elsewhere}" if elsewhere else ""
            what = " and ".join(dict.fromkeys(pair.what for pair in found))
            report.changed.append(Change(one.name, one.kind, f"one call: {what}", note))
        else:
            report.skipped.append(Skip(one.name, one.kind, wanted.refused[key]))
    return report
