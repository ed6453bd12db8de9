"""One call of a kernel, forward and backward, with every output against the truth in float64."""

from __future__ import annotations

from math import prod

import torch

from normwise.backends.protocol import Gate
from support import kernel_truth as truth
from support.kernel_calls import (
    channels_backward,
    channels_forward,
    groups_backward,
    groups_forward,
    rows_backward,
    rows_forward,
)
from support.tolerances import assert_close

EPS, MOMENTUM = 1e-5, 0.3


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters' gradients and running averages beside inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rows(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    center: bool = True,
    act: str | None = None,
    residual: bool = False,
    masked: bool = False,
    affine: bool = True,
    dsum: bool = False,
    offset: int = 0,
    threads: int = 1,
    groups: int | None = None,
    gate_first: bool | None = None,
    gate_act: str | None = "silu",
) -> None:
    """One call forward and backward, every output against the truth.

    `groups`: how many groups of rows have a gain and bias each; `gate_first`: None for no gate.
    """
    torch.set_num_threads(threads)
    x = truth.tensor(rows, cols, dtype=dtype, offset=offset)
    r = truth.tensor(rows, cols, dtype=dtype) if residual else None
    dy = truth.tensor(rows, cols, dtype=dtype, offset=offset)
    ds = truth.tensor(rows, cols, dtype=dtype) if dsum else None
    of_gain = (cols,) if groups is None else (groups, 1, cols)
    weight, bias = torch.randn(2, *of_gain).to(dtype) if affine else (None, None)
    gate = None
    if gate_first is not None:
        gate = Gate(truth.tensor(rows, cols, dtype=dtype, offset=offset), gate_act, gate_first)
    mask = torch.rand(rows) < 0.6 if masked else None
    if mask is not None:
        x[~mask] = float("nan")
        dy[~mask] = float("inf")
        if gate is not None:
            gate.values[~mask] = float("nan")

    given = {"center": center, "act": act, "mask": mask, "gate": gate}
    out = rows_forward(x, cols, weight, bias, EPS, residual=r, **given)
    got = rows_backward(dy, out.sum, out.stats, cols, weight, bias, dsum=ds, **given)

    added = (
        x if r is None else (x.double() + r.double()).to(torch.float32 if dtype == torch.bfloat16 else dtype).to(dtype)
    )
    s, w, b = truth.leaf(added), truth.leaf(weight), truth.leaf(bias)
    valid = None if mask is None else mask[:, None]
    values = None if gate is None else truth.leaf(gate.values)
    opened = torch.ones(()) if values is None else truth.opened(values, gate_act, valid)
    u = s if not gate_first else (s if valid is None else torch.where(valid, s, 0)) * opened
    z, mean, rstd = truth.standardize(u, [1], valid, EPS, center)
    if w is not None:
        z = z * _of_rows(w, rows) + _of_rows(b, rows)
    y = truth.activate(z if gate_first else z * opened, act, valid)
    upstream = dy.double() if valid is None else torch.where(valid, dy.double(), 0)
    leaves = {"ds": s, "dweight": w, "dbias": b, "dgate": values}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))
    if ds is not None:
        expected["ds"] = expected["ds"] + (ds.double() if valid is None else torch.where(valid, ds.double(), 0))

    assert_close(out.y, y, count=cols, name="y")
    if residual:
        assert_close(out.sum, added if valid is None else torch.where(valid, added, 0), name="sum")
    # The mean of a single row may be near 0: its rounding counts against the size of what it adds up.
    size = float(torch.nan_to_num(added.detach()).abs().max()) if rows else 0.0
    for got_one, stat, added_up in zip(out.stats, (mean, rstd), (size, None), strict=True):
        stat = stat[:, 0] if mask is None else torch.where(mask, stat[:, 0], 0)
        assert_close(got_one, stat, dtype=wide(dtype), count=cols, scale=added_up, name="stats")
    # What an input gradient adds up and subtracts; of a single column the exact sum is 0.
    of_u = (upstream * rstd * (1 if w is None else _of_rows(w, rows))).detach().abs()
    scale = float((of_u * opened.detach().abs()).max()) if rows else 0.0
    # Slopes are at most 1.13; of a gate that comes first they are times the input, of one that comes last the norm.
    of_gate = of_u * torch.nan_to_num(added.double()).abs() if gate_first else upstream * z.detach()
    sizes = {"ds": scale, "dgate": float(of_gate.abs().max()) if rows else 0.0}
    for name, g in zip(("ds", "dweight", "dbias", "dgate"), got, strict=True):
        if name in expected:
            kind_dtype = dtype if name in sizes else wide(dtype)
            size = sizes.get(name)
            assert_close(g, expected[name], kind="grad", dtype=kind_dtype, count=max(rows, cols), scale=size, name=name)
        else:
            assert g is None


