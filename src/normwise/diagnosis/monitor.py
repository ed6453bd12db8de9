"""`normwise.Monitor`: the numbers of a diagnosis, written to TensorBoard while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from normwise.diagnosis.collect import record
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import unwrapped
from normwise.diagnosis.records import Layer
from normwise.diagnosis.watch import Watch


class Monitor:
    """Writes what normalization does, layer by layer, every so many steps of a training loop of one's own.

        monitor = normwise.Monitor(model, SummaryWriter(), every=100)
        for inputs, target in loader:
            loss = criterion(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step()

    Of every `every`-th step, the first included, it writes the scalars `normwise/LAYER/...`: mean, std and percentiles
    15, 50, 85 of the output; the norm of the gradient that arrives there (`gradient`) and at each weight
    (`gradient/NAME`); of nonlinearities the share of saturated and dead units; of norms the medians over channels of
    the running statistics' distance and log2 ratio of variances; of recurrent layers the share of each gate that is
    saturated and the size of the summed input (gates are recomputed step by step, so of a long sequence this is what
    costs); and histograms of gains and biases of norms. See `normwise.diagnosis.records` for what they mean.

    Between these steps there is no hook on the model and nothing is computed. On these steps only forward passes in
    train mode count. The model, its gradients and the random state are left alone. Use it in a `with` block, or call
    `close()`, to be sure that no hook stays after an interrupted step.

    Args:
        model: in training, on any device; a DataParallel or DistributedDataParallel is looked through.
        writer: a torch.utils.tensorboard.SummaryWriter, or whatever has `add_scalar(tag, value, step)`; histograms are
            written if it has `add_histogram(tag, values, step)`.
        every: steps from one look to the next.

    Raises:
        DiagnosisError: no such model or writer; `every` is no positive integer; a compiled model, which hooks would
            make compile again.
    """

    def __init__(self, model: nn.Module, writer: Any, every: int = 100) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise DiagnosisError(f"every must be a positive integer, but got {every!r}")
        if not callable(getattr(writer, "add_scalar", None)):
            raise DiagnosisError(
                f"writer must have add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter has, but got "
                f"{type(writer).__name__}"
            )
        inner, _ = unwrapped(model)
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in (model, *inner.modules())):
            raise DiagnosisError(
                "Monitor cannot look into a compiled model: its hooks would make it compile again at every look. Train "
                "the eager model for the steps that you want to see"
            )
        self.model, self.writer, self.every = inner, writer, every
        self.steps = 0
        self.watch: Watch | None = None
        self._look()

    def step(self) -> None:
        """Once for each training step, after `backward()` and before the next `zero_grad()`."""
        watch = self.watch
        if watch is not None:
            self.close()
            watch.end({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})
            for seen in watch.layers.values():
                if seen.order is not None:
                    self._write(record(seen, {}, {}), seen.module)
        self.steps += 1
        if self.steps % self.every == 0:
            self._look()

    def close(self) -> None:
        """Take all hooks away."""
        if self.watch is not None:
            self.watch.__exit__()
            self.watch = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        self.watch = Watch(self.model, {name: m.training for name, m in self.model.named_modules()}, lean=True)
        self.watch.begin(0, None)
        self.watch.recording = self.watch.backward = True
        self.watch.__enter__()

    def _write(self, layer: Layer, module: nn.Module) -> None:
        name = layer.name or type(self.model).__name__
        for what, value in numbers(layer):
            self.writer.add_scalar(f"normwise/{name}/{what}", value, self.steps)
        if layer.norm is not None and callable(getattr(self.writer, "add_histogram", None)):
            for what, parameter in (("gain", "weight"), ("bias", "bias")):
                values = getattr(module, parameter, None)
                if values is not None and bool(torch.isfinite(values).all()):
                    self.writer.add_histogram(f"normwise/{name}/{what}", values.detach().float().cpu(), self.steps)


def numbers(layer: Layer) -> Iterator[tuple[str, float]]:
    """(name, value) of what a layer's record holds."""
    if layer.output is not None and layer.output.all.count:
        everything = layer.output.all
        yield from (("mean", everything.mean), ("std", everything.std))
        yield from ((f"p{p}", everything.percentile(p)) for p in (15, 50, 85))
    if layer.gradient is not None:
        if layer.gradient.output is not None:
            yield "gradient", layer.gradient.output
        yield from ((f"gradient/{name}", value) for name, value in layer.gradient.weights.items())
    if layer.units is not None:
        yield from (("saturated", layer.units.saturated), ("dead", layer.units.dead))
    if layer.norm is not None and layer.norm.running is not None and layer.norm.running.distance.count:
        yield "running/distance", layer.norm.running.distance.percentile(50)
        yield "running/log_ratio", layer.norm.running.log_ratio.percentile(50)
    for inside in layer.recurrence:
        yield from ((f"{inside.place}/saturated/{gate.name}", gate.saturated) for gate in inside.gates)
        if inside.summed:
            yield f"{inside.place}/summed/first", inside.summed[0]
            yield f"{inside.place}/summed/last", inside.summed[-1]
