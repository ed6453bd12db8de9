"""Nets as people write them, after the papers and the usual implementations: what `fuse` meets.

All take a width, so that tests have tiny ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """He et al. 2016: one ReLU module in two places, and `+=`."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Two blocks a stage, as in ResNet-18, with a functional ReLU behind the stem."""

    def __init__(self, width: int = 64, stages: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = []
        before = width
        for stage in range(stages):
            after = width * 2**stage
            layers.append(nn.Sequential(BasicBlock(before, after, 1 if stage == 0 else 2), BasicBlock(after, after)))
            before = after
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.layers(self.pool(x)).mean((2, 3)))


class ConvNormAct(nn.Sequential):
    """As torchvision's Conv2dNormActivation."""

    def __init__(
        self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None
    ) -> None:
        layers: list[nn.Module] = [conv(before, after, kernel, stride, groups), nn.BatchNorm2d(after)]
        super().__init__(*layers, *([] if act is None else [act(inplace=True)]))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, gate: type[nn.Module], act: type[nn.Module]) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, max(channels // 4, 1), 1), act()
        self.expand, self.gate = nn.Conv2d(max(channels // 4, 1), channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018; with squeeze and excitation Howard et al. 2019, Tan & Le 2019."""

    def __init__(
        self,
        before: int,
        after: int,
        stride: int = 1,
        expand: int = 4,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        inner = before * expand
        layers = [ConvNormAct(before, inner, 1, act=act), ConvNormAct(inner, inner, 3, stride, inner, act)]
        if gate is not None:
            layers.append(SqueezeExcite(inner, gate, nn.ReLU if act is nn.Hardswish else act))
        self.conv = nn.Sequential(*layers, conv(inner, after, 1), nn.BatchNorm2d(after))
        self.use_res_connect = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNet(nn.Module):
    """MobileNetV2 with `act` ReLU6; V3 with Hardswish and `gate` Hardsigmoid; EfficientNet with SiLU and Sigmoid."""

    def __init__(
        self,
        width: int = 16,
        stages: int = 3,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ConvNormAct(3, width, 3, 2, act=act)]
        for stage in range(stages):
            before, after = width * (stage or 1), width * (stage + 1)
            blocks.append(InvertedResidual(before, after, 1 if stage == 0 else 2, act=act, gate=gate))
            blocks.append(InvertedResidual(after, after, act=act, gate=gate))
        blocks.append(ConvNormAct(width * stages, width * 8, 1, act=act))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(width * 8, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """Huang et al. 2017, in the form that asks whether it gets one tensor or several."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(before), nn.ReLU(inplace=True), conv(before, 4 * growth, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), conv(4 * growth, growth)
        self.drop_rate = 0.0

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        previous = [features] if isinstance(features, Tensor) else features
        out = self.conv1(self.relu1(self.norm1(torch.cat(previous, 1))))
        out = self.conv2(self.relu2(self.norm2(out)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        return out


class DenseBlock(nn.ModuleDict):
    def __init__(self, before: int, growth: int, layers: int) -> None:
        super().__init__({f"layer{n}": DenseLayer(before + n * growth, growth) for n in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, width: int = 16, growth: int = 8, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        wide = width + layers * growth
        self.conv0, self.norm0, self.relu0 = conv(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.block1 = DenseBlock(width, growth, layers)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(wide), nn.ReLU(inplace=True), conv(wide, width, 1), nn.AvgPool2d(2, 2)
        )
        self.block2 = DenseBlock(width, growth, layers)
        self.norm5 = nn.BatchNorm2d(wide)
        self.classifier = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.norm0(self.conv0(x)))
        x = self.block2(self.transition(self.block1(x)))
        return self.classifier(F.relu(self.norm5(x), inplace=True).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: nothing stands behind a norm but a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.act = nn.Linear(channels, 4 * channels), nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(self.act(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class DiffusionBlock(nn.Module):
    """A residual block of a diffusion model's U-net: GroupNorm and SiLU, the time step added between."""

    def __init__(self, before: int, after: int, times: int, groups: int = 4) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before), nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(times, after)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after), nn.Conv2d(after, after, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time(self.nonlinearity(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class UNet(nn.Module):
    def __init__(self, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.low = DiffusionBlock(width, 2 * width, width), DiffusionBlock(2 * width, 2 * width, width)
        self.up = DiffusionBlock(3 * width, width, width)
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.embed(t[:, None])
        x = self.first(x)
        low = self.low(self.down(F.avg_pool2d(x, 2), t), t)
        return self.last(self.up(torch.cat([F.interpolate(low, scale_factor=2), x], 1), t))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).reshape(n, length, width))


class PreNormBlock(nn.Module):
    """Xiong et al. 2020."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), Attention(width, heads)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class PostNormBlock(nn.Module):
    """Vaswani et al. 2017."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + F.dropout(self.attention(x), self.dropout, self.training))
        out = self.linear2(F.relu(self.linear1(x)))
        return self.norm2(x + F.dropout(out, self.dropout, self.training))


class Transformer(nn.Module):
    """Pre-norm, or with `post` post-norm; over embedded steps."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        blocks: int = 2,
        *,
        post: bool = False,
        norm: type[nn.Module] = nn.LayerNorm,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PostNormBlock(width, heads, dropout) if post else PreNormBlock(width, heads, dropout, norm)
            for _ in range(blocks)
        )
        self.norm = None if post else norm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else self.norm(x)


class Net(NamedTuple):
    """A tiny net, an input, how many norms it has, and how many of them `fuse` makes one call with something."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    norms: int
    fused: int


def tiny(name: str) -> Net:
    """A net of `TINY`, with an input that fits it."""
    images = torch.randn(4, 3, 32, 32)
    steps = torch.randn(3, 7, 32)
    made = {
        "ResNet": lambda: Net(ResNet(8, 2), (images,), 10, 9),
        "MobileNetV2": lambda: Net(MobileNet(8), (images,), 20, 14),
        "MobileNetV3": lambda: Net(MobileNet(8, act=nn.Hardswish, gate=nn.Hardsigmoid), (images,), 20, 14),
        "EfficientNet": lambda: Net(MobileNet(8, act=nn.SiLU, gate=nn.Sigmoid), (images,), 20, 14),
        "DenseNet": lambda: Net(DenseNet(8, 4), (images,), 15, 15),
        "UNet": lambda: Net(UNet(8), (torch.randn(2, 3, 8, 8), torch.rand(2)), 7, 7),
        "pre-norm": lambda: Net(Transformer(), (steps,), 5, 2),
        "pre-norm RMS": lambda: Net(Transformer(norm=nn.RMSNorm), (steps,), 5, 2),
        "post-norm": lambda: Net(Transformer(post=True), (steps,), 4, 4),
    }
    return made[name]()


TINY = (
    "ResNet",
    "MobileNetV2",
    "MobileNetV3",
    "EfficientNet",
    "DenseNet",
    "UNet",
    "pre-norm",
    "pre-norm RMS",
    "post-norm",
)
