"""Where the affine part comes from, if not from parameters alone: scale, shift and gate given in the call.

The fourth answer of a norm. Gain and bias times 1 + scale, plus shift, are a gain and bias by sample (or by position).
One kernel applies it where there is one; else one multiply-add behind the bare norm does, for all norms alike."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.activations import GATES, activation, add_residual_and_activate
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import Gate, NormConfig, NormRequest, NormResult, accumulation_dtype
from normwise.ops import dispatch, hyperparameters, inputs, ragged, validity
from normwise.ops.errors import ShapeError
from normwise.ops.norm import gain
from normwise.ops.norm.run import run_modulated
from normwise.words import did_you_mean


class Given(NamedTuple):
    """What a call of a norm gives besides the parameters.

    norm(x) * (1 + scale) + shift, times act(gate); with `gate_first` the norm is that of x * act(gate).
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    gate_first: bool = False
    gate_act: str | None = "silu"


def check_gate(gate_first: Any, gate_act: Any) -> None:
    """
    Raises:
        TypeError: a gate_first that is not bool. ValueError: an unknown gate_act.
    """
    if not isinstance(gate_first, bool):
        raise TypeError(f"gate_first must be True (gate, then norm) or False, but got {gate_first!r}")
    if gate_act is not None and (not isinstance(gate_act, str) or gate_act not in GATES):
        hint = did_you_mean(gate_act, GATES)
        raise ValueError(f"unknown gate_act {gate_act!r}: expected one of {', '.join(map(repr, GATES))} or None{hint}")


def of_features(
    op: str,
    norm: Callable[..., Tensor],
    x: Any,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    given: Given,
    *,
    eps: float | None,
    dim: int | Sequence[int] | None = None,
    mask: Any = None,
    lengths: Any = None,
    act: str | None = None,
    add: Tensor | None = None,
    cast: gain.Cast | None = None,
    config: NormConfig | None = None,
) -> Any:
    """A norm of features with all that is `given`: y in the dtype of the input, or with `add` the pair (y, x + add).

    All is computed in float32 at least and rounded once, but with cast="input" the normalized input, to which gain and
    bias, then scale and shift are applied by torch's rules for dtypes.

    Args:
        norm: `norm(x, mask=...)`, without gain and bias, of a tensor in float32 or float64.
        weight, bias: of the normalized `shape`.
        config: the whole norm, where its statistics are those of rows of this input: a kernel may then run all at once.
    """
    shape = tuple(shape)
    x = _padded(op, x, given)
    inputs.floating(op, x)
    if eps is not None:
        hyperparameters.positive_eps(eps)
    check_gate(given.gate_first, given.gate_act)
    inputs.like_normalized_shape(shape, weight=weight, bias=bias)
    inputs.same_shape("add", add, x)
    inputs.same_shape("gate", given.gate, x)
    together = {"add": add, "weight": weight, "bias": bias}
    readable = inputs.beside(x, mask=mask, **together, scale=given.scale, shift=given.shift, gate=given.gate)
    if act is not None:
        activation(act)
    trailing = inputs.trailing_dims(x, len(shape))
    dims = inputs.feature_dims(x, shape, dim) or trailing
    valid = None
    if mask is not None or lengths is not None:
        channel_dim = dims[0] if dim is not None else x.dim() - 1
        valid = validity.valid_beside_features(x, mask, lengths, dims, channel_dim)
    scale, shift = (
        _kept(_by_feature(name, getattr(given, name), x, shape, dims), valid) for name in ("scale", "shift")
    )
    weight, bias = (None if t is None else _placed(t, x, dims) for t in (weight, bias))
    wide = accumulation_dtype(x.dtype)
    if cast != "input":
        rows_gain, rows_bias = by_sample(weight, bias, scale, shift, wide)
        if config is not None and dims == trailing:
            found = _by_kernel(config, x, add, rows_gain, rows_bias, valid, given, readable and valid is None)
            if found is not None:
                return found.y if add is None else (found.y, found.total)
    total = x if add is None else x + add
    if valid is not None and (add is not None or given.gate_first):
        total = total.masked_fill(~valid, 0)
    gate = None
    if given.gate is not None:
        gate = _kept(given.gate, valid).to(wide)  # type: ignore[union-attr]
        gate = gate if given.gate_act is None else GATES[given.gate_act](gate)
    gated_first = gate is not None and given.gate_first
    z = norm(total.to(wide) * gate if gated_first else total.to(wide), mask=valid)
    if cast == "input":
        y = gain.apply(z.to(x.dtype), weight, bias, None, None)
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
        dtype = y.dtype if gate is None or gated_first else x.dtype
    else:
        y = _affine(z, rows_gain, rows_bias)
        dtype = _result_dtype(x)
    y = y if gate is None or gated_first else y * gate
    y = y if valid is None else y.masked_fill(~valid, 0)
    y = add_residual_and_activate(y, None, act, valid).to(dtype)
    return y if add is None else (y, total)


