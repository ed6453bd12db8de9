"""Which tensors the norms accept, and what they say of others. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.backends.activations import activation
from normwise.ops._torch_internals import readable
from normwise.ops.conversion import mask_tensor
from normwise.ops.errors import ShapeError
from normwise.ops.hyperparameters import momentum_range, positive_eps
from normwise.ops.validity import valid_elements
from normwise.words import counted


def tensor(op: str, x: Any) -> Tensor:
    """`x`, which must be a tensor, and of a layout that is not ragged."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: expected a tensor as input, but got {type(x).__name__}: convert it first, e.g. torch.as_tensor(x)"
        )
    return x


def floating(op: str, x: Any) -> None:
    """Norms are for real floating tensors."""
    if not tensor(op, x).dtype.is_floating_point:
        raise TypeError(
            f'"{op}" not implemented for {x.dtype}: expected a floating dtype (float64, float32, bfloat16, float16); '
            "convert the input first, e.g. x.float()"
        )


def beside(x: Tensor, **given: Any) -> bool:
    """What goes with the input lies on its device and, except for a mask or reset, holds floating numbers.

    Returns:
        Whether all of these are `readable`, which answers the rest.

    Raises:
        RuntimeError: another device. TypeError: integers, complex or quantized numbers. What torch raises of two kinds
        of tensors that do not mix.
    """
    all_readable = not torch.compiler.is_compiling() and readable(x, *given.values())
    for name, value in given.items():
        if value is None or (all_readable and value.dtype is x.dtype):
            continue
        if not isinstance(value, Tensor):
            continue  # refused where its shape is looked at
        if value.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but the input is on {x.device} and {name} on "
                f"{value.device}: move {name}, or the layer that owns it, by .to(input.device)"
            )
        if type(value) not in (Tensor, torch.nn.Parameter, type(x)):
            # Only the two types know whether they go together: they say so now, before a running average moves.
            torch.add(x.detach().reshape(-1)[:0], value.detach().reshape(-1)[:0])
        if name not in ("mask", "reset") and not value.is_floating_point():
            raise TypeError(
                f"{name} must be of a floating dtype like the input's {x.dtype}, but got {value.dtype}: convert it: "
                f"{name}.to(input.dtype)"
            )
    return all_readable


def rank(x: Tensor, allowed: Sequence[int]) -> None:
    """`x` must have one of the allowed numbers of axes."""
    if x.dim() not in allowed:
        names = " or ".join(f"{n}D" for n in allowed)
        raise ShapeError(
            f"expected {names} input (got {x.dim()}D input): the shape is {tuple(x.shape)}, axis 1 must hold the "
            "channels"
        )


def per_channel(name: str, value: Tensor | None, x: Tensor) -> None:
    """A vector with one element per channel of `x` (N, C, ...), or None.

    torch's words come last here: a layer's caller has given no running_mean.
    """
    channels = x.shape[1]
    if value is not None and tuple(value.shape) != (channels,):
        raise ShapeError(
            f"the input (N, C, ...) of shape {tuple(x.shape)} has {counted(channels, 'channel')}, but {name} is of "
            f"shape {tuple(value.shape)}: expected one element per channel{channels_last_hint(x, value.numel())}. In "
            f"torch's words: {name} should contain {channels} elements not {value.numel()}"
        )


def channels_last_hint(x: Tensor, channels: int) -> str:
    """What to do about an input with its channels on another axis, as the end of an error about those of axis 1.

    `x` may be the view that `channels_to_axis_1` made, so the words fit that as well: with dim=-1 an (N, C, L).
    """
    if x.dim() < 3 or x.shape[-1] != channels:
        return ""
    order = "x.transpose(1, 2)" if x.dim() == 3 else "x.movedim(-1, 1)"
    return (
        f". Another axis of the input has {channels}: if the channels are there, give {order} or the layer's dim= (1 "
        "for channels first, -1 for channels last)"
    )


def channel_vectors(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Running averages, both or neither, gain and bias: one element per channel of `x` (N, C, ...) each."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither")
    size = x.shape[1:2]
    named = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, value in named:
        if value is not None and value.shape != size:
            per_channel(name, value, x)


def rows_fit(x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> bool:
    """Whether these are `readable`, of one dtype and fit so well that nothing needs to be asked one by one: most calls
    are of that kind, and on small tensors questions take longer than a kernel."""
    if x is None or torch.compiler.is_compiling() or not readable(x, weight, bias):
        return False
    dtype = x.dtype
    return (
        isinstance(eps, float)
        and eps > 0
        and dtype.is_floating_point
        and shape != ()
        and x.shape[-len(shape) :] == shape
        and x.is_contiguous()
        and (weight is None or (weight.dtype is dtype and weight.shape == shape))
        and (bias is None or (bias.dtype is dtype and bias.shape == shape))
    )


def channels_fit(x: Any, momentum: Any, eps: float, *vectors: Any) -> bool:
    """`rows_fit` for (N, C, ...) and vectors of C elements."""
    if torch.compiler.is_compiling() or not readable(x, *vectors):
        return False
    dtype = x.dtype
    if not (
        isinstance(eps, float)
        and eps > 0
        and dtype.is_floating_point
        and x.dim() > 1
        and type(momentum) is float
        and 0 <= momentum <= 1
    ):
        return False
    size = x.shape[1:2]
    return all(v is None or (v.dtype is dtype and v.shape == size) for v in vectors)


def like_normalized_shape(shape: tuple[int, ...], **given: Tensor | None) -> None:
    """A gain or bias with one element a feature, or None."""
    for name, value in given.items():
        if value is not None and value.shape != shape:
            raise ShapeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape "
                f"{list(value.shape)} and normalized_shape = {list(shape)}"
            )


