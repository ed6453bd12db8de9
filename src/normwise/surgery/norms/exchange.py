"""A layer of somebody else's class, and the layer of normwise that takes its place: proved, and with a way back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.surgery.hooks import HOOKS
from normwise.surgery.norms.forms import Form
from normwise.surgery.norms.proof import Call, different, distance, randomize, result, twin
from normwise.surgery.norms.recognize import Recognized, recognize
from normwise.surgery.report import Refusal

# How far two layers may lie apart on a user's input, by the unit of rounding of the dtype: sums of many terms in
# another order, and gradients that subtract.
_OUTPUTS, _GRADIENTS = 64, 2048


class Exchange(NamedTuple):
    """norm: what computes the same with the same tensors. following: the layer's own modules behind it. names: by the
    name of each of the layer's tensors that of the norm's. note: for the report."""

    norm: nn.Module
    following: list[nn.Module]
    names: dict[str, str]
    note: str


class Original(NamedTuple):
    """The layer whose place was taken, and by the names of its tensors those of its successor's."""

    layer: nn.Module
    names: dict[str, str]


def exchange(layer: nn.Module, calls: Sequence[Call] = ()) -> Exchange:
    """The layer of normwise that computes what `layer` does.

    Args:
        calls: what it was called with in an example, on which the two are then proved to agree.

    Raises:
        Refusal: there is none; its class is not in the catalogue and there is no example; or on the example they
        differ.
    """
    one = recognize(layer)
    if not calls and one.entry is None:
        raise Refusal(
            "its class is not in the catalogue of norm layers, though it behaves like one: pass example=, the argument "
            "of a call of the model, on which its replacement is proved"
        )
    features = one.features or _met(one.form, calls)
    form = one.form if one.form.family not in ("batch", "frozen") else _of_rank(one.form, calls)
    norm = form.build(layer, features)
    following = [layer.get_submodule(name) for name in one.form.followers]
    names = one.form.names
    _carry_plain(layer, norm)
    notes = [proved(layer, norm, following, names, calls), _rounding(one, norm)]
    if one.entry is not None and one.entry.note:
        notes.append(one.entry.note)
    renamed = ", ".join(f"{theirs} is {mine}" for theirs, mine in names.items() if theirs != mine)
    if renamed:
        notes.append(f"its {renamed} now")
    reshaped = [name for name, mine in names.items() if getattr(layer, name).shape != getattr(norm, mine).shape]
    if reshaped:
        notes.append(f"{', '.join(reshaped)} of another shape: new parameters, which an optimizer must be given")
    return Exchange(norm, following, names, "; ".join(filter(None, notes)))


def remember(new: nn.Module, layer: nn.Module, names: Mapping[str, str]) -> None:
    """Note in `new` whose place it takes; its parts then stand behind "0." if it is a Sequential."""
    prefix = "0." if isinstance(new, nn.Sequential) else ""
    vars(new)["_original"] = Original(layer, {theirs: prefix + mine for theirs, mine in names.items()})


def original_of(module: nn.Module) -> Original | None:
    """What `remember` noted."""
    found = vars(module).get("_original")
    return found if isinstance(found, Original) else None


def restored(new: nn.Module) -> nn.Module:
    """The layer whose place `new` took, with the tensors, mode and hooks that `new` has by now."""
    noted = original_of(new)
    assert noted is not None
    old, names = noted
    for theirs, mine in names.items():
        owner, _, name = mine.rpartition(".")
        tensor = getattr(new.get_submodule(owner), name)
        before = getattr(old, theirs)
        if tensor.shape != before.shape:
            view = tensor.detach().view(before.shape)
            tensor = nn.Parameter(view, tensor.requires_grad) if isinstance(before, nn.Parameter) else view
        if theirs in old._buffers:
            old._buffers[theirs] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
        else:
            old._parameters[theirs] = tensor
    for name in HOOKS:
        setattr(old, name, getattr(new, name))
    return old.train(new.training)


