"""LayerNorm and RMSNorm by the Triton kernels with a gain and bias of some rows each, and with a gate, against the
reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import normwise
from normwise.backends.protocol import Gate, NormConfig, NormRequest
from normwise.backends.triton import settings
from normwise.backends.triton.norms import FAMILIES, supports, supports_gate
from support.backends import DTYPES, ran
from support.launches import as_on_gpu
from support.tolerances import assert_close
from support.triton_checks import check


def some(*shape: int) -> torch.Tensor:
    mask = torch.rand(*shape) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


# By what a block has of them: several groups, their places not all taken; all rows of one; one of the parts of a group.
GROUPS = {
    "sample, some in a block": ((5, 3, 33), 1),
    "sample, of one row": ((5, 1, 33), 1),
    "sample, in several parts": ((2, 70, 33), 1),
    "sample, a row a block": ((2, 3, 60), 1),
    "position": ((5, 7, 33), 2),
    "position, a row a block": ((2, 2, 60), 2),
    "sample and head": ((3, 2, 5, 9), 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_gains_of_groups_of_rows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, gain_axes = GROUPS[name]
    if "a row a block" in name:  # as long rows have it
        monkeypatch.setattr(settings, "ELEMENTS_OF_TILE", dict.fromkeys((2, 4, 8), 64))
    check("features", shape, dtype, gain_axes=gain_axes, parameter_dtype=torch.float64 if len(shape) == 4 else None)
    check("features", shape, dtype, gain_axes=gain_axes, center=False, act="silu", mask=some(*shape[:-1], 1))


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["sample, some in a block", "sample, in several parts", "position"])
def test_a_gain_or_a_bias_of_groups_may_be_missing(name: str, weight: bool, bias: bool) -> None:
    shape, gain_axes = GROUPS[name]
    check("features", shape, gain_axes=gain_axes, weight=weight, bias=bias, act="gelu", residual=True, dtotal=True)


def test_a_program_with_several_blocks_of_a_group_writes_its_sums_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more groups than programs that a GPU runs at once."""
    monkeypatch.setattr(settings, "PROGRAMS", 1)
    assert settings.of_rows(3 * 70, 33, torch.float32, 70).parts == 1
    check("features", (3, 70, 33), torch.bfloat16, gain_axes=1, parameter_dtype=torch.float32)


