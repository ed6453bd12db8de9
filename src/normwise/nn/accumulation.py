"""Gradient accumulation with the statistics, and the gradients, of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.activations import add_residual_and_activate
from normwise.backends.channels import channel_dims
from normwise.backends.protocol import Moments, NormConfig, accumulation_dtype
from normwise.backends.reference import combined, moments, norm
from normwise.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from normwise.nn.construct import eps_of
from normwise.ops import inputs, ragged
from normwise.ops.dispatch import values_visible
from normwise.ops.norm import running_stats
from normwise.ops.norm.modulation import Given, by_channel, to_axis_1
from normwise.words import counted

Loss = Callable[[Any], Tensor]


def accumulated_backward(model: nn.Module, micro_batches: Iterable[Any], loss: Loss) -> Tensor:
    """Add to `.grad` what one backward over the whole batch would, in the memory of one micro-batch.

    Plain gradient accumulation gives every micro-batch statistics of its own in each BatchNorm layer. Here they are
    those of all micro-batches together, and the gradient flows through them into every micro-batch: outputs, gradients
    and running averages equal those of the concatenated batch, up to rounding. This is exact, and has its price: with
    L calls of BatchNorm layers every micro-batch runs forward up to about 1.5 L + 2 times and backward L + 1 times. It
    pays for few such layers; else take a norm that fits small batches (`BatchRenorm2d`, GroupNorm).

    How: the statistics s of the first layer come from one pass over the micro-batches, those of the next from another
    one that uses them, and so on. With s held fixed, total loss and s depend on a micro-batch through sums over its
    elements, so the gradient is that of

        sum over micro-batches of (loss + sum over layers of lambda . its share of s),  lambda = d(total) / d(s),

    where the lambda of a layer needs those of the layers behind it: the last one is right after one pass, the one
    before after two. The passes end as soon as no lambda changes any more.

    Args:
        model: its BatchNorm layers of normwise that are in training mode take part. All else runs as it is, with the
            same random numbers in every pass over a micro-batch.
        micro_batches: what `loss` takes, one after the other; all are kept.
        loss: runs the model on one micro-batch and returns its share of the total loss, a scalar: for a mean over
            the whole batch, `cross_entropy(model(x), target, reduction="sum") / samples_of_the_whole_batch`.

    Returns:
        The total loss, detached.

    Raises:
        ValueError: no micro-batch; a training BatchNorm layer of torch.nn, or one whose statistics are not simply
            those of its batch; a batch with one value per channel in total.
        TypeError: `loss` returns no tensor.
        RuntimeError: the micro-batches run different layers, or a layer runs under activation checkpointing; a loss
            without a gradient. On an error the model's buffers are as before.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("got no micro-batch: accumulated_backward needs at least one (is the loader empty?)")
    layers = _training_batch_norms(model)
    passes = _Passes(model, batches, loss)
    before = {b: b.detach().clone() for b in model.buffers()}
    try:
        with _forwards_replaced(layers, passes):
            while passes.find_next_statistics():
                passes.restore(before)
            for _ in passes.sites:
                converged = passes.update_adjoints()
                passes.restore(before)
                if converged:
                    break
            total = passes.backward()
    except BaseException:
        passes.restore(before)
        raise
    passes.restore({b: before[b] for layer in layers for b in layer.buffers()})
    passes.update_running_stats()
    return total


@dataclass
class _Site:
    """One call of one layer in the forward of each micro-batch.

    `statistics` are the pooled mean and biased variance (C,), `adjoints` the gradients of the total loss with respect
    to them.
    """

    layer: _BatchNorm
    statistics: Moments
    adjoints: tuple[Tensor, Tensor]
    leaves: tuple[Tensor, Tensor] | None = None


class _StopForward(Exception):  # not an error
    """Raised at the first layer without pooled statistics, whose input is all that this pass is for."""


