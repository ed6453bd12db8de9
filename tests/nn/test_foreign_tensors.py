"""Tensors whose elements do not lie where `data_ptr()` points, in every place of every layer.

C reads what it is pointed to: such a tensor must take another way, or be refused as torch refuses it. So a call
either raises, and has changed nothing, or gives the numbers of the same call on plain copies; what torch.nn takes is
taken. Each call runs in a child process, since the fault that is looked for ends it by a signal.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.backends.cpu import library
from support.backends import without_kernels
from support.in_children import Fault, in_children


class Layer(NamedTuple):
    make: Callable[[Any], nn.Module]  # from the namespace, normwise's or torch.nn's
    shape: tuple[int, ...]
    mask: tuple[int, ...] | None = None  # its shape; None where the layer takes none
    states: tuple[str, ...] = ()
    in_torch: bool = True


LAYERS = {
    "BatchNorm1d": Layer(lambda lib: lib.BatchNorm1d(6), (5, 6), (5,)),
    "BatchNorm1d eval": Layer(lambda lib: lib.BatchNorm1d(6).eval(), (5, 6), (5,)),
    "BatchNorm2d": Layer(lambda lib: lib.BatchNorm2d(6), (3, 6, 4, 5), (3, 4, 5)),
    "BatchNorm3d act": Layer(lambda lib: lib.BatchNorm3d(6, act="relu"), (2, 6, 2, 3, 2), (2, 2, 3, 2), in_torch=False),
    "SyncBatchNorm": Layer(lambda lib: lib.SyncBatchNorm(6), (5, 6, 4), (5, 4), in_torch=False),
    "ghosts": Layer(lambda lib: lib.BatchNorm1d(6, virtual_batch_size=2), (4, 6, 3), (4, 3), in_torch=False),
    "BatchRenorm2d": Layer(lambda lib: lib.BatchRenorm2d(6), (3, 6, 4, 5), (3, 4, 5), in_torch=False),
    "FrozenBatchNorm2d": Layer(lambda lib: lib.FrozenBatchNorm2d(6), (3, 6, 4, 5), (3, 4, 5), in_torch=False),
    "LayerNorm": Layer(lambda lib: lib.LayerNorm(6), (3, 4, 6), (3, 4)),
    "LayerNorm large": Layer(lambda lib: lib.LayerNorm(6), (30, 40, 6), (30, 40)),
    "LayerNorm act": Layer(lambda lib: lib.LayerNorm(6, act="gelu"), (3, 4, 6), (3, 4), in_torch=False),
    "RMSNorm": Layer(lambda lib: lib.RMSNorm(6), (3, 4, 6), (3, 4)),
    "GroupNorm": Layer(lambda lib: lib.GroupNorm(2, 6), (3, 6, 4), (3, 4)),
    "InstanceNorm1d": Layer(lambda lib: lib.InstanceNorm1d(6), (3, 6, 4), (3, 4)),
    "InstanceNorm2d": Layer(
        lambda lib: lib.InstanceNorm2d(6, affine=True, track_running_stats=True), (3, 6, 4, 5), (3, 4, 5)
    ),
    "LSTM plain": Layer(lambda lib: lib.LSTM(6, 6, **norm(lib, None)), (5, 3, 6), states=("h0", "c0")),
    "GRU plain": Layer(lambda lib: lib.GRU(6, 6, **norm(lib, None)), (5, 3, 6), states=("h0",)),
    "LSTM": Layer(lambda lib: lib.LSTM(6, 6, norm="layer"), (5, 3, 6), states=("h0", "c0"), in_torch=False),
    "GRU": Layer(lambda lib: lib.GRU(6, 6, norm="rms"), (5, 3, 6), states=("h0",), in_torch=False),
    "RNN": Layer(lambda lib: lib.RNN(6, 6, norm="layer"), (5, 3, 6), states=("h0",), in_torch=False),
    "RNN batch": Layer(lambda lib: lib.RNN(6, 6, norm="batch"), (5, 3, 6), states=("h0",), in_torch=False),
}


def norm(lib: Any, value: str | None) -> dict[str, Any]:
    return {"norm": value} if lib is normwise else {}


class Kind(NamedTuple):
    make: Callable[[Tensor], Any]
    of_bools: bool = True


def mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        store = os.path.join(tempfile.mkdtemp(), "store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def dtensor(t: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, mesh(), [Replicate()])


def two(t: Tensor) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(t.detach(), t.detach().clone())


def fake(t: Tensor) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(t)


class Named(Tensor):
    """A subclass with memory of its own."""


KINDS = {
    "DTensor": Kind(dtensor),
    "TwoTensor": Kind(two),
    "FakeTensor": Kind(fake),
    "functional": Kind(torch._to_functional_tensor),
    "subclass": Kind(lambda t: t.as_subclass(Named)),
    "negative view": Kind(lambda t: torch._neg_view(-t), of_bools=False),
    "part of a conjugate": Kind(lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag, of_bools=False),
    "conjugate view": Kind(lambda t: torch.complex(t, t).conj(), of_bools=False),
    "complex": Kind(lambda t: torch.complex(t, t), of_bools=False),
    "expanded": Kind(lambda t: (t[:1] if t.dim() == 1 else t[:, :1]).expand(t.shape)),
    "zeros without memory": Kind(lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
    "sparse": Kind(lambda t: t.to_sparse()),
    "quantized": Kind(lambda t: torch.quantize_per_tensor(t.detach(), 0.05, 100, torch.quint8), of_bools=False),
    "meta": Kind(lambda t: t.to("meta")),
}
# What torch.nn takes here and there, and makes something wrong of: it drops an imaginary part, or reads memory as if it
# were contiguous.
WRONG_IN_TORCH = ("complex", "conjugate view", "expanded", "zeros without memory")
REFUSED = object()  # no plain tensor means the same


class Wrong(Exception):
    """Not what a tensor of any kind may lead to."""


def plain(t: Any) -> Any:
    """The elements of a tensor of any kind as a plain one; REFUSED where they are no real numbers."""
    if isinstance(t, tuple | list):
        return type(t)(plain(e) for e in t)
    if not isinstance(t, Tensor):
        return t
    if t.is_complex() or t.is_quantized or not (t.is_floating_point() or t.dtype == torch.bool) or t.is_meta:
        return REFUSED
    if type(t).__name__ == "FakeTensor":
        return REFUSED
    if type(t).__name__ == "DTensor":
        return t.full_tensor().detach().clone()
    if type(t).__name__ == "TwoTensor":
        return plain(t.a)
    if torch._is_functional_tensor(t):
        torch._sync(t)
        return torch._from_functional_tensor(t).detach().clone()
    if t.layout != torch.strided:
        return t.detach().to_dense()
    return t.detach().as_subclass(Tensor).resolve_neg().clone(memory_format=torch.contiguous_format)


def places(layer: Layer) -> list[str]:
    """Where a tensor can stand in a call of the layer."""
    module = layer.make(normwise)
    own = [n for n, t in itertools.chain(module.named_parameters(), module.named_buffers()) if "num_batches" not in n]
    given = ["mask", "residual"] if layer.mask is not None else [*layer.states]
    upstream = ["upstream"] if layer.mask is not None or layer.in_torch else []
    return ["input", *own, *given, *upstream]


class Cell(NamedTuple):
    kind: str
    layer: str
    place: str


def run(layer: Layer, lib: Any, cell: Cell, kind: Callable[[Tensor], Any], backend: str | None) -> list[Any]:
    """Output and gradient of the input, with the tensor at the cell's place made one of `kind`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = layer.make(lib)
        tensors: dict[str, Any] = {"input": torch.randn(layer.shape)}
        for owner in (module._parameters, module._buffers):
            for name, t in owner.items():
                if t is not None and "num_batches" not in name:
                    value = torch.rand(t.shape) + 0.5
                    tensors[name] = value.requires_grad_() if owner is module._parameters else value
        if layer.mask is not None and cell.place in ("mask", "residual"):
            tensors[cell.place] = torch.rand(layer.mask) < 0.8 if cell.place == "mask" else torch.randn(layer.shape)
        for name in layer.states:
            tensors[name] = torch.randn(1, *layer.shape[1:])
        leaf = tensors["input"].requires_grad_()
        upstream = torch.randn(layer.shape)
        if cell.place == "upstream":
            upstream = kind(upstream)
        else:
            tensors[cell.place] = kind(tensors[cell.place])
        for owner in (module._parameters, module._buffers):
            owner.update({name: t for name, t in tensors.items() if name in owner})
        averages = [(t, t.clone()) for n, t in module._buffers.items() if t is not None and n != cell.place]
        options = {name: tensors[name] for name in ("mask", "residual") if name in tensors}
        states = tuple(tensors[name] for name in layer.states)
        arguments = [states[0] if len(states) == 1 else states] if states else []
        try:
            with normwise.backend(backend):
                y = module(tensors["input"], *arguments, **options)
        except Exception:
            if layer.mask is not None and not all(torch.equal(t, before) for t, before in averages):
                raise Wrong("the refused call changed a running average") from None
            raise
        y = y[0] if isinstance(y, tuple) else y
        found = [plain(y)]
        if cell.place == "upstream" or (isinstance(found[0], Tensor) and y.requires_grad):
            given = upstream if cell.place == "upstream" else upstream.to(y.dtype)
            if cell.place != "upstream" and type(y) is not Tensor:
                return found  # its gradient is the other kind's own business
            (grad,) = torch.autograd.grad(y, leaf, given, allow_unused=True)
            found.append(plain(grad))
        if layer.in_torch and cell.place == "upstream":
            found = found[1:]
        return found


