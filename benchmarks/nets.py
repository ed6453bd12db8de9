"""Whole nets as a user has them, by torch.nn's layers alone: what the suite `models` trains and evaluates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise

Inputs = tuple[Tensor, ...]


class Net(NamedTuple):
    """One net and what it is given.

    Attributes:
        build: the net, of torch.nn's layers.
        inputs: one batch.
        channels_last: measured in that layout too.
        ours: the net that takes its place where that is not what `normwise.convert` makes of it: the same with our
            LSTM, which has norms that torch's lacks, so that their results differ.
        compiles: whether torch.compile is asked for; a loop over steps takes it minutes.
        must, aim: the ratios demanded and hoped for in training with two threads, channels-first and channels-last.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    channels_last: bool = False
    ours: Callable[[], nn.Module] | None = None
    compiles: bool = True
    must: Sequence[float | None] = (None, None)
    aim: Sequence[float | None] = (None, None)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


class Residual(nn.Module):
    """ResNet's basic block (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu2(y)
        return out


def resnet(width: int = 64) -> nn.Module:
    """ResNet-18."""
    net = nn.Sequential(conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    before = width
    for stage in range(4):
        after = width << stage
        net.extend([Residual(before, after, 1 if stage == 0 else 2), Residual(after, after, 1)])
        before = after
    return net.extend(head(before))


def mobilenet() -> nn.Module:
    """MobileNet's depthwise separable convolutions (Howard et al. 2017), at half the depth."""
    net, before = nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(inplace=True)), 32
    for after, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        for layer in (conv(before, before, 3, stride, groups=before), conv(before, after, 1)):
            net.extend([layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True)])
        before = after
    return net.extend(head(before))


class Excite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(x)
        return out


