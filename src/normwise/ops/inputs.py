"""What the norms accept, and what they say otherwise. Nothing here changes anything."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.backends import scalars
from normwise.backends.activations import activation
from normwise.backends.cpu import library
from normwise.backends.protocol import LengthsRequest
from normwise.backends.reference import count_valid
from normwise.backends.words import counted
from normwise.ops._torch_internals import readable
from normwise.ops.dispatch import lengths_kernel, values_visible


class ShapeError(ValueError, RuntimeError):
    """A tensor of the wrong shape. Both kinds of error, because torch raises now the one and now the other."""


def whole_number(name: str, value: Any) -> int:
    """`value`, any integer (NumPy's, say), as Python's own. True and False are no numbers here."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} should be of type int, got: {scalars.given(value)}: give a whole number")


def size(name: str, value: Any) -> int:
    """A number of channels or features, as Python's own integer."""
    found = whole_number(name, value)
    if found < 0:
        raise ShapeError(
            f"Trying to create tensor with negative dimension {found}: {name} must be 0 or more, but got {found}"
        )
    return found


def tensor(op: str, x: Any) -> Tensor:
    """`x`, which must be a tensor, and of a layout that is not ragged."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: expected a tensor as input, but got {type(x).__name__}: convert it first, e.g. torch.as_tensor(x)"
        )
    return x


def as_tensor(name: str, value: Any, what: str) -> Tensor:
    """`value`, a tensor, list, tuple or array, which `what` describes, as a tensor; lists and arrays on the CPU."""
    if isinstance(value, Tensor):
        return value
    try:
        if hasattr(value, "__array_interface__"):
            value = value.copy()  # torch takes no array with negative strides, and warns of one that is read-only
        elif isinstance(value, (list, tuple)) and any(hasattr(v, "__array_interface__") for v in value):
            value = torch.stack([torch.as_tensor(v, device="cpu") for v in value])  # torch warns of a list of arrays
        # Not on a default device: the values are looked at.
        found = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be {what}, as a tensor, list, tuple or array, but got {type(value).__name__}"
        ) from None
    return found.to(torch.int64) if isinstance(value, (list, tuple)) and not found.numel() else found


def lengths_tensor(lengths: Any) -> Tensor:
    """`lengths` as a tensor of integers, on the device where it is if it is a tensor. TypeError: not integers."""
    found = as_tensor("lengths", lengths, "integers, one for each sample")
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(
            f"lengths must be of an integer dtype, but got {found.dtype}: use "
            f"{_converted('lengths', lengths, 'long', 'int')}"
        )
    return found if found.dtype in _SIGNED else found.to(torch.int64)


def bool_tensor(name: str, value: Any, meaning: str, device: torch.device, otherwise: str = "") -> Tensor:
    """`value` as a tensor of bool, whose True has this `meaning`; lists and arrays on `device`.

    TypeError: not bool; its cure ends in `otherwise`.
    """
    found = as_tensor(name, value, f"bool with {meaning}")
    if found.dtype != torch.bool and not (found.numel() == 0 and found is not value):
        raise TypeError(
            f"{name} must be of dtype torch.bool with {meaning}, but got {found.dtype}: use "
            f"{_converted(name, value, 'bool', 'bool')}{otherwise}"
        )
    return found if found is value else found.to(device, torch.bool, non_blocking=True)


def mask_tensor(mask: Any, device: torch.device) -> Tensor:
    """`mask` as a bool tensor; lists and arrays on `device`."""
    inverted = ", inverted if True marks padding there, as in torch's key_padding_mask"
    return bool_tensor("mask", mask, "True = valid", device, inverted)


def _converted(name: str, value: Any, method: str, dtype: str) -> str:
    """How `value` is converted, whatever it is."""
    if isinstance(value, Tensor):
        return f"{name}.{method}()"
    return f"{name}.astype({dtype})" if hasattr(value, "astype") else f"torch.tensor({name}).{method}()"


_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)


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


def channel_dim(dim: Any) -> int:
    """The axis of the channels, any but that of the samples."""
    axis = whole_number("dim", dim)
    if axis == 0:
        raise ValueError("dim=0 holds the samples: name the axis of the channels, 1 or e.g. -1 for (N, L, C)")
    return axis


def correction(value: Any) -> int:
    """What is taken from the count of a running variance."""
    taken = whole_number("correction", value)
    if taken not in (0, 1):
        raise ValueError(f"correction must be 1 (unbiased, torch's) or 0 (biased, Keras' and Flax'), but got {taken}")
    return taken


def rank(x: Tensor, allowed: Sequence[int]) -> None:
    """`x` must have one of the allowed numbers of axes."""
    if x.dim() not in allowed:
        names = " or ".join(f"{n}D" for n in allowed)
        raise ShapeError(
            f"expected {names} input (got {x.dim()}D input): the shape is {tuple(x.shape)}, axis 1 must hold the "
            "channels"
        )


def positive_eps(eps: Any) -> None:
    """eps keeps the division finite."""
    scalars.number("eps", eps, "a small positive number such as 1e-5")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, but got {eps}: use a small number such as 1e-5")


def momentum_range(momentum: Any, *, may_be_none: bool = True) -> None:
    """Running averages move by a share of the way, or, where there are none by step, by a cumulative average (None)."""
    if momentum is None and may_be_none:
        return
    scalars.number("momentum", momentum, f"a number in [0, 1]{' or None' * may_be_none}, such as 0.1")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1]{' or be None' * may_be_none}, but got {momentum}: it is the weight of the "
            "NEW batch in the running averages (Keras and Flax state the weight of the old value: use 1 minus theirs)"
        )


def dropout_range(dropout: Any) -> None:
    """A share of what leaves each layer but the last. In torch's words and by torch's error, whatever is wrong."""
    if not scalars.is_number(dropout) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed, but "
            f"got {scalars.given(dropout)}"
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
            "each "
            "normalized axis"
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
            f"{list(found)} "
            f"in an input of size{list(x.shape)}"
        )
    return dims if dims != trailing_dims(x, len(dims)) else None


def _axis_of(x: Tensor, shape: tuple[int, ...]) -> str:
    """The `dim=` that would fit, where there is one and only one: 1 for the channels of (N, C, L)."""
    fits = [str(d) for d in range(1, x.dim()) if x.shape[d : d + 1] == shape]
    return f"{fits[0]}, if axis {fits[0]} holds the features" if len(fits) == 1 else ""


def trailing_dims(x: Tensor, count: int) -> tuple[int, ...]:
    """The last `count` axes of `x`."""
    return tuple(range(x.dim() - count, x.dim()))


def not_along_features(lengths: Tensor | None, x: Tensor, dims: tuple[int, ...]) -> None:
    """`lengths` are of steps, and the last axis of features has none."""
    if lengths is not None and dims == (x.dim() - 1,):
        raise ValueError(
            "lengths counts valid steps along the last axis, but here the last axis holds the features that are "
            "normalized: give mask= of shape (N, L), True = valid, or normalize the channels of (N, C, L) by dim=1"
        )


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
    """What norms of (N, C, ...) share. The valid elements, as from `validity`, and whether all tensors are known to be
    `readable`."""
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
    valid = validity(x, mask, lengths, channel_dim=1)
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


def more_than_one(count: int, x: Tensor, cure: str) -> None:
    """One value has no deviation. torch's own words first, since people search for them."""
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}: one value standardizes "
            "to 0 "
            f"whatever it is. {cure}"
        )


