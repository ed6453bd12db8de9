"""A diagnosis leaves nothing behind: bit for bit, also when it fails or is interrupted half way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import DiagnosisError, diagnose
from normwise.measure.snapshot import same_bits

cross_entropy = nn.functional.cross_entropy


class Net(nn.Module):
    """All that could be left changed: running statistics, a counter, lists, a tensor that is no buffer, dropout; with
    blocks and attention, which are watched in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv1d(5, 8, 3, padding=1))
        self.norm = normwise.BatchNorm1d(8)
        self.lstm = normwise.LSTM(8, 6, norm="batch", num_stat_steps=4, batch_first=True)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True) for _ in range(3)))
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(6, 3)
        self.embedding = nn.Embedding(4, 6, max_norm=0.5)
        self.passes = 0
        self.seen: list[int] = []
        self.average = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen.append(len(x))
        y = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        y = self.blocks(self.lstm(y)[0])
        y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.1).mean(1)
        y = self.dropout(y) + self.embedding(torch.tensor([1]))
        y = self.linear(y)
        self.average += y.detach().mean(0)
        self.last = y.detach()
        return y + random.random() + torch.rand(1) + numpy.random.rand()  # noqa: NPY002


def everything(net: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Any]:
    """Values and identities of all that a user may look at."""
    modules = dict(net.named_modules())
    state = {}
    for kind, tensors in (("parameter", net.named_parameters()), ("buffer", net.named_buffers())):
        for name, tensor in tensors:
            state[kind, name] = (id(tensor), tensor.detach().clone(), tensor.requires_grad)
            state["version", name] = tensor._version if kind == "parameter" else 0
            state["grad", name] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
    for name, module in modules.items():
        state["attributes", name] = {k: id(v) for k, v in vars(module).items()}
        state["hooks", name] = [(k, list(v.items())) for k, v in vars(module).items() if k.endswith("_hooks")]
        state["mode", name] = module.training
    state["others"] = (net.passes, list(net.seen), net.average.clone())
    for number, (parameter, entries) in enumerate(optimizer.state.items()):
        for name, value in entries.items():
            kept = (id(value), value.clone()) if isinstance(value, Tensor) else value
            state["optimizer", number, name] = (id(parameter), kept)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state["groups"] = (groups, [[id(p) for p in group["params"]] for group in optimizer.param_groups])
    state["random"] = (torch.get_rng_state(), random.getstate(), numpy.random.get_state(), generator.get_state())  # noqa: NPY002
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return same_bits(a, b)
    if isinstance(a, numpy.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture
def world() -> Iterator[tuple[Net, torch.optim.Optimizer, Any, torch.Generator]]:
    """A net in the middle of its training: with gradients, optimizer state, a hook of its own, mixed modes."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    cases = torch.utils.data.TensorDataset(torch.randn(24, 9, 5), torch.randint(3, (24,)))
    loader = torch.utils.data.DataLoader(cases, batch_size=8, shuffle=True, generator=generator)
    with pytest.warns(UserWarning, match="longer than num_stat_steps"):
        net(cases.tensors[0]).square().sum().backward()
    optimizer.step()
    net.lstm.warned_of_length = False
    net.linear.weight.grad = None
    net.norm.eval()
    net.linear.register_forward_hook(lambda module, args, out: None)
    return net, optimizer, loader, generator


def check(world: tuple[Net, torch.optim.Optimizer, Any, torch.Generator], **arguments: Any) -> Any:
    net, optimizer, loader, generator = world
    before = everything(net, optimizer, generator)
    options = {"loss": cross_entropy, "optimizer": optimizer} | arguments
    try:
        with pytest.warns(UserWarning, match="longer than num_stat_steps"):
            return diagnose(net, loader, **options)
    finally:
        assert torch._C._len_torch_function_stack() == 0
        after = everything(net, optimizer, generator)
        # Rewritten by Net's own forward and set back: their versions have moved on.
        before, after = ({k: v for k, v in state.items() if k[0] != "version"} for state in (before, after))
        assert [key for key in before if not same(before[key], after.get(key))] == []
        assert after.keys() == before.keys()


def test_nothing_changes(world):
    found = check(world)
    assert [attention.layer for attention in found.attention] == [*(f"blocks.{n}.self_attn" for n in range(3)), ""]
    assert [stream.blocks for stream in found.streams] == [["blocks.0", "blocks.1", "blocks.2"]]
    assert len(found.training.losses) == 3
    assert found.layer("norm").calls == 1


def test_untouched_weights_are_not_even_written_to():
    """The caller may hold a graph through them, which writing the same values would spoil."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = torch.randn(8, 4)
    loss = net(x).square().sum()
    diagnose(net, [(x, torch.randint(3, (8,)))], loss=cross_entropy)
    loss.backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("call", [0, 2, 6, 7, 8, 14])
def test_nothing_changes_when_it_ends_half_way(world, error, call):
    """In the passes in train mode, and before and after the first and later steps."""
    calls = iter(range(10_000))

    def fails(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == call:
            raise error("half way")
        return cross_entropy(output, target)

    with pytest.raises((error, DiagnosisError), match="half way"):
        check(world, loss=fails)


def test_nothing_changes_when_a_layer_is_interrupted(world):
    net = world[0]
    calls = iter(range(10_000))

    def interrupted(module: nn.Module, args: object) -> None:
        if next(calls) == 20:
            raise KeyboardInterrupt

    net.dropout.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(world)


def test_the_caller_may_have_gradients_off(world):
    with torch.no_grad():
        assert check(world).layer("linear").gradient.output > 0
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_generator_of_batches_draws_as_it_would(world):
    """The random state is put back after the loader has drawn from it, too."""
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    net = nn.Linear(4, 3)
    state = torch.get_rng_state()
    data = ((torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3))
    diagnose(net, data, loss=cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.numel() == 1
