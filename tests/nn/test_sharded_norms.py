"""LayerNorm and RMSNorm of a shard of the features equal the layer over all features, whatever the shards' sizes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normwise
from support.derivatives import derivatives
from support.norm_cases import randomize
from support.on_ranks import on_ranks
from support.tolerances import assert_close

FEATURES = 12
# By number of ranks; an empty shard is a shard.
SHARDS = {2: [[5, 7], [12, 0]], 3: [[1, 4, 7], [6, 0, 6]], 4: [[3, 3, 3, 3], [1, 2, 0, 9]]}

Case = tuple[str, dict[str, Any], dict[str, Any]]  # layer, its arguments, those of the call
CASES: list[Case] = [
    ("LayerNorm", {}, {}),
    ("LayerNorm", {"bias": False, "act": "gelu"}, {"residual": True}),
    ("LayerNorm", {"elementwise_affine": False, "dim": 1}, {}),
    ("LayerNorm", {}, {"mask": "rows"}),
    ("LayerNorm", {"dim": 1}, {"lengths": True}),
    ("LayerNorm", {}, {"mask": "elements"}),
    ("RMSNorm", {"eps": 1e-3}, {}),
    ("RMSNorm", {"act": "silu", "dim": 1}, {"residual": True}),
    ("RMSNorm", {}, {"mask": "rows"}),
    ("RMSNorm", {}, {"mask": "elements"}),
    ("LayerNorm", {"offset": 1.0}, {"mask": "rows"}),
    ("RMSNorm", {"offset": 1.0, "cast": "input", "dim": 1}, {"residual": True}),
]


def data(case: Case, dtype: torch.dtype, offset: float) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any], int]:
    """The whole layer, its tensors, the call's arguments, and the axis of the features: the same on every rank."""
    name, arguments, call = case
    torch.manual_seed(0)
    dim = arguments.get("dim", -1)
    whole = randomize(getattr(normwise, name)(FEATURES, **arguments, dtype=dtype))
    shape = (3, FEATURES, 5) if dim == 1 else (3, 5, FEATURES)
    x, residual, upstream, second = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    tensors = {"x": x + offset, "residual": residual, "upstream": upstream, "second": second}
    tensors = {k: t.to(dtype) for k, t in tensors.items() if k != "residual" or "residual" in call}
    more: dict[str, Any] = {}
    if call.get("mask") == "rows":
        more["mask"] = torch.rand(3, 5) < 0.6
    elif call.get("mask") == "elements":
        more["mask"] = torch.rand(shape) < 0.6
    elif "lengths" in call:
        more["lengths"] = torch.tensor([5, 0, 2])
    return whole, tensors, more, dim


def sharded(sizes: list[int], cases: list[Case], dtype: torch.dtype, offset: float) -> list[dict[str, Tensor]]:
    found = []
    low = sum(sizes[: dist.get_rank()])
    own = slice(low, low + sizes[dist.get_rank()])
    for case in cases:
        whole, tensors, more, dim = data(case, dtype, offset)
        name, arguments, call = case
        layer = getattr(normwise, name)(own.stop - low, **arguments, dtype=dtype, process_group=dist.group.WORLD)
        layer.load_state_dict({k: t[own] for k, t in whole.state_dict().items()})
        own_tensors = {k: t.movedim(dim, -1)[..., own].movedim(-1, dim) for k, t in tensors.items()}
        if call.get("mask") == "elements":
            more["mask"] = more["mask"][..., own]
        found.append(derivatives(layer, own_tensors, more))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_equal_the_whole(size: int) -> None:
    for sizes in SHARDS[size]:
        compare(sizes, CASES, torch.float64)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.bfloat16, 0.0)], ids=str)
def test_in_other_dtypes(dtype: torch.dtype, offset: float) -> None:
    """Also where the mean dwarfs the deviation. A residual's sum would be rounded before it comes to the norm."""
    compare([5, 7], [case for case in CASES if "residual" not in case[2]], dtype, offset)


def compare(sizes: list[int], cases: list[Case], dtype: torch.dtype, offset: float = 0.0) -> None:
    parts = on_ranks(len(sizes), sharded, sizes, cases, dtype, offset)
    for i, case in enumerate(cases):
        whole, tensors, more, dim = data(case, dtype, offset)
        truth = derivatives(whole.double(), {k: t.double() for k, t in tensors.items()}, more)
        for name, expected in truth.items():
            axis = dim if expected.dim() == 3 else 0
            shards = [part[i][name] for part in parts]
            got = torch.cat(shards, axis) if shards[0].dim() else shards[0]
            kind = "forward" if name == "output" else "composed" if name.startswith("second") else "grad"
            assert_close(got, expected, kind=kind, count=FEATURES * 15, name=f"{case} {name}")


def faults() -> dict[str, str]:
    """What is said about a wrong use, on this rank."""
    rank, world = dist.get_rank(), dist.group.WORLD
    said = {}
    with pytest.raises(ValueError, match="disagree") as caught:
        normwise.LayerNorm(4, process_group=world)(torch.randn(3 + rank, 4))
    said["rows"] = str(caught.value)
    layer = normwise.RMSNorm(4, process_group=world)
    with pytest.raises(ValueError, match="disagree") as caught:
        layer(torch.randn(3, 4), mask=torch.ones(3, dtype=torch.bool) if rank else None)
    said["mask"] = str(caught.value)
    with pytest.raises(ValueError, match="disagree") as caught:
        layer(torch.randn(3, 4, dtype=torch.float64 if rank else torch.float32))
    said["dtype"] = str(caught.value)
    with normwise.backend("aten"), pytest.raises(normwise.BackendError, match="several ranks"):
        layer(torch.randn(3, 4))
    layer(torch.randn(3, 4))  # and works again after each of these
    alone = dist.new_group([0])
    if rank == 0:  # a group of one is no group
        torch.testing.assert_close(
            normwise.LayerNorm(4, process_group=alone)(torch.eye(4)), nn.LayerNorm(4)(torch.eye(4))
        )
    else:
        with pytest.raises(ValueError, match="not part of the given process group"):
            normwise.LayerNorm(4, process_group=alone)
    twin = copy.deepcopy(layer)
    assert twin.process_group is layer.process_group
    twin(torch.randn(3, 4))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(layer)
    for target in ("torch", "group"):
        with pytest.raises(ValueError, match="spread over the ranks"):
            normwise.convert(nn.Sequential(layer), to=target)
    said["repr"] = repr(layer)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"not been initialized.*torchrun"):
        layer(torch.randn(3, 4))
    return said


def test_what_is_refused() -> None:
    first, second = on_ranks(2, faults)
    assert first == second
    assert "number of rows = [3, 4]" in first["rows"]
    assert "masked = [0, 1]" in first["mask"]
    assert "['4 numbers from torch.float32', '4 numbers from torch.float64']" in first["dtype"]
    assert "process_group=" in first["repr"]


def test_a_group_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="ProcessGroup or None, but got str"):
        normwise.LayerNorm(4, process_group="world")
    assert normwise.LayerNorm(4).process_group is None
