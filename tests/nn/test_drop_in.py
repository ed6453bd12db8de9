"""Each layer gives what its namesake in torch.nn gives: results, gradients, statistics, state."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import normwise
from support.backends import BACKENDS, DTYPES, using
from support.norm_cases import CASES, Case, each_case, each_case_of_ours, randomize, run, with_bias_argument
from support.tolerances import assert_close

HALF = (torch.bfloat16, torch.float16)


def pair(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    theirs = randomize(case.theirs(dtype=dtype, device=device))
    ours = case.ours(dtype=dtype, device=device)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(case: Case, ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Ours against torch's; in half precision both against torch's in float64, ours no worse than torch's."""
    upstream = torch.randn(x.shape, dtype=torch.float64, device=x.device).to(x.dtype)
    half = x.dtype in HALF
    exact = theirs
    if half:
        exact = copy.deepcopy(theirs)
        exact.load_state_dict(ours.state_dict())
        exact.double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # torch's, of RMSNorm
        same_dtype = run(theirs, x, upstream)
    truth = run(exact, x.double(), upstream.double()) if half else same_dtype
    actual = run(ours, x, upstream)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].dtype == same_dtype[name].dtype, name
        assert actual[name].shape == expected.shape, name
        if half and torch.equal(actual[name], same_dtype[name]):
            continue  # torch's own kernel, with its own error
        assert_close(
            actual[name],
            expected,
            kind="grad" if name.startswith("grad") else "forward",
            dtype=x.dtype,
            count=x.numel() if name in ("grad weight", "grad bias") else case.count,
            scale=max(1.0, expected.double().abs().max().item()),
            name=name,
        )


def kernels_take(case: Case, dtype: torch.dtype) -> bool:
    """No float16, and no running averages in half precision."""
    return dtype not in HALF or (dtype == torch.bfloat16 and not dict(case.ours().named_buffers()))


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    [
        pytest.param(case, backend, dtype, id=f"{backend}-{dtype}-{case}")
        for case in CASES
        for backend in BACKENDS
        for dtype in DTYPES
        if backend != "kernels" or kernels_take(case, dtype)
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_torch(case: Case, backend: str, training: bool, dtype: torch.dtype, device: torch.device) -> None:
    ours, theirs = pair(case, dtype, device)
    ours.train(training), theirs.train(training)
    x = torch.randn(case.shape, dtype=torch.float64, device=device).mul(2).add(0.5).to(dtype)
    with using(backend):
        for _ in range(2):  # twice: running averages build on themselves
            compare(case, ours, theirs, x)


@each_case
@pytest.mark.parametrize("backend", ["chosen", "kernels", "no kernels", "reference"])
def test_strided_and_channels_last(case: Case, backend: str, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    x = torch.randn(*case.shape[:-1], 2 * case.shape[-1], device=device)[..., ::2]
    layouts = [x, x.transpose(0, 1).contiguous().transpose(0, 1)]
    if x.dim() == 4:
        layouts.append(x.contiguous(memory_format=torch.channels_last))
    if x.dim() == 5:
        layouts.append(x.contiguous(memory_format=torch.channels_last_3d))
    with using(backend):
        for view in layouts:
            compare(case, ours, theirs, view)


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(case: Case, half: torch.dtype, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    compare(case, ours, theirs, torch.randn(case.shape, device=device).to(half))


@each_case
def test_autocast_gives_torch_s_dtype(case: Case, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(case.shape, device=device).to(dtype)
        with torch.autocast(device.type, dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            expected = theirs(x)
            for backend in ("chosen", "reference"):
                with using(backend):
                    actual = ours(x)
                assert actual.dtype == expected.dtype
                assert_close(actual, expected.double(), kind="composed", count=case.count)


BATCHED = [c for c in CASES if not (c.name == "InstanceNorm1d" and len(c.shape) == 2)]


@pytest.mark.parametrize("case", BATCHED, ids=str)
@pytest.mark.parametrize("backend", ["chosen", "kernels", "no kernels", "reference"])
def test_empty_batch(case: Case, backend: str, device: torch.device) -> None:
    ours, theirs = pair(case, torch.float32, device)
    before = {name: b.clone() for name, b in ours.named_buffers()}
    x = torch.empty(0, *case.shape[1:], device=device, requires_grad=True)
    with using(backend):
        y = ours(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.shape == x.shape
    for name, buffer in ours.named_buffers():
        counted = name == "num_batches_tracked" and case.name.startswith("Batch")
        torch.testing.assert_close(buffer, before[name] + counted, rtol=0, atol=0)
    if not case.kwargs.get("track_running_stats", case.name.startswith("Batch")) or case.name.startswith("Batch"):
        # torch's InstanceNorm raises an IndexError here, or turns its running averages into NaN
        assert theirs(x).shape == x.shape
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer)


@each_case_of_ours
def test_same_state_both_ways(case: Case) -> None:
    ours, theirs = case.ours(), randomize(case.theirs())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    back = case.theirs()
    back.load_state_dict(ours.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=0)


@each_case_of_ours
def test_copies_and_files(case: Case) -> None:
    layer = randomize(case.ours()).eval()
    x = torch.randn(case.shape)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = case.ours().eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
        assert repr(copied) == repr(layer)


@each_case_of_ours
def test_is_a_kind_of_torch_s(case: Case) -> None:
    """Code that looks for norm layers by class (weight averaging, optimizer groups) finds ours."""
    assert isinstance(case.ours(), getattr(nn, case.name))


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm1d"])
def test_without_bias(name: str) -> None:
    args = (2, 4) if name == "GroupNorm" else (4,)
    affine = {"affine": True} if name.startswith("Instance") else {}
    layer = getattr(normwise, name)(*args, bias=False, **affine)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    layer.reset_parameters()
    x = torch.randn(3, 4, 5, 2) if name == "BatchNorm2d" else torch.randn(3, 4, 5)
    full = getattr(nn, name)(*args, **affine)
    torch.testing.assert_close(layer(x), full(x))
    if with_bias_argument(getattr(nn, name)):
        assert list(getattr(nn, name)(*args, bias=False, **affine).state_dict()) == list(layer.state_dict())


def test_device_and_dtype_arguments() -> None:
    layer = normwise.BatchNorm2d(3, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    assert layer(torch.empty(2, 3, 4, 4, device="meta", dtype=torch.float64)).shape == (2, 3, 4, 4)
    assert normwise.LayerNorm(4, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