def _of_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    """A gain of (cols,), or (groups, 1, cols) spread over the rows of each group."""
    return t if t.dim() == 1 else t.expand(-1, rows // len(t), -1).flatten(0, 1)


def check_groups(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    *,
    act: str | None = None,
    residual: bool = False,
    masked: bool = False,
    affine: bool = True,
    channels_last: bool = False,
    offset: int = 0,
    threads: int = 1,
) -> None:
    """One call forward and backward, every output against the truth."""
    torch.set_num_threads(threads)
    batch, channels, positions = shape[0], shape[1], prod(shape[2:])
    wider = wide(dtype)
    x, dy = (truth.tensor(*shape, dtype=dtype, offset=offset, channels_last=channels_last) for _ in range(2))
    r = truth.tensor(*shape, dtype=dtype, channels_last=channels_last) if residual else None
    weight, bias = torch.randn(2, channels).to(dtype) if affine else (None, None)
    mask, valid = None, None
    if masked:
        mask = torch.rand(batch, *shape[2:]) < 0.6
        mask[0] = False  # a sample without a valid position
        valid = mask.unsqueeze(1).expand(shape)
        x, dy = torch.where(valid, x, float("nan")), torch.where(valid, dy, float("inf"))

    settings = {"act": act, "residual": r, "mask": mask}
    y, stats = groups_forward(x, groups, weight, bias, EPS, **settings)
    got = groups_backward(dy, x, stats, groups, weight, bias, **settings)

    s, w, b, rd = (truth.leaf(t) for t in (x, weight, bias, r))
    by_group = (batch, groups, channels // groups, positions)
    keep = None if valid is None else valid.reshape(by_group)
    z, mean, rstd = truth.standardize(s.reshape(by_group), [2, 3], keep, EPS)
    z = z.reshape(shape)
    if w is not None:
        view = (1, channels, *(1,) * (len(shape) - 2))
        z = z * w.view(view) + b.view(view)
    expected_y = truth.activate(z if rd is None else z + rd, act, valid)
    upstream = dy.double() if valid is None else torch.where(valid, dy.double(), 0)
    leaves = {"dx": s, "dweight": w, "dbias": b, "dresidual": rd}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    expected = dict(zip(leaves, torch.autograd.grad(expected_y, list(leaves.values()), upstream), strict=True))

    count = max(batch, channels // groups) * positions
    assert y.stride() == x.stride() or not channels_last
    assert_close(y, expected_y, count=count, name="y")
    empty = torch.zeros_like(mean) if keep is None else (keep.sum([2, 3], keepdim=True) == 0).double()
    assert_close(stats[0], mean.reshape(-1), dtype=wider, count=count, name="mean")
    assert_close(stats[1], (rstd * (1 - empty)).reshape(-1), dtype=wider, count=count, name="rstd")
    scale = float(upstream.abs().max() * rstd.detach().max()) * (1.0 if w is None else float(weight.abs().max()))
    for name, g in zip(("dx", "dweight", "dbias", "dresidual"), got, strict=True):
        if name not in expected:
            assert g is None
            continue
        held_to = wider if name in ("dweight", "dbias") else dtype
        size = {"dx": scale, "dweight": float(upstream.abs().max())}.get(name)
        assert_close(g, expected[name], kind="grad", dtype=held_to, count=count, scale=size, name=name)


def check_channels(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    training: bool = True,
    act: str | None = None,
    residual: bool = False,
    masked: bool = False,
    affine: bool = True,
    by_sample: bool = False,
    channels_last: bool = False,
    offset: int = 0,
    threads: int = 1,
) -> None:
    """One call forward and backward, every output against the truth; `by_sample`: each sample has a gain and bias."""
    torch.set_num_threads(threads)
    channels, positions = shape[1], prod(shape[2:])
    wider = wide(dtype)
    x, dy = (truth.tensor(*shape, dtype=dtype, offset=offset, channels_last=channels_last) for _ in range(2))
    r = truth.tensor(*shape, dtype=dtype, channels_last=channels_last) if residual else None
    view = (shape[0] if by_sample else 1, channels, *(1,) * (len(shape) - 2))
    weight, bias = torch.randn(2, *(view if by_sample else (channels,))).to(dtype) if affine else (None, None)
    running_mean, running_var = torch.randn(channels, dtype=wider), torch.rand(channels, dtype=wider) + 0.5
    old_mean, old_var = running_mean.double().clone(), running_var.double().clone()
    mask, valid = None, None
    if masked:
        mask = torch.rand(shape[0], *shape[2:]) < 0.6
        mask.view(-1)[:2] = True
        valid = mask.unsqueeze(1).expand(shape)
        x, dy = torch.where(valid, x, float("nan")), torch.where(valid, dy, float("inf"))

    settings = {"act": act, "residual": r, "mask": mask}
    y, stats, _ = channels_forward(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS, **settings)
    got = channels_backward(dy, x, stats, weight, bias, training, **settings)

    dims = [0, *range(2, len(shape))]
    s, w, b, rd = (truth.leaf(t) for t in (x, weight, bias, r))
    if training:
        z, mean, rstd = truth.standardize(s, dims, valid, EPS)
        count = shape[0] * positions if mask is None else int(mask.sum())
        new_mean = (1 - MOMENTUM) * old_mean + MOMENTUM * mean.reshape(-1)
        unbiased = (rstd.reshape(-1) ** -2 - EPS) * count / max(count - 1, 1)
        new_var = (1 - MOMENTUM) * old_var + MOMENTUM * unbiased
    else:
        mean, rstd = (v.view(1, *view[1:]) for v in (old_mean, (old_var + EPS).rsqrt()))
        z = ((s if valid is None else torch.where(valid, s, 0)) - mean) * rstd
        new_mean, new_var = old_mean, old_var
    if w is not None:
        z = z * w.view(view) + b.view(view)
    expected_y = truth.activate(z if rd is None else z + rd, act, valid)
    upstream = dy.double() if valid is None else torch.where(valid, dy.double(), 0)
    leaves = {"dx": s, "dweight": w, "dbias": b, "dresidual": rd}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    expected = dict(zip(leaves, torch.autograd.grad(expected_y, list(leaves.values()), upstream), strict=True))

    rstd = rstd.detach()
    count = shape[0] * positions
    assert y.stride() == x.stride() or not channels_last
    assert_close(y, expected_y, count=count, name="y")
    assert_close(stats[0], mean.reshape(-1), dtype=wider, count=count, name="mean")
    assert_close(stats[1], rstd.reshape(-1), dtype=wider, count=count, name="rstd")
    assert_close(running_mean, new_mean, count=count, name="running_mean")
    assert_close(running_var, new_var, count=count, name="running_var")
    scale = float((upstream * rstd * (1 if w is None else w.detach().view(view))).abs().max()) if count else 0.0
    for name, g in zip(("dx", "dweight", "dbias", "dresidual"), got, strict=True):
        if name not in expected:
            assert g is None
            continue
        held_to = wider if name in ("dweight", "dbias") else dtype
        size = {"dx": scale, "dweight": float(upstream.abs().max()), "dbias": float(upstream.abs().max())}
        assert_close(g, expected[name], kind="grad", dtype=held_to, count=count, scale=size.get(name), name=name)
