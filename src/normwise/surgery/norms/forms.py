"""What a norm layer of somebody else's class may compute, written as the layer of normwise that computes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import normwise.nn as ours
from normwise.backends.activations import ACTIVATIONS
from normwise.ops.norm.gain import Cast
from normwise.surgery.norms.catalogue import Entry
from normwise.surgery.norms.gated import GatedRMSNorm

Family: TypeAlias = Literal["rms", "layer", "group", "batch", "frozen"]

# Names of attributes that hold eps, first those that always do.
_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")
# What stands in the code of layers that keep none; F.normalize's clamp is next to 0, which a norm of ours may not have.
_LITERALS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-30)
_GAINS = ("weight", "gamma", "g", "gain", "scale", "w")
_ACTIVATIONS = {name: name for name in ACTIVATIONS} | {
    "swish": "silu",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
}
_GATES = ("gate", "z")


class Form(NamedTuple):
    """y = act((offset + gain) * normalized(x) + bias), and which tensors of the layer are gain, bias and statistics.

    axis: that of the features, -1 or 1. spatial: the axes behind the channels, of a BatchNorm. batches: the count of
    batches. gate: whether x * act(gate) is normalized ("before") or the result multiplied ("after"). followers: modules
    of the layer's own that are called one after the other on the result.
    """

    family: Family
    eps: float
    axis: int = -1
    offset: float = 0.0
    cast: Cast | None = None
    gain: str | None = None
    bias: str | None = None
    mean: str | None = None
    var: str | None = None
    batches: str | None = None
    momentum: float | None = None
    spatial: int = 2
    groups: int | None = None
    group_size: int | None = None
    gate: Literal["before", "after"] | None = None
    gate_act: str = "silu"
    act: str | None = None
    followers: tuple[str, ...] = ()

    def takes(self, rank: int) -> bool:
        """Whether what it builds takes inputs of so many axes, if the features are where they belong."""
        if self.family not in ("batch", "frozen"):
            return True
        return rank == self.spatial + 2 or (self.spatial == 1 and rank == 2)

    @property
    def names(self) -> dict[str, str]:
        """By the layer's names of its tensors those of normwise."""
        pairs = (
            (self.gain, "weight"),
            (self.bias, "bias"),
            (self.mean, "running_mean"),
            (self.var, "running_var"),
            (self.batches, "num_batches_tracked"),
        )
        return {
            theirs: mine
            for theirs, mine in pairs
            if theirs is not None and not (mine == "num_batches_tracked" and self.family == "frozen")
        }

    def build(self, layer: nn.Module, features: int) -> nn.Module:
        """The layer of normwise that computes this with the very tensors of `layer`, in its mode."""
        tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
        where: dict[str, Any] = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
        new = self._empty(features, where)
        names = {"weight": self.gain, "bias": self.bias, "running_mean": self.mean, "running_var": self.var}
        for name, source in names.items():
            if source is not None:
                _share(new, name, getattr(layer, source), features)
        if self.batches is not None and "num_batches_tracked" in new._buffers:
            new._buffers["num_batches_tracked"] = getattr(layer, self.batches)
        return new.train(layer.training)

    def _empty(self, features: int, where: dict[str, Any]) -> nn.Module:
        affine, biased = self.gain is not None, self.bias is not None
        if self.gate is not None or self.group_size is not None:
            return GatedRMSNorm(
                features,
                self.eps,
                affine,
                gate=self.gate,
                gate_act=self.gate_act,
                group_size=self.group_size,
                offset=self.offset,
                cast=self.cast,
                **where,
            )
        if self.family in ("rms", "layer"):
            given: dict[str, Any] = {"dim": None if self.axis == -1 else self.axis, "act": self.act}
            given |= {"offset": self.offset, "cast": self.cast, **where}
            if self.family == "rms":
                return ours.RMSNorm(features, self.eps, affine, **given)
            return ours.LayerNorm(features, self.eps, affine, biased, **given)
        if self.family == "group":
            assert self.groups is not None
            return _without_bias(
                ours.GroupNorm(self.groups, features, self.eps, affine, act=self.act, **where), affine and not biased
            )
        kind = f"{max(self.spatial, 1)}d"
        if self.family == "frozen":
            frozen: type[nn.Module] = getattr(ours, f"FrozenBatchNorm{kind}")
            return frozen(features, self.eps, affine, bias=biased, act=self.act, **where)
        batch: type[nn.Module] = getattr(ours, f"BatchNorm{kind}")
        return _without_bias(
            batch(features, self.eps, self.momentum, affine, self.mean is not None, act=self.act, **where),
            affine and not biased,
        )


def _without_bias(layer: nn.Module, drop: bool) -> nn.Module:
    if drop:
        layer.register_parameter("bias", None)
    return layer


