"""The norms that are proven and timed: normwise's layer, the same written in torch's operations, and how many tensors
of the input's size must be moved at least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise

Way = Callable[..., Sequence[Tensor]]  # (layer, inputs, mask) -> outputs
Shape = tuple[int, ...]

DTYPES = ("bfloat16", "float32", "float16")
# The error allowed to a result, as a share of its largest element: a few roundings of the dtype.
EPS = 1e-5  # of all layers here
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@dataclass(frozen=True)
class NormCase:
    """One norm on one shape.

    Attributes:
        make: the layer, for a shape.
        ours, theirs: calls of it: by normwise, and in torch's operations.
        moved: tensors of the input's size that a forward, and a forward with its backward, read or write at least.
        small: a shape for the proof, which the CPU computes in float64.
        inputs: 2 with a residual or a gate.
        scaled: with scale and shift, one of each for a "sample" or a "position".
        masked: samples have a fifth of their positions, or of their rows, left out.
        wide: parameters stay float32 whatever the input.
        dtypes: of which the times are taken; all are proven.
    """

    kind: str
    make: Callable[[Shape], nn.Module]
    ours: Way
    theirs: Way
    moved: tuple[int, int]
    shape: Shape
    small: Shape
    inputs: int = 1
    scaled: str = ""
    channels_last: bool = False
    masked: bool = False
    wide: bool = False
    dtypes: tuple[str, ...] = ("bfloat16",)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.shape}{' channels-last' if self.channels_last else ''}"


class Built:
    """A case with its layer and tensors, on a device."""

    def __init__(self, case: NormCase, device: str, dtype: torch.dtype, small: bool) -> None:
        shape = case.small if small else case.shape
        self.case, self.dtype = case, dtype
        self.layer = case.make(shape).to(device)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.uniform_(0.5, 1.5)
        if not case.wide:
            self.layer.to(dtype)
        memory = torch.channels_last if case.channels_last else torch.contiguous_format
        self.inputs = [
            torch.randn(shape, device=device).to(dtype).to(memory_format=memory).requires_grad_()
            for _ in range(case.inputs)
        ]
        if case.scaled:
            of_scale = shape if case.scaled == "position" else (shape[0], *(1,) * (len(shape) - 2), shape[-1])
            self.inputs += [torch.randn(of_scale, device=device).to(dtype).requires_grad_() for _ in range(2)]
        # Of rows (..., 1), else of positions (N, 1, ...).
        of = (*shape[:-1], 1) if isinstance(self.layer, nn.LayerNorm | nn.RMSNorm) else (shape[0], 1, *shape[2:])
        self.mask = torch.rand(of, device=device) < 0.8 if case.masked else None
        if small and self.mask is not None:
            with torch.no_grad():
                self.inputs[0].masked_fill_(~self.mask, torch.nan)  # what is left out is never read
        outputs = self.forward(case.theirs)
        self.upstream = [torch.randn_like(y) for y in outputs]

    def forward(self, way: Way) -> Sequence[Tensor]:
        return way(self.layer, self.inputs, self.mask)

    def step(self, way: Way) -> list[Tensor]:
        """Outputs, and the gradients of all inputs and parameters."""
        found = self.forward(way)
        leaves = [*self.inputs, *self.layer.parameters()]
        return [*found, *torch.autograd.grad(found, leaves, self.upstream)]

    def inference(self, way: Way) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.forward(way)

    def truth(self, device: str = "cpu") -> list[Tensor]:
        """The same by the reference in float64, from the values as they are."""
        exact = copy.copy(self)
        exact.layer = copy.deepcopy(self.layer).to(device).double()
        exact.inputs = [t.detach().to(device).double().requires_grad_() for t in self.inputs]
        exact.mask = None if self.mask is None else self.mask.to(device)
        exact.upstream = [t.to(device).double() for t in self.upstream]
        with normwise.backend("reference"):
            return exact.step(self.case.ours)


def error_of(found: Sequence[Tensor], truth: Sequence[Tensor], allowed: float) -> float:
    """The largest error of a result, as a share of what is allowed to it; of one with NaN infinite."""
    worst = 0.0
    for got, true in zip(found, truth, strict=True):
        got, true = got.detach().to(true.device, torch.float64), true.detach()
        if got.numel():
            error = float((got - true).abs().max() / true.abs().max().clamp(min=1e-30)) / allowed
            worst = max(worst, error if error == error else float("inf"))
    return worst


def _plain(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (layer(inputs[0], mask=mask) if mask is not None else layer(inputs[0]),)


def _residual(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (layer(inputs[0], residual=inputs[1], mask=mask),)


def _added(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return tuple(layer(inputs[0], add=inputs[1]))


def _scaled(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    x, scale, shift = inputs
    return (layer(x, scale=scale, shift=shift),)


def _gated(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (layer(inputs[0], gate=inputs[1]),)


def _batch_norm(layer: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, layer.momentum, EPS)


def _their_batch_norm(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (_batch_norm(layer, inputs[0]),)


def _their_batch_norm_add_relu(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (F.relu(_batch_norm(layer, inputs[0]) + inputs[1]),)


def _their_masked_batch_norm(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    """As one writes it: statistics of the valid positions, the running averages moved, the rest zero."""
    assert mask is not None
    x, axes = inputs[0].float(), (0, *range(2, inputs[0].dim()))
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum(axes, keepdim=True) / count
    var = torch.where(mask, x - mean, 0).square().sum(axes, keepdim=True) / count
    with torch.no_grad():
        layer.running_mean.lerp_(mean.flatten(), layer.momentum)
        layer.running_var.lerp_(var.flatten() * (count / (count - 1)), layer.momentum)
    of = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean) * (var + EPS).rsqrt() * layer.weight.view(of) + layer.bias.view(of)
    return (torch.where(mask, y, 0).to(inputs[0].dtype),)


def _their_masked_instance_norm(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    assert mask is not None
    x, axes = inputs[0].float(), tuple(range(2, inputs[0].dim()))
    count = mask.sum(axes, keepdim=True).clamp(min=1)
    mean = torch.where(mask, x, 0).sum(axes, keepdim=True) / count
    var = torch.where(mask, x - mean, 0).square().sum(axes, keepdim=True) / count
    of = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean) * (var + EPS).rsqrt() * layer.weight.view(of) + layer.bias.view(of)
    return (torch.where(mask, y, 0).to(inputs[0].dtype),)


def _their_group_norm_silu(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (F.silu(F.group_norm(inputs[0], layer.num_groups, layer.weight, layer.bias, EPS)),)


def _their_layer_norm(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (F.layer_norm(inputs[0], layer.normalized_shape, layer.weight, layer.bias, layer.eps),)


def _their_rms_norm(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (F.rms_norm(inputs[0], layer.normalized_shape, layer.weight, layer.eps),)


def _add_then(norm: Way) -> Way:
    def both(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
        total = inputs[0] + inputs[1]
        return (*norm(layer, [total], mask), total)

    return both


def _their_scaled(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    x, scale, shift = inputs
    return (_their_layer_norm(layer, [x], None)[0] * (1 + scale) + shift,)


def _their_gated(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return (_their_rms_norm(layer, inputs[:1], None)[0] * F.silu(inputs[1]),)


def _their_gated_first(layer: Any, inputs: Sequence[Tensor], mask: Tensor | None) -> Sequence[Tensor]:
    return _their_rms_norm(layer, [inputs[0] * F.silu(inputs[1])], None)


ROWS: list[Shape] = [(8192, 768), (32768, 256), (8192, 4096), (8192, 8192)]
IMAGES: Shape = (32, 64, 56, 56)
GROUPED: list[Shape] = [(8, 128, 56, 56), (4, 512, 64, 64)]
# Samples, tokens and features of adaptive norms: those of DiT-XL/2, and of a larger model.
TOKENS: list[Shape] = [(32, 256, 1152), (4, 4096, 3072)]
# Tokens and features of what Mamba-2 gates.
GATED: list[Shape] = [(16384, 4096), (8192, 8192)]
EVERY = ("bfloat16", "float32", "float16")


def cases() -> list[NormCase]:
    found = []
    for last in (False, True):
        image = {"shape": IMAGES, "small": (3, 6, 5, 7), "channels_last": last, "wide": True}
        found += [
            NormCase("BatchNorm", lambda s: normwise.BatchNorm2d(s[1]), _plain, _their_batch_norm, (3, 6), **image),
            NormCase("BatchNorm + residual + ReLU", lambda s: normwise.BatchNorm2d(s[1], act="relu"), _residual,
                     _their_batch_norm_add_relu, (4, 10), inputs=2, dtypes=EVERY[:2], **image),
            NormCase("masked BatchNorm", lambda s: normwise.BatchNorm2d(s[1]), _plain, _their_masked_batch_norm, (3, 6),
                     masked=True, **image),
        ]  # fmt: skip
        found += [
            NormCase("GroupNorm + SiLU", lambda s: normwise.GroupNorm(s[1] // 4, s[1], act="silu"), _plain,
                     _their_group_norm_silu, (3, 6), shape, (2, 8, 5, 7), channels_last=last)
            for shape in GROUPED
        ]  # fmt: skip
    found.append(
        NormCase("masked InstanceNorm", lambda s: normwise.InstanceNorm2d(s[1], affine=True), _plain,
                 _their_masked_instance_norm, (3, 6), (8, 64, 112, 112), (3, 4, 5, 7), masked=True, wide=True)
    )  # fmt: skip
    for shape in ROWS:
        small = (5, shape[1])
        for kind, layer, theirs in (
            ("LayerNorm", normwise.LayerNorm, _their_layer_norm),
            ("RMSNorm", normwise.RMSNorm, _their_rms_norm),
        ):
            make = _of_last_axis(layer)
            found.append(NormCase(kind, make, _plain, theirs, (2, 5), shape, small, dtypes=EVERY[:2]))
            found.append(NormCase(f"add + {kind}", make, _added, _add_then(theirs), (4, 8), shape, small, inputs=2))
    for shape in TOKENS:
        plain, small = _of_last_axis(normwise.LayerNorm, elementwise_affine=False), (3, 5, shape[-1])
        for by, moved in (("sample", (2, 5)), ("position", (4, 10))):
            kind = f"LayerNorm, scale and shift by {by}"
            found.append(NormCase(kind, plain, _scaled, _their_scaled, moved, shape, small, scaled=by))
    for shape in GATED:
        for kind, first, theirs in (
            ("RMSNorm + gate", False, _their_gated),
            ("gate + RMSNorm", True, _their_gated_first),
        ):
            make = _of_last_axis(normwise.RMSNorm, gate_first=first)
            found.append(NormCase(kind, make, _gated, theirs, (3, 8), shape, (5, shape[-1]), inputs=2))
    return found


def _of_last_axis(layer: type[nn.Module], **options: Any) -> Callable[[Shape], nn.Module]:
    return lambda shape: layer(shape[-1], **options)
