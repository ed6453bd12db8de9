"""The batches that a diagnosis looks at: taken from the loader, checked, and called on the model."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from normwise.diagnosis.errors import DiagnosisError, UserCodeError
from normwise.diagnosis.pace import Pace
from normwise.surgery.batches import (
    LABELS,
    Forward,
    call,
    cure_of,
    device_of,
    label_of,
    moved,
    one_batch_at_a_time,
    raised,
    split,
)
from normwise.words import given

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch, on the model's device.

    Attributes:
        whole: as the loader gave it.
        inputs, target: its parts; see `normwise.surgery.batches`.
        forward: what runs the model on `whole`, where somebody gave that.
        has_target: the target is a part of its own, and not the inputs again.
    """

    whole: Any
    inputs: Any
    target: Any
    index: int
    forward: Forward | None = None
    has_target: bool = True

    def call(self, model: nn.Module) -> Any:
        """The model's output.

        Raises:
            UserCodeError: from whatever the model raises.
        """
        try:
            if self.forward is not None:
                return self.forward(model, self.whole)
            return call(model, _handed(self.inputs, {}))
        except Exception as error:
            raise self.refused(model, error) from error

    def refused(self, model: nn.Module, error: Exception) -> UserCodeError:
        mode = "train" if model.training else "eval"
        text = raised(error, f"in {mode} mode on batch {self.index}")
        if "more than 1 value per channel" in str(error) or "more than 1 spatial element" in str(error):
            cure = "give batches of at least two samples, or model, _ = normwise.convert(model, to='group')"
        else:
            cure = cure_of(error, self.forward, ", in train and in eval mode, before diagnosing it")
            if isinstance(self.whole, Mapping) and not self.has_target and cure.startswith("a tuple of inputs"):
                cure += f". The labels of a dict are what one of {', '.join(LABELS)} names: here there is none of these"
        return UserCodeError(f"{text}\nCure: {cure}")

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors among the inputs, by the name that the model's forward has for them; labels are not among them.

        Where nobody knows a name it is "inputs[0]" and so on.
        """
        if isinstance(self.inputs, Mapping):
            named = {name: value for name, value in self.inputs.items() if name != label_of(self.inputs)}
        else:
            parts = self.inputs if type(self.inputs) in (tuple, list) else [self.inputs]
            names = _arguments(model) if self.forward is None else []
            names += [f"inputs[{place}]" for place in range(len(names), len(parts))]
            named = dict(zip(names, parts, strict=False))
        return {str(name): value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def samples(self) -> int:
        """How many samples; 0 where nothing tells."""
        return next((len(t) for t in (*all_tensors(self.target), *all_tensors(self.inputs)) if t.dim()), 0)


def check_functions(loss: Any, forward: Any) -> None:
    """Raises DiagnosisError for a loss or a forward that cannot be called."""
    if loss is not None and not callable(loss):
        raise DiagnosisError(
            "loss must be a function of output and target, such as torch.nn.functional.cross_entropy, or None where "
            f"the model computes its own, but got {given(loss)}"
        )
    if forward is not None and not callable(forward):
        raise DiagnosisError(
            "forward must be a function of model and batch, such as lambda model, batch: model(batch.image), but got "
            f"{given(forward)}"
        )


def take(batches: Iterable[Any], limit: int, model: nn.Module, forward: Forward | None, pace: Pace) -> list[Batch]:
    """At most `limit` batches, moved to where the model is; no more are asked for, so a loader may be endless.

    Raises:
        DiagnosisError: no batches, or some that do not follow the convention of `normwise.surgery.batches`.
        UserCodeError: from whatever the batches raise.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise DiagnosisError(f"max_batches must be a positive integer, but got {limit!r}")
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        cure = (
            one_batch_at_a_time(batches)
            if isinstance(batches, (Dataset, str, bytes))
            else "for a single batch give [(inputs, target)]"
        )
        raise DiagnosisError(
            f"batches must be an iterable of pairs (inputs, target), such as a DataLoader, but got "
            f"{type(batches).__name__}: {cure}"
        )
    device = device_of(model)
    taken: list[Batch] = []
    for index, whole in enumerate(_drawn(batches, limit)):
        try:
            inputs, target = split(whole, model)
        except ValueError as error:
            if forward is None:
                raise DiagnosisError(
                    f"batches must yield pairs (inputs, target), but batch {index} is {error}"
                ) from None
            inputs, target = whole, whole
        parts = moved(inputs, device), moved(target, device)
        taken.append(Batch(whole, *parts, index, forward, has_target=target is not inputs))
        if pace.over:
            break
    if not taken:
        raise DiagnosisError(
            "batches is empty: give at least one pair (inputs, target). A generator that has already run out must be "
            "made again"
        )
    return taken


