"""Which positions of a batch of sequences are padding, as far as its inputs tell."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.diagnosis.batches import Batch
from normwise.diagnosis.layers import norm_kind
from normwise.ops import validity

# A mask of numbers is known by these words in its name, and any mask is of something else by those.
MASKS = {"mask", "masks", "padding", "pad", "valid"}
OTHER_MASKS = {"causal", "completion", "cross", "decoder", "global", "head", "indices", "label", "labels", "loss"}
OTHER_MASKS |= {"masked", "memory", "perm", "pixel", "prompt", "response", "special", "target", "tgt"}
# Values of a recording, and the share of zeros within it, that tell it from features.
LONG, SILENCE = 256, 0.05


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

    None where the inputs are no sequences, or nothing tells. See `_from_mask` and `_from_lengths` for what they must
    look like: a second input of another meaning (token types, labels, speakers) must not pass for them.
    """
    tensors = batch.tensors(model)
    masks = {name for name, t in tensors.items() if is_mask(name, t)}
    others = [t for name, t in tensors.items() if name not in masks]
    sequence = next((t for t in others if t.dim() == 3 and t.is_floating_point()), None)
    tokens = next((t for t in others if t.dim() == 2 and _is_integer(t)), None)
    waves = next((t for t in others if t.dim() == 2 and t.is_floating_point()), None)
    for main in [sequence] if sequence is not None else [m for m in (tokens, waves) if m is not None]:
        for name, tensor in tensors.items():
            if tensor is main:
                continue
            found = _from_mask(name, tensor, main) if name in masks else _from_lengths(name, tensor, main)
            if found is not None:
                return Valid(found[0], name, found[1])
    if sequence is not None:
        trailing = _from_zeros(sequence)
        return None if trailing is None else Valid(trailing[0], "trailing zeros", trailing[1])
    real = None if tokens is None else _from_tokens(tokens, model)
    if real is not None:
        return Valid(real, "padding_idx", True)
    silent = None if waves is None else _from_silence(waves)
    return None if silent is None else Valid(silent, "trailing zeros", True)


