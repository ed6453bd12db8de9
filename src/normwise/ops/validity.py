"""Which elements are valid, as masks and lengths say it, and whether enough are. Nothing here changes anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.backends.cpu import library
from normwise.backends.protocol import LengthsRequest
from normwise.backends.reference import count_valid
from normwise.ops._torch_internals import readable
from normwise.ops.conversion import lengths_tensor, mask_tensor
from normwise.ops.dispatch import lengths_kernel, values_visible
from normwise.ops.errors import ShapeError

BATCH_OF_ONE_CURE = (
    "Ways out: a norm that needs no batch (LayerNorm, GroupNorm), eval mode (model.eval() uses the running "
    "statistics), or DataLoader(drop_last=True) if only the last batch is this small."
)


def valid_elements(x: Tensor, mask: Any, lengths: Any, channel_dim: int) -> Tensor | None:
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
            f"{without_channel} (the input without its channel axis {channel_dim}) or a shape that broadcasts to the "
            "input's"
        )
    return flags.reshape(padded)


def _from_lengths(x: Tensor, lengths: Any, axis: int = -1) -> Tensor:
    if x.dim() < 3:
        raise ShapeError(
            "lengths counts valid steps along the last axis of an input (N, C, L), but got an input of shape "
            f"{tuple(x.shape)}: use mask="
        )
    n, steps = x.shape[0], x.shape[axis]
    counts = one_length_each(lengths, n, steps, f"an input of shape {tuple(x.shape)}")
    counts = counts.to(x.device, non_blocking=True)
    request = LengthsRequest(counts, steps)
    kernel = lengths_kernel(request)
    valid = kernel(request) if kernel is not None else torch.arange(steps, device=x.device) < counts[:, None]
    shape = [n, *(1,) * (x.dim() - 1)]
    shape[axis] = steps
    return valid.view(shape)


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


def valid_beside_features(x: Tensor, mask: Any, lengths: Any, dims: tuple[int, ...], channel_dim: int) -> Tensor | None:
    """`valid_elements` of a norm of the axes `dims`. Where the last one alone holds features, the steps of (N, L, D)
    are on axis 1; with more axes that could be any of them."""
    if lengths is None or mask is not None or dims != (x.dim() - 1,):
        return valid_elements(x, mask, lengths, channel_dim)
    if x.dim() != 3:
        raise ShapeError(
            "lengths counts valid steps along axis 1 of an input (N, L, D) with its features on the last axis, but got "
            f"an input of shape {tuple(x.shape)}: give mask=, True = valid, of that shape without the last axis or one "
            "that broadcasts to it"
        )
    return _from_lengths(x, lengths, axis=1)


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
            "such a batch out, or use eval mode"
        )
    if needed > 1:
        more_than_one(count, x, BATCH_OF_ONE_CURE)


def more_than_one(count: int, x: Tensor, cure: str) -> None:
    """One value has no deviation. torch's own words first, since people search for them."""
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}: one value standardizes "
            f"to 0 whatever it is. {cure}"
        )