def _by_kernel(
    config: NormConfig,
    x: Tensor,
    add: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    given: Given,
    known_readable: bool,
) -> NormResult | None:
    """All of it by one kernel, gain and bias with as many axes as `x`; None where there is none for it."""
    if torch.compiler.is_compiling() or dispatch.is_traced_or_transformed():
        return None  # before anything is made for a kernel that will not run
    rows = x.dim() - config.axes
    full = x.shape[rows:]
    if weight is not None and bias is not None and weight.shape != bias.shape:
        weight, bias = torch.broadcast_tensors(weight, bias)
    weight, bias = (
        None if t is None else t if t.shape[rows:] == full else t.expand(*t.shape[:rows], *full) for t in (weight, bias)
    )
    gate = None if given.gate is None else Gate(given.gate, given.gate_act, given.gate_first)
    return run_modulated(NormRequest(config, x, add, weight, bias, valid), gate, known_readable)


def of_channels(
    op: str,
    norm: Callable[..., tuple[Tensor, Any]],
    fused: Callable[..., Tensor | None] | None,
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Given,
    *,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float | Tensor | None = 0.0,
    eps: float,
    dim: int = 1,
    mask: Any = None,
    lengths: Any = None,
    act: str | None = None,
    residual: Any = None,
    kernel: Callable[..., tuple[Tensor | None, Any]] | None = None,
) -> tuple[Tensor, Any]:
    """A norm of (N, C, ...) with scale and shift, in the dtype of the input, and what else `norm` gives.

    Args:
        norm: `norm(x, mask=...)`, without gain and bias, of a tensor in float32 or float64, channels on axis 1.
        fused: where the statistics of a sample and channel are its own, or fixed: the same norm of (1, N * C, ...), in
            which a gain by sample is one by channel, so that kernels apply it:
            `fused(x, N, gain, bias, mask=..., act=..., residual=...)`, or None where it cannot.
        running, momentum: as `norm` uses them; they are checked before it moves any.
        kernel: the whole norm at once where gain and bias are those of samples,
            `kernel(x, by_sample=(gain, bias), mask=..., act=..., residual=...)`; without one its output is None.
    """
    x = _padded(op, x, given)
    if dim != 1:
        given = to_axis_1(given, x, dim)
        x, mask, residual = inputs.channels_to_axis_1(op, x, dim, mask, residual)
    valid, _ = inputs.validate_channels(op, x, *running, weight, bias, momentum, eps, mask, lengths, act, residual)
    gain, offset = by_channel(x, weight, bias, given, valid)
    extra = None
    y = None
    if kernel is not None and (gains := _of_samples(x, gain, offset)) is not None:
        y, extra = kernel(x, by_sample=gains, mask=valid, act=act, residual=residual)
    if y is None and fused is not None and _folds(x, gain, offset):
        y = _folded(fused, x, gain, offset, valid, act, residual)
    if y is None:
        z, extra = norm(x.to(accumulation_dtype(x.dtype)), mask=valid)
        y = _affine(z, gain, offset)
        y = y if valid is None else y.masked_fill(~valid, 0)
        y = add_residual_and_activate(y, residual, act, valid).to(
            _result_dtype(x, op in ("group_norm", "instance_norm"))
        )
    return (y if dim == 1 else y.movedim(1, dim)), extra


def to_axis_1(given: Given, x: Tensor, dim: int) -> Given:
    """Scale and shift laid out as the input `x`, whose channels are on axis `dim`, with theirs on axis 1."""
    scale, shift = (
        t.movedim(dim, 1) if isinstance(t, Tensor) and t.dim() == x.dim() else t for t in (given.scale, given.shift)
    )
    return given._replace(scale=scale, shift=shift)


def by_channel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Given, valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gain and bias of `x` (N, C, ...), with as many axes and in float32 or float64."""
    inputs.beside(x, scale=given.scale, shift=given.shift)
    named = (("scale", given.scale), ("shift", given.shift))
    scale, shift = (_kept(_by_channel(name, t, x), valid) for name, t in named)
    weight, bias = (None if t is None else t.view(1, -1, *(1,) * (x.dim() - 2)) for t in (weight, bias))
    return by_sample(weight, bias, scale, shift, accumulation_dtype(x.dtype))


def by_sample(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, wide: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gain weight * (1 + scale) and the bias bias * (1 + scale) + shift; None where they are 1 or 0."""
    weight, bias, scale, shift = (
        t if t is None or t.dtype is wide else t.to(wide) for t in (weight, bias, scale, shift)
    )
    if scale is not None:
        scale = 1 + scale
        weight = scale if weight is None else weight * scale
        bias = None if bias is None else bias * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return weight, bias


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None:
        return torch.addcmul(bias, z, weight)
    y = z if weight is None else z * weight
    return y if bias is None else y + bias


def _of_samples(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None] | None:
    """Gain and bias of (N, C, ...) as (N, C, 1, ...), where one kernel may apply them."""
    if not x.numel() or not on_cpu(x) or torch.compiler.is_compiling() or dispatch.is_traced_or_transformed():
        return None
    if any(t is not None and t.shape[2:].numel() != 1 for t in (gain, bias)):
        return None
    full = (*x.shape[:2], *(1,) * (x.dim() - 2))
    gain, bias = (t if t is None or t.shape == full else t.expand(full) for t in (gain, bias))
    return gain, bias


