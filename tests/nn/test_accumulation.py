"""accumulated_backward equals the backward over the concatenated batch: loss, gradients, running averages."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import normwise
from support.norm_cases import randomize
from support.tolerances import assert_close

Build = Callable[..., nn.Module]


class Residual(nn.Module):
    """Norms with activation and residual, one of them used twice."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = normwise.BatchNorm2d(4, act="relu", **kwargs)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = normwise.BatchNorm2d(4, act="silu", momentum=None)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y = self.last(self.norm(self.second(y)), residual=y)
        return self.out(y.mean((2, 3)))


def perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    width = 32
    for _ in range(4):
        layers += [nn.Linear(width, 6), normwise.BatchNorm1d(6), nn.Tanh()]
        width = 6
    return nn.Sequential(*layers, nn.Linear(6, 3))


NETS: dict[str, Build] = {"residual": Residual, "perceptron": perceptron}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("cuts", [[4, 4, 4], [1, 7, 4], [12]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_whole_batch(name: str, cuts: list[int], dtype: torch.dtype) -> None:
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            randomize(module)
    model.to(dtype)
    whole = copy.deepcopy(model).double()
    x, target = torch.randn(12, 2, 4, 4, dtype=torch.float64), torch.randint(3, (12,))
    for step in range(2):  # twice: gradients and averages build on what is there
        expected = F.cross_entropy(whole(x), target)
        expected.backward()
        batches = zip(x.to(dtype).split(cuts), target.split(cuts), strict=True)
        loss = normwise.accumulated_backward(
            model, batches, lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum") / 12
        )
        assert_close(loss, expected, kind="composed", count=12)
        for (key, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            # A bias before a norm has no gradient but rounding; the others are of this size.
            assert_close(p.grad, q.grad, kind="composed", count=400, scale=1.0, name=f"{key} {step}")
        for (key, b), c in zip(model.named_buffers(), whole.buffers(), strict=True):
            assert_close(b.double(), c.double(), kind="composed", dtype=dtype, count=200, scale=2.0, name=key)


def test_plain_accumulation_is_not_the_whole_batch() -> None:
    """What the others would have to pass, if this were not needed."""
    model = perceptron().double()
    x, target = torch.randn(12, 32, dtype=torch.float64), torch.randint(3, (12,))
    whole = torch.autograd.grad(F.cross_entropy(model(x), target), model[1].weight)[0]
    parts = [F.cross_entropy(model(x[i : i + 4]), target[i : i + 4]) / 3 for i in (0, 4, 8)]
    plain = torch.autograd.grad(sum(parts), model[1].weight)[0]
    assert (plain - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("how", ["lengths", "packed"])
def test_padding_and_ragged_input(how: str) -> None:
    layers = [normwise.BatchNorm1d(3, dtype=torch.float64) for _ in range(2)]
    model, whole = nn.ModuleList(layers), copy.deepcopy(nn.ModuleList(layers))
    lengths = torch.tensor([5, 1, 3, 4])
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    gain = torch.randn(3, dtype=torch.float64)

    def run(model: nn.ModuleList, rows: slice) -> Tensor:
        if how == "packed":
            parts = [part.T[:n] for part, n in zip(x[rows], lengths[rows], strict=True)]
            y = model[0](pack_sequence(parts, enforce_sorted=False))
            return (model[1](y._replace(data=y.data.tanh())).data.pow(3) * gain).sum()
        y = model[0](x[rows], lengths=lengths[rows]).tanh()
        return (model[1](y, lengths=lengths[rows]).pow(3) * gain[:, None]).sum()

    expected = run(whole, slice(0, 4))
    expected.backward()
    loss = normwise.accumulated_backward(model, [slice(0, 1), slice(1, 4)], lambda rows: run(model, rows))
    assert_close(loss, expected, kind="composed")
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(p.grad, q.grad, kind="composed", count=13)
    for a, b in zip(model.buffers(), whole.buffers(), strict=True):
        assert_close(a.double(), b.double(), kind="composed")


def test_random_layers_draw_the_same_in_every_pass() -> None:
    """The loss that is returned is the one whose gradient was taken."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 5), normwise.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 5), normwise.BatchNorm1d(5)
    ).double()
    x = torch.randn(10, 4, dtype=torch.float64)
    values: list[list[float]] = [[], []]

    def loss(i: int) -> Tensor:
        value = model(x[5 * i : 5 * i + 5]).pow(3).sum()
        values[i].append(value.item())
        return value

    normwise.accumulated_backward(model, [0, 1], loss)
    assert all(len(set(seen)) == 1 and len(seen) >= 3 for seen in values)
    state = torch.get_rng_state()
    normwise.accumulated_backward(model, [0, 1], loss)
    assert values[0][0] != values[0][-1]  # another step draws anew
    assert not torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_refused() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())

    def loss(x: Tensor) -> Tensor:
        return model(x).pow(2).sum()

    with pytest.raises(ValueError, match="got no micro-batch"):
        normwise.accumulated_backward(model, [], loss)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normwise.accumulated_backward(model, [torch.randn(1, 32)], loss)
    with pytest.raises(ValueError, match="must return a scalar"):
        normwise.accumulated_backward(model, [torch.randn(4, 32)], model)
    with pytest.raises(TypeError, match=r"got float: leave .item\(\) out"):
        normwise.accumulated_backward(model, [torch.randn(4, 32)], lambda x: loss(x).item())
    with pytest.raises(RuntimeError, match=r"does not require grad.*Leave .detach\(\)"):
        normwise.accumulated_backward(model, [torch.randn(4, 32)], lambda x: loss(x).detach())
    with pytest.raises(ValueError, match=r"1 is a torch BatchNorm1d.*convert\(model, to='batch'\)"):
        normwise.accumulated_backward(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), [1], loss)
    with pytest.raises(ValueError, match="1 is a normwise BatchRenorm1d"):
        normwise.accumulated_backward(nn.Sequential(nn.Linear(2, 2), normwise.BatchRenorm1d(2)), [1], loss)
    with pytest.raises(ValueError, match="the model has virtual_batch_size=2"):
        normwise.accumulated_backward(normwise.BatchNorm1d(2, virtual_batch_size=2), [1], loss)

    def wayward(x: Tensor) -> Tensor:
        return loss(x) if len(x) > 3 else model[:6](x.flatten(1)).sum()

    with pytest.raises(RuntimeError, match="do not run the same BatchNorm layers"):
        normwise.accumulated_backward(model, [torch.randn(4, 32), torch.randn(3, 32)], wayward)
    with pytest.raises(RuntimeError, match="does not go with activation checkpointing"):
        normwise.accumulated_backward(
            model, [torch.randn(4, 32)], lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=False).sum()
        )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert "_normalize" not in vars(model[2])


def test_frozen_and_absent_layers() -> None:
    """Layers in eval mode stay as they are, and a model without any is accumulated plainly."""
    model = perceptron().double()
    model[2].eval()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    x = torch.randn(6, 32, dtype=torch.float64)
    for net in (model, plain):
        whole = copy.deepcopy(net)
        whole(x).pow(2).sum().backward()
        normwise.accumulated_backward(net, x.split(2), lambda part, net=net: net(part).pow(2).sum())
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            assert_close(p.grad, q.grad, kind="composed", count=200, scale=10.0)
        torch.testing.assert_close(net.state_dict(), whole.state_dict())
