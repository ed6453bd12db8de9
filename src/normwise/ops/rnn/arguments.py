"""Validates the arguments of a recurrent layer's or cell's call, with torch's messages where torch has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.recurrence import Weights
from normwise.ops import conversion, inputs, validity
from normwise.ops._torch_internals import any_autocast_enabled
from normwise.ops.errors import ShapeError
from normwise.ops.rnn.running_stats import BatchStats


def tensor_or_packed(x: Any, name: str, cell: str) -> None:
    """A PackedSequence, or a tensor with or without a batch, jagged or not; `name` is the layer's."""
    if isinstance(x, PackedSequence):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor or a PackedSequence, but got {type(x).__name__}")
    if x.dim() not in (2, 3):
        end = "D tensor instead" if cell == "rnn" else "D instead"
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}{end}")


def rows(x: Tensor, weights: Weights, batch_first: bool | None = None) -> None:
    """Rows of features, as the first layer's weights want them; of sequences (T, B, C) or `batch_first`."""
    dtype, size = weights.weight_ih.dtype, weights.weight_ih.shape[-1]
    if x.dtype != dtype and not any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). Convert input: input.to({dtype}), or "
            f"convert model: model.to({x.dtype})"
        )
    if x.shape[-1] != size:
        hint = ""
        if batch_first is not None and x.dim() == 3 and x.shape[1] == size:
            order = "x.transpose(1, 2)" if batch_first else "x.permute(2, 0, 1)"
            hint = f": if the input is (B, C, T), with features on axis 1, give {order}"
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {size}, got {x.shape[-1]}{hint}")


def other_order(given: int, steps: int, batch: int, batch_first: bool) -> str:
    """What to do where `given` samples were told of that are as many as the steps of the input as the layer reads it:
    the end of an error about what must have one for each of `batch` samples."""
    if (
        given == batch or given != steps
    ):  # in this order: one as many as it should be sees no other size while compiling
        return ""
    read, other = ("(B, T, C)", "(T, B, C)") if batch_first else ("(T, B, C)", "(B, T, C)")
    return (
        f": the layer reads the input as {read}, {batch} samples of {steps} steps; if it is {other}, build the layer "
        f"with batch_first={not batch_first}"
    )


def states(
    hx: Any,
    sizes: list[tuple[int, int, int]],
    x: Tensor,
    batched: bool,
    name: str,
    order: Callable[[int], str] = lambda given: "",
) -> tuple[Tensor, Tensor | None]:
    """Initial states (L * D, B, H): h, and c of an LSTM, where there are two `sizes`. `hx` None means zeros. `order` is
    what to add to an error about a state of another number of samples."""
    lstm = len(sizes) == 2
    if hx is None:
        h = x.new_zeros(sizes[0])  # nobody writes on an initial state
        return h, (h if sizes[0] == sizes[1] else x.new_zeros(sizes[1])) if lstm else None
    if lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise TypeError(f"LSTM: expected hx to be a pair (h_0, c_0), but got {type(hx).__name__}")
    if not lstm and not isinstance(hx, Tensor):
        raise TypeError(f"{name}: expected hx to be a tensor, but got {type(hx).__name__}")
    found = list(hx) if lstm else [hx]
    wanted = 3 if batched else 2
    if any(s.dim() != wanted for s in found):
        ranks = ", ".join(f"{s.dim()}-D" for s in found)
        kind = "batched 3-D" if batched else "unbatched 2-D"
        what = (
            f"hx and cx should also be {wanted}-D but got ({ranks}) tensors"
            if lstm
            else f"hx should also be {wanted}-D but got {ranks} tensor"
        )
        raise RuntimeError(f"For {kind} input, {what}")
    if not batched:
        found = [s.unsqueeze(1) for s in found]
    for n, (state, size) in enumerate(zip(found, sizes, strict=True)):
        if tuple(state.shape) != size:
            which = f"hidden[{n}]" if lstm else "hidden"
            hint = order(state.shape[1]) if tuple(state.shape[::2]) == size[::2] else ""
            raise RuntimeError(f"Expected {which} size {size}, got {list(state.shape)}{hint}")
    inputs.beside(x, h0=found[0], c0=found[1] if lstm else None)
    of_one_dtype(x, found)
    return found[0], found[1] if lstm else None


def of_one_dtype(x: Tensor, states: Sequence[Tensor | None]) -> None:
    """ValueError for a state of another dtype than the input, unless autocast gives both its own."""
    for state in states:
        if state is not None and state.dtype != x.dtype and not any_autocast_enabled():
            raise ValueError(
                f"Input and hidden tensors are not the same dtype, found input tensor with {x.dtype} and hidden tensor "
                f"with {state.dtype}. Convert the state: state.to({x.dtype})"
            )


def lengths(given: Any, steps: int, batch: int, batched: bool, batch_first: bool) -> Tensor:
    """`lengths` as int64; without a batch a single number will do. Raises as `validity.one_length_each`."""
    given = conversion.lengths_tensor(given)
    if not batched:
        given = given.reshape(-1)
    elif given.dim() == 1 and (hint := other_order(given.shape[0], steps, batch, batch_first)):
        raise ShapeError(
            f"lengths must be of shape ({batch},), one for each sample of the input, but got {tuple(given.shape)}{hint}"
        )
    return validity.one_length_each(given, batch, steps, "the input").to(torch.int64)


def reset(given: Any, shape: tuple[int, ...], layout: str, device: torch.device) -> Tensor:
    """`reset` as a bool tensor, if it is one, or a list or array, of this `shape`, which `layout` names.

    Raises:
        ShapeError: of another shape.
    """
    flags = conversion.bool_tensor("reset", given, "True where an episode starts", device)
    if tuple(flags.shape) != shape:
        hint = ": give reset.T" if len(shape) == 2 and tuple(flags.shape) == shape[::-1] else ""
        raise ShapeError(f"reset must be of shape {shape}, {layout} as the input, but got {tuple(flags.shape)}{hint}")
    return flags


def step_index(stats: BatchStats | None, step: int | None) -> int:
    """`step`, which per-step batch statistics must be given; 0 where it does not matter."""
    if stats is not None and stats.steps > 1 and step is None:
        raise ValueError("per-step batch statistics need to know which step this is: pass step=0, 1, 2, ...")
    if step is not None and step < 0:
        raise ValueError(f"step counts steps from 0, but got {step}")
    return step or 0
