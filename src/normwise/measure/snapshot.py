"""Tensors, modes and random states that are put back as they were, bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Values:
    """The current values of tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.kept = [(tensor, tensor.detach().clone()) for tensor in {id(t): t for t in tensors}.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore them, into the same tensors."""
        for tensor, value in self.kept:
            # Untouched tensors stay untouched: writing to one would spoil a graph that the caller still holds.
            if not same_bits(tensor, value):
                tensor.detach().copy_(value)


def state_of(*modules: nn.Module) -> list[Tensor]:
    """All that a forward pass of these modules may write to: buffers, and tensors that are no buffers, as a count of
    skipped batches."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    beside = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    return [*(buffer for module in modules for buffer in module.buffers()), *beside]


@contextmanager
def state_kept(*modules: nn.Module) -> Iterator[None]:
    """Restores running statistics, and all else that `state_of` names, afterwards."""
    values = Values(state_of(*modules))
    try:
        yield
    finally:
        values.restore()


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the train or eval mode of each of these modules afterwards."""
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Random states are restored afterwards: what is drawn inside is drawn again."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def dry_run(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train or eval mode while open. Modes, state (`state_of`) and random states are then put back."""
    with random_state_kept(), state_kept(model), modes_kept(model.modules()):
        model.train(training)
        yield


class RandomState:
    """The present random states of torch, Python, NumPy where it is loaded, and of some generators.

    Devices that are not initialised stay so.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()
        self.generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Restore them."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        for generator, state in self.generators:
            generator.set_state(state)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN equals the same NaN, 0.0 is not -0.0."""
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout == torch.strided and a.element_size() in INTEGERS and not a.is_quantized:
        kind = INTEGERS[a.element_size()]
        return torch.equal(a.view(kind), b.view(kind))
    return False