def outcome(cell: Cell) -> str:
    """What became of it: "refused", "as plain" or "no numbers"; raises where the numbers are others."""
    layer, kind = LAYERS[cell.layer], KINDS[cell.kind].make
    theirs: Any = None
    if layer.in_torch and cell.place not in ("mask", "residual") and cell.kind not in WRONG_IN_TORCH:
        try:
            theirs = run(layer, nn, cell, kind, None)
        except Exception as error:
            theirs = error
    try:
        ours = run(layer, normwise, cell, kind, None)
    except Wrong:
        raise
    except Exception as error:
        if isinstance(theirs, list) and not any(t is REFUSED for t in theirs):
            raise Wrong(f"refused, but torch.nn takes it: {type(error).__name__}: {error}") from error
        return f"refused by {type(error).__name__}: {str(error).splitlines()[0]}"

    def twin(t: Tensor) -> Any:
        made = plain(kind(t))
        return made.requires_grad_(t.requires_grad) if isinstance(made, Tensor) else made

    if any(t is REFUSED for t in ours):
        return "no numbers"
    expected = theirs if isinstance(theirs, list) else None
    if expected is None or any(t is REFUSED for t in expected):
        if plain(kind(torch.rand(3, 3))) is REFUSED:
            raise Wrong("numbers come of what has none")
        expected = run(layer, normwise, cell, twin, "reference" if layer.mask is not None else None)
    for got, truth in zip(ours, expected, strict=False):
        if truth is not None:  # the twin of an input is a leaf of its own
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
    return "as plain"


def cells(kind: str) -> list[Cell]:
    found = [Cell(kind, name, place) for name, layer in LAYERS.items() for place in places(layer)]
    if kind == "zeros without memory":  # torch's own kernels read them too: only a gradient is ever one
        found = [c for c in found if c.place == "upstream"]
    return [c for c in found if KINDS[kind].of_bools or c.place != "mask"]


def outcome_without_kernels(cell: Cell) -> str:
    with without_kernels():
        return outcome(cell)


@pytest.mark.parametrize("way", [outcome, outcome_without_kernels])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_right_numbers_or_is_refused(kind: str, way: Callable[[Cell], str]) -> None:
    without = way is outcome_without_kernels or library.missing() is not None
    if kind == "zeros without memory" and without:
        pytest.skip("torch's own kernels read a gradient without memory")
    asked = cells(kind)
    answers = in_children(way, asked)
    faults = [
        f"{cell.layer}, {cell.place}: {a}" for cell, a in zip(asked, answers, strict=True) if isinstance(a, Fault)
    ]
    assert not faults, f"{kind}:\n" + "\n".join(faults)
