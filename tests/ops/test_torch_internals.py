"""What each private name of torch is used for: if one of these tests fails, that use has lost its ground."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from normwise.backends import _torch_internals as of_backends
from normwise.ops import _torch_internals as internals


def test_transforms_are_seen_while_they_run() -> None:
    seen = []
    torch.vmap(lambda x: (seen.append(internals.transforms_active()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not internals.transforms_active()


def test_dispatch_modes_are_counted() -> None:
    seen = []
    make_fx(lambda x: (seen.append(internals.dispatch_modes_active()), x + 1)[1])(torch.ones(2))
    assert seen[0] > 0
    assert internals.dispatch_modes_active() == 0


def test_a_jit_trace_is_seen() -> None:
    seen = []
    torch.jit.trace(lambda x: (seen.append(internals.is_jit_tracing()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not internals.is_jit_tracing()


def test_a_running_backward_has_a_number() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(internals.current_graph_task_id()))
    y.sum().backward()
    assert seen[0] != -1
    assert internals.current_graph_task_id() == -1


def test_forward_mode_is_seen() -> None:
    assert not internals.forward_ad_active()
    with forward_ad.dual_level():
        assert internals.forward_ad_active()


def test_what_is_more_than_a_dense_tensor_on_the_cpu_is_not_readable() -> None:
    plain = torch.randn(3, 4)
    for own in (plain, plain.t(), plain[1:], torch.nn.Parameter(plain), plain.clone().requires_grad_() * 2):
        assert internals.readable(own)
    zeros = torch._efficientzerotensor(3)
    for foreign in (plain.to_sparse(), torch._neg_view(plain), plain.to("meta"), torch.randn(3).cfloat().conj(), zeros):
        assert not internals.readable(foreign)


def test_what_is_more_than_a_dense_tensor_on_a_gpu_is_not_readable_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what torch's dispatcher would know of a tensor there."""
    key = torch._C.DispatchKey
    x = torch.randn(3)
    assert internals.readable_on_gpu(None)
    assert not internals.readable_on_gpu(x)
    known = torch._C.DispatchKeySet(key.CUDA) | torch._C.DispatchKeySet(key.AutogradCUDA)
    known |= torch._C.DispatchKeySet(key.ADInplaceOrView)
    monkeypatch.setattr(internals, "_dispatch_keys", lambda t: known)
    assert internals.readable_on_gpu(x, torch.nn.Parameter(x))
    for more in (key.Negative, key.Conjugate, key.SparseCUDA, key.Python, key.FuncTorchBatched):
        foreign = known | torch._C.DispatchKeySet(more)
        monkeypatch.setattr(internals, "_dispatch_keys", lambda t, foreign=foreign: foreign)
        assert not internals.readable_on_gpu(x)


def test_fake_tensors_are_told() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert internals.is_fake(torch.empty(2))
        with internals.without_fake_tensors():
            assert not internals.is_fake(torch.empty(2))
    assert not internals.is_fake(torch.empty(2))


def test_batched_tensors_are_told() -> None:
    seen = []
    torch.vmap(lambda x: (seen.append(internals.is_batchedtensor(x)), x)[1])(torch.ones(2, 3))
    assert seen == [True]


def test_autocast_is_seen() -> None:
    assert not internals.any_autocast_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert internals.any_autocast_enabled()


def test_a_constant_is_asked_for_while_compiling() -> None:
    @internals.constant_while_compiling
    def answer() -> bool:
        return True

    torch._dynamo.reset()
    assert torch.compile(lambda x: x + 1 if answer() else x, backend="eager", fullgraph=True)(torch.ones(1)) == 2


def test_the_compiler_is_loaded_by_compiling() -> None:
    code = """
import pytest
import torch
from normwise.ops._torch_internals import compiler_loaded
assert not compiler_loaded()
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
assert compiler_loaded()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_batch_norm_keeps_the_mean_and_reciprocal_deviation_of_the_batch() -> None:
    x, weight, bias = torch.randn(5, 3, 7, requires_grad=True), torch.randn(3), torch.randn(3)
    y, mean, rstd, *_ = of_backends.batch_norm_with_stats(x, weight, bias, None, None, True, 0.0, 1e-3, True)
    var, expected = torch.var_mean(x, (0, 2), correction=0)
    torch.testing.assert_close((mean, rstd), (expected, (var + 1e-3).rsqrt()))
    assert torch.equal(y, torch.batch_norm(x, weight, bias, None, None, True, 0.0, 1e-3, True))
    assert y.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_torch_s_lstm_fails_under_autocast(dtype: torch.dtype) -> None:
    layer, failed = torch.nn.LSTM(3, 4), False
    with torch.autocast("cpu", dtype=dtype):
        try:
            layer(torch.randn(5, 2, 3))
        except RuntimeError:
            failed = True
    assert failed == of_backends.lstm_fails_under_autocast(dtype)
