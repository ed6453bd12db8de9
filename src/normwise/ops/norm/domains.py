"""BatchNorm of several domains: the third answer, "where the statistics come from", sample by sample."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.backends.activations import add_residual_and_activate
from normwise.backends.protocol import Moments, NormConfig, accumulation_dtype, momentum_now
from normwise.backends.reference.moments import rstd_of
from normwise.ops import conversion, dispatch, inputs, ragged
from normwise.ops.errors import ShapeError
from normwise.ops.norm import running_stats
from normwise.ops.norm.running_stats import Updated
from normwise.ops.norm.segments import Segments, segment_norm


def one_for_all(domain: Any) -> Any:
    """`domain` as Python's own number, if it is one number that can be seen; otherwise as it is.

    Raises:
        TypeError: a bool.
    """
    if isinstance(domain, bool):
        raise TypeError(f"domain must be a number, or integers, one for each sample, but got {domain}")
    if isinstance(domain, Tensor):
        one = domain.dim() == 0 and domain.dtype in _INTEGERS and dispatch.values_visible(domain)
        return int(domain) if one else domain
    if domain is None or isinstance(domain, int | torch.SymInt | Sequence):
        return domain
    try:
        return operator.index(domain)
    except TypeError:
        return domain


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def one_domain_each(domain: Any, samples: int, domains: int, device: torch.device) -> Tensor:
    """`domain`, also one number for all, as a tensor of one number in [0, domains) for each sample.

    Raises:
        TypeError: not integers. ShapeError: not one for each sample. ValueError: out of range, on the CPU: elsewhere a
            look would wait for the device.
    """
    found = conversion.as_tensor("domain", domain, "a number, or integers, one for each sample")
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"domain must be of an integer dtype, but got {found.dtype}: give the number of the domain")
    if found.dim() == 0:
        found = found.expand(samples)
    if tuple(found.shape) != (samples,):
        raise ShapeError(
            f"domain must be one number, or of shape ({samples},), one for each sample, but got {tuple(found.shape)}"
        )
    if samples and dispatch.values_visible(found):
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= domains:
            raise ValueError(f"domain must lie in [0, {domains}), but got values from {low} to {high}")
    return found.to(device, torch.int64)


def batch_norm_of_domains(
    input: Any,
    domain: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    *,
    num_batches_tracked: Tensor | None,
    mask: Any,
    lengths: Any,
    act: str | None,
    residual: Any,
    correction: int,
    domains: int,
    ranks: Sequence[int] | None,
    excluded: Mapping[str, Any],
) -> tuple[Tensor, Updated]:
    """`batch_norm` of (N, C, ...), each sample among those of its domain, and whether the running statistics were
    updated. A single value of a domain, which has no deviation, gives the bias.

    Args:
        domain: (N,) integers.
        running_mean, running_var: (domains, C), num_batches_tracked: (domains,), updated in place in training: of a
            domain without a sample they stay. weight, bias: (C,) or (domains, C).
        excluded: arguments that go with one domain only.
    """
    for name, value in excluded.items():
        if value is not None:
            raise ValueError(
                f"batch_norm: {name} goes with one domain for the whole batch, not with one for each sample"
            )
    if ragged.is_ragged(input):
        raise ValueError(
            "batch_norm: rows of a ragged input do not tell their sample: give a padded input, or one domain for all"
        )
    x = inputs.tensor("batch_norm", input)
    if ranks is not None:
        inputs.rank(x, ranks)
    running = [None if t is None else t[0] for t in (running_mean, running_var)]
    vectors = [t if t is None or t.dim() == 1 else t[0] for t in (weight, bias)]
    number = momentum if isinstance(momentum, float | int) else 0.0
    given = (number, eps, mask, lengths, act, residual)
    valid, _ = inputs.validate_channels("batch_norm", x, running[0], running[1], vectors[0], vectors[1], *given)
    domain = one_domain_each(domain, x.shape[0], domains, x.device)
    dispatch.reference_only("batch_norm", "samples of several domains in one call are the reference's alone")
    positions = x.shape[2:]

    def rows(t: Tensor) -> Tensor:
        return t.movedim(1, -1).reshape(-1, t.shape[1])

    of_row = domain.repeat_interleave(positions.numel()) if positions.numel() != 1 else domain
    flags = None if valid is None else rows(valid.expand(x.shape[0], valid.shape[1], *positions))
    more = None if residual is None else rows(residual)
    gain, shift = (t if t is None or t.dim() == 1 else t.index_select(0, of_row) for t in (weight, bias))
    batch_statistics = training or running_mean is None
    if batch_statistics:
        options: dict[str, Any] = {"weight": gain, "bias": shift, "valid": flags, "act": act, "residual": more}
        y, moments = segment_norm(
            "batch_norm", rows(x), Segments(of_row, domains), across_features=False, eps=eps, **options
        )
    else:
        assert running_var is not None
        wide = accumulation_dtype(x.dtype)
        mean, var = (t.to(wide).index_select(0, of_row) for t in (running_mean, running_var))  # type: ignore[union-attr]
        values = rows(x).to(wide)
        y = ((values if flags is None else values.masked_fill(~flags, 0)) - mean) * rstd_of(var, eps)
        y = y if gain is None else y * gain
        y = y if shift is None else y + shift
        y = y if flags is None else y.masked_fill(~flags, 0)
        y = add_residual_and_activate(y, more, act, flags).to(x.dtype)
    y = y.reshape(x.shape[0], *positions, x.shape[1]).movedim(-1, 1)
    if not batch_statistics or running_mean is None or running_var is None or running_stats.is_recomputing():
        return y, True
    return y, _update(running_mean, running_var, num_batches_tracked, momentum, moments, correction)


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | Tensor | None,
    moments: Moments,
    correction: int,
) -> Updated:
    """Of each domain that has a sample; of none where one has a mean or variance that is not finite."""
    seen = moments.count.expand_as(moments.mean).amax(1) > 0
    if momentum is None:
        momentum = (
            momentum_now(None, num_batches_tracked, running_mean.dtype)[:, None].expand_as(running_mean).flatten()
        )
    config = NormConfig("batch_norm", "channels", 0.0, momentum=momentum)
    flat = Moments(*(m.expand_as(moments.mean).reshape(-1) for m in moments))
    stats = (running_mean.view(-1), running_var.view(-1), None)
    updated = running_stats.update_from_moments(config, *stats, flat, correction)
    if num_batches_tracked is not None and updated is not False:
        num_batches_tracked.add_(seen if updated is True else seen & updated)
    return updated