def _of_rank(form: Form, calls: Sequence[Call]) -> Form:
    """The form of a BatchNorm that takes inputs of the ranks of these calls, if any."""
    ranks = {call.args[0].dim() for call in calls if call.args and isinstance(call.args[0], Tensor)}
    fitting = (form._replace(spatial=spatial) for spatial in (1, 2, 3))
    return next((one for one in fitting if ranks and all(map(one.takes, ranks))), form)


def _met(form: Form, calls: Sequence[Call]) -> int:
    sizes = {call.args[0].shape[form.axis] for call in calls if call.args and isinstance(call.args[0], Tensor)}
    if len(sizes) != 1:
        raise Refusal(
            f"it is called with {sorted(sizes)} features, and a layer of normwise is made for one number"
            if sizes
            else "it has no tensors that say how many features it normalizes: pass example="
        )
    return sizes.pop()


def _carry_plain(layer: nn.Module, norm: nn.Module) -> None:
    """Numbers and flags that a parent may read of its norm, such as `variance_epsilon`."""
    for name, value in vars(layer).items():
        if not name.startswith("_") and isinstance(value, (int, float, str)) and not hasattr(type(norm), name):
            vars(norm).setdefault(name, value)


def _rounding(one: Recognized, norm: nn.Module) -> str:
    """What to say about half precision."""
    if one.rounding == "unknown":
        return "in half precision it may round elsewhere than its replacement, which rounds once at the end"
    if one.rounding == "in one dtype":
        return "in half precision the same bits where input and gain are of one dtype"
    return ""


def proved(
    layer: nn.Module, norm: nn.Module, following: Sequence[nn.Module], names: Mapping[str, str], calls: Sequence[Call]
) -> str:
    """How it is proved that a norm and what follows it compute what the layer does, for the report.

    With the tensors that there are, and with others, since gains of 1 hide what is done with them.

    Raises:
        Refusal: the two differ on the example.
    """
    if not calls:
        return "proved on generated inputs"
    exact, worst, prefix = True, 0.0, "0." if following else ""
    for training, drawn in itertools.product((False, True), repeat=2):
        old, new = twin(layer), twin(nn.Sequential(norm, *following) if following else norm)
        if drawn:
            randomize(old, torch.Generator().manual_seed(0))
            _copy_tensors(old, new[0] if following else new, names)  # type: ignore[index]
        for call in calls:
            a, b = (result(one.train(training), call, gradients=True) for one in (old, new))
            unit = torch.finfo(a.output.dtype).eps
            if a.output.dtype != b.output.dtype:
                raise Refusal(f"on the example it returns {a.output.dtype}, and its replacement {b.output.dtype}")
            apart = distance(b.output, a.output)
            pairs = [*zip(a.of_inputs, b.of_inputs, strict=True)]
            pairs += [
                (a.of_parameters.get(theirs), b.of_parameters.get(prefix + mine)) for theirs, mine in names.items()
            ]
            gradient = max((distance(y, x) for x, y in pairs), default=0.0)
            if not apart <= _OUTPUTS * unit or not gradient <= _GRADIENTS * unit:
                raise Refusal(
                    f"on the example its replacement differs by {apart:.1g} of the largest output and {gradient:.1g} "
                    "of the largest gradient"
                )
            exact &= different(a.output, b.output) == 0
            worst = max(worst, apart)
    return "proved on the example, " + ("to the last bit" if exact else f"up to {worst:.0e} of the largest output")


@torch.no_grad()
def _copy_tensors(old: nn.Module, new: nn.Module, names: Mapping[str, str]) -> None:
    for theirs, mine in names.items():
        tensor = getattr(new, mine)
        tensor.copy_(getattr(old, theirs).view(tensor.shape))


def calls_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call as it is kept: its tensors as they are now."""

    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    return Call(tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()})
