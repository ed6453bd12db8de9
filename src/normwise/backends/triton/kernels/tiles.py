"""BatchNorm, GroupNorm and InstanceNorm of (samples, channels, positions) in any memory layout.

Statistics come in two stages: each program sums a part of a block of channels, and one program a statistic merges the
parts. A statistic is of `per_group` channels next to one another, of one sample (BY_SAMPLE) or of all. Sums of parts
lie as (channels, parts) in float64; a tile is summed in WIDE, float32 unless the input is float64.

An element lies at sample * sn + channel * sc + position * sp, its byte of the mask at the same with mn, mc and mp.
Pointers that are None stand for tensors that are not there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.common import activate, times_slope


@triton.jit
def _valid(mask, sample, c, p, inside, mn, mc, mp):
    """Which elements of a tile count."""
    if mask is None:
        return inside
    else:
        return tl.load(mask + sample * mn + c[:, None] * mc + p[None, :] * mp, mask=inside, other=0) != 0


@triton.jit
def _standardized(x, stats, at, c, sample, valid, statistics, groups, per_group, BY_SAMPLE: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """((x - mean) * rstd, rstd, where their statistics lie); the mean is subtracted in two, as it is no float32."""
    s = c // per_group
    if BY_SAMPLE:
        s += sample * groups
    mean = tl.load(stats + s, mask=s < statistics, other=0)
    rstd = tl.load(stats + statistics + s, mask=s < statistics, other=0).to(WIDE)
    near = mean.to(WIDE)
    rest = (mean - near.to(tl.float64)).to(WIDE)
    v = tl.load(x + at, mask=valid, other=0).to(WIDE)
    z = ((v - near[:, None]) - rest[:, None]) * rstd[:, None]
    return tl.where(valid, z, 0.0), rstd, s


@triton.jit
def _before_act(z, residual, weight, bias, at, c, channels, valid, WIDE: tl.constexpr):
    """z * weight + bias + residual."""
    if weight is not None:
        z = z * tl.load(weight + c, mask=c < channels, other=0).to(WIDE)[:, None]
    if bias is not None:
        z = z + tl.load(bias + c, mask=c < channels, other=0).to(WIDE)[:, None]
    if residual is not None:
        z = z + tl.load(residual + at, mask=valid, other=0).to(WIDE)
    return z


@triton.jit
def moments_of_parts(
    x, mask, counts, means, squares, samples, channels, positions, parts, chunks, samples_per_part, positions_per_part,
    sn, sc, sp, mn, mc, mp, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of each part and channel: how many elements count, their mean, and the sum of squares about it.

    Tiles are centred twice, about a rough mean and about the mean of what is left, and merged by the formula of Chan,
    Golub & LeVeque 1979: no sum of squares of uncentred numbers occurs.
    """
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_sample = part // chunks * samples_per_part
    first_position = part % chunks * positions_per_part
    count = tl.zeros([BLOCK_C], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    square = tl.zeros([BLOCK_C], tl.float64)
    for n in range(samples_per_part):
        sample = first_sample + n
        end = tl.where(sample < samples, positions, 0)
        for start in range(0, positions_per_part, BLOCK_P):
            p = first_position + start + tl.arange(0, BLOCK_P)
            inside = (c < channels)[:, None] & (p < end)[None, :]
            at = sample * sn + c[:, None] * sc + p[None, :] * sp
            valid = _valid(mask, sample, c, p, inside, mn, mc, mp)
            v = tl.load(x + at, mask=valid, other=0).to(WIDE)
            new = tl.sum(valid.to(WIDE), 1)
            divisor = tl.maximum(new, 1.0)
            rough = tl.sum(v, 1) / divisor
            v = tl.where(valid, v - rough[:, None], 0.0)
            rest = tl.sum(v, 1) / divisor
            v = tl.where(valid, v - rest[:, None], 0.0)
            new = new.to(tl.float64)
            apart = rough.to(tl.float64) + rest.to(tl.float64) - mean
            apart = tl.where(new > 0, apart, 0.0)
            share = new / tl.maximum(count + new, 1.0)
            square += tl.sum(v * v, 1).to(tl.float64) + apart * apart * (count * share)
            mean += apart * share
            count += new
    at = c * parts + part
    tl.store(counts + at, count, mask=c < channels)
    tl.store(means + at, mean, mask=c < channels)
    tl.store(squares + at, square, mask=c < channels)


@triton.jit
def merge_moments(
    counts, means, squares, stats, moments, statistics, groups, per_group, parts, parts_of_sample,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """stats (2, statistics): mean and 1 / sqrt(var + eps); moments (2, statistics): var and count."""
    s = tl.program_id(0).to(tl.int64)
    first_channel = s % groups * per_group
    first_part = s // groups * parts_of_sample
    pieces = parts_of_sample * per_group
    count = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    mean = count
    square = count
    for start in range(0, pieces, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        at = (first_channel + k // parts_of_sample) * parts + first_part + k % parts_of_sample
        n = tl.load(counts + at, mask=k < pieces, other=0)
        m = tl.load(means + at, mask=k < pieces, other=0)
        new = tl.sum(n, 0)
        middle = tl.sum(n * m, 0) / tl.maximum(new, 1.0)
        off = tl.where(n > 0, m - middle, 0.0)
        new_square = tl.sum(tl.load(squares + at, mask=k < pieces, other=0) + n * off * off, 0)
        apart = tl.where(new > 0, middle - mean, 0.0)
        share = new / tl.maximum(count + new, 1.0)
        square += new_square + apart * apart * (count * share)
        mean += apart * share
        count += new
    var = square / tl.maximum(count, 1.0)
    tl.store(stats + s, mean)
    # A variance that has left the range gives NaN: 1 over infinity would make zeros of an input that exploded.
    tl.store(stats + statistics + s, 1.0 / tl.sqrt(var + EPS) + var * 0.0)
    tl.store(moments + s, var)
    tl.store(moments + statistics + s, count)


@triton.jit
def given_stats(running_mean, running_var, stats, channels, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """stats (2, channels) of running averages."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(running_mean + c, mask=c < channels, other=0).to(tl.float64)
    var = tl.load(running_var + c, mask=c < channels, other=1).to(tl.float64)
    tl.store(stats + c, mean, mask=c < channels)
    tl.store(stats + channels + c, 1.0 / tl.sqrt(var + EPS) + var * 0.0, mask=c < channels)


@triton.jit
def tiles_forward(
    x, residual, mask, weight, bias, stats, y, channels, positions, chunks, statistics, groups, per_group,
    sn, sc, sp, mn, mc, mp, ACT: tl.constexpr, BY_SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * rstd * weight + bias + residual), a tile a program."""
    sample = tl.program_id(0).to(tl.int64) // chunks
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0).to(tl.int64) % chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    at = sample * sn + c[:, None] * sc + p[None, :] * sp
    valid = _valid(mask, sample, c, p, inside, mn, mc, mp)
    z, _, _ = _standardized(x, stats, at, c, sample, valid, statistics, groups, per_group, BY_SAMPLE, WIDE)
    z = activate(_before_act(z, residual, weight, bias, at, c, channels, valid, WIDE), ACT)
    tl.store(y + at, tl.where(valid, z, 0.0), mask=inside)


@triton.jit
def gradients_of_parts(
    dy, x, residual, mask, weight, bias, stats, counts, dbiases, dweights, samples, channels, positions, parts, chunks,
    samples_per_part, positions_per_part, statistics, groups, per_group, sn, sc, sp, mn, mc, mp,
    ACT: tl.constexpr, BY_SAMPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of each part and channel: how many elements count, and the sums of g and g * z, where g = dy * act'."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_sample = part // chunks * samples_per_part
    first_position = part % chunks * positions_per_part
    count = tl.zeros([BLOCK_C], tl.float64)
    sum_g = tl.zeros([BLOCK_C], tl.float64)
    sum_gz = tl.zeros([BLOCK_C], tl.float64)
    for n in range(samples_per_part):
        sample = first_sample + n
        end = tl.where(sample < samples, positions, 0)
        for start in range(0, positions_per_part, BLOCK_P):
            p = first_position + start + tl.arange(0, BLOCK_P)
            inside = (c < channels)[:, None] & (p < end)[None, :]
            at = sample * sn + c[:, None] * sc + p[None, :] * sp
            valid = _valid(mask, sample, c, p, inside, mn, mc, mp)
            z, _, _ = _standardized(x, stats, at, c, sample, valid, statistics, groups, per_group, BY_SAMPLE, WIDE)
            g = tl.load(dy + at, mask=valid, other=0).to(WIDE)
            if ACT is not None:
                before = _before_act(z, residual, weight, bias, at, c, channels, valid, WIDE)
                g = tl.where(valid, times_slope(g, before, ACT), 0.0)
            sum_g += tl.sum(g, 1).to(tl.float64)
            sum_gz += tl.sum(g * z, 1).to(tl.float64)
            count += tl.sum(valid.to(WIDE), 1).to(tl.float64)
    at = c * parts + part
    tl.store(counts + at, count, mask=c < channels)
    tl.store(dbiases + at, sum_g, mask=c < channels)
    tl.store(dweights + at, sum_gz, mask=c < channels)


@triton.jit
def merge_gradients(
    counts, dbiases, dweights, weight, means, statistics, groups, per_group, parts, parts_of_sample,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """means (2, statistics): E[g weight] and E[g weight z] over the elements that count."""
    s = tl.program_id(0).to(tl.int64)
    first_channel = s % groups * per_group
    first_part = s // groups * parts_of_sample
    pieces = parts_of_sample * per_group
    count = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    sum_g = count
    sum_gz = count
    for start in range(0, pieces, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        c = first_channel + k // parts_of_sample
        at = c * parts + first_part + k % parts_of_sample
        g = tl.load(dbiases + at, mask=k < pieces, other=0)
        gz = tl.load(dweights + at, mask=k < pieces, other=0)
        if weight is not None:
            w = tl.load(weight + c, mask=k < pieces, other=0).to(tl.float64)
            g = g * w
            gz = gz * w
        sum_g += tl.sum(g, 0)
        sum_gz += tl.sum(gz, 0)
        count += tl.sum(tl.load(counts + at, mask=k < pieces, other=0), 0)
    count = tl.maximum(count, 1.0)
    tl.store(means + s, sum_g / count)
    tl.store(means + statistics + s, sum_gz / count)


@triton.jit
def tiles_backward(
    dy, x, residual, mask, weight, bias, stats, means, dx, dresidual, channels, positions, chunks, statistics, groups,
    per_group, sn, sc, sp, mn, mc, mp, ACT: tl.constexpr, BY_SAMPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g weight - E[g weight] - z * E[g weight z]), without the means where statistics were given (None);
    dresidual = g = dy * act'. A tile a program."""
    sample = tl.program_id(0).to(tl.int64) // chunks
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0).to(tl.int64) % chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    at = sample * sn + c[:, None] * sc + p[None, :] * sp
    valid = _valid(mask, sample, c, p, inside, mn, mc, mp)
    z, rstd, s = _standardized(x, stats, at, c, sample, valid, statistics, groups, per_group, BY_SAMPLE, WIDE)
    g = tl.load(dy + at, mask=valid, other=0).to(WIDE)
    if ACT is not None:
        before = _before_act(z, residual, weight, bias, at, c, channels, valid, WIDE)
        g = tl.where(valid, times_slope(g, before, ACT), 0.0)
    if dresidual is not None:
        tl.store(dresidual + at, g, mask=inside)
    if weight is not None:
        g = g * tl.load(weight + c, mask=c < channels, other=0).to(WIDE)[:, None]
    if means is not None:
        mean_g = tl.load(means + s, mask=s < statistics, other=0).to(WIDE)
        mean_gz = tl.load(means + statistics + s, mask=s < statistics, other=0).to(WIDE)
        g = (g - mean_g[:, None]) - z * mean_gz[:, None]
    tl.store(dx + at, tl.where(valid, g * rstd[:, None], 0.0), mask=inside)
