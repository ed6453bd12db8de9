"""LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.scalars import flags
from normwise.nn.construct import Activated, affine, reset_affine
from normwise.ops import hyperparameters, symbolic
from normwise.ops.distributed import StatsGroup
from normwise.ops.norm import gain, modulation
from normwise.ops.norm.gain import Cast
from normwise.ops.norm.layer_norm import layer_norm, rms_norm
from normwise.words import counted


class LayerNorm(Activated, nn.LayerNorm):
    r"""Layer normalization over the last axes, or over those that `dim` names.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta), with mean and variance over the features of one sample:
    the same at any batch size and length, in training and in evaluation.

    A drop-in for `torch.nn.LayerNorm`: same arguments, state_dict and results. Beyond it: `dim` normalizes any axes,
    e.g. `LayerNorm(64, dim=1)` the channels of (N, C, H, W); `act` is applied last; in the call, `mask` (bool,
    True = valid) or `lengths` keep padding out, with `add` the result is the pair (ln(x + add), x + add),
    `segments` (R,) makes the rows (R, C) of a graph or document share mean and variance, and `scale`, `shift` and
    `gate` make it adaptive or gated: y = act((ln(x) * (1 + scale) + shift) * gate_act(gate)).

    Args:
        normalized_shape: sizes of the axes that are normalized together.
        eps: added to the variance.
        elementwise_affine: learn gamma and beta, each of shape `normalized_shape`.
        bias: learn beta.
        dim: the axes of the input that hold `normalized_shape`, in its order; None for the last ones.
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus",
            "mish" or None.
        process_group: the features are spread over the ranks of this torch.distributed group (tensor parallelism), not
            necessarily evenly, and `normalized_shape` is the shape of this rank's shard. Statistics are those of the
            whole rows: two numbers per row are exchanged forward, two backward. See `Several ranks` in the docs.
        offset: gamma is offset + weight: 1.0 for layers whose weight starts at 0 (LayerNorm1P, Gemma's RMSNorm). The
            weight starts as 1 - offset.
        cast: "output" rounds to a half precision input's dtype once, behind gamma and beta, as Olmo 2's RMSNorm;
            "input" before them, as Llama's and T5's. None is "output" by the quickest backend. See
            `normwise.functional.layer_norm`.
        gate_first: what a `gate` multiplies is the input, not the output.
        gate_act: of a `gate`: "silu", "sigmoid", "gelu", "relu" or None.

    Source: Ba, Kiros & Hinton 2016.
    """

    _stats_group: StatsGroup | None = None
    offset: float = 0.0
    cast: Cast | None = None
    gate_first: bool = False
    gate_act: str | None = "silu"

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
        offset: float = 0.0,
        cast: Cast | None = None,
        gate_first: bool = False,
        gate_act: str | None = "silu",
    ) -> None:
        hyperparameters.positive_eps(eps)
        flags(elementwise_affine=elementwise_affine, bias=bias)
        shape = list(hyperparameters.sizes("normalized_shape", normalized_shape))
        self_dim = _dim(dim, shape)
        if act is not None:
            activation(act)
        gain.check(offset, cast)
        modulation.check_gate(gate_first, gate_act)
        # Before torch's constructor, which calls reset_parameters.
        self.offset, self.cast = offset, cast
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dim = self_dim
        self.act = act
        self.gate_first, self.gate_act = gate_first, gate_act
        if process_group is not None:
            self._stats_group = StatsGroup(process_group)

    def reset_parameters(self) -> None:
        """Gain 1 (a weight of 1 - offset), bias 0."""
        reset_affine(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        add: Tensor | PackedSequence | None = None,
        segments: Tensor | None = None,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Any:
        """See `normwise.functional.layer_norm` for shapes and errors; `act` here is for this call."""
        given: dict[str, Any]
        if not (scale is shift is gate is None):
            given = {"mask": mask, "lengths": lengths, "add": add, "segments": segments, "act": act}
            return _modulated(self, input, given | {"scale": scale, "shift": shift, "gate": gate})
        if symbolic.is_traced(input, mask, lengths, add, segments):
            given = {"mask": mask, "lengths": lengths, "add": add, "segments": segments, "act": act}
            node = symbolic.call_layer(self, input, function=True, **given)
            if node is not None:
                return node
        weight, bias = affine(self)
        return layer_norm(
            input,
            self.normalized_shape,
            weight,
            bias,
            self.__dict__["eps"],
            dim=self.dim,
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            add=add,
            process_group=self._stats_group,
            offset=self.offset,
            cast=self.cast,
            segments=segments,
        )

    @property
    def process_group(self) -> Any:
        """The ranks that hold the other shards of the features, or None."""
        return None if self._stats_group is None else self._stats_group.process_group

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self)


class RMSNorm(Activated, nn.RMSNorm):
    r"""Root mean square normalization over the last axes, or over those that `dim` names.

    y = act(gamma * x / sqrt(E[x^2] + eps)): LayerNorm that leaves the mean in and has no bias.

    A drop-in for `torch.nn.RMSNorm`: same arguments, state_dict and results; `eps` None stands for the machine
    epsilon. `dim`, `act`, `mask`, `lengths`, `add`, `scale`, `shift`, `gate` and `process_group` (one number per row)
    as in `LayerNorm`. With `gate` it is the gated norm of Mamba-2, whose order `gate_first` says.

    `offset` and `cast`, as there, make it the RMSNorm of a model of transformers, in half precision to the bit:
    cast="input" that of Llama, Mistral, Qwen and T5, cast="output" that of Olmo 2, offset=1.0 that of Gemma. See
    `normwise.functional.rms_norm`.

    Source: Zhang & Sennrich 2019.
    """

    _stats_group: StatsGroup | None = None
    offset: float = 0.0
    cast: Cast | None = None
    gate_first: bool = False
    gate_act: str | None = "silu"

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
        offset: float = 0.0,
        cast: Cast | None = None,
        gate_first: bool = False,
        gate_act: str | None = "silu",
    ) -> None:
        if eps is not None:
            hyperparameters.positive_eps(eps)
        flags(elementwise_affine=elementwise_affine)
        shape = list(hyperparameters.sizes("normalized_shape", normalized_shape))
        self_dim = _dim(dim, shape)
        if act is not None:
            activation(act)
        gain.check(offset, cast)
        modulation.check_gate(gate_first, gate_act)
        # Before torch's constructor, which calls reset_parameters.
        self.offset, self.cast = offset, cast
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dim = self_dim
        self.act = act
        self.gate_first, self.gate_act = gate_first, gate_act
        if process_group is not None:
            self._stats_group = StatsGroup(process_group)

    def reset_parameters(self) -> None:
        """Gain 1 (a weight of 1 - offset)."""
        reset_affine(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        add: Tensor | PackedSequence | None = None,
        segments: Tensor | None = None,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Any:
        """See `normwise.functional.rms_norm` for shapes and errors; `act` here is for this call."""
        given: dict[str, Any]
        if not (scale is shift is gate is None):
            given = {"mask": mask, "lengths": lengths, "add": add, "segments": segments, "act": act}
            return _modulated(self, input, given | {"scale": scale, "shift": shift, "gate": gate})
        if symbolic.is_traced(input, mask, lengths, add, segments):
            given = {"mask": mask, "lengths": lengths, "add": add, "segments": segments, "act": act}
            node = symbolic.call_layer(self, input, function=True, **given)
            if node is not None:
                return node
        return rms_norm(
            input,
            self.normalized_shape,
            affine(self)[0],
            self.__dict__["eps"],
            dim=self.dim,
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            add=add,
            process_group=self._stats_group,
            offset=self.offset,
            cast=self.cast,
            segments=segments,
        )

    @property
    def process_group(self) -> Any:
        """The ranks that hold the other shards of the features, or None."""
        return None if self._stats_group is None else self._stats_group.process_group

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self)


def _modulated(layer: LayerNorm | RMSNorm, input: Any, given: dict[str, Any]) -> Any:
    """A call with scale, shift or gate; apart, because handing these on would slow down each small call without."""
    if symbolic.is_traced(input, *given.values()):
        node = symbolic.call_layer(layer, input, function=True, **given)
        if node is not None:
            return node
    weight, bias = affine(layer)
    options: dict[str, Any] = {
        name: getattr(layer, name) for name in ("dim", "act", "offset", "cast", "gate_first", "gate_act")
    }
    options |= {"process_group": layer._stats_group, **given}
    options["act"] = layer.act if given["act"] is None else given["act"]
    eps = layer.__dict__["eps"]
    if isinstance(layer, RMSNorm):
        return rms_norm(input, layer.normalized_shape, weight, eps, **options)
    return layer_norm(input, layer.normalized_shape, weight, bias, eps, **options)


def _dim(dim: int | Sequence[int] | None, shape: list[int]) -> int | tuple[int, ...] | None:
    """`dim` as it is kept: hashable, and with as many axes as `shape`."""
    if dim is None:
        return None
    if hyperparameters.has_many(dim):
        dim = tuple(hyperparameters.whole_number("dim", d) for d in dim)
        named = len(dim)
    else:
        dim = hyperparameters.whole_number("dim", dim)
        named = 1
    if named != len(shape):
        raise ValueError(f"dim={dim} names {counted(named, 'axis')}, but normalized_shape={shape} has {len(shape)}")
    return dim


def _extra_repr(layer: LayerNorm | RMSNorm) -> str:
    said = {
        "dim": layer.dim,
        "act": layer.act,
        "process_group": layer._stats_group,
        "offset": layer.offset or None,
        "cast": layer.cast,
        "gate_first": layer.gate_first or None,
        "gate_act": None if layer.gate_act == "silu" else str(layer.gate_act),
    }
    return "".join(f", {name}={value!r}" for name, value in said.items() if value is not None)
