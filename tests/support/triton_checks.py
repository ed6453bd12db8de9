"""One call of the Triton kernels of a family, forward and backward, every output against the reference in float64."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import Gate, NormConfig, NormRequest
from normwise.backends.reference.norms import FAMILIES as REFERENCE
from normwise.backends.reference.norms import gated
from normwise.backends.triton.norms import FAMILIES, supports, supports_gate
from normwise.ops.norm import running_stats
from support.kernel_truth import leaf, opened
from support.tolerances import assert_close

EPS, MOMENTUM = 1e-5, 0.3
OPS = {"features": "layer_norm", "groups": "group_norm", "channels": "batch_norm"}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def coarser(stored: torch.dtype, of_input: torch.dtype) -> torch.dtype:
    """What a sum that is stored in one dtype is held to: no more than it was computed in."""
    return max(stored, wide(of_input), key=lambda dtype: torch.finfo(dtype).eps)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t` with its channels last in memory, as every second element of a larger tensor, or as it is."""
    if layout == "channels last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([t, t], -1)[..., 0]
    return t


def check(
    family: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    axes: int = 1,
    groups: int = 1,
    center: bool = True,
    act: str | None = None,
    residual: bool = False,
    weight: bool = True,
    bias: bool = True,
    mask: Tensor | None = None,
    dtotal: bool = False,
    training: bool = True,
    running: bool = False,
    running_dtype: torch.dtype = torch.float32,
    momentum: float | Tensor = MOMENTUM,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
    shift: float = 0.0,
    eps: float = EPS,
    gain_axes: int | None = None,
    gate_first: bool | None = None,
    gate_act: str | None = "silu",
) -> None:
    """Everything that a mask (broadcastable, as many axes) leaves out holds NaN or infinity.

    `gain_axes`: for each index of so many leading axes there is a gain and bias; `gate_first`: None for no gate.
    """
    config = NormConfig(OPS[family], family, eps, act, axes, groups, center, training, momentum)  # type: ignore[arg-type]
    x, dy, r, dt = (laid_out((torch.randn(shape) + add).to(dtype), layout) for add in (shift, 0, 0, 0))
    of = shape[len(shape) - axes :] if family == "features" else shape[1:2]
    if gain_axes is not None:
        of = (*shape[:gain_axes], *(1,) * (len(shape) - axes - gain_axes), *of)
    w, b = torch.randn(2, *of).to(parameter_dtype or dtype)
    gate = None
    if gate_first is not None:
        gate = Gate(laid_out(torch.randn(shape).to(dtype), layout), gate_act, gate_first)
    if mask is not None:
        off = ~mask.expand(shape)
        for t, poison in ((x, torch.nan), (dy, torch.inf), (r, torch.nan), (dt, torch.nan)):
            t[off] = poison
        if gate is not None:
            gate.values[off] = torch.nan
    r = r if residual else None
    w, b = w if weight else None, b if bias else None
    averages: Any = [None] * 3
    if running or not training:
        averages = [torch.randn(of).to(running_dtype), (torch.rand(of) + 0.5).to(running_dtype), torch.tensor(4)]
    old = [None if t is None else t.clone() for t in averages]

    request = NormRequest(config, x, r, w, b, mask, *averages)
    assert supports(request) is None
    assert gate is None or supports_gate(config, x, gate) is None
    and_gate = () if gate is None else (gate,)
    out = FAMILIES[family].forward(*request, True, *and_gate)
    after = None if family == "features" or act is None else r
    saved = (config, out.total, after, w, b, mask, out.stats)
    got = FAMILIES[family].backward(*saved, dy, dt if dtotal else None, *and_gate)

    # What is normalized is the sum as it is stored.
    entering, added = x, r
    if family == "features" and r is not None:
        entering, added = (x.to(wide(dtype)) + r.to(wide(dtype))).to(dtype), None
        total = entering if mask is None else torch.where(mask, entering, 0)
        assert_close(out.total, total, name="total")
    leaves = [leaf(t) for t in (entering, added, w, b)]
    wide_averages = [None if t is None else t.double() for t in old[:2]]
    values = None if gate is None else leaf(gate.values)
    if values is None:
        truth = REFERENCE[family].forward(config, *leaves, mask, *wide_averages, None, True)
    else:
        s, _, *gains = leaves
        u = s if mask is None else torch.where(mask, s, 0)
        by = opened(values, gate_act, mask)
        truth = REFERENCE[family].forward(
            config, u * by if gate_first else u, None, *gains, mask, None, None, None, True
        )
        truth = truth._replace(y=gated(config, s, *gains, mask, Gate(values, gate_act, gate_first)))
        leaves.append(values)
    upstream = dy.double() if mask is None else torch.where(mask, dy.double(), 0)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(truth.y, wanted, upstream) if x.numel() else [torch.zeros_like(t) for t in wanted])
    dx, dresidual, dweight, dbias, *dgate = (None if t is None else next(found) for t in leaves)
    assert dx is not None
    if dtotal:
        dx = dx + (dt.double() if mask is None else torch.where(mask, dt.double(), 0))

    assert out.y.dtype == dtype
    assert out.y.stride() == out.total.stride()
    count = prod(shape)
    gain = float(w.abs().max()) if weight and count else 1.0
    assert_close(out.y, truth.y, count=count, scale=max(1.0, gain), name="y")
    # The size of what the input gradient subtracts, of which little may be left.
    rstd = 1.0
    if truth.moments is not None and count and training:
        counted = truth.moments.count.expand_as(truth.moments.var) > 0
        rstd = float(torch.where(counted, (truth.moments.var + eps).rsqrt(), 0).max())
    elif not training:
        rstd = float((wide_averages[1] + eps).rsqrt().max()) if count else 1.0
    up = float(upstream.abs().max()) if count else 0.0
    if values is not None:
        largest = float(by.detach().abs().max())
        of_gate = float(torch.nan_to_num(s.detach()).abs().max()) * rstd if gate_first else 1.0
        of_gate = up * gain * max(of_gate, float(count) ** 0.5)
        assert_close(got.gate, dgate[0], kind="grad", count=count, scale=of_gate, name="dgate")
        up *= max(largest, 1.0)
    assert_close(got.x, dx, kind="grad", count=count, scale=max(up * rstd * gain, 1.0), name="dx")
    for name, mine, expected in (("dweight", got.weight, dweight), ("dbias", got.bias, dbias)):
        assert (mine is None) == (expected is None)
        if mine is not None:
            assert mine.shape == of
            assert_close(
                mine, expected, kind="grad", dtype=coarser(mine.dtype, dtype), count=count, scale=up, name=name
            )
    if dresidual is not None and act is not None:
        assert_close(got.residual, dresidual, kind="grad", count=1, name="dresidual")
    if running and training:
        _check_running(config, averages, old, out, truth.moments)
    elif averages[0] is not None:
        assert all(torch.equal(new, before) for new, before in zip(averages, old, strict=True))


def _check_running(config: NormConfig, averages: Any, old: Any, out: Any, moments: Any) -> None:
    """Against the definition, in float64."""
    expected = [t.double() for t in old[:2]]
    if config.family == "groups":
        # The kernels give the moments, which ops moves the averages by.
        assert out.stats_updated is None
        updated = running_stats.update_from_moments(config, *averages, out.moments)
        running_stats.update_over_samples(*expected, moments, config.momentum)
        assert updated is True
    else:
        assert running_stats.update_averages(*expected, moments, config.momentum) == bool(out.stats_updated)
        assert int(averages[2]) == int(old[2]) + int(out.stats_updated)
    for name, new, truth in zip(("running_mean", "running_var"), averages, expected, strict=False):
        held_to = coarser(new.dtype, out.y.dtype)
        assert_close(new, truth, dtype=held_to, count=16, name=name)
