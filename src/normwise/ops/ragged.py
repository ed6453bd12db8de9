"""Sequences of different lengths without padding: PackedSequence and jagged nested tensors.

Both keep all valid steps in one dense tensor of rows, so a norm of rows needs no mask: it takes the rows out and puts
the result back in the same wrapping. A norm whose statistics are those of one sequence gets them padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import inputs
from normwise.ops.errors import ShapeError

Ragged: TypeAlias = Tensor | PackedSequence


def is_ragged(x: Any) -> bool:
    """Whether `x` is a PackedSequence or a nested tensor."""
    return isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.is_nested)


def rank_or_rows(x: Any, ranks: Sequence[int], for_rows: str) -> None:
    """ShapeError unless a tensor has one of `ranks` axes, and a ragged input goes to a layer that takes rows, (N, C):
    the layer `for_rows` does."""
    if is_ragged(x):
        if 2 not in ranks:
            raise ShapeError(
                f"a layer for {' or '.join(f'{n}D' for n in ranks)} input takes no ragged input: {for_rows} does"
            )
    else:
        inputs.rank(inputs.tensor(for_rows, x), ranks)


def by_rows(
    op: Callable[..., Any],
    x: Ragged,
    *,
    mask: Tensor | None,
    lengths: Tensor | None,
    residual: Ragged | None,
) -> Any:
    """`op(rows, residual=rows)` in the form of `x`, for `op` of (rows, features...) giving rows, or a tuple of rows
    and of what else there is.

    Raises:
        ValueError: mask or lengths beside an input that states its own lengths.
        TypeError: a residual wrapped in another way, or a nested tensor that is not jagged and without holes.
    """
    if mask is not None or lengths is not None:
        raise ValueError(f"got mask or lengths together with a {_kind(x)}: it states its own lengths, leave them out")
    if residual is not None and not _alike(x, residual):
        raise TypeError(
            f"residual must be a {_kind(x)} with the same lengths in the same order as the input, but got "
            f"{_kind(residual)}"
        )
    y = op(_rows(x), residual=None if residual is None else _rows(residual))
    if not isinstance(y, tuple):
        return _wrap(y, x)
    return tuple(_wrap(part, x) if isinstance(part, Tensor) and part.dim() else part for part in y)


def by_sequences(
    op: Callable[..., Tensor],
    x: Ragged,
    *,
    mask: Tensor | None,
    lengths: Tensor | None,
    residual: Ragged | None,
) -> Any:
    """`op(padded, lengths=..., residual=padded)` of (N, C, L) in the form of `x`, whose rows hold C channels.

    Raises:
        as `by_rows`; ShapeError for rows of several axes.
    """
    sample, step, counts = _places(x)
    longest = len(x.batch_sizes) if isinstance(x, PackedSequence) else int(counts.max()) if len(counts) else 0

    def rows(data: Tensor, residual: Tensor | None) -> Tensor:
        if data.dim() != 2:
            raise ShapeError(
                f"expected rows of channels, (N, L, C) or (N, C, L) with L ragged, but got a {_kind(x)} with rows of "
                f"shape {tuple(data.shape[1:])}"
            )

        def padded(t: Tensor) -> Tensor:
            zeros = t.new_zeros(len(counts), longest, t.shape[1])
            return zeros.index_put((sample, step), t).transpose(1, 2)

        y = op(padded(data), lengths=counts, residual=None if residual is None else padded(residual))
        return y.transpose(1, 2)[sample, step]

    return by_rows(rows, x, mask=mask, lengths=lengths, residual=residual)


def _places(x: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence and step of each row, and the steps of each sequence; packed ones in their packed order."""
    if isinstance(x, PackedSequence):
        # Found on the CPU, where batch_sizes are, and sent: to find it on a GPU is to wait for it.
        valid = torch.arange(int(x.batch_sizes[0]), device="cpu") < x.batch_sizes[:, None]
        step, sample = valid.nonzero(as_tuple=True)
        places = (sample, step, valid.sum(0))
        return tuple(t.to(x.data.device, non_blocking=True) for t in places)  # type: ignore[return-value]
    _rows(x)  # which refuses what is not jagged
    counts = _jagged(x).offsets().diff()
    steps = torch.arange(int(counts.max()) if len(counts) else 0, device=counts.device)
    sample, step = (steps < counts[:, None]).nonzero(as_tuple=True)
    return sample, step, counts


def of_steps(name: str, x: Tensor) -> None:
    """TypeError or ShapeError unless a nested tensor is jagged, without holes, and (N, L, C) with L ragged."""
    _rows(x)
    if x.dim() != 3 or _jagged_dim(x) != 1:
        shape = ", ".join(str(s) if isinstance(s, int) else "L" for s in x.shape)
        raise ShapeError(
            f"{name}: expected a jagged tensor (N, L, C) of sequences of L steps, L ragged, but got ({shape})"
        )


def rows_and_offsets(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a jagged tensor: the rows of all sequences, one behind the other, and where each begins; the last one ends at
    the last number."""
    return _rows(x), _jagged(x).offsets()


def longest(x: Tensor) -> int:
    """The steps of the longest sequence of a jagged tensor."""
    counts = _jagged(x).offsets().diff()
    return int(counts.max()) if len(counts) else 0


def like(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` as a jagged tensor of the sequences of `x`."""
    return _wrap(rows, x)  # type: ignore[return-value]


def _kind(x: Any) -> str:
    if isinstance(x, PackedSequence):
        return "PackedSequence"
    return "nested tensor" if isinstance(x, Tensor) and x.is_nested else "padded tensor"


def _alike(x: Ragged, other: Ragged) -> bool:
    if isinstance(x, PackedSequence):
        return isinstance(other, PackedSequence) and torch.equal(x.batch_sizes, other.batch_sizes)
    return isinstance(other, Tensor) and other.is_nested and other.shape == x.shape


def _rows(x: Ragged) -> Tensor:
    if isinstance(x, PackedSequence):
        return x.data
    if x.layout != torch.jagged or _jagged(x).lengths() is not None:
        raise TypeError(
            "expected a nested tensor with layout=torch.jagged and no holes: build it by "
            "torch.nested.nested_tensor(tensors, layout=torch.jagged), or call .contiguous()"
        )
    values: Tensor = x.values()
    return values.movedim(_jagged_dim(x) - 1, 0)


def _wrap(rows: Tensor, like: Ragged) -> Ragged:
    if isinstance(like, PackedSequence):
        return like._replace(data=rows)
    dim = _jagged_dim(like)
    return torch.nested.nested_tensor_from_jagged(rows.movedim(0, dim - 1), _jagged(like).offsets(), jagged_dim=dim)


def _jagged(x: Tensor) -> Any:
    """`x` as what it is at run time: torch's stubs do not know the methods of jagged nested tensors."""
    return x


def _jagged_dim(x: Tensor) -> int:
    """The axis of varying size: the one whose size is symbolic."""
    return next(d for d, s in enumerate(x.shape) if d > 0 and not isinstance(s, int))
