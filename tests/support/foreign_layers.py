"""Norm layers of many a library, in small: what they compute, written anew, and what looks like one and is none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class L2Norm(nn.Module):
    """x over its root mean square, without any tensor of its own (Llama 4's)."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        z = x.float()
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class CenteredNorm(nn.Module):
    """LayerNorm without a bias, rounded at the end (Cohere's)."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        z = hidden.float()
        z = z - z.mean(-1, keepdim=True)
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * z).to(hidden.dtype)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm of the channels of an image, by moving them to the end and back (timm's, ConvNeXt's)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandWrittenLayerNorm2d(nn.Module):
    """The same by hand, all in the input's dtype (SAM's, ViTDet's)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class TransposedLayerNorm(nn.LayerNorm):
    """LayerNorm of axis 1 of (N, C, L) (ESPnet's with dim=1, SqueezeBert's)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class ChannelNorm(nn.Module):
    """LayerNorm of the channels with a gain of shape (1, C, 1, 1) under another name (imagen's)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt() * self.g


class NormalizedRMSNorm(nn.Module):
    """F.normalize times the root of the features (x-transformers', lucidrains')."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (self.gamma + 1)


class GatedBefore(nn.Module):
    """RMSNorm of x * silu(gate), by groups (Mamba-2's, Zamba2's)."""

    def __init__(self, size: int, group_size: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon, self.group_size = eps, group_size or size

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        z = hidden.float()
        if gate is not None:
            z = z * F.silu(gate.float())
        groups = z.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * groups.flatten(-2).to(hidden.dtype)


class GatedAfter(nn.Module):
    """RMSNorm(x) * silu(gate) (Qwen3Next's)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        z = hidden.float()
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        y = self.weight * z.to(hidden.dtype)
        return (y * F.silu(gate.float())).to(hidden.dtype)


class FrozenStats2d(nn.Module):
    """BatchNorm of four buffers, with eps in the code (DETR's)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class ActivatedBatchNorm(nn.Module):
    """BatchNorm and an activation by its name (ABN of inplace_abn)."""

    def __init__(self, num_features: int, activation: str = "leaky_relu") -> None:
        super().__init__()
        self.activation, self.eps, self.momentum = activation, 1e-3, 0.2
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return getattr(F, self.activation)(x)


class BatchNormAct(nn.Module):
    """BatchNorm with modules behind it, of no base of torch.nn."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("moving_mean", torch.zeros(num_features))
        self.register_buffer("moving_var", torch.ones(num_features))
        self.drop, self.act = nn.Dropout(0.25), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.moving_mean, self.moving_var, self.gamma, self.beta, self.training, 0.1, 1e-5)
        return self.act(self.drop(x))


class SwappedGroupNorm(nn.GroupNorm):
    """GroupNorm with its arguments the other way round (timm's)."""

    def __init__(self, num_channels: int, num_groups: int = 4) -> None:
        super().__init__(num_groups, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)


# What is no norm, or none that normwise has a counterpart of.


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class AffineNoNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class UnitLengthNorm(nn.Module):
    """x over its length: a root mean square with a gain of d^-1/2 that is in no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class ScalarGainNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor([dim**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.g


class UnbiasedLayerNorm(nn.Module):
    """The annotated transformer's: the unbiased deviation, and eps beside it instead of under the root."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.a_2, self.b_2, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.b_2


class EpsOutsideRMSNorm(nn.Module):
    """eps beside the root, at which inputs next to nothing come out otherwise."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3) * self.scale


class ExponentialGainNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, 1e-6) * self.log_gain.exp()


class MaxNorm(nn.Module):
    """Free of scale as a norm is, and by the largest element."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(-1, keepdim=True) + 1e-6) * self.weight


class SometimesNorm(nn.Module):
    """An RMSNorm, but for inputs whose sum is negative."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        z = F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        return z if x.sum() > 0 else z * self.weight


class NoisyNorm(nn.LayerNorm):
    """A LayerNorm in evaluation, and noise on top in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class PairNormed(nn.LayerNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class OverwritingNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x * self.weight


class ConditionedNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight + condition, 1e-6)


class ForgottenBiasNorm(nn.Module):
    """A bias that is held and not used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, None, 1e-5)


NO_NORMS = [
    LayerScale,
    AffineNoNorm,
    ScalarGainNorm,
    UnbiasedLayerNorm,
    EpsOutsideRMSNorm,
    ExponentialGainNorm,
    MaxNorm,
    SometimesNorm,
    NoisyNorm,
    PairNormed,
    OverwritingNorm,
    ConditionedNorm,
    ForgottenBiasNorm,
]
