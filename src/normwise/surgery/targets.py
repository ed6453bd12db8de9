"""What `convert` puts in the place of one norm layer, for each of its targets.

A target takes a layer, the shapes of the inputs that it meets (none where they are unknown) and the options of the
call. It returns the new layer and a note for the report, or raises `Refusal` with the reason why this layer stays.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

import normwise.nn as ours
from normwise.nn.construct import channel_axis
from normwise.nn.frozen_batch_norm import FrozenBatchNorm
from normwise.surgery.carry import carry_tensors, rebuild
from normwise.surgery.groups import enough_channels, number_of_groups
from normwise.surgery.norms.gated import GatedRMSNorm
from normwise.surgery.report import AlreadyOne, Refusal
from normwise.surgery.select import BATCH, INSTANCE, known_base, option
from normwise.words import counted

Made: TypeAlias = tuple[nn.Module, str]
Shapes: TypeAlias = Sequence[torch.Size]


def to_batch(layer: nn.Module, met: Shapes, *, spatial: int | None = None, **options: Any) -> Made:
    """normwise.BatchNorm1d/2d/3d, by the number of axes behind the channels."""
    return _batch_family(layer, "BatchNorm", met, spatial, options)


def to_renorm(layer: nn.Module, met: Shapes, *, spatial: int | None = None, **options: Any) -> Made:
    """normwise.BatchRenorm1d/2d/3d."""
    if isinstance(layer, BATCH) and getattr(layer, "running_mean", None) is None:
        raise Refusal("track_running_stats=False: there are no running averages to correct a batch towards")
    return _batch_family(layer, "BatchRenorm", met, spatial, options)


def to_frozen(layer: nn.Module, met: Shapes, *, spatial: int | None = None, **options: Any) -> Made:
    """normwise.FrozenBatchNorm1d/2d/3d."""
    if not isinstance(layer, BATCH):
        raise Refusal("it has no running statistics to be frozen to, as only BatchNorm has")
    if getattr(layer, "running_mean", None) is None:
        raise Refusal("track_running_stats=False: there are no statistics to be frozen to")
    return _batch_family(layer, "FrozenBatchNorm", met, spatial, options)


def to_sync(layer: nn.Module, met: Shapes, **options: Any) -> Made:
    """normwise.SyncBatchNorm, of inputs of any rank."""
    if not isinstance(layer, BATCH):
        raise Refusal("its statistics are not over the batch: it is the same on every rank as it is")
    return _with_statistics(layer, _ours("SyncBatchNorm"), options)


def to_group(
    layer: nn.Module, met: Shapes, *, num_groups: int | Callable[[int], int] | None = None, **options: Any
) -> Made:
    """normwise.GroupNorm, of as many groups as `groups.number_of_groups` says; a GroupNorm keeps its own."""
    if type(layer) is ours.GroupNorm and num_groups is None and not options:
        raise AlreadyOne()
    channels = channels_of(layer)
    if isinstance(layer, nn.GroupNorm) and num_groups is None:
        groups, why = layer.num_groups, ""
    else:
        positions = min((math.prod(shape[2:]) for shape in met), default=None)
        groups, why = number_of_groups(channels, _rank(layer), positions, num_groups)
    given = {"num_groups": groups, "num_channels": channels, "affine": _affine(layer), "dim": channel_axis(layer)}
    new = rebuild(layer, ours.GroupNorm, **(given | options))
    return _without_statistics(layer, new, why)


def to_layer(layer: nn.Module, met: Shapes, **options: Any) -> Made:
    """normwise.LayerNorm; of what has channels on axis 1, over these channels: LayerNorm(C, dim=1)."""
    if type(layer) is ours.LayerNorm and not options:
        raise AlreadyOne()
    if isinstance(layer, nn.LayerNorm):
        return _without_statistics(layer, rebuild(layer, ours.LayerNorm, **options))
    channels = channels_of(layer)
    enough_channels(channels)
    given = {"normalized_shape": channels, "dim": channel_axis(layer), "elementwise_affine": _affine(layer), **options}
    return _without_statistics(layer, rebuild(layer, ours.LayerNorm, **given))


def to_rms(layer: nn.Module, met: Shapes, **options: Any) -> Made:
    """normwise.RMSNorm in the place of a LayerNorm, of the same gain and without its bias: another norm."""
    if type(layer) is ours.RMSNorm and not options:
        raise AlreadyOne()
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        raise Refusal("it is no LayerNorm: an RMSNorm neither has a bias nor takes the mean away")
    _whole(layer)
    new = rebuild(layer, ours.RMSNorm, **options)
    left = carry_tensors(layer, new, but=("bias",))
    other = (
        "another norm, which leaves the mean in: fine-tune, or exact=True" if isinstance(layer, nn.LayerNorm) else ""
    )
    dropped = "bias dropped" if getattr(layer, "bias", None) is not None else ""
    return new, _summary(layer, new, left, *filter(None, [dropped, other]))


def to_normwise(layer: nn.Module, met: Shapes, **options: Any) -> Made:
    """The namesake in normwise, which computes the same."""
    base = known_base(layer)
    if base.__module__.startswith("normwise."):
        raise AlreadyOne()
    new = rebuild(layer, _ours(base.__name__), **options)
    return new, _summary(layer, new, carry_tensors(layer, new))


def to_torch(layer: nn.Module, met: Shapes, **options: Any) -> Made:
    """The namesake in torch.nn."""
    if isinstance(layer, GatedRMSNorm):
        raise Refusal("torch.nn has no norm with a gate, or of groups of the features")
    base = known_base(layer)
    if base.__module__.startswith("torch."):
        raise AlreadyOne()
    of_one_domain(layer)
    name = base.__name__.replace("BatchRenorm", "BatchNorm").replace("FrozenBatchNorm", "BatchNorm")
    namesake: type[nn.Module] | None = getattr(nn, name, None)
    if namesake is None:
        raise Refusal(f"torch.nn has no {name}")
    _whole(layer)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and not _trailing(layer.dim):  # type: ignore[arg-type]
        raise Refusal(f"torch.nn's layer normalizes the last axes, not dim={layer.dim}")
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and channel_axis(layer) != 1:
        raise Refusal(f"torch.nn's layer has the channels on axis 1, not dim={layer.dim}")
    new = rebuild(layer, namesake, **options)
    note = _summary(layer, new, carry_tensors(layer, new))
    if isinstance(layer, FrozenBatchNorm):
        new.requires_grad_(False)
        note = "fixed in evaluation only: train() moves its statistics"
    return new, note


TARGETS: dict[str, Callable[..., Made]] = {
    "batch": to_batch,
    "frozen": to_frozen,
    "group": to_group,
    "layer": to_layer,
    "normwise": to_normwise,
    "renorm": to_renorm,
    "rms": to_rms,
    "sync": to_sync,
    "torch": to_torch,
}


def of_one_domain(layer: nn.Module) -> None:
    """Raises `Refusal` for a BatchNorm of several domains."""
    domains = getattr(layer, "domains", None) if isinstance(layer, BATCH) else None
    if domains is not None:
        raise Refusal(
            f"it keeps the statistics of {counted(domains, 'domain')}, of which its successor could take one alone"
        )


def channels_of(layer: nn.Module) -> int:
    """The size of axis 1 of the layer's input. Raises `Refusal` where it is not on axis 1."""
    of_one_domain(layer)
    if isinstance(layer, (*BATCH, *INSTANCE)):
        return int(layer.num_features)
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    _whole(layer)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and option(layer, "dim") in (1, (1,)):
        return int(layer.normalized_shape[0])
    raise Refusal("it normalizes the last axes, where no channels of a batch stand that could take its gain and bias")


