"""The chooser: what it picks and why, and that a forced backend never falls back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import normwise
from backends import without_kernels
from normwise.backends.cpu import library
from normwise.ops.dispatch import BACKENDS, RUNNING_SUM_LIMIT, Call, choose, forced, found

x = torch.randn(4, 6, 5)


def choice(op: str = "layer_norm", dims: tuple[int, ...] = (2,), tensor: torch.Tensor = x, **facts: object) -> str:
    return choose(Call(op, tensor, dims, **facts)).backend


@pytest.fixture
def no_library() -> Iterator[None]:
    with without_kernels():
        yield


@pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")
def test_compiled_kernels_first() -> None:
    assert choice() == choice("batch_norm", (0, 2)) == choice("group_norm", (2, 3)) == "cpu"
    assert choice(mask=torch.ones(4, 6, 1, dtype=torch.bool)) == "cpu"
    assert choice("group_norm", (2, 3), torch.randn(2, 5, 6).mT) == "cpu"
    assert choice("instance_norm", averages=(torch.zeros(6), torch.ones(6))) == "cpu"
    assert choice(tensor=x.half()) == "torch"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"tensor": x.half()}, "float32, bfloat16 and float64, not torch.float16"),
        ({"mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all features of a row"),
        ({"op": "batch_norm", "mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all channels"),
        ({"residual": x.double()}, "do not mix"),
        ({"op": "batch_norm", "averages": (torch.zeros(6).half(),) * 2}, "running averages of torch.float32"),
        ({"op": "group_norm", "mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "one mask for all channels"),
        ({"op": "group_norm", "residual": x.bfloat16()}, "do not mix"),
        ({"op": "softmax"}, "no C\\+\\+ kernel for softmax"),
        ({"tensor": torch.randn(3, device="meta")}, "run on the CPU, not on meta"),
    ],
)
def test_what_the_compiled_kernels_cannot_take(facts: dict[str, object], reason: str) -> None:
    facts = {"op": "layer_norm", "dims": (2,), "tensor": x} | facts
    call = Call(facts.pop("op"), facts.pop("tensor"), facts.pop("dims"), **facts)
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match=reason):
        choose(call)


@pytest.mark.usefixtures("no_library")
def test_torch_where_it_does_the_job() -> None:
    assert choice() == "torch"
    assert choice("group_norm", (2, 3)) == "torch"
    assert choice(tensor=x.double()) == "torch"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"mask": torch.ones(4, 6, 5, dtype=torch.bool)}, "no mask"),
        ({"dims": (1,)}, "trailing axes only"),
        ({"fixed_momentum": False}, "a number only"),
        ({"weight": torch.ones(5, dtype=torch.float64)}, "does not mix"),
        ({"op": "instance_norm", "tensor": x[:0]}, "empty input"),
        ({"op": "batch_norm", "dims": (0,), "tensor": torch.empty(RUNNING_SUM_LIMIT + 1, 2)}, "loses digits"),
    ],
)
@pytest.mark.usefixtures("no_library")
def test_reference_elsewhere_and_why(facts: dict[str, object], reason: str) -> None:
    facts = {"op": "layer_norm", "dims": (2,), "tensor": x} | facts
    call = Call(facts.pop("op"), facts.pop("tensor"), facts.pop("dims"), **facts)
    chosen = choose(call)
    assert chosen.backend == "reference"
    assert reason in chosen.reason


def test_forced_backend_never_falls_back() -> None:
    layer = normwise.BatchNorm1d(6)
    lengths = torch.tensor([1, 2, 3, 5])
    with normwise.backend("aten"):
        assert forced() == "torch"
        layer(x)
        with pytest.raises(normwise.BackendError, match=r"'torch' was forced but cannot run batch_norm: .*no mask"):
            layer(x, lengths=lengths)
    with normwise.backend("triton"), pytest.raises(normwise.BackendError, match="triton"):
        normwise.LayerNorm(5)(x)
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


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'cuda': expected one of 'torch', 'cpu'"),
        normwise.backend("cuda"),
    ):
        pass


def test_reference_inside_transforms() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(choose(Call("layer_norm", x, (0,))))
        return x

    torch.vmap(f)(x)
    assert seen[0].backend == "reference"
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
    assert states["torch"] is None
    assert states["reference"] is None


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_small_inputs_take_atens_call_unless_it_loses_digits(shift: float) -> None:
    small = torch.randn(8, 16) + shift
    exact = torch.nn.functional.layer_norm(small.double(), (16,))
    assert (normwise.functional.layer_norm(small, (16,)) - exact).abs().max() < 1e-5
    averages = torch.zeros(16), torch.ones(16)
    y = normwise.functional.batch_norm(small, *averages, training=True, momentum=1.0)
    assert (y - torch.nn.functional.batch_norm(small.double(), None, None, training=True)).abs().max() < 1e-5
    torch.testing.assert_close(averages[0], small.mean(0))
    torch.testing.assert_close(averages[1].double(), small.double().var(0), rtol=1e-5, atol=0)