def feature_dims(x: Tensor, shape: tuple[int, ...], dim: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The axes of `x` that hold the normalized `shape`, in its order, as `dim` names them; None for the last ones."""
    if not shape:
        raise ShapeError(
            "Expected normalized_shape to be at least 1-dimensional, but got normalized_shape = []: name the size of "
            "each normalized axis"
        )
    if dim is None:
        if x.shape[-len(shape) :] != shape:
            raise ShapeError(
                f"Given normalized_shape={list(shape)}, expected input with shape [*, {', '.join(map(str, shape))}], "
                f"but got input of size{list(x.shape)}: the input must end in normalized_shape; for other axes use "
                f"dim={_axis_of(x, shape)}"
            )
        return None
    named = (dim,) if isinstance(dim, int) else tuple(dim)
    if len(named) != len(shape):
        raise ValueError(
            f"dim={dim} names {counted(len(named), 'axis')}, but normalized_shape={list(shape)} has {len(shape)}"
        )
    if any(not -x.dim() <= d < x.dim() for d in named):
        raise ShapeError(
            f"Dimension out of range: dim={dim} for an input of shape {tuple(x.shape)} with {counted(x.dim(), 'axis')}"
        )
    dims = tuple(d % x.dim() for d in named)
    if len(set(dims)) < len(dims):
        raise ValueError(f"dim={dim} names an axis of the input of shape {tuple(x.shape)} twice")
    found = tuple(x.shape[d] for d in dims)
    if found != shape:
        raise ShapeError(
            f"Given normalized_shape={list(shape)}, expected an input with these sizes at dim={dim}, but got "
            f"{list(found)} in an input of size{list(x.shape)}"
        )
    return dims if dims != trailing_dims(x, len(dims)) else None


def _axis_of(x: Tensor, shape: tuple[int, ...]) -> str:
    """The `dim=` that would fit, where there is one and only one: 1 for the channels of (N, C, L)."""
    fits = [str(d) for d in range(1, x.dim()) if x.shape[d : d + 1] == shape]
    return f"{fits[0]}, if axis {fits[0]} holds the features" if len(fits) == 1 else ""


def trailing_dims(x: Tensor, count: int) -> tuple[int, ...]:
    """The last `count` axes of `x`."""
    return tuple(range(x.dim() - count, x.dim()))


def validate_channels(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    mask: Tensor | None,
    lengths: Tensor | None,
    act: str | None,
    residual: Any,
) -> tuple[Tensor | None, bool]:
    """What norms of (N, C, ...) share. The `valid_elements`, and whether all tensors are known to be `readable`."""
    both_or_neither = (running_mean is None) is (running_var is None)
    if (both_or_neither and mask is None and lengths is None and act is None and residual is None) and channels_fit(
        x, momentum, eps, running_mean, running_var, weight, bias
    ):
        return None, True
    floating(op, x)
    positive_eps(eps)
    if not isinstance(momentum, Tensor):
        momentum_range(momentum)
    if x.dim() < 2:
        raise ShapeError(f"expected 2D input or more (got {x.dim()}D input): axis 1 must hold the channels")
    channel_vectors(x, running_mean, running_var, weight, bias)
    same_shape("residual", residual, x)
    all_readable = beside(
        x,
        mask=mask,
        residual=residual,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
    )
    if act is not None:
        activation(act)
    valid = valid_elements(x, mask, lengths, channel_dim=1)
    return valid, all_readable and valid is None


def channels_to_axis_1(op: str, x: Any, dim: int, mask: Any, residual: Any) -> tuple[Tensor, Any, Any]:
    """Input, mask and residual whose channels are on axis `dim`, as views with these on axis 1: (N, L, C) as (N, C, L).

    Raises:
        ShapeError: no such axis, or that of the samples. TypeError: an input that is no tensor.
    """
    x = tensor(op, x)
    if x.is_nested:
        raise ValueError(
            f"{op}: dim={dim} needs a padded tensor: a ragged one has its features on the last axis anyway"
        )
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(
            f"Dimension out of range: dim={dim} for an input of shape {tuple(x.shape)} with {counted(x.dim(), 'axis')}"
        )
    if dim % x.dim() == 0:
        raise ShapeError(f"dim={dim} names axis 0, which holds the samples: name the axis of the channels")
    same_shape("residual", residual, x)
    if mask is not None and (mask := mask_tensor(mask, x.device)).dim() == x.dim():
        mask = mask.movedim(dim, 1)
    return x.movedim(dim, 1), mask, None if residual is None else residual.movedim(dim, 1)


def dense(x: Tensor) -> Tensor:
    """(N, C, ...) as it is if its channels come first or last in memory, otherwise copied."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def same_shape(name: str, value: Any, x: Tensor) -> None:
    """`residual` is added to the input or output element by element."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor like the input, but got {type(value).__name__}")
    if value.shape != x.shape:
        raise ShapeError(
            f"{name} must have the input's shape {tuple(x.shape)}, but got {tuple(value.shape)}: expand it first"
        )