def _whole(layer: nn.Module) -> None:
    """Raises `Refusal` for a LayerNorm or RMSNorm of one shard of the features."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and option(layer, "process_group") is not None:
        raise Refusal("its features are spread over the ranks of a process group, of which the new layer knows nothing")


def _batch_family(layer: nn.Module, family: str, met: Shapes, spatial: int | None, options: dict[str, Any]) -> Made:
    channels = channels_of(layer)
    cls = _ours(f"{family}{_rank_or(layer, met, spatial)}d")
    if isinstance(layer, BATCH):
        return _with_statistics(layer, cls, options)
    given = {
        "num_features": channels,
        "affine": _affine(layer),
        "track_running_stats": True,
        "dim": channel_axis(layer),
    }
    new = rebuild(layer, cls, **(given | options))
    fresh = "running statistics are new: fine-tune, or normwise.recalibrate"
    return new, _summary(layer, new, carry_tensors(layer, new, statistics=False), fresh)


def _with_statistics(layer: nn.Module, cls: type[nn.Module], options: dict[str, Any]) -> Made:
    given = {"affine": _affine(layer), "track_running_stats": getattr(layer, "running_mean", None) is not None}
    if "track_running_stats" not in inspect.signature(cls).parameters:
        del given["track_running_stats"]
    if known_base(layer) is cls and not options:
        raise AlreadyOne()
    of_one_domain(layer)
    spread = {name: options.pop(name) for name in ("domains", "domain_affine") if name in options}
    new = rebuild(layer, cls, **(given | options))
    note = _summary(layer, new, carry_tensors(layer, new))
    if spread:
        if not issubclass(cls, (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)):
            raise Refusal(f"a {cls.__name__} keeps the statistics of one domain")
        assert isinstance(new, ours.BatchNorm1d | ours.BatchNorm2d | ours.BatchNorm3d)
        new.spread(spread.get("domains", 0), spread.get("domain_affine", False))
        note = "; ".join(filter(None, [note, "each domain starts with its statistics"]))
    return new, note


def _without_statistics(layer: nn.Module, new: nn.Module, *notes: str) -> Made:
    return new, _summary(layer, new, carry_tensors(layer, new, statistics=False), *filter(None, notes))


def _rank(layer: nn.Module) -> int | None:
    """1, 2 or 3, as in BatchNorm2d; None where the class does not say it."""
    name = known_base(layer).__name__
    return int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else None


def _rank_or(layer: nn.Module, met: Shapes, spatial: int | None) -> int:
    """The rank of the layer's class; or of the input, as `spatial` or an example tell it."""
    rank = _rank(layer)
    if rank is not None:
        return rank
    if spatial is None:
        axes = {len(shape) - 2 for shape in met}
        if len(axes) != 1:
            raise Refusal(
                "it does not say the rank of its input: pass example=, the argument of a call of the model, or "
                "spatial=, the number of axes behind the channels (2 for images), with where= if it is not the same "
                "for all"
            )
        (spatial,) = axes
    if spatial not in range(4):
        raise ValueError(f"spatial is the number of axes behind the channels, 0 to 3, but got {spatial!r}")
    return max(spatial, 1)


