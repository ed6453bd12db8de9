"""Norm layers as the models of transformers write them: plain modules of torch's operations, in their order.

Each has the names that it has there. Written anew from the formulas of models/*/modeling_*.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class LlamaRMSNorm(nn.Module):
    """w * D(z): rounded to the input's dtype before the gain. Also Mistral's, Qwen2's and Qwen3's."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalized = _over_root_mean_square(hidden_states.to(torch.float32), self.variance_epsilon)
        return self.weight * normalized.to(hidden_states.dtype)


class Olmo2RMSNorm(nn.Module):
    """D(w * z): rounded once, behind the gain. Also GptOss's."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalized = _over_root_mean_square(hidden_states.to(torch.float32), self.variance_epsilon)
        return (self.weight * normalized).to(hidden_states.dtype)


class GemmaRMSNorm(nn.Module):
    """D((1 + w) * z), with a weight that starts at 0. Also Gemma2's, Gemma3's and Qwen3Next's."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        output = _over_root_mean_square(x.float(), self.eps)
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class T5LayerNorm(nn.Module):
    """The mean square in float32; the input itself is divided, by promotion in float32 too, and is rounded to a weight
    of half precision only: w * z without rounding for a half precision input beside a float32 weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normalized = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            normalized = normalized.to(self.weight.dtype)
        return self.weight * normalized


class LayerNorm1P(nn.LayerNorm):
    """nn.LayerNorm by weight + 1, with a weight that starts at 0: Nemotron's."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)
