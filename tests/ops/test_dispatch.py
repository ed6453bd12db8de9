"""Which backend runs a call and why, and that a forced backend never falls back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import normwise
from normwise.backends.aten.norms import RUNNING_SUM_LIMIT
from normwise.backends.cpu import library
from normwise.backends.protocol import NormConfig, NormRequest
from normwise.backends.triton import runtime
from normwise.ops.dispatch import BACKENDS, Resolved, forced, found, resolve
from support.backends import without_kernels

x = torch.randn(4, 6, 5)


FAMILIES = {
    "layer_norm": "features",
    "rms_norm": "features",
    "group_norm": "groups",
    "instance_norm": "groups",
    "batch_norm": "channels",
}


def resolved(op: str = "layer_norm", tensor: torch.Tensor = x, momentum: object = 0.1, **tensors: object) -> Resolved:
    groups = tensor.shape[1] if op == "instance_norm" else 1
    config = NormConfig(op, FAMILIES[op], 1e-5, groups=groups, momentum=momentum)
    return resolve(NormRequest(config, tensor, **tensors))


def choice(*args: object, **facts: object) -> str:
    return resolved(*args, **facts).backend.name


def averages(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"running_mean": torch.zeros(6, dtype=dtype), "running_var": torch.ones(6, dtype=dtype)}


@pytest.fixture
def no_library() -> Iterator[None]:
    with without_kernels():
        yield


@pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")
def test_compiled_kernels_first() -> None:
    assert choice() == choice("batch_norm") == choice("group_norm") == "cpu"
    assert choice(mask=torch.ones(4, 6, 1, dtype=torch.bool)) == "cpu"
    assert choice("group_norm", torch.randn(2, 5, 6).mT) == "cpu"
    assert choice("instance_norm", **averages()) == "cpu"
    assert choice(tensor=x.half()) == "aten"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"tensor": x.half()}, "float32, bfloat16 and float64, not torch.float16"),
        ({"mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all features of a row"),
        ({"op": "batch_norm", "mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all channels"),
        ({"residual": x.double()}, "do not mix"),
        ({"op": "batch_norm", **averages(torch.float16)}, "running averages of torch.float32"),
        ({"op": "group_norm", "mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all channels"),
        ({"op": "group_norm", "residual": x.bfloat16()}, "do not mix"),
        ({"tensor": x[..., :0]}, "no input without a feature"),
        ({"tensor": torch.randn(3, device="meta")}, "on the CPU, not a tensor on meta"),
    ],
)
def test_what_the_compiled_kernels_cannot_take(facts: dict[str, object], reason: str) -> None:
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match=reason):
        resolved(**facts)


@pytest.mark.usefixtures("no_library")
def test_torch_where_it_does_the_job() -> None:
    assert choice() == "aten"
    assert choice("group_norm") == "aten"
    assert choice(tensor=x.double()) == "aten"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "no mask"),
        ({"op": "batch_norm", "momentum": torch.tensor(0.1)}, "a number only"),
        ({"weight": torch.ones(5, dtype=torch.float64)}, "does not mix"),
        ({"op": "instance_norm", "tensor": x[:0]}, "empty input"),
        ({"op": "batch_norm", "tensor": torch.empty(RUNNING_SUM_LIMIT + 1, 2)}, "loses precision"),
        ({"tensor": x + 1e4}, "a mean is much larger than the deviation"),
    ],
)
@pytest.mark.usefixtures("no_library")
def test_reference_elsewhere_and_why(facts: dict[str, object], reason: str) -> None:
    chosen = resolved(**facts)
    assert chosen.backend.name == "reference"
    assert reason in chosen.reason


def test_forced_backend_never_falls_back() -> None:
    layer = normwise.BatchNorm1d(6)
    lengths = torch.tensor([1, 2, 3, 5])
    with normwise.backend("aten"):
        assert forced() == "aten"
        layer(x)
        with pytest.raises(normwise.BackendError, match=r"'aten' was forced but cannot run batch_norm: .*no mask"):
            layer(x, lengths=lengths)
    assert forced() is None
    layer(x, lengths=lengths)


def test_backend_blocks_nest_and_survive_an_error() -> None:
    with normwise.backend("reference"):
        with normwise.backend(None):
            assert choice() != "reference"
        with pytest.raises(KeyError), normwise.backend("aten"):
            raise KeyError
        assert choice(mask=torch.ones(4, 6, 5, dtype=torch.bool)) == choice() == "reference"
    assert choice() != "reference"


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"unknown backend 'cuda': expected one of 'cpu', .*'aten', 'reference'$"),
        normwise.backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match="'reference'; did you mean 'aten'"), normwise.backend("torch"):
        pass


def test_reference_inside_transforms() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(resolved(tensor=x))
        return x

    torch.vmap(f)(x)
    assert seen[0].backend.name == "reference"
    assert "transform" in seen[0].reason


def test_environment_variable() -> None:
    code = "import normwise.ops.dispatch as c; print(c.forced())"
    env = {**os.environ, "NORMWISE_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference"]
    env["NORMWISE_BACKEND"] = "fast"
    failed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "NORMWISE_BACKEND: unknown backend 'fast'" in failed.stderr


def test_every_backend_is_accounted_for() -> None:
    states = found()
    assert set(states) == set(BACKENDS)
    assert states["aten"] is None
    assert states["reference"] is None


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_small_inputs_far_from_zero_keep_their_digits(shift: float) -> None:
    small = torch.randn(8, 16) + shift
    exact = torch.nn.functional.layer_norm(small.double(), (16,))
    assert (normwise.functional.layer_norm(small, (16,)) - exact).abs().max() < 1e-5
    running = torch.zeros(16), torch.ones(16)
    y = normwise.functional.batch_norm(small, *running, training=True, momentum=1.0)
    assert (y - torch.nn.functional.batch_norm(small.double(), None, None, training=True)).abs().max() < 1e-5
    torch.testing.assert_close(running[0], small.mean(0))
    # Stored in float32; at 1e4 a variance from float32 squares would be wrong in its first digits.
    torch.testing.assert_close(running[1].double(), small.double().var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", FAMILIES)
def test_triton_is_for_gpus(op: str) -> None:
    with (
        normwise.backend("triton"),
        pytest.raises(normwise.BackendError, match=f"'triton' was forced but cannot run {op}: .*on a GPU, not on cpu"),
    ):
        resolved(op)


@pytest.mark.parametrize(
    ("installed", "gpu", "interpreted", "reason"),
    [
        (False, True, False, "Triton is not installed"),
        (False, True, True, "Triton is not installed"),
        (True, False, False, "torch finds no GPU"),
        (True, True, False, None),
        (True, False, True, None),
    ],
)
def test_what_triton_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, installed: bool, gpu: bool, interpreted: bool, reason: str | None
) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(runtime, "interpreted", lambda: interpreted)
    told = runtime._missing.__wrapped__()
    assert told is None if reason is None else reason in told


def test_triton_is_not_imported_before_it_runs() -> None:
    code = (
        "import sys, torch, normwise; from normwise.ops import dispatch; dispatch.found()\n"
        "layer, x = normwise.BatchNorm1d(3), torch.randn(4, 3, 5); layer(x, lengths=[1, 2, 3, 4]).sum().backward()\n"
        "print('triton' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def small_layer_norm(**changed: object) -> str:
    """The backend of a LayerNorm of few numbers whose gradient is wanted, all of which C may read."""
    of = {"tensor": torch.randn(32, 128), "weight": torch.ones(128, requires_grad=True), **changed}
    tensor = of.pop("tensor")
    act = of.pop("act", None)
    request = NormRequest(NormConfig("layer_norm", "features", 1e-5, act), tensor, **of)
    return resolve(request, "norm", known_readable=True).backend.name


@pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")
@pytest.mark.parametrize(
    "changed",
    [
        {"tensor": torch.randn(32, 128) + 100},  # 100 deviations from zero, where ATen loses precision
        {"tensor": torch.randn(32, 128).index_fill(0, torch.tensor([31]), torch.inf)},
        {"tensor": torch.full((32, 128), torch.nan)},
        {"tensor": torch.randn(32, 128) * 1e30},
        {"tensor": torch.randn(513, 128)},
        {"tensor": torch.randn(1, 4000)[:, :3000], "weight": torch.ones(3000, requires_grad=True)},
        {"tensor": torch.randn(128, 32).mT},
        {"tensor": torch.randn(32, 128).bfloat16()},
        {"weight": torch.ones(128)},
        {"weight": torch.ones(128, dtype=torch.float64, requires_grad=True)},
        {"residual": torch.randn(32, 128)},
        {"mask": torch.ones(32, 1, dtype=torch.bool)},
        {"tensor": torch.randn(129, 128), "act": "relu"},
    ],
)
def test_a_small_layer_norm_is_atens_only_where_it_is_right_and_faster(changed: dict[str, object]) -> None:
    assert small_layer_norm() == "aten"
    assert small_layer_norm(act="relu") == "aten"
    assert small_layer_norm(**changed) == "cpu"
    with torch.no_grad():
        assert small_layer_norm() == "cpu"
    with normwise.backend("cpu"):
        assert small_layer_norm() == "cpu"


@pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")
def test_the_digits_of_a_small_layer_norm_do_not_depend_on_who_computes_it() -> None:
    layer = normwise.LayerNorm(128)
    for offset in (0, 20, 31, 33, 1000):
        x = torch.randn(32, 128) + offset
        exact = torch.nn.functional.layer_norm(x.double(), (128,))
        # ATen's x * a + b: two terms of up to 32 deviations nearly cancel, each with roundings of 1.2e-7 of its size.
        torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-5)
        with torch.no_grad():
            # Ours subtracts the mean first: a few roundings of 1.2e-7 of a result of about 3.
            torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-6)
