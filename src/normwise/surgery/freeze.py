"""Freezing normalization layers: statistics that stay fixed through every `model.train()`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from normwise.nn.frozen_batch_norm import FrozenBatchNorm
from normwise.nn.running_norm import RunningNorm
from normwise.surgery.norms.recognize import stands_for
from normwise.surgery.report import Change, Report, Skip
from normwise.surgery.select import BATCH, INSTANCE, RECURRENT, Where, chosen, has_norm, layers, require_module


class _StaysInEval:
    """A frozen layer's own `train`: the layer stays in evaluation.

    An attribute of the instance, which copies and pickles with the layer, and which a compiler sees as the constant
    `training=False`.
    """

    def __init__(self, layer: nn.Module, learned: list[str]) -> None:
        self.layer = layer
        self.learned = learned  # the parameters that had requires_grad before

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.layer).train(self.layer, False)


def freeze(model: nn.Module, *, affine: bool = True, where: Where = None) -> Report:
    """Fix the running statistics of a model's batch norms and RunningNorms, in place, until `unfreeze`.

    A frozen layer normalizes by its running statistics in training as in evaluation, and they stay as they are, also
    after `model.train()`, which would undo `layer.eval()`. Copies and pickles of the model
    are frozen too. Layers without running statistics (LayerNorm, GroupNorm) have nothing to freeze.

    Args:
        model: changed in place.
        affine: fix gain and bias as well (requires_grad off); False leaves them to be learned, the usual way to
            fine-tune on small batches.
        where: which layers: a pattern of names ("backbone.*"), a class, several of these, or a function of name and
            module; None means all that have running statistics.

    Returns:
        What is frozen now, and what is not and why. `frozen(model)` gives the names later.

    Raises:
        ValueError: there is no layer with running statistics, or `where` means none.
    """
    require_module("freeze", model)
    candidates = [one for one in layers(model, (nn.Module,)) if _may_be_frozen(one.module)]
    meant = chosen(candidates, where)
    report = Report("freeze")
    for one in candidates:
        reason = _why_not(one.module) if meant(one) else "not meant by where="
        if reason is not None:
            report.skipped.append(Skip(one.name, one.kind, reason))
        else:
            report.changed.append(Change(one.name, one.kind, "frozen", freeze_layer(one.module, affine)))
    if not report.changed:
        raise ValueError(
            "freeze found no layer with running statistics in the model: LayerNorm, GroupNorm and the like have none; "
            "to fix their gain and bias set requires_grad_(False) on them" + report.reasons
        )
    return report


def unfreeze(model: nn.Module, *, where: Where = None) -> Report:
    """Undo `freeze`, in place: the layers take the model's mode, and parameters that were trained before are again.

    Raises:
        ValueError: nothing is frozen, or `where` means nothing that is.
    """
    require_module("unfreeze", model)
    candidates = [one for one in layers(model, (nn.Module,)) if is_frozen(one.module)]
    if not candidates:
        raise ValueError(
            "unfreeze found no frozen layer: normwise.frozen(model) lists those that normwise.freeze froze"
        )
    meant = chosen(candidates, where)
    report = Report("unfreeze")
    for one in filter(meant, candidates):
        for name in _memory(one.module).learned:
            one.module.get_parameter(name).requires_grad_(True)
        del one.module.__dict__["train"]
        one.module.train(model.training)
        report.changed.append(Change(one.name, "frozen", one.kind))
    return report


def frozen(model: nn.Module) -> list[str]:
    """The names of the layers that `freeze` froze."""
    return [name for one in layers(model, (nn.Module,)) if is_frozen(one.module) for name in one.names]


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` froze this very layer."""
    return isinstance(vars(layer).get("train"), _StaysInEval)


def freeze_layer(layer: nn.Module, affine: bool) -> str:
    """Freeze one layer; returns what a report should say about it."""
    if is_frozen(layer):
        learned = _memory(layer).learned
    else:
        learned = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        if isinstance(layer, RECURRENT):
            learned = [name for name in learned if name.startswith("gain_") and "between" not in name]
    for name in learned:
        layer.get_parameter(name).requires_grad_(not affine)
    vars(layer)["train"] = _StaysInEval(layer, learned)
    layer.train()
    return "statistics, gain and bias" if affine else "statistics; gain and bias learn on"


def keep_frozen(old: nn.Module, new: nn.Module, names: Mapping[str, str]) -> str:
    """Freeze `new`, which stands in the place of the frozen `old`, if it can be; returns what to report.

    Args:
        names: what parameters of `old` are called in `new`, if not the same.
    """
    reason = _why_not(new)
    if reason is not None:
        return f"no longer frozen: {reason}"
    vars(new)["train"] = _StaysInEval(new, [names.get(name, name) for name in _memory(old).learned])
    new.train()
    return ""


def _memory(layer: nn.Module) -> _StaysInEval:
    kept = vars(layer)["train"]
    assert isinstance(kept, _StaysInEval)
    return kept


def _may_be_frozen(layer: nn.Module) -> bool:
    """Whether one may think of a layer, of whatever class, as keeping running statistics."""
    if isinstance(layer, RECURRENT):
        return has_norm(layer)
    return isinstance(layer, RunningNorm) or isinstance(stands_for(layer), (*BATCH, *INSTANCE))


def _why_not(layer: nn.Module) -> str | None:
    """What keeps a layer from being frozen: there is nothing to freeze, or too much would be."""
    norm = layer if isinstance(layer, RECURRENT) else stands_for(layer) or layer
    if "train" in vars(layer) and not is_frozen(layer):
        return "a train() is bound to this very instance, which freezing would replace: take it off first"
    if isinstance(layer, RECURRENT):
        config = getattr(layer, "recurrence", None)
        if config is None or config.norm != "batch":
            return "its norms have no running statistics"
        if getattr(layer, "dropout", 0) or config.zoneout:
            return "kept in evaluation it would lose its dropout or zoneout too"
    elif isinstance(layer, RunningNorm):
        return "per_instance=True: it has no running statistics" if layer.per_instance else None
    elif isinstance(norm, FrozenBatchNorm):
        return "its statistics are fixed as it is"
    elif norm._buffers.get("running_mean") is None:
        if isinstance(norm, BATCH):
            return "track_running_stats=False: it takes each batch's own statistics in evaluation too"
        return "it has no running statistics"
    return None
