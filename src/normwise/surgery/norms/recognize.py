"""Which modules are norm layers, whatever their class, and what they compute, proved by running them.

Names propose, behaviour proves. A module whose tensors fit one feature axis is copied, its gain and bias are drawn at
random, and it runs beside every form (`forms.py`) that it may have; the one that agrees in outputs, gradients and
running statistics, in training and in evaluation, is what it computes.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.ops.norm.gain import Cast
from normwise.surgery.forwards import is_bound
from normwise.surgery.norms.catalogue import Entry, entry_of
from normwise.surgery.norms.forms import Form, features_of, forms, own_tensors, takes_gate
from normwise.surgery.norms.proof import (
    FEW,
    GRADIENTS_CLOSE,
    Call,
    different,
    distance,
    generated,
    in_dtype,
    randomize,
    result,
    same_output,
    twin,
)
from normwise.surgery.report import Refusal
from normwise.surgery.select import NORMS, class_of, known_base

_HALF = torch.bfloat16
# What a norm without tensors of its own is tried with; then it says nothing about the number of its features.
_ANY_SIZE = 12
# "LlamaRMSNorm", "norm1", "RMS", "ln_f", "MyLN", "bn2": but not "normal", "ellipse" or "subnet".
_NAME = re.compile(r"norm(?!al(?![iy]))|(?<![a-z])(rms|ln|bn|gn|abn)(?![a-z])", re.IGNORECASE)
# Tensors that a norm layer may have: gain, bias, two statistics, a counter.
_MOST_TENSORS = 5


Rounding: TypeAlias = Literal["as here", "in one dtype", "unknown"]


class Recognized(NamedTuple):
    """A norm layer of a class that is neither torch.nn's nor normwise's.

    form: what it computes. features: how many, None where the layer has no tensors that say it. entry: what the
    catalogue has of its class. rounding: where half precision is rounded "as here", "in one dtype" only (not where
    input and gain are of two), or nobody knows.
    """

    form: Form
    features: int | None
    entry: Entry | None
    rounding: Rounding


# What every module keeps: its parts, its hooks, its mode.
_BOOKKEEPING = {*vars(nn.Module()), "training", "_original", "_is_full_backward_hook"}

_found: dict[tuple[Any, ...], Recognized | Refusal] = {}
_standing: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module | None]] = WeakKeyDictionary()


def is_own(layer: nn.Module) -> bool:
    """Whether it is one of torch.nn's or normwise's norm layers as it is, with their forward."""
    return isinstance(layer, NORMS) and not is_bound(layer) and class_of(layer).forward is known_base(layer).forward


def proposed(module: nn.Module) -> bool:
    """Whether a module may be a norm layer of somebody else's: by its tensors and parts, before anything is run."""
    cls = class_of(module)
    if (cls.__module__.startswith(("torch.", "normwise.")) and not is_bound(module)) or is_own(module):
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    if parametrize.is_parametrized(module) or len(module._parameters) + len(module._buffers) > _MOST_TENSORS:
        return False
    if entry_of(module) is not None or is_called_norm(module):
        return bool(own_tensors(module)) or not list(module.children())
    return features_of(module) is not None and 1 <= _required(module) <= 2


def is_called_norm(module: nn.Module) -> bool:
    """Whether its class has the name of a norm layer."""
    return is_norm_name(class_of(module).__name__)


def is_norm_name(words: str) -> bool:
    """Whether one of the words is that of a norm layer: "LlamaRMSNorm", "norm1", "ln_f", "MyLN"."""
    return _NAME.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words)) is not None


def recognize(module: nn.Module) -> Recognized:
    """What a proposed module computes.

    Raises:
        Refusal: nothing that a norm of normwise computes, or it cannot be run.
    """
    key = _key(module)
    found = _found.get(key) if key is not None else None
    if found is None:
        try:
            found = _search(module)
        except Refusal as why:
            found = why
        if key is not None:
            _found[key] = found
    if isinstance(found, Refusal):
        raise found
    return found


