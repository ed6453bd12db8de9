"""BatchNorm, GroupNorm and InstanceNorm by the Triton kernels, against the reference in float64."""

from __future__ import annotations

from math import prod

import pytest
import torch

from normwise.backends.protocol import NormConfig, NormRequest
from normwise.backends.triton import settings
from normwise.backends.triton.norms import FAMILIES, supports
from support.backends import DTYPES
from support.kernel_truth import ACTS, FURTHER_ACTS
from support.tolerances import assert_close
from support.triton_checks import check

SHAPES = [(4, 6, 5, 7), (2, 3, 1023), (3, 5, 63), (1, 1, 7), (5, 17, 16), (9, 7), (2, 70), (12, 3), (2, 1, 5000)]
EMPTY = [(0, 3), (0, 3, 5), (2, 3, 0), (2, 0, 5), (2, 0)]
LAYOUTS = ["contiguous", "channels last", "strided"]


def mask_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """ "positions": the same for all channels; "samples"; "elements"; "last axis"."""
    if not kind:
        return None
    batch, _, *spatial = shape
    of = {
        "positions": (batch, 1, *spatial),
        "samples": (batch, *(1,) * (len(shape) - 1)),
        "elements": shape,
        "last axis": (1,) * (len(shape) - 1) + (shape[-1] if spatial else 1,),
    }[kind]
    mask = torch.rand(of) < 0.6
    mask.view(-1)[:2] = True
    return mask


def groups_of(shape: tuple[int, ...]) -> int:
    return next(g for g in (3, 2, 5, 1) if shape[1] % g == 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["channels", "groups"])
