"""Masks, lengths and other numbers a sample as tensors, whether given as tensors, lists or arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)


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
