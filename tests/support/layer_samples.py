"""Every kind of layer, norms and recurrent ones, with an input each: what tests of the whole module run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise


@dataclass(frozen=True)
class Sample:
    """A layer and the shape of an input."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]

    def make(self, **more: Any) -> nn.Module:
        return getattr(normwise, self.name)(*self.args, **self.kwargs, **more)

    def input(self) -> Tensor:
        return torch.randn(self.shape)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.kwargs.items())])


def _sample(name: str, *args: Any, shape: tuple[int, ...], **kwargs: Any) -> Sample:
    return Sample(name, args, kwargs, shape)


ROWS, SERIES, IMAGE, VOLUME, STEPS = (6, 4), (3, 4, 5), (2, 4, 5, 3), (2, 4, 2, 3, 2), (5, 3, 4)

NORMS = [
    _sample("BatchNorm1d", 4, shape=ROWS),
    _sample("BatchNorm1d", 4, shape=SERIES, virtual_batch_size=2),
    _sample("BatchNorm2d", 4, shape=IMAGE, act="relu"),
    _sample("BatchNorm3d", 4, shape=VOLUME, momentum=None),
    _sample("SyncBatchNorm", 4, shape=SERIES, act="silu"),
    _sample("BatchRenorm1d", 4, shape=ROWS),
    _sample("BatchRenorm2d", 4, shape=IMAGE, act="gelu"),
    _sample("BatchRenorm3d", 4, shape=VOLUME),
    _sample("FrozenBatchNorm1d", 4, shape=SERIES),
    _sample("FrozenBatchNorm2d", 4, shape=IMAGE, act="relu"),
    _sample("FrozenBatchNorm3d", 4, shape=VOLUME),
    _sample("LayerNorm", 4, shape=ROWS),
    _sample("LayerNorm", 4, shape=IMAGE, dim=1, act="silu"),
    _sample("RMSNorm", 4, shape=ROWS),
    _sample("RMSNorm", 4, shape=SERIES, dim=1, act="relu"),
    _sample("RMSNorm", 4, shape=ROWS, cast="input"),
    _sample("GroupNorm", 2, 4, shape=IMAGE),
    _sample("GroupNorm", 2, 4, shape=SERIES, act="silu"),
    _sample("InstanceNorm1d", 4, shape=SERIES, track_running_stats=True),
    _sample("InstanceNorm2d", 4, shape=IMAGE, affine=True, act="relu"),
    _sample("InstanceNorm3d", 4, shape=VOLUME),
]
RECURRENT = [
    _sample("LSTM", 4, 6, shape=STEPS),
    _sample("LSTM", 4, 6, shape=STEPS, norm=None, bidirectional=True),
    _sample("GRU", 4, 6, shape=STEPS, norm="batch", num_stat_steps=8),
    _sample("RNN", 4, 6, shape=STEPS, norm="rms", num_layers=2),
    _sample("LSTMCell", 4, 6, shape=ROWS),
    _sample("GRUCell", 4, 6, shape=ROWS, norm=None),
    _sample("RNNCell", 4, 6, shape=ROWS, norm="batch", num_stat_steps=1),
]

each_norm = pytest.mark.parametrize("sample", NORMS, ids=str)
each_layer = pytest.mark.parametrize("sample", NORMS + RECURRENT, ids=str)
each_recurrent = pytest.mark.parametrize("sample", RECURRENT, ids=str)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of what a layer returns, in order."""
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def same(actual: Any, expected: Any) -> None:
    """Bit for bit the same results."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def trained_once(layer: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Any] | None = None) -> dict[str, Any]:
    """Outputs, gradients and state of one step in train mode."""
    leaf = x.clone().requires_grad_()
    outputs = tensors((run or (lambda m, t: m(t)))(layer.train(), leaf))
    upstream = [torch.full_like(t, 0.5).cumsum(-1) for t in outputs]
    grads = torch.autograd.grad(outputs, [leaf, *layer.parameters()], upstream, allow_unused=True)
    return {
        "outputs": [t.detach() for t in outputs],
        "grads": [torch.zeros(()) if g is None else g for g in grads],
        "state": [t.clone() for t in layer.state_dict().values()],
    }
