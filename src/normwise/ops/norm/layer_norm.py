"""Layer and root mean square normalization: statistics of one sample, over its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.protocol import Moments, NormConfig, NormRequest, NormResult, accumulation_dtype
from normwise.ops import distributed, hyperparameters, inputs, ragged, symbolic, validity
from normwise.ops.distributed_norm import distributed_norm
from normwise.ops.errors import ShapeError
from normwise.ops.norm import gain
from normwise.ops.norm.gain import Cast
from normwise.ops.norm.modulation import Given, of_features
from normwise.ops.norm.run import run
from normwise.ops.norm.segments import Segments, segment_norm, segments_of

_FLOAT32_EPS, _FLOAT64_EPS = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def layer_norm(
    input: Tensor | PackedSequence,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    add: Tensor | PackedSequence | None = None,
    process_group: Any = None,
    offset: float = 0.0,
    cast: Cast | None = None,
    segments: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    gate_first: bool = False,
    gate_act: str | None = "silu",
) -> Any:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta), statistics over the features of one sample.

    With `add` r the result is the pair (y, x + r), where y normalizes x + r: what a pre-norm transformer needs.

    Args:
        input: (*, normalized_shape); a PackedSequence or jagged nested tensor of rows; any tensor if `dim` is given.
        normalized_shape: sizes of the axes that are normalized together; an integer for one.
        weight, bias: gamma and beta, of shape `normalized_shape`.
        eps: added to the (biased) variance.
        dim: the axes of the input that hold `normalized_shape`, in its order; default the last ones.
        mask: bool, True = valid: the input's shape without its channel axis (the first one that `dim` names; without
            `dim` the last), or anything that broadcasts to the input.
        lengths: (N,) integers, valid steps of each sample: along axis 1 of (N, L, D) where the last axis is the only
            one normalized, otherwise along the last axis, as of (N, C, L).
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus"
            or "mish", applied last: torch.nn.functional's by their defaults, "gelu_tanh" gelu(approximate="tanh").
        add: like the input, added to it before the statistics are taken.
        process_group: the features are spread over the ranks of this group, unevenly if need be, and `input`,
            `normalized_shape`, `weight` and `bias` are this rank's shard; mean and variance are those of whole rows.
            All ranks must call with the same rows.
        offset: gamma is offset + weight, formed in float32 for a weight of half precision; without a weight gamma is 1.
        cast: where values are rounded to the dtype of a half precision input. "output", as None: once, behind all
            that is computed in float32. "input": before gamma and beta, which are applied by torch's rules for dtypes,
            so that a float32 weight gives a float32 result and offset + weight is formed in the weight's dtype.
        segments: (R,) integers for an input (R, normalized_shape): which graph, cloud or document a row belongs to.
            Mean and variance are then those of all rows and features of a segment, wherever its rows stand.
        scale, shift: the normalized input with gain and bias is multiplied by 1 + scale and shift is added: of shape
            (N, normalized_shape), one for each sample, also where the input is (N, ..., normalized_shape); of
            `normalized_shape`; or of as many axes as the input, to which it then broadcasts. `act` comes after.
        gate: like the input: that is then multiplied by gate_act(gate), before `act`; with `gate_first` what is
            normalized, the input (or x + r), is multiplied instead.
        gate_act: "silu", "sigmoid", "gelu", "relu" or None.

    Returns:
        Like the input (or the pair); 0 at invalid positions, which neither enter the statistics nor receive a gradient.

    Raises:
        ShapeError: shapes that do not fit.
        TypeError: dtypes that do not, an offset that is no number.
        ValueError: eps <= 0, lengths out of range, an offset that is not finite, an unknown cast.

    Source: Ba, Kiros & Hinton 2016, eq. 3 and 4; Perez et al. 2018 for scale and shift, Gu & Dao 2023 for the gate.
    """
    given = None
    if not (scale is shift is gate is None):
        given = Given(scale, shift, gate, gate_first, gate_act)
    if symbolic.is_traced(input, weight, mask, lengths, add, segments, given):
        return symbolic.call_function(
            layer_norm,
            input,
            normalized_shape,
            weight,
            bias,
            eps,
            dim=dim,
            mask=mask,
            lengths=lengths,
            act=act,
            add=add,
            process_group=process_group,
            offset=offset,
            cast=cast,
            segments=segments,
            **({} if given is None else given._asdict()),
        )
    if not isinstance(normalized_shape, (tuple, list)):
        normalized_shape = hyperparameters.sizes("normalized_shape", normalized_shape)
    config = NormConfig("layer_norm", "features", eps, act, len(normalized_shape))
    if cast is not None or type(offset) is not float or offset:
        gain.check(offset, cast)
        weight = gain.stored_around(weight, offset, cast)
    return _feature_norm(
        config, input, normalized_shape, weight, bias, dim, mask, lengths, add, process_group, cast, segments, given
    )