def test_any_shape(family: str, shape: tuple[int, ...], layout: str) -> None:
    running = family == "channels"
    check(family, shape, layout=layout, groups=groups_of(shape), running=running, act="relu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 6, 1, 63), (2, 3, 1023), (9, 7)], ids=str)
@pytest.mark.parametrize("family", ["channels", "groups"])
def test_any_dtype(family: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(family, shape, dtype, groups=groups_of(shape), running=family == "channels")


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("family", ["channels", "groups"])
def test_without_an_element(family: str, shape: tuple[int, ...]) -> None:
    check(family, shape, running=family == "channels", residual=True, act="silu")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("masked", ["", "positions"])
def test_mask_residual_and_activation_are_fused(act: str | None, masked: str) -> None:
    shape = (4, 6, 37)
    mask = mask_of(masked, shape)
    check("channels", shape, act=act, mask=mask, residual=True, running=True)
    check("channels", shape, act=act, mask=mask, training=False)
    check("groups", shape, act=act, mask=mask, residual=True, groups=groups_of(shape))


@pytest.mark.parametrize("act", FURTHER_ACTS)
def test_further_activations_are_fused(act: str) -> None:
    shape = (4, 6, 37)
    check("channels", shape, act=act, mask=mask_of("positions", shape), residual=True)
    check("groups", shape, torch.float64, act=act, groups=groups_of(shape))


@pytest.mark.parametrize("masked", ["positions", "samples", "elements", "last axis"])
@pytest.mark.parametrize("shape", [(4, 6, 37), (9, 19), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_every_mask(masked: str, shape: tuple[int, ...], layout: str) -> None:
    act = "leaky_relu"
    mask = mask_of(masked, shape)
    check("channels", shape, act=act, mask=mask, layout=layout, residual=True, running=True)
    check("channels", shape, act=act, mask=mask, layout=layout, training=False)
    check("groups", shape, act=act, mask=mask, layout=layout, residual=True, groups=groups_of(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_every_dtype_with_mask_and_residual(dtype: torch.dtype, layout: str, training: bool) -> None:
    shape = (5, 6, 37)
    mask = mask_of("positions", shape)
    check(
        "channels", shape, dtype, layout=layout, mask=mask, residual=True, act="gelu", training=training, running=True
    )
    if training:
        check("groups", shape, dtype, layout=layout, mask=mask, residual=True, act="gelu", groups=2)


@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("training", [False, True])
def test_gain_and_bias_may_be_missing(weight: bool, bias: bool, training: bool) -> None:
    check("channels", (3, 5, 9), weight=weight, bias=bias, training=training, act="silu")
    check("groups", (3, 6, 9), weight=weight, bias=bias, act="silu", groups=3)


def test_parameters_of_another_dtype_get_their_gradients_in_it() -> None:
    for family in ("channels", "groups"):
        check(family, (3, 6, 9), torch.bfloat16, parameter_dtype=torch.float32, groups=2)
        check(family, (3, 6, 9), torch.float32, parameter_dtype=torch.float16, groups=2)


@pytest.mark.parametrize("masked", [False, True])
def test_instance_norm_gives_the_moments_of_each_sample(masked: bool) -> None:
    shape = (4, 5, 9)
    mask = mask_of("positions", shape) if masked else None
    if mask is not None:
        mask[1], mask[2, :, 1:] = False, False  # a sample without an element, and one that has one
    check("groups", shape, groups=5, mask=mask, running=True)


@pytest.mark.parametrize("family", ["channels", "groups"])
def test_all_invalid(family: str) -> None:
    """Zeros, zero gradients, and averages as they were."""
    check(family, (3, 4, 5), groups=2, mask=torch.zeros(3, 1, 1, dtype=torch.bool), running=family == "channels")
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    mask[:, 1], mask[2], mask[0, 3, 1:], mask[1, 3] = False, False, False, False
    check(family, (3, 4, 5), groups=4, mask=mask, running=family == "channels")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_running_averages_of_another_dtype(dtype: torch.dtype) -> None:
    check("channels", (6, 5, 9), running=True, running_dtype=dtype)
    check("channels", (6, 5, 9), training=False, running_dtype=dtype)


def test_momentum_may_be_a_tensor() -> None:
    check("channels", (6, 5, 9), running=True, momentum=torch.tensor(0.25))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("channels", [1, 3, 1026])  # of 1024 and more they are several blocks
def test_a_batch_that_is_not_finite_moves_no_average(channels: int) -> None:
    x = torch.randn(4, channels)
    x[1, -1] = torch.inf
    averages = torch.randn(channels), torch.rand(channels), torch.tensor(3)
    old = [t.clone() for t in averages]
    config = NormConfig("batch_norm", "channels", 1e-5, momentum=0.1)
    out = FAMILIES["channels"].forward(*NormRequest(config, x, None, None, None, None, *averages), False)
    assert not out.stats_updated
    assert out.y[:, -1].isnan().all()
    assert out.y[:, :-1].isfinite().all()
    assert all(torch.equal(new, before) for new, before in zip(averages, old, strict=True))
    x[1, -1] = 0
    assert FAMILIES["channels"].forward(*NormRequest(config, x, None, None, None, None, *averages), False).stats_updated
    assert averages[2] == 4
    # Finite moments, but not in the averages' own dtype.
    half = torch.zeros(channels, dtype=torch.float16), torch.ones(channels, dtype=torch.float16), averages[2]
    out = FAMILIES["channels"].forward(*NormRequest(config, x * 1e5, None, None, None, None, *half), False)
    assert not out.stats_updated
    assert averages[2] == 4


@pytest.mark.parametrize("shape", [(2, 4, 20_000), (40_000, 4)], ids=str)
@pytest.mark.parametrize("family", ["channels", "groups"])
def test_many_elements_around_1e4_lose_no_precision(family: str, shape: tuple[int, ...]) -> None:
    if family == "groups":
        shape = (1, *shape[1:]) if len(shape) > 2 else (1, 4, 40_000)
    x = torch.randn(shape) + 1e4
    out = FAMILIES[family].forward(*NormRequest(NormConfig("batch_norm", family, 1e-5), x), True)
    s = x.double().requires_grad_()
    if family == "channels":
        y = torch.nn.functional.batch_norm(s, None, None, training=True)
    else:
        y = torch.nn.functional.group_norm(s, 1)
    assert_close(out.y, y, count=1)
    dy = torch.randn(shape)
    got = FAMILIES[family].backward(
        NormConfig("batch_norm", family, 1e-5), out.total, None, None, None, None, out.stats, dy, None
    )
    assert_close(got.x, torch.autograd.grad(y, s, dy.double())[0], kind="grad", count=1)


def test_sorted_input_does_not_cancel() -> None:
    """Every tile has a mean far from the whole's."""
    x = torch.linspace(0, 1e4, 40_000).repeat_interleave(4).view(40_000, 4)
    out = FAMILIES["channels"].forward(*NormRequest(NormConfig("batch_norm", "channels", 1e-5), x), True)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    assert_close(out.stats, torch.stack([mean, (var + 1e-5).rsqrt()]), dtype=torch.float32, count=1)


def test_the_same_bits_twice() -> None:
    x, dy, w = torch.randn(3, 8, 700), torch.randn(3, 8, 700), torch.randn(8)
    for family in ("channels", "groups"):
        config, runs = NormConfig("group_norm", family, 1e-5, "gelu", groups=2), []
        for _ in range(2):
            out = FAMILIES[family].forward(*NormRequest(config, x, None, w, w), True)
            grads = FAMILIES[family].backward(config, x, None, w, w, None, out.stats, dy, None)
            runs.append((out.y, grads.x, grads.weight, grads.bias))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (4096, 64, 7), (1, 2048, 1_000_003), (32, 3, 224 * 224), (7, 70_000, 1), (1, 70_000, 9999)]
)
def test_parts_cover_every_position_once_in_few_programs(
    size: tuple[int, int, int], channels_last: bool, by_sample: bool
) -> None:
    samples, channels, positions = size
    for dtype in DTYPES:
        t = settings.of_tiles(*size, channels_last=channels_last, by_sample=by_sample, dtype=dtype)
        assert t.positions_per_part % t.block_positions == 0
        assert -(-channels // t.block_channels) <= settings.MOST_BLOCKS
        assert (t.chunks - 1) * t.positions_per_part < positions <= t.chunks * t.positions_per_part
        assert t.parts == -(-samples // t.samples_per_part) * t.chunks
        assert t.block_channels * t.block_positions <= settings.ELEMENTS_OF_TILE[dtype.itemsize]
        if not by_sample:
            assert t.parts * -(-channels // t.block_channels) <= 2 * max(settings.PROGRAMS, channels)
        assert t.parts <= max(2 * settings.PROGRAMS, samples)
        assert prod((t.block_channels, t.block_positions)) & (t.block_channels * t.block_positions - 1) == 0


def test_what_is_not_built_is_refused_with_the_reason() -> None:
    def reason(mean: torch.Tensor) -> str:
        config = NormConfig("batch_norm", "channels", 1e-5)
        return (
            supports(NormRequest(config, torch.randn(4, 3), None, None, None, None, mean, torch.ones(3))) or "takes it"
        )

    assert reason(torch.zeros(3)) == "takes it"
    assert "contiguous running averages" in reason(torch.zeros(3, 2)[:, 0])
    assert "contiguous running averages" in reason(torch.zeros(1).expand(3))
