"""scale=, shift= and gate= on every backend, and where one kernel does all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.backends.cpu import library
from support.backends import using
from support.modulated_norms import CASES, N, in_float64, leaves, made
from support.tolerances import assert_close


def modulated(kind: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A layer, the tensors of a call and its options."""
    first = kind == "gate first"
    layer = normwise.RMSNorm(21, eps=1e-5, gate_first=first) if "gate" in kind else normwise.LayerNorm(21, act="silu")
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(N, 9, 21)
    mask = torch.rand(N, 9) < 0.7
    shape = (N, 9, 21) if "position" in kind else (N, 1, 21)
    given = {"scale": torch.randn(shape), "shift": torch.randn(shape)}
    given |= {"gate": torch.randn_like(x)} if "gate" in kind else {}
    if kind == "shift":
        del given["scale"]
    tensors = {"input": x, "add": torch.randn_like(x), **given}
    return layer.to(dtype), {k: t.to(dtype).requires_grad_() for k, t in tensors.items()}, {"mask": mask}


KINDS = ["sample", "position", "shift", "gate first", "gate last", "gate by position"]


@pytest.mark.parametrize("backend", ["cpu", "chosen", "no kernels", "aten", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_equals_the_reference_in_float64(kind, backend):
    layer, tensors, options = modulated(kind, torch.float32)
    exact, truth = copy.deepcopy(layer).double(), {k: leaves(t, dtype=torch.float64)[0] for k, t in tensors.items()}
    upstream = torch.randn(2, *tensors["input"].shape)
    with using(backend):
        outputs = layer(**tensors, **options)
        found = torch.autograd.grad(outputs, [*tensors.values(), *layer.parameters()], list(upstream))
    with normwise.backend("reference"):
        expected = exact(**truth, **options)
        true = torch.autograd.grad(expected, [*truth.values(), *exact.parameters()], list(upstream.double()))
    for a, b in zip((*outputs, *found), (*expected, *true), strict=True):
        assert_close(a, b, kind="composed", count=a.numel(), scale=float(b.detach().abs().max()))


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_does_all(kind):
    layer, tensors, options = modulated(kind, torch.bfloat16)
    name = "GatedNormBackward" if "gate" in kind else "NormBackward"
    assert type(layer(**tensors, **options)[0].grad_fn).__name__ == name
    assert type(layer(**{**tensors, "input": tensors["input"].float()}, **options)[0].grad_fn).__name__ != name
    with normwise.backend("reference"):
        assert type(layer(**tensors, **options)[0].grad_fn).__name__ != name


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (9, 5)], ids=str)
@pytest.mark.parametrize("which", ["both", "scale", "shift", "one scale for all channels", "one shift for all samples"])
def test_one_kernel_does_a_conditional_batch_norm(training, shape, which):
    layer = getattr(normwise, f"BatchNorm{len(shape) - 2 or 1}d")(5, act="relu").train(training)
    x, residual = torch.randn(2, *shape).unbind()
    ones = (1,) * (len(shape) - 2)
    given = {"scale": torch.randn(shape[0], 1 if "channels" in which else 5, *ones), "shift": torch.randn(*shape[:2])}
    if "samples" in which:
        given["shift"] = torch.randn(1, 5, *ones)
    given = {k: t for k, t in given.items() if which not in ("scale", "shift") or k == which}
    tensors = {"input": x, "residual": residual, **given}
    truth = {k: leaves(t, dtype=torch.float64)[0] for k, t in tensors.items()}
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}
    mask = torch.rand(shape[0], *shape[2:]) < 0.7
    mask.view(-1)[:2] = True
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(shape)
    with using("cpu"):
        y = layer(**tensors, mask=mask)
        assert type(y.grad_fn).__name__ == "NormBackward"
        found = torch.autograd.grad(y, [*tensors.values(), *layer.parameters()], upstream)
    with normwise.backend("reference"):
        expected = exact(**truth, mask=mask)
        true = torch.autograd.grad(expected, [*truth.values(), *exact.parameters()], upstream.double())
    for a, b in zip((y, *found), (expected, *true), strict=True):
        assert_close(a, b, kind="composed", count=x.numel(), scale=float(b.detach().abs().max()))
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer, name), getattr(exact, name), kind="composed", count=x.numel(), scale=1.0)
    assert layer.num_batches_tracked == exact.num_batches_tracked == training


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_a_scale_by_position_or_a_statistic_from_elsewhere_takes_no_kernel_for_all():
    x = torch.randn(8, 5, 4, 3, requires_grad=True)
    by_sample, by_position = torch.randn(8, 5), torch.randn(8, 5, 4, 3)
    for layer, scale in [
        (normwise.BatchNorm2d(5), by_position),
        (normwise.BatchNorm2d(5, virtual_batch_size=4), by_sample),
        (normwise.BatchNorm2d(5, correction=0), by_sample),
        (normwise.BatchNorm2d(5, momentum=None), by_sample),
    ]:
        y = layer(x, scale=scale)
        one_kernel = type(y.grad_fn).__name__ == "NormBackward"
        assert one_kernel == (layer.momentum is None)  # the weight of a cumulative average is a number on the CPU
        expected = in_float64(layer, x.double(), scale.double().view(*scale.shape, *(1,) * (4 - scale.dim())), None)
        if layer.virtual_batch_size is None:
            assert_close(y, expected, kind="composed", count=x.numel(), scale=float(expected.detach().abs().max()))
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance3d", "batch2d", "frozen"])
def test_on_every_backend(name, backend):
    case, layer = CASES[name], made(name)
    x, scale, shift = (torch.randn(shape) for shape in (case.shape, case.sample, case.sample))
    expected = in_float64(layer, x.double(), *(t.double().reshape(case.placed) for t in (scale, shift)))
    with using(backend):
        y = layer(x, scale=scale, shift=shift)
    assert_close(y, expected, kind="composed", count=x.numel())
