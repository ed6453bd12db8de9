"""What a layer keeps for its backward, counted, and the most that forward and backward hold, against torch's way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.case import Figure
from benchmarks.held import kept, peak
from benchmarks.measure import Probe
from benchmarks.norms import IMAGES

Forward = Callable[[Tensor], Sequence[Tensor]]
MIB = 1 << 20
TIMES = 3


@dataclass(frozen=True)
class Memory:
    """One layer in two ways, whose memory is compared.

    Attributes:
        name, against, must, aim: as in `Case`; the ratio is that of peaks.
        ours, theirs: from an input to outputs.
        parameters: of both.
        x: the input.
        tensors: how many tensors of the input's size ours may keep; None where that is not stated.
    """

    name: str
    ours: Forward
    theirs: Forward
    parameters: Sequence[Tensor]
    x: Tensor
    against: str
    tensors: int | None = None
    must: float | None = None
    aim: float | None = None

    def figure(self, probe: Probe) -> Figure:
        ours, theirs = (sum(kept(lambda f=f: f(self.x), self.parameters).values()) for f in (self.ours, self.theirs))
        # How many pages malloc needs for a loop's many small blocks differs from one time to the next.
        peaks = [statistics.median_low(self._peak(way) for _ in range(TIMES)) for way in (self.ours, self.theirs)]
        return {
            "against": self.against,
            "must": self.must,
            "aim": self.aim,
            "error": 0.0,  # numbers of bytes, which have none
            "kept": ours,
            "their_kept": theirs,
            "peak": peaks[0],
            "their_peak": peaks[1],
            "median": peaks[0] / max(peaks[1], 1),
            "input": self.x.nbytes,
            "tensors": self.tensors,
        }

    def _peak(self, forward: Forward) -> int:
        leaves = [t for t in (self.x, *self.parameters) if t.requires_grad]
        upstream = [torch.randn_like(y) for y in forward(self.x)]
        return peak(lambda: torch.autograd.grad(forward(self.x), leaves, upstream, allow_unused=True))

    def line(self, figure: Figure) -> str:
        text = f"keeps {figure['kept'] / MIB:8.1f} MiB, {self.against} {figure['their_kept'] / MIB:8.1f}"
        text += f"  ({figure['kept'] / figure['input']:.2f} and {figure['their_kept'] / figure['input']:.2f} inputs)"
        text += f"  peak {figure['peak'] / MIB:7.1f} and {figure['their_peak'] / MIB:7.1f} MiB: {figure['median']:.2f}"
        if self.must is not None:
            text += f"  must {self.must:.2f} {'ok' if figure['median'] <= self.must else 'SHORT'}"
        if self.tensors is not None and figure["kept"] > (self.tensors + 0.05) * figure["input"]:
            text += f"  MORE than {self.tensors} inputs"
        return text


def cases() -> Iterator[Memory]:
    yield from norms()
    yield from recurrent()


def norms() -> Iterator[Memory]:
    image, rows = IMAGES[0], (8192, 768)
    for channels_last in (False, True):
        x = torch.randn(image)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        name = f"{image}{' channels-last' if channels_last else ''}"
        ours, theirs = normwise.BatchNorm2d(64), nn.BatchNorm2d(64)
        yield _layers(f"BatchNorm {name}", ours, theirs, x, tensors=1)
        fused = normwise.BatchNorm2d(64, act="relu")
        yield _layers(f"BatchNorm + ReLU {name}", fused, lambda x, n=theirs: (F.relu_(n(x)),), x, tensors=1)
    residual = torch.randn(image)
    yield _layers(
        f"BatchNorm + residual + ReLU {image}",
        lambda x, n=fused: (n(x, residual=residual),),
        lambda x, n=theirs: (F.relu_(n(x).add_(residual)),),
        torch.randn(image),
        tensors=2,
    )
    x, other = torch.randn(rows), torch.randn(rows)
    ours, theirs = normwise.LayerNorm(768), nn.LayerNorm(768)
    yield _layers(f"LayerNorm {rows}", ours, theirs, x, tensors=1)
    yield _layers(
        f"residual add + LayerNorm {rows}",
        lambda x: ours(x, add=other),
        lambda x: (theirs(s := x + other), s),
        x,
        tensors=1,
    )
    gelu = normwise.LayerNorm(768, act="gelu")
    yield _layers(f"LayerNorm + GELU {rows}", gelu, lambda x: (F.gelu(theirs(x)),), x, tensors=1)
    yield _layers(f"RMSNorm {rows}", normwise.RMSNorm(768), nn.RMSNorm(768), x, tensors=1)
    x = torch.randn(image)
    yield _layers(f"GroupNorm(8) {image}", normwise.GroupNorm(8, 64), nn.GroupNorm(8, 64), x, tensors=1)


def recurrent() -> Iterator[Memory]:
    """LSTMs against the same layer as an eager loop, and against torch's without a norm."""
    for steps, batch, inputs, units in [(100, 32, 256, 256), (784, 32, 1, 128)]:
        x = torch.randn(steps, batch, inputs)
        shape = (steps, batch, inputs, units)
        layer, plain = normwise.LSTM(inputs, units), nn.LSTM(inputs, units)
        run = _first(layer)
        yield Memory(
            f"LN-LSTM {shape}", run, _eager(run), list(layer.parameters()), x.requires_grad_(), "eager", must=0.5
        )
        parameters = [*layer.parameters(), *plain.parameters()]
        yield Memory(f"LN-LSTM {shape}", run, _first(plain), parameters, x, "nn.LSTM")


def _layers(
    name: str, ours: nn.Module | Forward, theirs: nn.Module | Forward, x: Tensor, *, tensors: int | None = None
) -> Memory:
    parameters = [p for layer in (ours, theirs) if isinstance(layer, nn.Module) for p in layer.parameters()]
    return Memory(name, _first(ours), _first(theirs), parameters, x.requires_grad_(), "torch.nn", tensors)


def _first(layer: nn.Module | Forward) -> Forward:
    """A layer's output; a function as it is."""
    if not isinstance(layer, nn.Module):
        return layer

    def forward(x: Tensor) -> Sequence[Tensor]:
        output = layer(x)
        return (output[0] if isinstance(output, tuple) else output,)

    return forward


def _eager(forward: Forward) -> Forward:
    def loop(x: Tensor) -> Sequence[Tensor]:
        with normwise.backend("aten"):
            return forward(x)

    return loop