class Inverted(nn.Module):
    """An inverted residual with excitation (Sandler et al. 2018, Howard et al. 2019)."""

    def __init__(self, before: int, after: int, stride: int, act: Callable[..., nn.Module]) -> None:
        super().__init__()
        wide = 4 * before
        self.skips = stride == 1 and before == after
        self.body = nn.Sequential(
            conv(before, wide, 1),
            nn.BatchNorm2d(wide),
            act(inplace=True),
            conv(wide, wide, 3, stride, groups=wide),
            nn.BatchNorm2d(wide),
            act(inplace=True),
            Excite(wide),
            conv(wide, after, 1),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skips else y


def inverted(act: Callable[..., nn.Module]) -> nn.Module:
    """EfficientNet-like with SiLU, MobileNetV3-like with Hardswish."""
    net, before = nn.Sequential(conv(3, 16, 3, 2), nn.BatchNorm2d(16), act(inplace=True)), 16
    for after, stride in [(24, 2), (24, 1), (40, 2), (40, 1), (80, 2), (80, 1)]:
        net.append(Inverted(before, after, stride, act))
        before = after
    return net.extend([conv(before, 320, 1), nn.BatchNorm2d(320), act(inplace=True)]).extend(head(320))


class Block(nn.Module):
    """The residual block of a diffusion model's U-Net (Ho et al. 2020)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, before),
            nn.SiLU(),
            conv(before, after),
            nn.GroupNorm(8, after),
            nn.SiLU(),
            conv(after, after),
        )
        self.shortcut = nn.Identity() if before == after else conv(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.body(x)
        return out


class UNet(nn.Module):
    """One level down and up again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.down = conv(3, width), Block(width, width)
        self.pool, self.middle, self.up = nn.AvgPool2d(2), Block(width, 2 * width), nn.Upsample(scale_factor=2)
        self.after = Block(3 * width, width)
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), conv(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(self.stem(x))
        coarse = self.up(self.middle(self.pool(fine)))
        out: Tensor = self.out(self.after(torch.cat([fine, coarse], 1)))
        return out


class PreNorm(nn.Module):
    """A block of a pre-norm transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def transformer(width: int = 256) -> nn.Module:
    return nn.Sequential(*[PreNorm(width, 4) for _ in range(4)], nn.LayerNorm(width), nn.Linear(width, 64))


def policy() -> nn.Module:
    net, before = nn.Sequential(), 24
    for width in (256, 256):
        net.extend([nn.Linear(before, width), nn.LayerNorm(width), nn.ReLU()])
        before = width
    return net.append(nn.Linear(before, 6))


class Tagger(nn.Module):
    """A linear layer, a recurrent one, a linear one; of the output at all steps, or at the last one."""

    def __init__(self, inputs: int, lstm: nn.Module, outputs: int, last: bool = False) -> None:
        super().__init__()
        units: Any = lstm.hidden_size
        self.before, self.act, self.lstm = nn.Linear(inputs, int(lstm.input_size)), nn.ReLU(), lstm  # type: ignore[arg-type]
        self.after, self.last = nn.Linear(units, outputs), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.act(self.before(x)))[0]
        out: Tensor = self.after(y[-1] if self.last else y)
        return out


class Resets(Tagger):
    """The same with a state that is zeroed where an episode begins: ours takes that, torch.nn's a call a step."""

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:  # type: ignore[override]
        y = self.act(self.before(x))
        if isinstance(self.lstm, normwise.LSTM):
            ours: Tensor = self.after(self.lstm(y, reset=begins)[0])
            return ours
        state = (y.new_zeros(1, y.shape[1], self.lstm.hidden_size),) * 2  # type: ignore[arg-type]
        steps = []
        for row, goes_on in zip(y.split(1), (~begins).to(y.dtype).unsqueeze(-1).split(1), strict=True):
            h, state = self.lstm(row, tuple(goes_on * s for s in state))
            steps.append(h)
        theirs: Tensor = self.after(torch.cat(steps))
        return theirs


def sequences(model: type[Tagger], inputs: int, units: Sequence[int], outputs: int, **more: Any) -> dict[str, Any]:
    """The same model with torch.nn's LSTM and with ours; `units`: input, hidden and layers of the LSTM."""

    def build(kind: Callable[..., nn.Module]) -> nn.Module:
        return model(inputs, kind(*units), outputs, **more)

    return {"build": partial(build, nn.LSTM), "ours": partial(build, normwise.LSTM)}


def images(batch: int, size: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(batch, 3, size, size),)


def rows(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(shape),)


def episodes(steps: int, batch: int, inputs: int) -> Inputs:
    return torch.randn(steps, batch, inputs), torch.rand(steps, batch) < 0.05


NETS: dict[str, Net] = {
    "ResNet-18, 16 x 3 x 64 x 64": Net(resnet, images(16, 64), True, must=(1.0, 1.0), aim=(0.98, 0.98)),
    "MobileNet-like, 16 x 3 x 96 x 96": Net(mobilenet, images(16, 96), True, must=(0.85, 0.93), aim=(0.80, 0.88)),
    "EfficientNet-like, SiLU, 16 x 3 x 96 x 96": Net(
        partial(inverted, nn.SiLU), images(16, 96), True, must=(0.85, 0.85), aim=(0.75, 0.75)
    ),
    "MobileNetV3-like, Hardswish, 16 x 3 x 96 x 96": Net(
        partial(inverted, nn.Hardswish), images(16, 96), True, must=(0.85, 0.85), aim=(0.75, 0.75)
    ),
    "U-Net, GroupNorm + SiLU, 8 x 3 x 64 x 64": Net(UNet, images(8, 64), True, must=(0.97, 0.97), aim=(0.90, 0.90)),
    "pre-norm transformer, 16 x 128 x 256": Net(transformer, rows(16, 128, 256), must=(1.0,), aim=(0.98,)),
    "policy net, 32 x 24": Net(policy, rows(32, 24), must=(1.05,), aim=(1.0,)),
    "speech-like, LSTM, 100 x 16 x 80": Net(
        **sequences(Tagger, 80, (128, 256, 2), 40), inputs=rows(100, 16, 80), must=(1.0,), aim=(0.9,)
    ),
    "time series, LSTM, 96 x 32 x 8": Net(**sequences(Tagger, 8, (32, 64), 8, last=True), inputs=rows(96, 32, 8)),
    "policy with resets, LSTM, 64 x 16 x 24": Net(
        **sequences(Resets, 24, (128, 128), 6), inputs=partial(episodes, 64, 16, 24), compiles=False
    ),
}