def test_no_group_is_in_two_programs_that_write_the_same_sums() -> None:
    """For any sizes: all rows are taken once, of a group by the same program, or in parts that are added up."""
    for rows in (1, 2, 6, 64, 1023):
        for group_rows in (n for n in range(1, rows + 1) if rows % n == 0):
            for cols in (1, 33, 700, 5000):
                launch = settings.of_rows(rows, cols, torch.bfloat16, group_rows)
                if launch.slots is not None:
                    assert group_rows <= launch.slots <= launch.block_rows
                    assert launch.block_rows % launch.slots == 0
                    assert launch.blocks * (launch.block_rows // launch.slots) >= rows // group_rows
                    assert launch.rows_per_program == launch.block_rows
                    assert launch.parts == 1
                else:
                    assert launch.blocks * launch.block_rows >= group_rows
                    assert launch.parts * launch.rows_per_program >= group_rows
                    assert launch.rows_per_program % launch.block_rows == 0


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_before_and_behind_the_norm(dtype: torch.dtype, gate_first: bool) -> None:
    check("features", (7, 63), dtype, center=False, gate_first=gate_first)
    check("features", (2, 9, 130), dtype, gate_first=gate_first, gain_axes=1, layout="strided")


@pytest.mark.parametrize("gate_act", ["sigmoid", "gelu", "relu", "swish", None])
@pytest.mark.parametrize("gate_first", [True, False])
def test_activations_of_a_gate(gate_first: bool, gate_act: str | None) -> None:
    for dtype in (torch.float32, torch.float64):
        check("features", (9, 63), dtype, gate_first=gate_first, gate_act=gate_act)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("masked", ["", "rows", "elements"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_with_mask_residual_and_activation(dtype: torch.dtype, masked: str, gate_first: bool) -> None:
    mask = {"": None, "rows": some(19, 1), "elements": some(19, 63)}[masked]
    options: dict[str, Any] = {"mask": mask, "residual": True, "dtotal": True, "gate_first": gate_first}
    check("features", (19, 63), dtype, act="gelu", **options)
    check("features", (19, 63), dtype, weight=False, bias=False, center=False, **options)


def modulated(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the gradient of x, of an adaptive LayerNorm with a gate."""
    layer = normwise.LayerNorm(9)
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x, **given)
    return y, torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y), retain_graph=True)[0]


def test_forced_one_kernel_does_all() -> None:
    given = {"scale": torch.randn(4, 9), "shift": torch.randn(4, 6, 9)}
    for gate, node in ((None, "NormBackward"), (torch.randn(4, 6, 9), "GatedNormBackward")):
        with normwise.backend("triton"), ran() as seen:
            found = modulated(**given, gate=gate)
        assert type(found[0].grad_fn).__name__ == node
        assert seen == {"triton"}


def test_forced_the_bare_norm_is_tritons_where_the_gain_is_none_of_neighbouring_rows() -> None:
    scale = torch.randn(1, 6, 9)
    with normwise.backend("triton"), ran() as seen:
        found = modulated(scale=scale)
    assert seen == {"triton"}
    with normwise.backend("reference"):
        expected = modulated(scale=scale)
    for mine, truth in zip(found, expected, strict=True):
        assert_close(mine, truth, kind="composed", count=36)


def test_by_default_a_gpu_has_it_where_the_bare_norm_is_tritons() -> None:
    scale, gate, elements = torch.randn(4, 9), torch.randn(4, 6, 9), some(4, 6, 9)
    with as_on_gpu():
        for given in ({}, {"mask": some(4, 6)}):
            assert type(modulated(scale=scale, gate=gate, **given)[0].grad_fn).__name__ != "GatedNormBackward"
        for given, node in (({}, "NormBackward"), ({"gate": gate}, "GatedNormBackward")):
            assert type(modulated(scale=scale, mask=elements, **given)[0].grad_fn).__name__ == node
    for other in ("aten", "reference"):
        with as_on_gpu(), normwise.backend(other):
            assert type(modulated(scale=scale, gate=gate)[0].grad_fn).__name__ != "GatedNormBackward"


def test_what_is_not_built_is_refused_with_the_reason() -> None:
    config, x = NormConfig("layer_norm", "features", 1e-5), torch.randn(2, 3, 4)

    def reason(weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> str | None:
        return supports(NormRequest(config, x, None, weight, bias))

    assert reason(torch.randn(2, 1, 4), torch.randn(2, 1, 4)) is None
    assert reason(torch.randn(1, 1, 4)) is None
    assert "Triton kernels take a gain and bias of neighbouring rows" in str(reason(torch.randn(1, 3, 4)))
    assert "of one shape" in str(reason(torch.randn(2, 1, 4), torch.randn(2, 3, 4)))
    long = torch.empty(2, 2, (1 << 13) + 1)
    of_samples = supports(NormRequest(config, long, None, long[:, :1]))
    assert "up to 8192 elements with a gain of some rows, not 8193" in str(of_samples)
    assert "up to 8192 elements with a gate, not 8193" in str(supports_gate(config, long, Gate(long)))
    assert supports_gate(config, x, Gate(torch.randn(2, 3, 4))) is None
    assert "with a gate of torch.float64" in str(supports_gate(config, x, Gate(x.double())))
    assert "not on cpu and meta" in str(supports_gate(config, x, Gate(x.to("meta"))))


def test_the_same_bits_twice() -> None:
    x, dy, values = torch.randn(3, 2, 70, 33)
    weight, bias = torch.randn(2, 2, 1, 33)
    request = NormRequest(NormConfig("layer_norm", "features", 1e-5), x, None, weight, bias)
    runs = []
    for _ in range(2):
        out = FAMILIES["features"].forward(*request, True, Gate(values))
        saved = (request.config, x, None, weight, bias, None, out.stats)
        grads = FAMILIES["features"].backward(*saved, dy, None, Gate(values))
        runs.append((out.y, grads.x, grads.weight, grads.bias, grads.gate))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