def _share(new: nn.Module, name: str, tensor: Tensor, features: int) -> None:
    """`tensor` itself under the name, or where it has axes of size 1 a view of it."""
    if tensor.shape != (features,):
        view = tensor.detach().view(features)
        tensor = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
    if name in new._buffers:
        new._buffers[name] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
    else:
        as_parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        new.register_parameter(name, as_parameter)


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The floating tensors that the layer itself holds, by name."""
    held = {**layer._parameters, **layer._buffers}
    return {name: t for name, t in held.items() if t is not None and t.is_floating_point()}


def features_of(layer: nn.Module) -> int | None:
    """How many features the layer's tensors have, one number each; None where they do not agree, or there are none."""
    sizes = {t.numel() if max(t.shape, default=0) == t.numel() else -1 for t in own_tensors(layer).values()}
    return sizes.pop() if len(sizes) == 1 and 1 not in sizes and -1 not in sizes else None


def takes_gate(layer: nn.Module) -> bool:
    """Whether the forward takes a second tensor that is called a gate."""
    names = list(inspect.signature(layer.forward).parameters)
    return len(names) > 1 and names[1] in _GATES


def forms(layer: nn.Module, shapes: Sequence[torch.Size], entry: Entry | None) -> Iterator[Form]:
    """All that the layer may compute, the likeliest first; `shapes` are some that it takes."""
    tensors = own_tensors(layer)
    means = [name for name in tensors if name in layer._buffers and "mean" in name]
    variances = [name for name in tensors if name in layer._buffers and "var" in name]
    statistics = bool(means and variances)
    rest = [name for name in tensors if name not in (*means, *variances)]
    followers = tuple(name for name, _ in layer.named_children())
    for family in _families(layer, statistics, entry):
        for gain, bias in _affine(rest, family):
            for eps in _epsilons(layer, entry):
                base = Form(family, eps, gain=gain, bias=bias, followers=followers, act=_act(layer))
                if family in ("rms", "layer"):
                    yield from _by_features(layer, base, shapes, entry)
                elif family == "group":
                    yield base._replace(axis=1, groups=int(layer.num_groups))  # type: ignore[arg-type]
                else:
                    momentum = getattr(layer, "momentum", 0.1)
                    counts = [name for name, b in layer._buffers.items() if b is not None and not b.is_floating_point()]
                    batch = base._replace(
                        axis=1,
                        mean=means[0] if means else None,
                        var=variances[0] if variances else None,
                        batches=counts[0] if counts else None,
                        momentum=momentum if isinstance(momentum, (int, float)) else None,
                    )
                    # A layer may take any rank, as F.batch_norm does: images are the likeliest.
                    for spatial in sorted({max(len(shape) - 2, 1) for shape in shapes}, key=lambda n: n != 2):
                        yield batch._replace(spatial=spatial)


def _families(layer: nn.Module, statistics: bool, entry: Entry | None) -> tuple[Family, ...]:
    if entry is not None and entry.family is not None:
        return (entry.family,)
    if statistics:
        return ("frozen", "batch")
    groups: tuple[Family, ...] = ("group",) if isinstance(getattr(layer, "num_groups", None), int) else ()
    return (*groups, "rms", "layer")


def _affine(names: list[str], family: Family) -> Iterator[tuple[str | None, str | None]]:
    """Gain and bias: which of the tensors they may be, all of which must be used."""
    if not names:
        yield None, None
    elif len(names) == 1:
        yield names[0], None
    elif len(names) == 2 and family != "rms":
        ordered = sorted(names, key=lambda name: name not in _GAINS)
        yield ordered[0], ordered[1]
        yield ordered[1], ordered[0]


def _epsilons(layer: nn.Module, entry: Entry | None) -> list[float]:
    named = [getattr(layer, name, None) for name in _EPS]
    others = [value for name, value in vars(layer).items() if name not in (*_EPS, "momentum")]
    literal = [] if entry is None or entry.eps is None else [entry.eps]
    found = [*literal, *(v for v in (*named, *others) if isinstance(v, float) and 0 < v < 0.1), *_LITERALS]
    return list(dict.fromkeys([*found, torch.finfo(torch.float32).eps]))


def _by_features(layer: nn.Module, base: Form, shapes: Sequence[torch.Size], entry: Entry | None) -> Iterator[Form]:
    axes = (entry.axis,) if entry is not None and entry.axis is not None else (-1, 1)
    offsets = (0.0,) if base.gain is None else (0.0, 1.0)
    if takes_gate(layer):
        size = getattr(layer, "group_size", None)
        group_size = size if isinstance(size, int) else None
        named = getattr(layer, "activation", None)
        act = named if isinstance(named, str) and named in ("silu", "swish", "sigmoid", "gelu", "relu") else "silu"
        for gate in ("before", "after"):
            yield base._replace(gate=gate, gate_act=act, group_size=group_size, act=None)
        return
    size = getattr(layer, "group_size", None)
    for axis in axes:
        if axis == 1 and not any(len(shape) > 2 for shape in shapes):
            continue
        for offset in offsets:
            if isinstance(size, int) and axis == -1 and base.family == "rms":
                yield base._replace(offset=offset, group_size=size)
            yield base._replace(axis=axis, offset=offset)


def _act(layer: nn.Module) -> str | None:
    named = next((v for name in ("activation", "act") if isinstance(v := getattr(layer, name, None), str)), None)
    return None if named is None else _ACTIVATIONS.get(named)