def stands_for(module: nn.Module) -> nn.Module | None:
    """The norm of torch.nn or normwise that a module is, or the one that computes what it does with its tensors; None
    for what is no norm.

    To look at; its input belongs into `module` itself. Where the class is derived from torch.nn's or normwise's and it
    is not known what its forward does, the module itself.
    """
    if is_own(module) or not proposed(module):
        return module if isinstance(module, NORMS) else None
    now = _key(module), *map(id, (*module._parameters.values(), *module._buffers.values()))
    known = _standing.get(module)
    if known is None or known[0] != now:
        try:
            one = recognize(module)
            known = now, one.form.build(module, one.features or 1)
        except Refusal:
            known = now, None
        _standing[module] = known
    return known[1] or (module if isinstance(module, NORMS) else None)


def _required(module: nn.Module) -> int:
    """How many arguments its forward cannot do without."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty for p in parameters if p.kind in positional)


def _key(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module may go by, values of tensors aside; None where an instance is a world of its own."""
    if is_bound(module):
        return None
    own = {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING}
    plain = tuple((name, repr(value) if isinstance(value, (list, dict)) else value) for name, value in own.items())
    tensors = tuple((name, t.shape, t.dtype, t.device) for name, t in own_tensors(module).items())
    parts = tuple((name, _key(child)) for name, child in module.named_children())
    key = class_of(module), plain, tensors, parts
    try:
        hash(key)
    except TypeError:
        return None
    return None if any(part is None for _, part in parts) else key


def _search(module: nn.Module) -> Recognized:
    entry = entry_of(module)
    if entry is not None and entry.refused:
        raise Refusal(entry.refused)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta or tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter):
            raise Refusal(f"its tensors are {'on the meta device' if tensor.is_meta else type(tensor).__name__}")
    needed = _required(module)
    if needed > 2 or (needed == 2 and not takes_gate(module)):
        raise Refusal("it is called with more than its input, from which its result depends")
    features = features_of(module)
    if features is None and own_tensors(module):
        raise Refusal("its tensors do not have one number for each feature")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return _fitting(module, features, entry)


def _fitting(module: nn.Module, features: int | None, entry: Entry | None) -> Recognized:
    generator = torch.Generator().manual_seed(0)
    try:
        probe = twin(module).float()
        randomize(probe, generator)
    except Exception as error:
        raise Refusal(f"it cannot be copied to be looked at: {error}") from error
    calls = list(_accepted(probe, features or _ANY_SIZE, generator))
    if features is None:
        calls = [(call, benign) for call, benign in calls if call.args[0].shape[-1] == _ANY_SIZE]
    if not calls:
        raise Refusal("it takes no input of the shapes that norm layers take")
    shapes = [call.args[0].shape for call, _ in calls]
    if not any(_scale_free(probe, call) for call, benign in calls if benign) and not _keeps_statistics(probe):
        raise Refusal("it does not normalize: four times the input gives another result")
    for form in forms(probe, shapes, entry):
        if _agrees(probe, form, features or _ANY_SIZE, calls):
            form, rounding = _with_rounding(module, form, features or _ANY_SIZE, calls)
            return Recognized(form, features, entry, rounding)
    known_as = "" if entry is None else "; the catalogue knows its class, of which this is another version"
    raise Refusal(f"it computes nothing that a norm of normwise computes{known_as}")


def _accepted(probe: nn.Module, features: int, generator: torch.Generator) -> Iterator[tuple[Call, bool]]:
    """The generated calls that the layer takes."""
    refused: set[torch.Size] = set()
    probe.eval()
    for call, benign in generated(probe, features, generator):
        shape = call.args[0].shape
        if shape in refused:
            continue
        try:
            result(probe, call, gradients=False)
        except Exception:  # somebody else's code on a shape that it may not be made for
            refused.add(shape)
        else:
            yield call, benign


def _scale_free(probe: nn.Module, call: Call) -> bool:
    larger = Call((4 * call.args[0], *call.args[1:]), call.kwargs)
    a, b = (result(probe, one, gradients=False).output for one in (call, larger))
    return bool(torch.isclose(a, b, rtol=0.01, atol=0.01).all())


