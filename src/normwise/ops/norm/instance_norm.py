"""Instance normalization: one mean and variance for each sample and channel."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.protocol import NormConfig, NormRequest, accumulation_dtype
from normwise.ops import conversion, hyperparameters, inputs, ragged, symbolic, validity
from normwise.ops.errors import ShapeError
from normwise.ops.norm import running_stats
from normwise.ops.norm.modulation import Given, of_channels
from normwise.ops.norm.run import run
from normwise.ops.norm.segments import segment_norm, segments_of


def instance_norm(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    segments: Tensor | None = None,
    dim: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics over positions, by sample and channel.

    Args:
        input: (N, C, ...) with at least one axis of positions; or a PackedSequence or jagged nested tensor of N
            sequences of rows of C channels.
        running_mean, running_var: (C,), moved in place towards the average over samples if `use_input_stats`,
            otherwise the statistics that are used.
        weight, bias: (C,): gamma and beta.
        use_input_stats: take the statistics from the input.
        momentum: weight of the new batch in the running averages, in [0, 1].
        eps: added to the (biased) variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus"
            or "mish", applied last: torch.nn.functional's by their defaults, "gelu_tanh" gelu(approximate="tanh").
        residual: like the input, added before `act`.
        segments: (R,) integers for an input (R, C): which graph, cloud or document a row belongs to. Each segment is
            then a sample and its rows are the positions, wherever they stand; `mask` is (R,).
        dim: the axis of the channels, e.g. -1 for (N, L, C); mask and residual are laid out as the input.
        scale, shift: (N, C), one for each sample, or of as many axes as the input, to which it broadcasts: the
            normalized input with gain and bias is multiplied by 1 + scale and shift is added, before the residual.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0; one with a single valid element gives its bias there.

    Raises:
        ValueError: one position only, eps <= 0, momentum outside [0, 1], running averages missing.
        ShapeError: shapes that do not fit.
        TypeError: dtypes that do not.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, eq. 2.
    """
    modulated = not (scale is shift is None)
    if symbolic.is_traced(input, weight, mask, lengths, residual, segments) or (
        modulated and symbolic.is_traced(scale, shift)
    ):
        return symbolic.call_function(
            instance_norm,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
            segments=segments,
            dim=None if dim == 1 else dim,
            scale=scale,
            shift=shift,
        )
    return instance_norm_of(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        mask=mask,
        lengths=lengths,
        act=act,
        residual=residual,
        segments=segments,
        dim=dim,
        scale=scale,
        shift=shift,
    )