def _folds(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> bool:
    """Whether (N, C, ...) can be taken as (1, N * C, ...) without a copy, and gain and bias as vectors: not while
    a graph is recorded, in which sizes would stand that are those of this batch; the compiler fuses by itself."""
    return (
        x.dim() > 2
        and x.numel() > 0
        and x.is_contiguous()
        and all(t is None or t.shape[2:].numel() == 1 for t in (gain, bias))
        and not torch.compiler.is_compiling()
        and not dispatch.jit_traces()
        and dispatch.have_values(x)
    )


def _folded(
    fused: Callable[..., Tensor | None],
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> Tensor | None:
    samples, channels, *positions = x.shape
    form = (1, samples * channels, *positions)
    vectors = (None if t is None else t.expand(samples, channels, *t.shape[2:]).reshape(-1) for t in (gain, bias))
    if valid is not None:
        valid = valid.expand(samples, channels, *positions).reshape(form)
    residual = None if residual is None else residual.reshape(form)
    y = fused(x.view(form), samples, *vectors, mask=valid, act=act, residual=residual)
    return None if y is None else y.reshape(x.shape)


def _padded(op: str, x: Any, given: Given) -> Tensor:
    if ragged.is_ragged(x):
        names = " and ".join(name for name in ("scale", "shift", "gate") if getattr(given, name) is not None)
        raise ValueError(
            f"{op}: {names or 'a gate'} of a PackedSequence or nested tensor is not supported, since its rows do not "
            "say which sample they are of: give a padded input with mask= or lengths="
        )
    return inputs.tensor(op, x)


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but got {type(value).__name__}: convert it by torch.as_tensor")
    return value


def _fits(shape: Sequence[int], full: Sequence[int]) -> bool:
    return len(shape) == len(full) and all(s in (1, n) for s, n in zip(shape, full, strict=True))


def _by_feature(name: str, value: Any, x: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor | None:
    """`value` with as many axes as `x`, on whose axes `dims` the normalized `shape` is. By its number of axes it is one
    for each position, laid out as `x`; for each sample, (N, *shape); or for all, of that shape."""
    if value is None:
        return None
    t, rows = _tensor(name, value), x.dim() - len(shape)
    samples = next((size for d, size in enumerate(x.shape) if d not in dims), 1)
    if _fits(t.shape, x.shape):
        return t
    if rows > 1 and _fits(t.shape, (samples, *shape)):
        return _placed(t.unflatten(0, (t.shape[0], *(1,) * (rows - 1))), x, dims)
    if rows and _fits(t.shape, shape):
        return _placed(t, x, dims)
    raise ShapeError(
        f"{name} of shape {tuple(t.shape)} does not fit an input of shape {tuple(x.shape)} normalized over {shape}: "
        f"expected {(samples, *shape)}, one for each sample (axis 0); {shape}, one for all; or {x.dim()} axes that "
        f"broadcast to the input's shape, e.g. by {name}.unsqueeze(0) for one that is the same for all samples"
    )


def _placed(t: Tensor, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`t`, whose last axes are the normalized ones, with as many axes as `x`, each where that of `x` is."""
    t = t[(None,) * (x.dim() - t.dim())]
    trailing = inputs.trailing_dims(x, len(dims))
    return t if dims == trailing else t.movedim(trailing, dims)


def _by_channel(name: str, value: Any, x: Tensor) -> Tensor | None:
    """`value` with as many axes as `x`: (N, C), one for each sample, or what broadcasts to `x` already."""
    if value is None:
        return None
    t = _tensor(name, value)
    if _fits(t.shape, x.shape):
        return t
    if _fits(t.shape, x.shape[:2]):
        return t.view(*t.shape, *(1,) * (x.dim() - 2))
    raise ShapeError(
        f"{name} of shape {tuple(t.shape)} does not fit an input of shape {tuple(x.shape)} (channels on axis 1): "
        f"expected {tuple(x.shape[:2])}, one for each sample and channel, or {x.dim()} axes that broadcast to the "
        f"input's shape, e.g. by {name}.unsqueeze(0) for one that is the same for all samples"
    )


def _kept(t: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """`t`, 0 where it meets invalid positions only: whatever it holds there would spoil the gradient 0."""
    if t is None or valid is None:
        return t
    for d, (size, there) in enumerate(zip(t.shape, valid.shape, strict=True)):
        if size == 1 and there != 1:
            valid = valid.any(d, keepdim=True)
    return t.masked_fill(~valid, 0)


def _result_dtype(x: Tensor, under_autocast: bool = True) -> torch.dtype:
    """That of `x`, or float32 on the devices where autocast runs these norms so."""
    kind = x.device.type
    if under_autocast and kind in ("cuda", "xpu") and torch.is_autocast_enabled(kind):
        return accumulation_dtype(x.dtype)
    return x.dtype