def counted(module: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Which elements of a norm's input count, by the `mask=` or `lengths=` of its call; None if all do.

    None also where these do not fit, which the norm itself will say.
    """
    mask, lengths = given.get("mask"), given.get("lengths")
    if (mask is None and lengths is None) or x.is_nested:
        return None
    dim = getattr(module, "dim", None)
    of_features = norm_kind(module) in ("layer", "rms")
    if not of_features:
        dim = 1
    axis = x.dim() - 1 if dim is None else dim if isinstance(dim, int) else dim[0]
    # Features on several axes are no steps of (N, L, D).
    alone = of_features and len(getattr(module, "normalized_shape", (0,)) if dim is None else _axes(dim)) == 1
    try:
        lengths = None if lengths is None else torch.as_tensor(lengths)
        valid = validity.valid_beside_features(x, mask, lengths, (axis % x.dim(),) if alone else (), axis)
    except (TypeError, ValueError):
        return None
    return None if valid is None else valid.expand_as(x)


def _axes(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else dim


def _words(name: str) -> set[str]:
    """The words of "attention_mask", "paddingMask", "inputs[1]"."""
    return set(re.findall("[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def is_mask(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be a mask of positions: truth values; or 0 and 1 under the name of a mask."""
    words = _words(name)
    if words & OTHER_MASKS:
        return False
    if tensor.dtype == torch.bool:
        return True
    return bool(words & MASKS) and _as_bool(tensor) is not None


def _as_bool(tensor: Tensor) -> Tensor | None:
    """A mask as truth values; None for what holds other numbers than those of a mask.

    A mask of numbers is 0 and 1; or, added to the scores of attention, 0 where valid and a large negative number.
    """
    if tensor.dtype == torch.bool:
        return tensor
    if tensor.is_complex() or not tensor.numel():
        return None
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return tensor != 0
    if tensor.is_floating_point() and bool(((tensor == 0) | (tensor <= -1e4)).all()):
        return tensor == 0
    return None


def _from_mask(name: str, tensor: Tensor, main: Tensor) -> tuple[Tensor, bool] | None:
    """Valid positions by a mask that fits `main`, and whether samples come first there.

    The valid positions of each sample must be one stretch from the first position on, or one up to the last (where
    padding is on the left). Of a bool mask under the name of one they may have holes, if all samples begin valid.
    """
    mask = _as_bool(tensor)
    if mask is None:
        return None
    if mask.dim() > 2 and mask[0].numel() == max(mask.shape[1:]):  # (N, 1, T), (N, T, 1), (N, 1, 1, T)
        mask = mask.flatten(1)
    if mask.dim() != 2 or not mask.numel():
        return None
    if mask.shape[0] == mask.shape[1] and torch.equal(mask, mask.tril()) != torch.equal(mask, mask.triu()):
        return None  # a causal mask (T, T) of attention
    holes = tensor.dtype == torch.bool and bool(_words(name) & MASKS) and main.dim() == 3
    ways = []
    if mask.shape == main.shape[:2]:
        ways.append((mask, True))
    if mask.T.shape == main.shape[:2] and main.dim() == 3:  # torch's key_padding_mask (N, T) beside inputs (T, N, ...)
        ways.append((mask, False))
    if mask.shape == main.shape[:2] and main.dim() == 3:  # (T, N) beside inputs (T, N, ...)
        ways.append((mask.T, False))
    if main.dim() == 3 and mask.shape == (main.shape[0], main.shape[2]):  # (N, C, L)
        ways.append((mask, True))
    for one, samples_first in ways:
        valid = _valid(name, one, holes)
        if valid is not None:
            return valid, samples_first
    return None


def _valid(name: str, mask: Tensor, holes: bool) -> Tensor | None:
    """The mask (N, T) with True = valid, whichever of the two it says; None where neither makes sense.

    No sample is padding alone, and the longest usually has none: a row that is the same throughout is valid. Without
    one, True is valid if all samples begin so, else False is. Of an `attention_mask` it is always 1.
    """
    words = _words(name)
    attention = "attention" in words
    either = [mask] if attention else [mask, ~mask]
    if not attention and bool((~mask).all(1).any()) and not bool(mask.all(1).any()):
        either = [~mask, mask]
    for valid in either:
        steps = valid.int().diff(dim=1)
        if not bool(valid.any(1).all()):
            continue
        if bool(valid[:, 0].all()) and (holes or not bool((steps > 0).any())):
            return valid
        # Padding on the left. In the other sense it would be padding on the right, if it is there in all samples.
        left = bool(valid[:, -1].all()) and not bool((steps < 0).any())
        told = attention or (bool(valid[:, 0].any()) and (valid is mask or bool(words & {"pad", "padding"})))
        if left and told:
            return valid
    return None


def _from_lengths(name: str, tensor: Tensor, main: Tensor) -> tuple[Tensor, bool] | None:
    """Valid positions by lengths (N,) or (N, 1) that fit `main`.

    What is not called so may be labels or speakers: then what lies behind the ends must look like padding, one and the
    same step over and over.
    """
    tensor = tensor[:, 0] if tensor.dim() == 2 and tensor.shape[1] == 1 else tensor
    if tensor.dim() != 1 or not _is_integer(tensor) or not len(tensor):
        return None
    named = any(word.startswith("len") for word in _words(name))
    longest = int(tensor.max())
    if int(tensor.min()) < (0 if named else 1) or longest < 1:
        return None
    certain = named and not (main.dim() == 2 and main.is_floating_point())  # which may be features, one a length
    sizes = main.shape[:2] if main.dim() == 2 else main.shape
    for steps, samples, first in ((1, 0, True), (0, 1, False), (2, 0, True)):
        if steps < len(sizes) and sizes[samples] == len(tensor) and longest <= sizes[steps]:
            valid = torch.arange(sizes[steps], device=tensor.device) < tensor[:, None]
            if certain or _repeats(main.movedim((samples, steps), (0, 1)), valid):
                return valid, first
    return None


def _repeats(main: Tensor, valid: Tensor) -> bool:
    """Whether all steps of (N, T, ...) that are not valid are the same as the sample's last."""
    same = main == main[:, -1:]
    same = same if same.dim() == 2 else same.flatten(2).all(2)
    return bool((same | valid).all()) and not bool(valid.all())


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


def _from_silence(waves: Tensor) -> Tensor | None:
    """Zeros at the end of some samples of (N, T), and not of all.

    These may as well be features (N, C), in which zeros are frequent: a recording is long, and has next to none
    within.
    """
    steps = waves.shape[1]
    ends = (waves == 0).int().flip(1).cumprod(1).sum(1)
    if steps < LONG or not bool((ends > 0).any()) or not bool((ends == 0).any()) or bool((ends == steps).any()):
        return None
    valid = torch.arange(steps, device=waves.device) < (steps - ends)[:, None]
    return valid if float((waves[valid] == 0).double().mean()) < SILENCE else None