def _affine(layer: nn.Module) -> bool:
    return getattr(layer, "weight", None) is not None


def _trailing(dim: int | tuple[int, ...] | None) -> bool:
    axes = () if dim is None else (dim,) if isinstance(dim, int) else dim
    return axes == tuple(range(-len(axes), 0))


def _ours(name: str) -> type[nn.Module]:
    found: type[nn.Module] | None = getattr(ours, name, None)
    if found is None:
        raise Refusal(f"normwise has no {name}")
    return found


def _summary(layer: nn.Module, new: nn.Module, left: list[str], *notes: str) -> str:
    """What did not carry over: buffers by name, and what the layer was told that its successor cannot be told."""
    told = inspect.signature(known_base(layer)).parameters.values()
    taken = inspect.signature(type(new)).parameters
    lost = [
        f"{p.name}={value!r} has no counterpart"
        for p in told
        if p.kind is p.KEYWORD_ONLY and p.name not in (*taken, "bias", "act", "dim")
        if (value := getattr(layer, p.name, p.default)) != p.default
    ]
    if "running_mean" in left:
        left = ["running statistics", *(name for name in left if not name.startswith("running_"))]
    left = [name for name in left if not name.startswith("num_batches_")]  # counters, which say nothing elsewhere
    dropped = [f"{', '.join(left)} dropped"] if left else []
    return "; ".join([*dropped, *lost, *notes])
