"""Which positions of a batch of sequences are padding, as far as its inputs tell."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.diagnosis.batches import Batch
from normwise.diagnosis.layers import norm_kind
from normwise.ops import inputs


class Valid(NamedTuple):
    """`mask` (N, T) bool, True = valid; `told_by` names what tells; `samples_first` where inputs are (N, T, ...)."""

    mask: Tensor
    told_by: str
    samples_first: bool

    @property
    def padding(self) -> float:
        return 1 - float(self.mask.double().mean())


def valid_positions(batch: Batch, model: nn.Module) -> Valid | None:
    """From a mask, from lengths, from an embedding's `padding_idx`, or from steps at the end that are all zero.

    None where the inputs are no sequences, or nothing tells. A mask of either convention is understood: what it says
    of the first positions, which are never padding at the end, is "valid".
    """
    tensors = batch.tensors()
    sequence = next((t for t in tensors.values() if t.dim() == 3 and t.is_floating_point()), None)
    tokens = next((t for t in tensors.values() if t.dim() == 2 and t.dtype == torch.int64), None)
    main = sequence if sequence is not None else tokens
    if main is None:
        return None
    for name, tensor in tensors.items():
        if tensor is main:
            continue
        found = _from_mask(tensor, main) if tensor.dtype == torch.bool else _from_lengths(tensor, main)
        if found is not None:
            return Valid(found[0], name, found[1])
    real = _from_tokens(tokens, model) if sequence is None and tokens is not None else None
    if real is not None:
        return Valid(real, "padding_idx", True)
    trailing = None if sequence is None else _from_zeros(sequence)
    return None if trailing is None else Valid(trailing[0], "trailing zeros", trailing[1])


def counted(module: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Which elements of a norm's input count, by the `mask=` or `lengths=` of its call; None if all do.

    None also where these do not fit, which the norm itself will say.
    """
    mask, lengths = given.get("mask"), given.get("lengths")
    if (mask is None and lengths is None) or x.is_nested:
        return None
    dim = getattr(module, "dim", None)
    if norm_kind(module) not in ("layer", "rms"):
        dim = 1
    axis = x.dim() - 1 if dim is None else dim if isinstance(dim, int) else dim[0]
    try:
        valid = inputs.validity(x, mask, None if lengths is None else torch.as_tensor(lengths), channel_dim=axis)
    except (TypeError, ValueError):
        return None
    return None if valid is None else valid.expand_as(x)


def _from_mask(tensor: Tensor, main: Tensor) -> tuple[Tensor, bool] | None:
    if tensor.dim() != 2:
        return None
    if tensor.shape == main.shape[:2]:
        samples_first, mask = True, tensor
    elif tensor.T.shape == main.shape[:2]:  # torch's key_padding_mask (N, T) beside inputs (T, N, ...)
        samples_first, mask = False, tensor
    elif main.dim() == 3 and tensor.shape == (main.shape[0], main.shape[2]):  # (N, C, L)
        samples_first, mask = True, tensor
    else:
        return None
    if mask.shape[0] == mask.shape[1] and torch.equal(mask, mask.tril()) != torch.equal(mask, mask.triu()):
        return None  # a causal mask (T, T) of attention
    if not bool(mask[:, 0].any()):
        return ~mask, samples_first
    return (mask, samples_first) if bool(mask[:, 0].all()) else None


def _from_lengths(tensor: Tensor, main: Tensor) -> tuple[Tensor, bool] | None:
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or not len(tensor):
        return None
    longest = int(tensor.max())
    if int(tensor.min()) < 0 or longest < 1:
        return None
    sizes = main.shape[:2] if main.dim() == 2 else main.shape
    for steps, samples, first in ((1, 0, True), (0, 1, False), (2, 0, True)):
        if steps < len(sizes) and sizes[samples] == len(tensor) and longest <= sizes[steps]:
            return torch.arange(sizes[steps], device=tensor.device) < tensor[:, None], first
    return None


def _from_tokens(tokens: Tensor, model: nn.Module) -> Tensor | None:
    indices = {m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    return tokens != indices.pop() if len(indices) == 1 else None


def _from_zeros(x: Tensor) -> tuple[Tensor, bool] | None:
    """Steps at the end that are zero in all features, of some samples and not of all."""
    for steps, samples, features in ((1, 0, 2), (2, 0, 1), (0, 1, 2)):
        silent = (x == 0).all(features)
        silent = silent if samples < steps else silent.T
        ends = silent.int().flip(1).cumprod(1).sum(1)
        if bool((ends > 0).any()) and bool((ends == 0).any()) and bool((ends < x.shape[steps]).all()):
            return torch.arange(x.shape[steps], device=x.device) < (x.shape[steps] - ends)[:, None], samples < steps
    return None