def rms_norm(
    input: Tensor | PackedSequence,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    add: Tensor | PackedSequence | None = None,
    process_group: Any = None,
    offset: float = 0.0,
    cast: Cast | None = None,
    segments: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    gate_first: bool = False,
    gate_act: str | None = "silu",
) -> Any:
    r"""act(gamma * x / sqrt(mean(x^2) + eps)), the mean square over the features of one sample.

    Arguments, result and errors are those of `layer_norm`, without a bias. `eps` None stands for the machine epsilon
    of the dtype that statistics are computed in (float32, or float64 for float64 inputs), as in torch.

    With an `offset` or a `cast`, an input of half precision is computed by the same operations in the same order as in
    the models of transformers that norm so, for the same bits in y and in all gradients. Without, the quickest backend
    rounds at the end, after sums in an order of its own.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    given = None
    if not (scale is shift is gate is None):
        given = Given(scale, shift, gate, gate_first, gate_act)
    if symbolic.is_traced(input, weight, mask, lengths, add, segments, given):
        return symbolic.call_function(
            rms_norm,
            input,
            normalized_shape,
            weight,
            eps,
            dim=dim,
            mask=mask,
            lengths=lengths,
            act=act,
            add=add,
            process_group=process_group,
            offset=offset,
            cast=cast,
            segments=segments,
            **({} if given is None else given._asdict()),
        )
    if eps is None:
        dtype = inputs.tensor("rms_norm", input.data if isinstance(input, PackedSequence) else input).dtype
        eps = _FLOAT64_EPS if accumulation_dtype(dtype) is torch.float64 else _FLOAT32_EPS
    # By position: by keyword a named tuple takes half a microsecond more.
    if not isinstance(normalized_shape, (tuple, list)):
        normalized_shape = hyperparameters.sizes("normalized_shape", normalized_shape)
    config = NormConfig("rms_norm", "features", eps, act, len(normalized_shape), 1, False)
    if cast is not None or type(offset) is not float or offset:
        gain.check(offset, cast)
        weight = gain.stored_around(weight, offset, cast)
        config = config._replace(as_written=cast is not None or bool(offset))
    return _feature_norm(
        config, input, normalized_shape, weight, None, dim, mask, lengths, add, process_group, cast, segments, given
    )


def _feature_norm(
    config: NormConfig,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int | Sequence[int] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    add: Any,
    process_group: Any,
    cast: Cast | None,
    segments: Any = None,
    given: Given | None = None,
) -> Any:
    """y, or with `add` the pair (y, x + add)."""
    shape = tuple(normalized_shape)
    if (
        dim is None
        and mask is None
        and lengths is None
        and add is None
        and config.act is None
        and process_group is None
        and segments is None
        and given is None
    ) and inputs.rows_fit(x, shape, weight, bias, config.eps):
        request = NormRequest(config, x, None, weight, bias)
        if cast != "input":
            return run(request, None, True).y
        return _run(request, None, True, gain.follows_rounding(x, weight, bias)).y
    if given is not None:

        def bare(x: Tensor, mask: Tensor | None) -> Any:
            return _feature_norm(
                config._replace(act=None), x, shape, None, None, dim, mask, None, None, process_group, None, segments
            )

        if segments is not None:
            _one_row_each(shape, inputs.tensor(config.op, x))
            segments_of(config.op, segments, x, dim=dim, lengths=lengths)
        options: dict[str, Any] = {"mask": mask, "lengths": lengths, "act": config.act, "add": add, "cast": cast}
        options["config"] = config if process_group is None and segments is None else None
        return of_features(config.op, bare, x, shape, weight, bias, given, eps=config.eps, dim=dim, **options)
    if segments is not None:
        inputs.tensor(config.op, x)
        _one_row_each(shape, x)
        excluded = {"dim": dim, "lengths": lengths, "process_group": process_group}
        found = segments_of(config.op, segments, x, **excluded)
    if ragged.is_ragged(x):
        if dim is not None:
            raise ValueError(f"dim={dim} needs a padded tensor: rows of a ragged one have trailing features only")

        def rows(x: Tensor, residual: Tensor | None) -> Any:
            return _feature_norm(
                config, x, normalized_shape, weight, bias, None, None, None, residual, process_group, cast
            )

        return ragged.by_rows(rows, x, mask=mask, lengths=lengths, residual=add)
    inputs.floating(config.op, x)
    hyperparameters.positive_eps(config.eps)
    inputs.like_normalized_shape(shape, weight=weight, bias=bias)
    inputs.same_shape("add", add, x)
    readable = inputs.beside(x, mask=mask, add=add, weight=weight, bias=bias)
    if config.act is not None:
        activation(config.act)
    dims = inputs.feature_dims(x, shape, dim)
    trailing = inputs.trailing_dims(x, len(shape))
    valid = formula = None
    if mask is not None or lengths is not None:
        channel_dim = (dims or trailing)[0] if dim is not None else x.dim() - 1
        valid = validity.valid_beside_features(x, mask, lengths, dims or trailing, channel_dim)
        readable = False
    if segments is not None:
        return _of_segments(config, x, found, weight, bias, valid, add, cast)
    if process_group is not None:
        formula = _over_ranks(process_group, config.op, x, dims or trailing, valid)
    affine_last = cast == "input" and gain.follows_rounding(x, weight, bias)
    if dims is None:
        x = x if config.as_written else x.contiguous()  # the bits of a sum depend on the stride that it runs along
        result = _run(NormRequest(config, x, add, weight, bias, valid), formula, readable, affine_last)
        return result.y if add is None else (result.y, result.total)
    channels_last = not x.is_contiguous()
    x, add, valid = (None if t is None else t.movedim(dims, trailing) for t in (x, add, valid))
    result = _run(NormRequest(config, x.contiguous(), add, weight, bias, valid), formula, readable, affine_last)
    outputs = tuple(t.movedim(trailing, dims) for t in ((result.y,) if add is None else (result.y, result.total)))
    if not channels_last:
        outputs = tuple(t.contiguous() for t in outputs)
    return outputs[0] if add is None else outputs


def _one_row_each(shape: tuple[int, ...], x: Tensor) -> None:
    """With segments there is nothing between the axis of the rows and those of the features."""
    if x.dim() > 1 + len(shape):
        raise ShapeError(
            f"segments number the rows of an input (R, {', '.join(map(str, shape))}), but got one of shape "
            f"{tuple(x.shape)}: make its leading axes one of rows, x.flatten(0, {x.dim() - len(shape) - 1}), and give "
            f"the segment of each, or name all of {tuple(x.shape[1:])} as normalized_shape"
        )


def _of_segments(
    config: NormConfig,
    x: Tensor,
    segments: Segments,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    add: Tensor | None,
    cast: Cast | None,
) -> Any:
    """y by the statistics of segments, or with `add` the pair (y, x + add)."""
    if add is not None:
        x = x + add if valid is None else (x + add).masked_fill(~valid, 0)
    affine_last = cast == "input" and gain.follows_rounding(x, weight, bias)
    y, _ = segment_norm(
        config.op,
        x,
        segments,
        across_features=True,
        eps=config.eps,
        center=config.center,
        weight=None if affine_last else weight,
        bias=None if affine_last else bias,
        valid=valid,
        act=None if affine_last else config.act,
    )
    y = gain.apply(y, weight, bias, valid, config.act) if affine_last else y
    return y if add is None else (y, x)


def _run(
    request: NormRequest, formula: Callable[..., Any] | None, known_readable: bool, affine_last: bool
) -> NormResult:
    """`run`; with `affine_last`, gain, bias and activation are applied to its rounded result."""
    if not affine_last:
        return run(request, formula, known_readable)
    bare = request._replace(config=request.config._replace(act=None), weight=None, bias=None)
    result = run(bare, formula, known_readable)
    y = gain.apply(result.y, request.weight, request.bias, request.mask, request.config.act)
    return result._replace(y=y)


def _over_ranks(
    process_group: Any, op: str, x: Tensor, dims: tuple[int, ...], valid: Tensor | None
) -> Callable[..., tuple[Tensor, Moments]] | None:
    """`reference.norm` of rows whose features are spread over ranks; None where this rank stands alone."""
    rows = prod([size for d, size in enumerate(x.shape) if d not in dims])
    # What ranks that hold the shards of the same rows must agree on, so that their messages are of one size.
    facts = {"number of rows": rows, "masked": int(valid is not None)}
    group = distributed.stats_group(process_group).group(op, x.device, facts)
    if group is None:
        return None
    # A row that is valid here may be partly invalid in another shard, so a mask always says how many count.
    return partial(distributed_norm, group=group, count_each=valid is not None)