def instance_norm_of(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    rank: int | None = None,
    num_features: int | None = None,
    segments: Tensor | None = None,
    dim: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    """`instance_norm` of a layer's input, if `rank` is given: it has as many axes, or one less where it is one sample,
    as are then `mask` and `residual`; with `num_features` channels, if that is given."""
    if not (scale is shift is None):
        call = partial(
            instance_norm_of,
            running_mean=running_mean,
            running_var=running_var,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            rank=rank,
            segments=segments,
        )
        given = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": dim}
        return _modulated(call, input, weight, bias, num_features, Given(scale, shift), given)
    if segments is not None:
        return _of_segments(
            input,
            segments,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            mask,
            lengths,
            act,
            residual,
            rank,
            num_features,
        )
    if ragged.is_ragged(input):
        if rank not in (None, 3):
            raise ShapeError(f"a layer for {rank}D input takes no ragged input: InstanceNorm1d does")
        sequences = partial(
            instance_norm_of,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            act=act,
            rank=rank,
            num_features=num_features,
        )
        return ragged.by_sequences(sequences, input, mask=mask, lengths=lengths, residual=residual)
    x = inputs.tensor("instance_norm", input)
    single = False
    if rank is not None:
        inputs.rank(x, (rank - 1, rank))
        single = x.dim() < rank
    if single:
        x, mask, lengths, residual = _as_batch(x, mask, lengths, residual)
    if dim != 1:
        x, mask, residual = inputs.channels_to_axis_1("instance_norm", x, dim, mask, residual)
    if num_features is not None and x.shape[1] != num_features:
        raise ShapeError(
            f"expected input's size at dim=1 to match num_features ({num_features}), but got: {x.shape[1]}"
            f"{inputs.channels_last_hint(x, num_features)}."
        )
    inputs.floating("instance_norm", x)
    hyperparameters.positive_eps(eps)
    hyperparameters.momentum_range(momentum)
    if x.dim() < 3:
        raise ShapeError(f"expected 3D input or more (got {x.dim()}D input): (N, C, ...) with an axis of positions")
    channels, *positions = x.shape[1:]
    inputs.channel_vectors(x, running_mean, running_var, weight, bias)
    inputs.same_shape("residual", residual, x)
    inputs.beside(
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
    valid = validity.valid_elements(x, mask, lengths, channel_dim=1)
    if not use_input_stats and running_mean is None:
        raise ValueError(
            "Expected running_mean and running_var to be defined when use_input_stats is false: give them, or take the "
            "input's own statistics"
        )
    if use_input_stats and prod(positions) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {x.shape}: one value standardizes to "
            "0 whatever it is. Use LayerNorm or GroupNorm, whose statistics also run over channels"
        )
    if use_input_stats:
        config = NormConfig("instance_norm", "groups", eps, act, groups=channels, momentum=momentum)
        if x.shape[0] == 0:
            running_mean = running_var = None
        elif running_mean is not None and running_stats.is_recomputing():
            # What there is to learn, the first run has learnt.
            running_mean, running_var = running_mean.clone(), running_var.clone()  # type: ignore[union-attr]
    else:
        config = NormConfig("instance_norm", "channels", eps, act, batch_statistics=False)
    request = NormRequest(config, inputs.dense(x), residual, weight, bias, valid, running_mean, running_var)  # type: ignore[arg-type]
    y = run(request).y
    y = y if dim == 1 else y.movedim(1, dim)
    return y.squeeze(0) if single else y


def _as_batch(x: Tensor, mask: Any, lengths: Any, residual: Any) -> tuple[Tensor, Any, Any, Any]:
    """One sample and what goes with it as a batch of one."""
    inputs.same_shape("residual", residual, x)
    if mask is not None:
        mask = conversion.mask_tensor(mask, x.device).unsqueeze(0)
    if lengths is not None:
        lengths = conversion.lengths_tensor(lengths).reshape(1)
    return x.unsqueeze(0), mask, lengths, None if residual is None else residual.unsqueeze(0)


def _modulated(
    call: partial[Any],
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    num_features: int | None,
    given: Given,
    options: dict[str, Any],
) -> Any:
    """`instance_norm_of`, of which `call` has the statistics, with scale or shift."""
    said = call.keywords
    mean, var, rank, segments = (said[name] for name in ("running_mean", "running_var", "rank", "segments"))
    single = False
    if segments is not None:
        segments_of("instance_norm", segments, inputs.tensor("instance_norm", x), lengths=options["lengths"])
    elif rank is not None and not ragged.is_ragged(x):
        inputs.rank(inputs.tensor("instance_norm", x), (rank - 1, rank))
        single = x.dim() < rank
    if single:
        x, *more = _as_batch(x, *(options[name] for name in ("mask", "lengths", "residual")))
        options |= dict(zip(("mask", "lengths", "residual"), more, strict=True))
        scale, shift = (t.unsqueeze(0) if isinstance(t, Tensor) else t for t in given[:2])
        given = given._replace(scale=scale, shift=shift)

    def bare(x: Tensor, mask: Tensor | None) -> tuple[Any, None]:
        return call(x, weight=None, bias=None, mask=mask, num_features=num_features), None

    def fused(x: Tensor, samples: int, gain: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
        if num_features not in (None, x.shape[1] // samples):
            return None  # refused by `bare`
        fixed = {}
        if mean is not None:
            wide = accumulation_dtype(x.dtype)
            fixed = {"running_mean": mean.to(wide).repeat(samples), "running_var": var.to(wide).repeat(samples)}
        return call(x, weight=gain, bias=bias, **fixed, **options)

    moving = segments is not None or (said["use_input_stats"] and mean is not None)
    options |= {"running": (mean, var), "momentum": said["momentum"], "eps": said["eps"]}
    y, _ = of_channels("instance_norm", bare, None if moving else fused, x, weight, bias, given, **options)
    return y.squeeze(0) if single else y


def _of_segments(
    input: Any,
    segments: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    mask: Any,
    lengths: Any,
    act: str | None,
    residual: Any,
    rank: int | None,
    num_features: int | None,
) -> Tensor:
    """Rows (R, C), a sample for each segment."""
    x = inputs.tensor("instance_norm", input)
    if rank not in (None, 3):
        raise ShapeError(f"a layer for {rank}D input takes no segments of rows: InstanceNorm1d does")
    found = segments_of("instance_norm", segments, x, lengths=lengths)
    inputs.rank(x, (2,))
    if num_features is not None and x.shape[1] != num_features:
        raise ShapeError(
            f"expected input's size at dim=1 to match num_features ({num_features}), but got: {x.shape[1]}"
            f"{inputs.channels_last_hint(x, num_features)}."
        )
    valid, _ = inputs.validate_channels(
        "instance_norm", x, running_mean, running_var, weight, bias, momentum, eps, mask, None, act, residual
    )
    if not use_input_stats:
        if running_mean is None:
            raise ValueError("Expected running_mean and running_var to be defined when use_input_stats is false")
        config = NormConfig("instance_norm", "channels", eps, act, batch_statistics=False)
        return run(NormRequest(config, x, residual, weight, bias, valid, running_mean, running_var)).y
    options: dict[str, Any] = {"weight": weight, "bias": bias, "valid": valid, "act": act, "residual": residual}
    y, moments = segment_norm("instance_norm", x, found, across_features=False, eps=eps, **options)
    if running_mean is not None and running_var is not None and x.shape[0] and not running_stats.is_recomputing():
        running_stats.update_over_samples(running_mean, running_var, moments, momentum)
    return y
