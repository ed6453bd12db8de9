"""GatedRMSNorm: root mean square normalization with a gate, or of groups of features, as in state-space models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import normwise.nn as ours
from normwise.ops.norm.gain import Cast
from normwise.ops.norm.layer_norm import rms_norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GatedRMSNorm(ours.RMSNorm):
    r"""RMSNorm of x and a gate, of all features of a row or of each group of them.

    gate="before": y = (offset + gamma) * rms(x * act(gate));  "after": y = (offset + gamma) * rms(x) * act(gate)

    with rms(x) = x / sqrt(E[x^2] + eps) over the features, or over each `group_size` of them. Product and activation
    are computed in float32. A call without a gate leaves it out.

    What stands for the gated norms of other libraries, with `offset` and `cast` as in `normwise.RMSNorm`.

    Source: Gu & Dao 2023 (Mamba), Dao & Gu 2024 (Mamba-2).
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Literal["before", "after"] | None = "before",
        gate_act: str = "silu",
        group_size: int | None = None,
        offset: float = 0.0,
        cast: Cast | None = None,
    ) -> None:
        if gate not in ("before", "after", None):
            raise ValueError(f"gate must be 'before', 'after' or None, but got {gate!r}")
        if gate_act not in _ACTIVATIONS:
            raise ValueError(f"gate_act must be one of {', '.join(_ACTIVATIONS)}, but got {gate_act!r}")
        if group_size is not None and (group_size < 1 or normalized_shape % group_size):
            raise ValueError(f"group_size={group_size} does not divide the {normalized_shape} features")
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype, offset=offset, cast=cast)
        self.gate, self.gate_act, self.group_size = gate, gate_act, group_size

    def forward(self, input: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """y of shape (..., features), in the dtype of the input, or in what that and the gain's dtype give where
        cast="input"; `gate` of the same shape."""
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        opened = None if gate is None or self.gate is None else _ACTIVATIONS[self.gate_act](gate.to(x.dtype))
        if opened is not None and self.gate == "before":
            x = x * opened
        size = self.group_size or x.shape[-1]
        eps = self.__dict__["eps"]
        z: Tensor = rms_norm(x.unflatten(-1, (-1, size)), [size], None, eps).flatten(-2)
        if self.weight is None:
            y = z
        elif self.cast == "input":
            gain = self.weight if self.offset == 0 else self.offset + self.weight
            y = gain * z.to(input.dtype)
        else:
            y = (self.offset + self.weight.to(z.dtype)) * z
        if opened is not None and self.gate == "after":
            y = (y * opened).to(input.dtype)
        return y if self.cast == "input" else y.to(input.dtype)

    def extra_repr(self) -> str:
        said: dict[str, Any] = {"gate": self.gate, "gate_act": self.gate_act, "group_size": self.group_size}
        return super().extra_repr() + "".join(
            f", {name}={value!r}" for name, value in said.items() if value is not None
        )