def _drawn(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    try:
        drawn = itertools.islice(batches, limit)
    except Exception as error:
        raise _batches_raised(error) from error
    while True:
        try:
            batch = next(drawn)
        except StopIteration:
            return
        except Exception as error:
            raise _batches_raised(error) from error
        yield batch


def _batches_raised(error: Exception) -> UserCodeError:
    return UserCodeError(f"batches raised {type(error).__name__}: {error}\nCure: see that `for batch in batches` runs")


def _handed(value: Any, made: dict[int, Tensor]) -> Any:
    """The inputs as other tensors on the same memory: a forward that sets `requires_grad` leaves the loader's alone."""
    if isinstance(value, Tensor) and not value.is_inference():
        return made.setdefault(id(value), value.detach().requires_grad_(value.requires_grad))
    if isinstance(value, Mapping):
        return {key: _handed(v, made) for key, v in value.items()}
    return type(value)(_handed(v, made) for v in value) if type(value) in (tuple, list) else value


def _arguments(model: nn.Module) -> list[str]:
    """The names of the arguments that the model's forward takes in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def scalar(loss: Loss | None, output: Any, batch: Batch) -> Tensor:
    """`loss(output, batch.target)`, or without one the loss that the model computed itself; a scalar tensor.

    Raises:
        DiagnosisError: it is none.
        UserCodeError: from whatever the loss raises.
    """
    if inspect.isclass(loss):
        raise DiagnosisError(f"loss is the class {loss.__name__}, not a function: make one, loss={loss.__name__}()")
    if loss is None:
        value = _own_loss(output)
    else:
        try:
            value = loss(output, batch.target)
        except Exception as error:
            raise UserCodeError(
                f"loss raised {type(error).__name__}: {error}\nCure: {_cure(output, batch, error)}"
            ) from error
    if not isinstance(value, Tensor):
        raise DiagnosisError(
            f"loss must return a scalar tensor, but got {type(value).__name__}: leave out .item() and float()"
        )
    if value.numel() != 1 or value.is_complex() or not value.is_floating_point():
        raise DiagnosisError(
            f"loss must return a scalar tensor, but got shape {tuple(value.shape)} of {value.dtype}: reduce it, e.g. "
            "with .mean() or reduction='mean'"
        )
    return value.reshape(())


def _own_loss(output: Any) -> Tensor:
    """`output.loss`, `output["loss"]`, or the output itself or the first of a tuple where that is a scalar."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    value = _member(output, "loss")
    value = first if value is None else value
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DiagnosisError(
            f"no loss was given, and the model's output ({type(output).__name__}) holds none: pass loss=, a function "
            "of output and target; or give the model labels in its batches, if it computes a loss from them"
        )
    return value


def _cure(output: Any, batch: Batch, error: Exception) -> str:
    if not batch.has_target:
        return (
            f"batch {batch.index} is {type(batch.whole).__name__} without a target, so that loss got the batch itself: "
            "let `batches` yield pairs (inputs, target), several inputs as a tuple, ((x, lengths), target), or dicts "
            f"that hold one of {', '.join(LABELS)}. If what was given as `batches` is itself one batch, give [batch]"
        )
    cure = (
        "loss is called as loss(output, target), with what the model returned and the second of the pair that "
        "`batches` yields (of a dict its labels)"
    )
    if _member(output, "logits") is not None:
        take = "output['logits']" if type(output) is dict else "output.logits"
        cure += (
            f"; this model returns {type(output).__name__}: loss=lambda output, target: cross_entropy({take}, target)"
        )
        if _member(output, "loss") is not None:
            cure += ", or leave out loss=, since it computes its own"
    if isinstance(batch.target, Tensor) and batch.target.is_floating_point() and "Long" in str(error):
        cure += f"; the target is {batch.target.dtype}, and numbers of classes are integers: target.long()"
    return cure


def _member(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def all_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, mappings and dataclasses, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Mapping):
        yield from all_tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from all_tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from all_tensors(vars(value))


def main_tensor(output: Any) -> Tensor | None:
    """What stands for a model's output: its logits, else its first floating tensor that is not a mere number."""
    logits = _member(output, "logits")
    found = [t for t in (*all_tensors(logits), *all_tensors(output)) if t.is_floating_point()]
    return next((t for t in found if t.dim()), found[0] if found else None)