BATCH_OF_ONE_CURE = (
    "Ways out: a norm that needs no batch (LayerNorm, GroupNorm), eval mode (model.eval() uses the running "
    "statistics), "
    "or DataLoader(drop_last=True) if only the last batch is this small."
)


def enough_values(x: Tensor, valid: Tensor | None, needed: int) -> None:
    """A channel needs one value for a mean and two for a deviation. What a mask leaves is counted on the CPU only."""
    if valid is None:
        if needed > 1:
            values = x.shape[0]
            for size in x.shape[2:]:
                values *= size
            more_than_one(values, x, BATCH_OF_ONE_CURE)
        return
    if not values_visible(valid) or x.numel() == 0:
        return
    if valid.shape[1] == 1:  # the mask is that of all channels
        at_hand = readable(valid) and valid.is_contiguous() and library.missing() is None
        found = library.count_valid(valid, needed) if at_hand else int(torch.count_nonzero(valid))
        count = found * (x.numel() // (x.shape[1] * valid.numel()))
    else:
        count = int(count_valid(x, (0, *range(2, x.dim())), valid).min())
    if count == 0:
        raise ValueError(
            "mask (or lengths) leaves no valid element for a channel: there is nothing to take statistics of. Leave "
            "such a "
            "batch out, or use eval mode"
        )
    if needed > 1:
        more_than_one(count, x, BATCH_OF_ONE_CURE)


def validity(x: Tensor, mask: Any, lengths: Any, channel_dim: int) -> Tensor | None:
    """The valid elements as a bool tensor with as many axes as `x`, broadcastable to it; None if all are valid.

    Args:
        x: the input.
        mask: bool, True = valid (the reverse of torch's key_padding_mask), as a tensor, list or array: the shape of
            `x` without `channel_dim`, or any shape that broadcasts to that of `x`.
        lengths: integers of shape (x.shape[0],), as a tensor, list, tuple or array: how many steps along the last axis
            are valid.
        channel_dim: the axis that a mask need not have.

    Raises:
        TypeError: a mask that is not bool, lengths that are not integers.
        ShapeError: a shape that does not fit.
        ValueError: mask and lengths together, or lengths outside [0, steps].
    """
    if mask is not None and lengths is not None:
        raise ValueError("got both mask and lengths: give one of them (mask & lengths_mask is a mask)")
    if lengths is not None:
        return _from_lengths(x, lengths)
    if mask is None:
        return None
    flags = mask_tensor(mask, x.device)
    channel_dim %= x.dim()
    without_channel = (*x.shape[:channel_dim], *x.shape[channel_dim + 1 :])
    if tuple(flags.shape) == without_channel:
        return flags.unsqueeze(channel_dim)
    padded = (1,) * (x.dim() - flags.dim()) + tuple(flags.shape)
    if len(padded) != x.dim() or any(m not in (1, s) for m, s in zip(padded, x.shape, strict=True)):
        raise ShapeError(
            f"mask of shape {tuple(flags.shape)} does not fit an input of shape {tuple(x.shape)}: expected "
            f"{without_channel} "
            f"(the input without its channel axis {channel_dim}) or a shape that broadcasts to the input's"
        )
    return flags.reshape(padded)


def one_length_each(lengths: Any, samples: int, steps: int, of: str) -> Tensor:
    """`lengths` as a tensor of one integer in [0, steps] for each sample of the input, which `of` names.

    Raises:
        TypeError: not integers.
        ShapeError: not one for each sample.
        ValueError: outside [0, steps], on the CPU: elsewhere a look would wait for the device.
    """
    found = lengths_tensor(lengths)
    if tuple(found.shape) != (samples,):
        raise ShapeError(
            f"lengths must be of shape ({samples},), one for each sample of {of}, but got {tuple(found.shape)}"
        )
    if samples and values_visible(found):
        low, high = int(found.min()), int(found.max())
        if low < 0 or high > steps:
            raise ValueError(
                f"lengths must lie in [0, {steps}], the number of steps of {of}, but got values from {low} to {high}"
            )
    return found


def _from_lengths(x: Tensor, lengths: Any) -> Tensor:
    if x.dim() < 3:
        raise ShapeError(
            "lengths counts valid steps along the last axis of an input (N, C, L), but got an input of shape "
            f"{tuple(x.shape)}: "
            "use mask="
        )
    n, steps = x.shape[0], x.shape[-1]
    counts = one_length_each(lengths, n, steps, f"an input of shape {tuple(x.shape)}")
    counts = counts.to(x.device, non_blocking=True)
    request = LengthsRequest(counts, steps)
    kernel = lengths_kernel(request)
    valid = kernel(request) if kernel is not None else torch.arange(steps, device=x.device) < counts[:, None]
    return valid.view(n, *(1,) * (x.dim() - 2), steps)
