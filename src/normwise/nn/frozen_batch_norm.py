"""FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.scalars import flags
from normwise.nn.construct import Activated
from normwise.ops import hyperparameters, symbolic
from normwise.ops.norm.batch_norm_with_stats import batch_norm_with_stats


class FrozenBatchNorm(Activated):
    """The part that does not depend on the input's rank."""

    ranks: tuple[int, ...]
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dim = 1  # of layers pickled by earlier versions

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        dim: int = 1,
    ) -> None:
        num_features = hyperparameters.size("num_features", num_features)
        hyperparameters.positive_eps(eps)
        flags(affine=affine, bias=bias)
        if act is not None:
            activation(act)
        super().__init__()
        self.dim = hyperparameters.channel_dim(dim)
        self.num_features, self.eps, self.affine, self.act = num_features, eps, affine, act
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.register_buffer("weight", torch.ones_like(zeros) if affine else None)
        self.register_buffer("bias", zeros.clone() if affine and bias else None)
        self.register_buffer("running_mean", zeros.clone())
        self.register_buffer("running_var", torch.ones_like(zeros))

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
        segments: Tensor | None = None,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """act(bn(input) + residual); see `normwise.functional.batch_norm` for shapes and errors.

        `act` here is for this call, in the place of the layer's.
        """
        if symbolic.is_traced(input, mask, lengths, residual, segments) or (
            not (scale is shift is None) and symbolic.is_traced(scale, shift)
        ):
            given: dict[str, Any] = {
                "mask": mask,
                "lengths": lengths,
                "residual": residual,
                "segments": segments,
                "act": act,
                "scale": scale,
                "shift": shift,
            }
            return symbolic.call_layer(self, input, **given)
        return batch_norm_with_stats(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            False,
            0.0,
            self.__dict__["eps"],
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            residual=residual,
            ranks=self.ranks,
            segments=segments,
            dim=self.dim,
            scale=scale,
            shift=shift,
        )[0]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """That of a BatchNorm loads as well: its count of batches means nothing here."""
        state_dict.pop(prefix + "num_batches_tracked", None)  # type: ignore[attr-defined]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act!r}"
        return f"{self.num_features}, eps={self.__dict__['eps']}, affine={self.affine}{act}" + (
            "" if self.dim == 1 else f", dim={self.dim}"
        )


class FrozenBatchNorm1d(FrozenBatchNorm):
    r"""Batch normalization of (N, C) or (N, C, L) by fixed numbers, in training as in evaluation.

    y = act(gamma * (x - running_mean) / sqrt(running_var + eps) + beta + residual), where all four are buffers: no
    optimizer, `train()` or batch changes them. Gradients flow through to the input.

    For fine-tuning with batches too small for statistics of their own; `normwise.convert(model, to="frozen")` puts it
    in the place of a model's BatchNorm layers, whose state_dict it also loads. `normwise.freeze` keeps the layers and
    can be undone.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: have gamma and beta.
        bias: have beta.
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus",
            "mish" or None.
    """

    ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """As `FrozenBatchNorm1d`, of (N, C, H, W)."""

    ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """As `FrozenBatchNorm1d`, of (N, C, D, H, W)."""

    ranks = (5,)
