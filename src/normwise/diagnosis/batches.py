"""The batches that a diagnosis looks at: taken from the loader, checked, and called on the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.diagnosis.errors import DiagnosisError

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch, on the model's device. `inputs` is what the model is called with."""

    inputs: Any
    target: Any
    index: int

    def call(self, model: nn.Module) -> Any:
        """`model(*inputs)` of a tuple or list, `model(**inputs)` of a dict, else `model(inputs)`.

        Raises:
            DiagnosisError: from whatever the model raises.
        """
        try:
            if isinstance(self.inputs, Mapping):
                return model(**self.inputs)
            return model(*self.inputs) if type(self.inputs) in (tuple, list) else model(self.inputs)
        except Exception as error:
            raise self.refused(model, error) from error

    def refused(self, model: nn.Module, error: Exception) -> DiagnosisError:
        mode = "train" if model.training else "eval"
        text = f"the model raised {type(error).__name__} in {mode} mode on batch {self.index}: {error}"
        if "more than 1 value per channel" in str(error) or "more than 1 spatial element" in str(error):
            cure = "give batches of at least two samples, or model, _ = normwise.convert(model, to='group')"
        elif isinstance(error, TypeError) and "argument" in str(error):
            cure = (
                "a tuple of inputs is given as model(*inputs), a dict as model(**inputs), anything else as "
                "model(inputs): let `batches` yield (inputs, target) so that this fits"
            )
        else:
            cure = "see that model(inputs) runs on this batch, in train and in eval mode, before diagnosing it"
        return DiagnosisError(f"{text}\nCure: {cure}")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the inputs, by the name or place that they have there."""
        if isinstance(self.inputs, Mapping):
            named: Iterable[tuple[Any, Any]] = self.inputs.items()
        elif type(self.inputs) in (tuple, list):
            named = enumerate(self.inputs)
        else:
            named = [(0, self.inputs)]
        return {f"inputs[{name}]" if isinstance(name, int) else name: v for name, v in named if isinstance(v, Tensor)}

    @property
    def samples(self) -> int:
        """How many samples; 0 where nothing tells."""
        return next((len(t) for t in (*all_tensors(self.target), *all_tensors(self.inputs)) if t.dim()), 0)


def take(batches: Iterable[Any], limit: int, model: nn.Module) -> list[Batch]:
    """At most `limit` batches, moved to where the model is; no more are asked for, so a loader may be endless.

    Raises:
        DiagnosisError: no batches, or not pairs (inputs, target).
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise DiagnosisError(f"max_batches must be a positive integer, but got {limit!r}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DiagnosisError(
            f"batches must be an iterable of pairs (inputs, target), such as a DataLoader, but got "
            f"{type(batches).__name__}: for a single batch give [(inputs, target)]"
        )
    devices = {p.device for p in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    taken = []
    for index, pair in enumerate(itertools.islice(batches, limit)):
        if type(pair) not in (tuple, list) or len(pair) != 2:
            what = f"{len(pair)} items" if type(pair) in (tuple, list) else type(pair).__name__
            raise DiagnosisError(
                f"batches must yield pairs (inputs, target), but batch {index} is {what}: several inputs go into a "
                "tuple, ((x, lengths), target), named ones into a dict, ({'x': x, 'mask': mask}, target)"
            )
        taken.append(Batch(moved(pair[0], device), moved(pair[1], device), index))
    if not taken:
        raise DiagnosisError(
            "batches is empty: give at least one pair (inputs, target). A generator that has already run out must be "
            "made anew"
        )
    return taken


def moved(value: Any, device: torch.device | None) -> Any:
    """Tensors in `value`, nested in tuples, lists and dicts, on `device`."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PackedSequence):
        return value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: moved(v, device) for key, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def scalar(loss: Loss, output: Any, target: Any) -> Tensor:
    """`loss(output, target)`, which must be a scalar tensor.

    Raises:
        DiagnosisError: it is not, or raises.
    """
    try:
        value = loss(output, target)
    except Exception as error:
        raise DiagnosisError(
            f"loss raised {type(error).__name__}: {error}\nCure: loss is called as loss(output, target), with what the "
            "model returned and the second of the pair that `batches` yields"
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


def all_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, (Mapping, tuple, list)) or hasattr(value, "__dataclass_fields__"):
        inner = (
            value
            if isinstance(value, (tuple, list))
            else (value if isinstance(value, Mapping) else vars(value)).values()
        )
        for part in inner:
            yield from all_tensors(part)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in a model's output."""
    return next((t for t in all_tensors(value) if t.is_floating_point()), None)
