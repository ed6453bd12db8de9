"""The custom op `normwise::norm`: torch's opcheck, and gradients of both orders against autograd of the reference."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from normwise.backends import reference
from support.tolerances import assert_close

SETTINGS = {
    "batch": ((0, 2), (1, 3, 1), False, False, True),
    "batch masked": ((0, 2), (1, 3, 1), True, False, True),
    "given": ((0, 2), (1, 3, 1), False, True, True),
    "given masked": ((0, 2), (1, 3, 1), True, True, True),
    "features": ((1, 2), (1, 3, 4), False, False, True),
    "rms masked": ((1, 2), (1, 3, 4), True, False, False),
    "plain": ((2,), None, False, False, True),
}
OF_EACH_DTYPE = ("test_schema", "test_autograd_registration", "test_faketensor")
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def arguments(setting: str, dtype: torch.dtype = torch.float64) -> tuple[object, ...]:
    dims, weight_shape, masked, given, center = SETTINGS[setting]
    x = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    weight = bias = mask = mean = var = None
    if weight_shape is not None:
        weight, bias = (torch.randn(weight_shape, dtype=dtype, requires_grad=True) for _ in range(2))
    if masked:
        mask = torch.tensor([[True, True, False, True], [True, False, False, False]]).unsqueeze(1)
    if given:
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
        mean, var = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.5
    return x, list(dims), weight, bias, mask, mean, var, 1e-3, center


@each_setting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(setting: str, dtype: torch.dtype, device: torch.device) -> None:
    args = [
        a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in arguments(setting, dtype)
    ]
    # That a compiler may trace it takes most of the time; all that it sees of a dtype is what the fake op says of it.
    checks = {"test_utils": OF_EACH_DTYPE} if dtype != torch.float64 else {}
    torch.library.opcheck(torch.ops.normwise.norm.default, args, **checks)
    torch.library.opcheck(torch.ops.normwise.norm_backward.default, [torch.randn_like(args[0]), *args], **checks)


@each_setting
def test_gradients_of_both_orders(setting: str) -> None:
    args = arguments(setting)
    x, dims, weight, bias, mask, mean, var, eps, center = args
    leaves = [t for t in (x, weight, bias) if t is not None]
    upstream = torch.randn_like(x).requires_grad_()
    y = torch.ops.normwise.norm(*args)[0]
    truth, _ = reference.norm(x, dims, weight, bias, mask=mask, mean=mean, var=var, eps=eps, center=center)
    assert_close(y, truth)
    first = torch.autograd.grad(y, leaves, upstream, create_graph=True)
    first_truth = torch.autograd.grad(truth, leaves, upstream, create_graph=True)
    again = [torch.randn_like(g) for g in first]
    second = torch.autograd.grad(first, [upstream, *leaves], again, allow_unused=True)
    second_truth = torch.autograd.grad(first_truth, [upstream, *leaves], again, allow_unused=True)
    for got, expected in zip((*first, *second), (*first_truth, *second_truth), strict=True):
        if expected is None:
            assert got is None or not got.any()
        else:
            assert_close(got, expected, kind="grad", count=24, scale=10.0)


def test_opcheck_of_the_correction_of_batch_renorm() -> None:
    mean, running_mean = torch.randn(2, 4).unbind(0)
    var, running_var = (torch.rand(2, 4) + 0.5).unbind(0)
    limits = torch.tensor(1.5), torch.tensor(0.5)
    args = [*(t.clone() for t in (mean, var, running_mean, running_var)), *limits, 1e-3]
    torch.library.opcheck(torch.ops.normwise.renorm_correction.default, args)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_of_a_norm_over_ranks(masked: bool, tmp_path: Path) -> None:
    for registers in ("distributed_custom_op", "custom_op.kernel_norm"):
        importlib.import_module(f"normwise.ops.{registers}")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        name = dist.group.WORLD.group_name
        x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (1, 3, 1), (1, 3, 1)))
        mask = torch.tensor([[True, True, False, True], [True, False, False, False]]).unsqueeze(1) if masked else None
        settings = [0, 2], name, 1e-3, True, masked
        args = [x, weight, bias, mask, *settings]
        torch.library.opcheck(torch.ops.normwise.distributed_norm.default, args)
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        y, _, _, count, rough, offset, rstd = torch.ops.normwise.distributed_norm(*detached)
        saved = [*detached[:4], rough, offset, rstd, count, *settings]
        torch.library.opcheck(torch.ops.normwise.distributed_norm_backward.default, [torch.randn_like(y), *saved])
    finally:
        dist.destroy_process_group()


def test_every_op_is_checked() -> None:
    """An op that is added here needs an `opcheck`: in this file, test_recurrent_custom_op.py or, of Triton's kernels,
    tests/triton_kernels/test_custom_op.py."""
    for registers in ("distributed_custom_op", "custom_op.kernel_norm"):
        importlib.import_module(f"normwise.ops.{registers}")
    tests = Path(__file__).parent.parent
    files = [Path(__file__), Path(__file__).with_name("test_recurrent_custom_op.py")]
    files.append(tests / "triton_kernels" / "test_custom_op.py")
    checked = {
        name
        for file in files
        for name in re.findall(r"opcheck\(torch\.ops\.normwise\.(\w+)\.", file.read_text(encoding="utf-8"))
    }
    registered = {
        name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("normwise::")
    }
    assert {name.removeprefix("normwise::") for name in registered} == checked