def _keeps_statistics(probe: nn.Module) -> bool:
    return any("var" in name for name in probe._buffers)


def _agrees(probe: nn.Module, form: Form, features: int, calls: list[tuple[Call, bool]]) -> bool:
    """Whether the layer gives what the form gives, in evaluation and in training, for all calls."""
    one, other_of = twin(probe), twin(probe)
    try:
        other = built(form, other_of, features)
    except (TypeError, ValueError, AssertionError, RuntimeError, Refusal):
        return False
    for training in (False, True):
        for layer in (one, other_of, other):
            layer.train(training)
        for call, benign in calls:
            if not form.takes(call.args[0].dim()):
                continue
            with contextlib.suppress(Exception):
                a, b = (result(layer, call, gradients=benign) for layer in (one, other))
                if same_output(b.output, a.output) and _same_gradients(a, b, form) and _same_state(one, other, form):
                    continue
            return False
    return True


def built(form: Form, layer: nn.Module, features: int) -> nn.Module:
    """What stands in the place of the layer: the norm, and its own modules that follow."""
    norm = form.build(layer, features)
    following = [layer.get_submodule(name) for name in form.followers]
    return nn.Sequential(norm, *following).train(layer.training) if following else norm


def _same_gradients(a: Any, b: Any, form: Form) -> bool:
    if not a.of_inputs:
        return True
    prefix = "0." if form.followers else ""
    pairs = list(zip(a.of_inputs, b.of_inputs, strict=True))
    for mine, theirs in (("weight", form.gain), ("bias", form.bias)):
        if theirs in a.of_parameters:
            pairs.append((a.of_parameters[theirs], b.of_parameters.get(prefix + mine)))
    return all(distance(x, y) <= GRADIENTS_CLOSE for x, y in pairs)


def _same_state(one: nn.Module, other: nn.Module, form: Form) -> bool:
    norm: nn.Module = other[0] if form.followers else other  # type: ignore[index]
    pairs = [
        (name, mine) for name, mine in ((form.mean, "running_mean"), (form.var, "running_var")) if name is not None
    ]
    return all(same_output(getattr(norm, mine).reshape(-1), getattr(one, name).reshape(-1)) for name, mine in pairs)


def _with_rounding(
    module: nn.Module, form: Form, features: int, calls: list[tuple[Call, bool]]
) -> tuple[Form, Rounding]:
    """The form with the place where half precision is rounded, and where that is certain."""
    if form.family not in ("rms", "layer"):
        return form, "as here"
    # Without a gain there is one place, behind all.
    places: tuple[Cast, ...] = ("output", "input") if form.gain is not None else ("output",)
    candidates = [form._replace(cast=cast) for cast in places]
    halves = [in_dtype(call, _HALF) for call, benign in calls if benign]
    alone = [one for one in candidates if _same_bits(module, one, features, halves, _HALF)]
    if len(alone) != 1:
        return form, "unknown"
    return alone[0], "as here" if _same_bits(module, alone[0], features, halves, torch.float32) else "in one dtype"


def _same_bits(module: nn.Module, form: Form, features: int, calls: list[Call], dtype: torch.dtype) -> bool:
    """Whether the layer, with tensors of this dtype, and the form give the same in half precision, but for a few
    bits."""
    one, other_of = (twin(module).float().eval() for _ in range(2))
    for layer in (one, other_of):
        randomize(layer, torch.Generator().manual_seed(2))
        layer.to(dtype)
    other = built(form, other_of, features)
    sizes = [call.args[0].numel() for call in calls]
    differing = sum(size * _share(one, other, call) for size, call in zip(sizes, calls, strict=True))
    return bool(differing <= FEW * sum(sizes))


def _share(one: nn.Module, other: nn.Module, call: Call) -> float:
    """Of the elements that two layers give in half precision, how many differ."""
    try:
        a, b = (result(layer, call, gradients=False).output for layer in (one, other))
    except Exception:
        return 1.0
    return different(a, b) if a.dtype == b.dtype else 1.0
