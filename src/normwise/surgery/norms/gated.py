"""GatedRMSNorm: root mean square normalization with a gate, or of groups of features, as in state-space models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import normwise.nn as ours
from normwise.backends.protocol import NormConfig
from normwise.nn.construct import affine
from normwise.ops import symbolic
from normwise.ops.norm import gain
from normwise.ops.norm.gain import Cast
from normwise.ops.norm.layer_norm import rms_norm
from normwise.ops.norm.modulation import Given, of_features


class GatedRMSNorm(ours.RMSNorm):
    r"""RMSNorm of x and a gate, of all features of a row or of each group of them.

    gate="before": y = (offset + gamma) * rms(x * act(gate));  "after": y = (offset + gamma) * rms(x) * act(gate)

    with rms(x) = x / sqrt(E[x^2] + eps) over the features, or over each `group_size` of them. Product and activation
    are computed in float32. A call without a gate leaves it out.

    What stands for the gated norms of other libraries: `normwise.RMSNorm(gate_first=...)(x, gate=...)` with its
    `offset` and `cast`, the gate as second argument, and groups.

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
        if group_size is not None and (group_size < 1 or normalized_shape % group_size):
            raise ValueError(f"group_size={group_size} does not divide the {normalized_shape} features")
        options: dict[str, Any] = {"gate_first": gate == "before", "gate_act": gate_act, "offset": offset, "cast": cast}
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype, **options)
        self.gate, self.group_size = gate, group_size

    def forward(self, input: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """y of shape (..., features), in the dtype of the input, or in what that and the gain's dtype give where
        cast="input"; `gate` of the same shape."""
        if symbolic.is_traced(input, gate):
            return symbolic.call_layer(self, input, gate=gate)  # type: ignore[no-any-return]
        eps, size = self.__dict__["eps"], self.group_size or self.normalized_shape[0]

        def norm(x: Tensor, mask: None) -> Any:
            return rms_norm(x.unflatten(-1, (-1, size)), [size], None, eps).flatten(-2)

        weight = gain.stored_around(affine(self)[0], self.offset, self.cast)
        given = Given(None, None, None if self.gate is None else gate, self.gate == "before", self.gate_act)
        whole = None
        if self.group_size in (None, self.normalized_shape[0]) and eps is not None:
            as_written = self.cast is not None or bool(self.offset)
            whole = NormConfig("rms_norm", "features", eps, center=False, as_written=as_written)
        options: dict[str, Any] = {"eps": eps, "cast": self.cast, "config": whole}
        return of_features(  # type: ignore[no-any-return]
            "rms_norm", norm, input, self.normalized_shape, weight, None, given, **options
        )

    def extra_repr(self) -> str:
        said: dict[str, Any] = {"gate": self.gate, "group_size": self.group_size}
        return super().extra_repr() + "".join(
            f", {name}={value!r}" for name, value in said.items() if value is not None
        )
