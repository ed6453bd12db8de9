"""recalibrate: re-estimates the running statistics of a model's norms from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.reference import Moments
from normwise.measure.eager import run_eagerly
from normwise.measure.snapshot import Values, modes_kept, state_of
from normwise.nn.frozen_batch_norm import FrozenBatchNorm
from normwise.nn.running_norm import RunningNorm
from normwise.ops import distributed
from normwise.surgery.batches import Forward, on_batch, one_batch_at_a_time, without_graph
from normwise.surgery.forwards import normalizes_its_input
from normwise.surgery.freeze import is_frozen
from normwise.surgery.norms.recognize import stands_for
from normwise.surgery.pools import Pool, pool_of
from normwise.surgery.progress import Progress, shown
from normwise.surgery.report import Change, Report, Skip
from normwise.surgery.select import (
    BATCH,
    INSTANCE,
    RECURRENT,
    Layer,
    Where,
    chosen,
    has_norm,
    known_base,
    layers,
    require_module,
)
from normwise.words import given


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    exact: bool = False,
    where: Where = None,
    process_group: Any = None,
    progress: Progress = False,
) -> Report:
    r"""Set the running statistics of a model's norms to those of the data, in place.

    After weight averaging (EMA, SWA), after weights were changed or loaded, or where training's running averages lag
    behind or came from batches that were too small. Mean and variance of each channel are pooled over all values that
    the layer sees in all batches:

        mean = sum(n_k mean_k) / n,   var = sum(n_k (var_k + (mean_k - mean)^2)) / n,   n = sum(n_k)

    with n_k the valid values of batch k (`mask=` and `lengths=` count), in float64; running_var is var * n / (n - 1).
    Batches of different sizes weigh by their values, and their order does not matter. A BatchNorm with `momentum=None`
    averages batches instead, and loses the second term: how far the batches' means lie apart.

    Recurrent layers and cells with norm="batch" get this for each row of their tables: step by step, over the samples
    running at that step, the last row over all steps that share it; a row whose step no two samples reach stays.
    InstanceNorm averages means and unbiased variances of single samples, as in training, here all samples alike.

    The model's other layers run in evaluation, so dropout is off. What a deeper layer sees depends on how the layers
    before it normalize while the data go through:

    - by default as in training, by each batch's own statistics, in one pass over the data. The usual choice, and what
      torch.optim.swa_utils.update_bn does; it needs batches as large as those of training, and as mixed: data sorted by
      class give each layer but the first statistics of batches that no training has seen (shuffle, or `exact=True`).
    - `exact=True`: by the statistics that are already set, layer after layer, in one pass over the data for each
      layer. The result is what evaluation will see, and the same however the data are cut into batches. (But what is
      inside a recurrent layer always runs by the batch's own statistics: a step needs those of the step before.)

    Args:
        model: its layers of torch.nn and normwise that keep running statistics are recalibrated; those that `freeze`
            froze are not.
        batches: what to run, e.g. a DataLoader: tensors, pairs ((x, lengths), target) whose target is left aside, or
            mappings, which give keyword arguments; `normwise.surgery.batches` has the convention. With `exact` it must
            be one that can be gone over many times.
        forward: runs the model on a batch of any other structure: `lambda model, batch: model(batch.image.cuda())`.
        exact: see above.
        where: which layers, as in `freeze`; None means all.
        process_group: the ranks whose values are pooled; None for all, where torch.distributed is initialised. All of
            them must call this; afterwards they hold the same statistics. A rank may have no batch.
        progress: True shows a bar (by rich, where it is installed); or a function of the number of batches done and
            their total (None if unknown).

    Returns:
        What was recalibrated, from how many values, and what was skipped and why.

    Raises:
        ValueError: there is no layer with running statistics, no batch, no finite value, or a batch of three and more
            parts without `forward=`.
        TypeError: not a model, or not an iterable of batches.
        RuntimeError: a process group that is not initialised, or a rank that did not answer.
        Exception: what the model raises, of its class, with the batch. After an error statistics, counters and modes
            are as they were.
    """
    return re_estimate("recalibrate", model, batches, forward, where, exact, process_group, progress)


def re_estimate(
    verb: str,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    where: Where,
    exact: bool = False,
    process_group: Any = None,
    progress: Progress = False,
) -> Report:
    """What `recalibrate` does, as part of what the user called by the name `verb`."""
    require_module(verb, model)
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping, str, bytes)):
        raise TypeError(
            "batches must be an iterable of batches, such as a DataLoader or a list of tensors, but got "
            f"{type(batches).__name__}: {one_batch_at_a_time(batches)}"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of model and batch, or None, but got {given(forward)}")
    distributed.group_of(process_group, default=True)  # says now what is wrong with it
    candidates = [one for one in layers(model, (nn.Module,)) if _may_keep(one.module)]
    meant = chosen(candidates, where)
    report = Report(verb)
    wanted = []
    for one in candidates:
        reason = _why_not(one.module) if meant(one) else "not meant by where="
        if reason is None:
            wanted.append(one)
        else:
            report.skipped.append(Skip(one.name, one.kind, reason))
    if not wanted:
        raise ValueError(
            f"{verb} found no norm with running statistics in the model: the others keep none, so there is nothing to "
            f"re-estimate{report.reasons}"
        )
    if exact and iter(batches) is iter(batches):
        raise ValueError(
            "exact=True goes over the batches once for each layer, but these can be gone over only once: pass a list "
            "or a DataLoader instead of an iterator"
        )
    with shown(progress, verb) as show:
        _recalibrate(_Run(verb, model, batches, forward, process_group, show), wanted, exact, report)
    return report


def has_running_statistics(model: nn.Module) -> bool:
    """Whether `recalibrate` has anything to do in a model."""
    return any(_may_keep(one.module) and _why_not(one.module) is None for one in layers(model, (nn.Module,)))


def _recalibrate(run: _Run, wanted: list[Layer], exact: bool, report: Report) -> None:
    with run.restoring(wanted):
        found = run.layer_by_layer(wanted) if exact else run.at_once(wanted)
        for one in wanted:
            pool = found[one.name]
            reason = pool.why_not()
            if reason is None:
                pool.store()
                report.changed.append(Change(one.name, one.kind, "recalibrated", str(pool)))
            else:
                report.skipped.append(Skip(one.name, one.kind, reason))
        if not report.changed:
            reasons = report.reasons
            if not run.done:
                reasons = " no batch came: an iterator that was gone over before is empty, a DataLoader is not"
            raise ValueError(f"{report.verb} found nothing to take statistics of:{reasons}")


class _Run:
    """The model on the batches, once or many times."""

    def __init__(
        self,
        verb: str,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward | None,
        process_group: Any,
        show: Callable[[Iterable[Any], int], Iterator[Any]],
    ) -> None:
        self.verb = verb
        self.model, self.batches, self.forward = model, batches, forward
        self.process_group, self.show = process_group, show
        self.done = 0
        self.few = ""  # what to do where a batch is too small to normalize
        self.state = Values([])  # of the layers, as it was

    def at_once(self, wanted: list[Layer]) -> dict[str, Pool]:
        """One pass in which all layers normalize by the batch's own statistics."""
        for one in wanted:
            one.module.training = not isinstance(one.module, RECURRENT)  # whose pools make it take batch statistics
        if not any(isinstance(one.module, RECURRENT) for one in wanted):
            self.few = (
                "give larger batches, or normwise.recalibrate(..., exact=True), for which those of one sample will do"
            )
        pools = self.over_all(wanted, self.show(self.batches, 1))
        self.state.restore()
        self.share([pools[one.name] for one in wanted], wanted)
        return pools

    def layer_by_layer(self, wanted: list[Layer]) -> dict[str, Pool]:
        """One pass per layer, in the order in which the model calls them; each is set before the next pass."""
        passes = len(wanted)
        found: dict[str, Pool] = {}
        for one in self.in_order(wanted):
            found |= self.over_all([one], self.show(self.batches, passes))
            self.share([found[one.name]], [one])
            if found[one.name].why_not() is None:
                found[one.name].store()
        return found

    def in_order(self, wanted: list[Layer]) -> list[Layer]:
        """In the order of calls in the first batch, the same on all ranks; layers that it does not call come last."""
        met: list[str] = []
        with ExitStack() as hooks:
            for one in wanted:
                hook = one.module.register_forward_pre_hook(lambda module, args, name=one.name: met.append(name))
                hooks.callback(hook.remove)
            for batch in self.batches:
                self.call(batch, 0)
                break
        places = [Moments(*(torch.zeros(1) for _ in range(3))) for _ in wanted]
        for one, place in zip(wanted, places, strict=True):
            if one.name in met:
                place.mean.fill_(met.index(one.name))
                place.count.fill_(1)
        agreed = distributed.pool_moments([_on(place, wanted[0].module) for place in places], self.process_group)
        position = [float(place.mean) if place.count else float("inf") for place in agreed]
        return [wanted[n] for n in sorted(range(len(wanted)), key=position.__getitem__)]

    def over_all(self, wanted: list[Layer], batches: Iterator[Any]) -> dict[str, Pool]:
        """Run the model on every batch; the pools of these layers."""
        pools = {one.name: pool_of(_norm(one.module), one.module) for one in wanted}
        with ExitStack() as hooks:
            for pool in pools.values():
                hooks.callback(pool.observe())
            for number, batch in enumerate(batches):
                self.call(batch, number)
                self.done += 1
        return pools

    def call(self, batch: Any, number: int) -> None:
        on_batch(self.verb, self.forward, self.model, batch, number, self.few)

    def share(self, pools: list[Pool], wanted: list[Layer]) -> None:
        """Pool over the ranks, in one exchange."""
        counts = torch.tensor([[pool.batches, pool.skipped] for pool in pools], dtype=torch.float64)
        mine = [part for pool in pools for part in pool.parts.values()]
        mine.append(Moments(counts, torch.zeros_like(counts), torch.ones_like(counts)))
        *all_moments, sums = distributed.pool_moments([_on(m, wanted[0].module) for m in mine], self.process_group)
        totals = (sums.mean * sums.count).round().long().tolist()
        found = iter(all_moments)
        for pool, one, total in zip(pools, wanted, totals, strict=True):
            pool.parts = {name: _on(next(found), one.module) for name in pool.parts}
            pool.batches, pool.skipped = total

    @contextmanager
    def restoring(self, wanted: list[Layer]) -> Iterator[None]:
        """The model in evaluation, without gradients or compiled code, which skips hooks. Afterwards all modes are
        as they were; after an error so is every buffer of the layers."""
        self.state = Values(state_of(*(one.module for one in wanted)))
        with modes_kept(self.model.modules()):
            try:
                for module in self.model.modules():
                    module.training = False
                with without_graph(self.model), run_eagerly():
                    yield
            except BaseException:
                self.state.restore()
                raise


def _may_keep(layer: nn.Module) -> bool:
    """Whether one may think of a layer as keeping running statistics."""
    if isinstance(layer, RECURRENT):
        return has_norm(layer) and layer.recurrence.norm == "batch"
    if isinstance(layer, RunningNorm):
        return not layer.per_instance
    norm = stands_for(layer)
    return isinstance(norm, BATCH) or (isinstance(norm, INSTANCE) and norm.running_mean is not None)


def _norm(layer: nn.Module) -> nn.Module:
    """What computes what the layer does with its very statistics, which is the layer unless its class is another's."""
    return layer if isinstance(layer, RECURRENT) else stands_for(layer) or layer


def _why_not(layer: nn.Module) -> str | None:
    norm = _norm(layer)
    if isinstance(layer, RunningNorm):
        return "its statistics are those of all that it has seen: reset_running_stats() and then update(x) take others"
    if isinstance(norm, FrozenBatchNorm):
        return "its statistics are fixed"
    if is_frozen(layer):
        return "it is frozen: normwise.unfreeze first"
    if not isinstance(norm, RECURRENT) and norm.running_mean is None:
        return "track_running_stats=False: it keeps no statistics"
    if norm is layer and not normalizes_its_input(layer):
        return (
            f"it has a forward of its own, which may give {known_base(layer).__name__}'s something else than its input "
            "to normalize; one that is bound to the instance, as accelerate's hooks are, take off first"
        )
    return None


def _on(found: Moments, layer: nn.Module) -> Moments:
    device = next(layer.buffers()).device
    return Moments(*(t.to(device) for t in found))