class _Passes:
    """Passes over all micro-batches, and the layers' pooled statistics so far."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Loss) -> None:
        self.batches, self.loss = batches, loss
        self.sites: list[_Site] = []
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        self.seeds = [int(torch.randint(2**62, (), device="cpu")) for _ in batches]
        self._site_index = 0
        self._own_moments: list[tuple[_BatchNorm, Moments]] = []
        self._shares: list[Tensor] = []

    def find_next_statistics(self) -> bool:
        """Pool the statistics of the first site that has none; False if all have."""
        self._own_moments = []
        with torch.no_grad():
            for batch, seed in zip(self.batches, self.seeds, strict=True):
                with suppress(_StopForward):
                    self._run(batch, seed, None)
        if not self._own_moments:
            return False
        layer = self._own_moments[0][0]
        if len(self._own_moments) != len(self.batches) or any(found is not layer for found, _ in self._own_moments):
            raise RuntimeError(_DIFFERENT_LAYERS)
        pooled = combined(
            Moments(*(torch.stack(column) for column in zip(*(m for _, m in self._own_moments), strict=True)))
        )
        if values_visible(pooled.count) and bool((pooled.count < 2).any()):
            raise ValueError(
                "Expected more than 1 value per channel when training, got fewer in all micro-batches together: give "
                "more micro-batches, or use a norm that needs no batch (LayerNorm, GroupNorm)"
            )
        self.sites.append(_Site(layer, pooled, (torch.zeros_like(pooled.mean), torch.zeros_like(pooled.var))))
        return True

    def update_adjoints(self) -> bool:
        """One pass for the adjoints; True if it changed none beyond rounding."""
        new = [(torch.zeros_like(site.statistics.mean), torch.zeros_like(site.statistics.var)) for site in self.sites]
        for batch, seed in zip(self.batches, self.seeds, strict=True):
            leaves = self._free_statistics()
            objective = self._run(batch, seed, leaves) + sum(self._shares)
            grads = torch.autograd.grad(objective, leaves, allow_unused=True)
            for adjoint, grad in zip((t for pair in new for t in pair), grads, strict=True):
                if grad is not None:
                    adjoint += grad
        unchanged = [
            (now - old).norm() <= 4 * torch.finfo(now.dtype).eps * now.norm()
            for site, pair in zip(self.sites, new, strict=True)
            for old, now in zip(site.adjoints, pair, strict=True)
        ]
        # Whether to go on is Python's to decide: a wait for a GPU, once a pass, for what saves a pass.
        converged = bool(torch.stack(unchanged).all())
        for site, pair in zip(self.sites, new, strict=True):
            site.adjoints = pair
        return converged

    def backward(self) -> Tensor:
        """The pass that adds to `.grad`; the total loss."""
        total: Tensor | None = None
        for batch, seed in zip(self.batches, self.seeds, strict=True):
            value = self._run(batch, seed, [])
            (value + sum(self._shares)).backward()
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        return total

    def update_running_stats(self) -> None:
        """Update every layer's running averages by the pooled statistics, once per call."""
        for site in self.sites:
            layer = site.layer
            if layer.running_mean is not None and layer.running_var is not None:
                config = NormConfig("batch_norm", "channels", eps_of(layer), momentum=layer._momentum())
                stats = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
                updated = running_stats.update_from_moments(config, *stats, site.statistics, layer.correction)
                if updated is not True:
                    layer._count_skipped(updated)

    @staticmethod
    def restore(buffers: dict[Tensor, Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)

    def _free_statistics(self) -> list[Tensor]:
        """New leaves for the gradient, two per site."""
        for site in self.sites:
            site.leaves = (
                site.statistics.mean.clone().requires_grad_(),
                site.statistics.var.clone().requires_grad_(),
            )
        return [leaf for site in self.sites if site.leaves is not None for leaf in site.leaves]

    def _run(self, batch: Any, seed: int, leaves: list[Tensor] | None) -> Tensor:
        """The loss of one micro-batch."""
        if not leaves:
            for site in self.sites:
                site.leaves = None
        self._site_index, self._shares = 0, []
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(seed)
            value = self.loss(batch)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a scalar tensor, but got {type(value).__name__}: leave .item() out")
        if value.dim() != 0:
            raise ValueError(f"loss must return a scalar, but got a tensor of shape {tuple(value.shape)}: use .sum()")
        if leaves is not None and not value.requires_grad:
            raise RuntimeError(
                "element 0 of tensors does not require grad and does not have a grad_fn: the loss of a micro-batch "
                "does not depend on the model's parameters. Leave .detach() and torch.no_grad() out of loss"
            )
        if leaves is not None and self._site_index != len(self.sites):
            raise RuntimeError(_DIFFERENT_LAYERS)
        return value

    def normalize(
        self,
        layer: _BatchNorm,
        input: Any,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Any = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """A layer's `forward` by the statistics of all micro-batches."""
        ragged.rank_or_rows(input, layer.ranks, "BatchNorm1d")
        given = Given(scale, shift)
        if layer.dim != 1:
            given = to_axis_1(given, input, layer.dim)
            moved = inputs.channels_to_axis_1("batch_norm", input, layer.dim, mask, residual)
            y = self._by_site(layer, moved[0], given, mask=moved[1], lengths=lengths, residual=moved[2])
            return y.movedim(1, layer.dim)
        if ragged.is_ragged(input):
            if not (scale is shift is None):
                raise ValueError("scale and shift need a padded input: give it with mask= or lengths=")
            rows = partial(self._by_site, layer, given=given, mask=None, lengths=None)
            return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual)
        return self._by_site(layer, input, given, mask=mask, lengths=lengths, residual=residual)

    def _by_site(
        self,
        layer: _BatchNorm,
        x: Tensor,
        given: Given,
        *,
        mask: Tensor | None,
        lengths: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        weight, bias, act = layer.weight, layer.bias, layer.act
        valid, _ = inputs.validate_channels(
            "batch_norm", x, None, None, weight, bias, 0.0, eps_of(layer), mask, lengths, act, residual
        )
        gain, shift = by_channel(x, weight, bias, given, valid)
        dims = channel_dims(x)
        if running_stats.is_recomputing():
            raise RuntimeError(
                "accumulated_backward needs one micro-batch's memory and does not go with activation checkpointing: "
                "leave torch.utils.checkpoint out, or make the micro-batches smaller"
            )
        if self._site_index == len(self.sites):
            own = moments(x, dims, valid)
            self._own_moments.append((layer, Moments(*(m.expand_as(own.mean).reshape(-1) for m in own))))
            raise _StopForward
        site = self.sites[self._site_index]
        self._site_index += 1
        if site.layer is not layer:
            raise RuntimeError(_DIFFERENT_LAYERS)
        pooled = site.statistics
        shape = (1, -1, *(1,) * (x.dim() - 2))
        if torch.is_grad_enabled():
            self._shares.append(_share(x, dims, valid, pooled, site.adjoints, shape))
        mean, var = (t.view(shape) for t in site.leaves or pooled[:2])
        y, _ = norm(x, dims, gain, shift, mask=valid, mean=mean, var=var, eps=eps_of(layer))
        return add_residual_and_activate(y, residual, act, valid)


def _share(
    x: Tensor,
    dims: tuple[int, ...],
    valid: Tensor | None,
    pooled: Moments,
    adjoints: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """adjoints . this micro-batch's share of the pooled mean and variance."""
    distance = x.to(accumulation_dtype(x.dtype)) - pooled.mean.view(shape)
    if valid is not None:
        distance = distance.masked_fill(~valid, 0)
    by_mean, by_var = (adjoint / pooled.count for adjoint in adjoints)
    return (by_mean * distance.sum(dims)).sum() + (by_var * distance.square().sum(dims)).sum()


def _training_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    found: list[_BatchNorm] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or not layer.training:
            continue
        if not isinstance(layer, BatchNorm1d | BatchNorm2d | BatchNorm3d):
            raise ValueError(
                f"{name or 'the model'} is a {type(layer).__module__.partition('.')[0]} {type(layer).__name__}: "
                "accumulated_backward pools the statistics of normwise's BatchNorm1d, BatchNorm2d and BatchNorm3d. "
                "Replace it by model, _ = normwise.convert(model, to='batch'), or put it into eval mode"
            )
        if layer.domains is not None:
            raise ValueError(
                f"{name or 'the model'} keeps statistics of {counted(layer.domains, 'domain')}: accumulated_backward "
                "pools those of one batch of one domain"
            )
        if layer.virtual_batch_size is not None:
            raise ValueError(
                f"{name or 'the model'} has virtual_batch_size={layer.virtual_batch_size}, which asks for statistics "
                "of less than a micro-batch: set it to None"
            )
        found.append(layer)
    return found


@contextmanager
def _forwards_replaced(layers: Sequence[_BatchNorm], passes: _Passes) -> Iterator[None]:
    """Inside, the layers' outputs are computed by `passes`."""
    for layer in layers:
        layer.forward = partial(passes.normalize, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


_DIFFERENT_LAYERS = (
    "the micro-batches do not run the same BatchNorm layers in the same order, so there is no whole batch: "
    "make the order of the layers independent of the data"
)
