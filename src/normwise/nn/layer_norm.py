"""LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.construct import Activated, eps_of, reset_affine
from normwise.ops import check, plain, symbolic
from normwise.ops.layer_norm import layer_norm
from normwise.ops.ranks import Peers
from normwise.ops.rms_norm import rms_norm
from normwise.reference import activation

_FLOAT32_EPS = torch.finfo(torch.float32).eps


class LayerNorm(Activated, nn.LayerNorm):
    r"""Layer normalization over the last axes, or over those that `dim` names.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta), with mean and variance over the features of one sample:
    the same at any batch size and length, in training and in evaluation.

    A drop-in for `torch.nn.LayerNorm`: same arguments, state_dict and results. Beyond it: `dim` normalizes any axes,
    e.g. `LayerNorm(64, dim=1)` the channels of (N, C, H, W); `act` is applied last; in the call, `mask` (bool,
    True = valid) or `lengths` keep padding out, and with a `residual` the result is the pair
    (ln(x + residual), x + residual).

    Args:
        normalized_shape: sizes of the axes that are normalized together.
        eps: added to the variance.
        elementwise_affine: learn gamma and beta, each of shape `normalized_shape`.
        bias: learn beta.
        dim: the axes of the input that hold `normalized_shape`, in its order; None for the last ones.
        act: "relu", "leaky_relu", "silu", "gelu" or None.
        process_group: the features are spread over the ranks of this torch.distributed group (tensor parallelism), not
            necessarily evenly, and `normalized_shape` is the shape of this rank's shard. Statistics are those of the
            whole rows: two numbers a row are exchanged forward, two backward. See `Several ranks` in the documentation.

    Source: Ba, Kiros & Hinton 2016.
    """

    _peers: Peers | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | Sequence[int] | None = None,
        act: str | None = None,
        process_group: Any = None,
    ) -> None:
        check.positive_eps(eps)
        shape = _shape(normalized_shape)
        self_dim = _dim(dim, shape)
        if act is not None:
            activation(act)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dim = self_dim
        self.act = act
        if process_group is not None:
            self._peers = Peers(process_group)

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        reset_affine(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
    ) -> Any:
        """See `normwise.functional.layer_norm` for shapes and errors."""
        if (
            mask is None
            and lengths is None
            and residual is None
            and self.dim is None
            and self.act is None
            and self._peers is None
        ):
            try:
                learnt = self._parameters  # asking the module for one of them takes as long as all the rest
                weight, bias = learnt["weight"], learnt["bias"]
            except KeyError:  # parametrized, say
                pass
            else:
                y = plain.layer_norm(input, self.normalized_shape, weight, bias, self.__dict__["eps"])
                if y is not None:
                    return y
        if symbolic.is_traced(input, mask, lengths, residual):
            node = symbolic.call_layer(self, input, function=True, mask=mask, lengths=lengths, residual=residual)
            if node is not None:
                return node
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            eps_of(self),
            dim=self.dim,
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
            process_group=self._peers,
        )

    @property
    def process_group(self) -> Any:
        """The ranks that hold the other shards of the features, or None."""
        return None if self._peers is None else self._peers.process_group

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self.dim, self.act, self._peers)


class RMSNorm(Activated, nn.RMSNorm):
    r"""Root mean square normalization over the last axes, or over those that `dim` names.

    y = act(gamma * x / sqrt(E[x^2] + eps)): LayerNorm that leaves the mean in and has no bias.

    A drop-in for `torch.nn.RMSNorm`: same arguments, state_dict and results; `eps` None stands for the machine
    epsilon. `dim`, `act`, `mask`, `lengths`, `residual` and `process_group` (one number a row) as in `LayerNorm`.

    Source: Zhang & Sennrich 2019.
    """

    _peers: Peers | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | Sequence[int] | None = None,
        act: str | None = None,
        process_group: Any = None,
    ) -> None:
        if eps is not None:
            check.positive_eps(eps)
        shape = _shape(normalized_shape)
        self_dim = _dim(dim, shape)
        if act is not None:
            activation(act)
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dim = self_dim
        self.act = act
        if process_group is not None:
            self._peers = Peers(process_group)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
    ) -> Any:
        """See `normwise.functional.rms_norm` for shapes and errors."""
        alone = mask is None and lengths is None and residual is None
        if alone and self.dim is None and self.act is None and self._peers is None:
            learnt = self._parameters
            if "weight" in learnt:
                eps = self.__dict__["eps"]
                eps = _FLOAT32_EPS if eps is None else eps
                y = plain.rms_norm(input, self.normalized_shape, learnt["weight"], eps)
                if y is not None:
                    return y
        if symbolic.is_traced(input, mask, lengths, residual):
            node = symbolic.call_layer(self, input, function=True, mask=mask, lengths=lengths, residual=residual)
            if node is not None:
                return node
        return rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            eps_of(self),
            dim=self.dim,
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
            process_group=self._peers,
        )

    @property
    def process_group(self) -> Any:
        """The ranks that hold the other shards of the features, or None."""
        return None if self._peers is None else self._peers.process_group

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self.dim, self.act, self._peers)


def _shape(normalized_shape: int | Sequence[int]) -> list[int]:
    sizes = normalized_shape if isinstance(normalized_shape, Iterable) else [normalized_shape]
    return [check.whole_number("normalized_shape", size) for size in sizes]


def _dim(dim: int | Sequence[int] | None, shape: list[int]) -> int | tuple[int, ...] | None:
    """`dim` as it is kept: hashable, and with as many axes as `shape`."""
    if dim is None:
        return None
    if isinstance(dim, Iterable):
        dim = tuple(check.whole_number("dim", d) for d in dim)
        named = len(dim)
    else:
        dim = check.whole_number("dim", dim)
        named = 1
    if named != len(shape):
        raise ValueError(f"dim={dim} names {named} axes, but normalized_shape={shape} has {len(shape)}")
    return dim


def _extra_repr(dim: int | tuple[int, ...] | None, act: str | None, peers: Peers | None) -> str:
    said = {"dim": dim, "act": act, "process_group": peers}
    return "".join(f", {name}={value!r}" for name, value in said.items() if value is not None)
