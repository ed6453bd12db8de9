"""What a batch is. One convention for everything here that runs a model on a loader:

    a batch                         the model is called            its target
    ------------------------------  -----------------------------  ----------------------------------
    (inputs, target)                as `inputs` says               target
    {"x": ..., "labels": ...}       model(**batch)                 the labels
    {"x": ..., "mask": ...}, x, ..  as the batch, as inputs, says  the whole batch (an autoencoder's)

`inputs` that are a tuple or list are given as model(*inputs), a mapping as model(**inputs), anything else as
model(inputs). Labels are what "labels", "label", "targets" or "target" names, the first that is there; the model gets
them too if its forward takes an argument of that name (and then may compute the loss itself, as those of transformers
do). Tensors are moved to the model's device. Whatever is otherwise is for `forward=`, a function of model and batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

LABELS = ("labels", "label", "targets", "target")


class UnknownPartsError(ValueError):
    """A batch of which nobody knows what the model gets; whoever goes over the batches says which one it is."""


class Parts(NamedTuple):
    """What the model is called with, and what the loss compares its output with."""

    inputs: Any
    target: Any


def split(batch: Any, model: nn.Module) -> Parts:
    """The parts of a batch, by the convention above.

    Raises:
        UnknownPartsError: a tuple or list of three and more, of which nobody knows what is a target.
    """
    if isinstance(batch, Mapping):
        name = label_of(batch)
        if name is None:
            return Parts(batch, batch)
        inputs = batch if _takes(model, name) else {key: value for key, value in batch.items() if key != name}
        return Parts(inputs, batch[name])
    if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
        return Parts(batch, batch)
    if len(batch) not in (1, 2):
        raise UnknownPartsError(
            f"{len(batch)} items, of which it is not known what the model gets: several inputs go into a tuple, "
            "((x, lengths), target), named ones into a dict, ({'x': x, 'mask': mask}, target); or pass "
            "forward=lambda model, batch: model(...)"
        )
    return Parts(batch[0], batch[-1])


def one_batch_at_a_time(batches: Any) -> str:
    """The cure where something else was given than an iterable of batches."""
    if isinstance(batches, Dataset):
        return "torch.utils.data.DataLoader(dataset, batch_size=32) makes batches of its samples"
    if isinstance(batches, Tensor):
        return "[x] is one batch, x.split(32) several"
    if isinstance(batches, Mapping):
        return "[batch] is one batch"
    if isinstance(batches, (str, bytes)):
        return "give the batches themselves, not a name of theirs"
    return "give a list of them"


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(*inputs)` of a tuple or list, `model(**inputs)` of a mapping, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if type(inputs) in (tuple, list) else model(inputs)


def raised(error: Exception, where: str) -> str:
    """What the model raised, and on what: "on batch 0"."""
    return f"the model raised {type(error).__name__} {where}: {error}"


def cure_of(error: Exception, forward: Forward | None, when: str = "") -> str:
    """What to look at where a model raises on a batch.

    Args:
        when: in which mode it is to run, and before what.
    """
    if forward is not None:
        return f"see that forward(model, batch) runs on this batch{when}"
    if isinstance(error, TypeError) and "argument" in str(error):
        return (
            "a tuple of inputs is given as model(*inputs), a dict as model(**inputs), anything else as model(inputs): "
            "let `batches` yield (inputs, target) so that this fits, or pass forward=lambda model, batch: model(...)"
        )
    return f"see that model(inputs) runs on this batch{when}"


def call_example(model: nn.Module, example: Any) -> Any:
    """The model's output on the `example` that a user gave. What it raises names the example."""
    try:
        return call(model, example)
    except Exception as error:
        cure = (
            "see that model(example) runs in evaluation: a tuple or list is given as model(*example), a mapping as "
            "model(**example)"
        )
        same = _restated(error, f"{raised(error, 'on example=')}\nCure: {cure}")
        if same is None:
            raise
        raise same from error


def on_batch(verb: str, forward: Forward | None, model: nn.Module, batch: Any, number: int, few: str = "") -> Any:
    """The model's output on a batch. What it raises names the batch by its number.

    Args:
        few: the cure where the batch is too small to normalize.
    """
    try:
        return (forward or run)(model, batch)
    except UnknownPartsError as error:
        raise UnknownPartsError(f"{verb}: batch {number} is {error}") from None
    except Exception as error:
        if str(error).startswith("Expected more than 1 "):  # torch's words, which come first
            text = f"{error}\n{verb}, on batch {number}{few and ': ' + few}"
        else:
            text = f"{raised(error, f'on batch {number}')}\nCure: {cure_of(error, forward)}"
        same = _restated(error, text)
        if same is None:
            raise
        raise same from error


def _restated(error: Exception, text: str) -> Exception | None:
    """An error of the same class, for whoever catches it, that says `text`; None where its class is not made of a text
    alone, and the error has it as a note (Python 3.11)."""
    try:
        same = type(error)(text)
        if str(same) == text:
            vars(same).update(vars(error))  # what else it says, to whoever catches it
            return same
    except Exception:  # its class wants other arguments
        pass
    if hasattr(error, "add_note"):
        error.add_note(text)
    return None


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch: what `forward=` is where nobody gives one. Raises as `split`, and as the model."""
    return call(model, moved(split(batch, model).inputs, device_of(model)))


@contextmanager
def without_graph(*models: nn.Module) -> Iterator[None]:
    """Inside, forwards leave no graph behind, as under `torch.no_grad()`; but a model whose forward differentiates with
    respect to its inputs (forces, physics-informed nets, gradient penalties) runs as well."""
    learned = [
        p for model in models for p in model.parameters() if p.requires_grad and not p.is_inference() and not is_lazy(p)
    ]
    with torch.enable_grad():
        try:
            for p in learned:
                p.requires_grad_(False)
            yield
        finally:
            for p in learned:
                p.requires_grad_(True)


def label_of(batch: Mapping[str, Any]) -> str | None:
    """The name of the labels in a batch that is a mapping."""
    return next((name for name in LABELS if batch.get(name) is not None), None)


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model is; None where it is in several places, or nowhere."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def moved(value: Any, device: torch.device | None) -> Any:
    """Tensors in `value`, nested in tuples, lists and mappings, on `device`."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: moved(v, device) for key, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name, or takes any."""
    arguments = inspect.signature(model.forward).parameters
    if name in arguments:
        return True
    if not any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values()):
        return False
    # A wrapper hands everything on.
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return _takes(inner, name) if isinstance(inner, nn.Module) else True
