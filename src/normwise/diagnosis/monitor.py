"""`normwise.Monitor`: the numbers and findings of a diagnosis, of every so many steps while a model trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import silence
from normwise.diagnosis.collect import ranks, record
from normwise.diagnosis.distributions import distribution
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import layers_of, unwrapped
from normwise.diagnosis.look import Look, write
from normwise.diagnosis.records import Data, Diagnosis, Finding, Layer, NonFinite
from normwise.diagnosis.run import judged
from normwise.diagnosis.steps import check_optimizer, groups
from normwise.diagnosis.watch import Watch
from normwise.measure.eager import run_eagerly
from normwise.measure.gradients import squared_norm
from normwise.words import counted

# The share of their start that running statistics may still hold before they are judged.
START = 0.05


class Monitor:
    """Looks at what normalization does, layer by layer, every so many steps of a training loop of one's own.

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

    Each finding that one training step can show (NW001, NW002, NW003, NW006 to NW008 and NW010 to NW017, not all in
    every form that `normwise.diagnose` knows) is written once, when it first arises, and kept in `findings`. Running
    statistics are not judged (NW002) until less than 5 % of what they started from is left in them.

    Between these steps there is no hook on the model and nothing is computed. On these steps only forward passes in
    train mode count, all of them: with gradient accumulation a step is the optimizer's. The model, its gradients and
    the random state are left alone. A model compiled by torch.compile, whole or in part, runs eagerly on these steps,
    since compiled code skips hooks, and is not compiled again for them. Use it in a `with` block, or call
    `close()`, to be sure that no hook stays after an interrupted step.

    Args:
        model: in training, on any device; a DataParallel, DistributedDataParallel or torch.compile is looked through.
        writer: a torch.utils.tensorboard.SummaryWriter, or whatever has `add_scalar(tag, value, step)`; histograms are
            written if it has `add_histogram(tag, values, step)`, findings if it has `add_text(tag, text, step)`. Or
            what has `log(look)`, as the loggers of `normwise.integrations`; or several of all these in a list. None
            writes nowhere: what `step()` returns is all.
        every: steps from one look to the next.
        optimizer: also look at its weight decay (NW011).
        scaler: the torch.amp.GradScaler of mixed precision: gradients are written without its factor.
        ignore: findings to leave out, as in `normwise.diagnose`: ["NW005", "NW001:encoder.*"].
        steps: how many optimizer steps came before, in a run that was resumed.

    Raises:
        DiagnosisError: no such model or writer; `every` is no positive integer.
    """

    def __init__(
        self,
        model: nn.Module,
        writer: Any = None,
        every: int = 100,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        ignore: Sequence[str] = (),
        steps: int = 0,
    ) -> None:
        for name, value, least in (("every", every, 1), ("steps", steps, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                what = "a positive integer" if least else "the number of steps that came before, 0 or more"
                raise DiagnosisError(f"{name} must be {what}, but got {value!r}")
        self.writers = _writers(writer)
        self.model, self.wrapper = unwrapped(model)
        if optimizer is not None:
            check_optimizer(self.model, optimizer)
        self.every, self.optimizer, self.scaler = every, optimizer, scaler
        self.silenced = silence.checked(ignore)
        self.steps = steps
        self.findings: list[Finding] = []
        self.watch: Watch | None = None
        self._known: set[tuple[str, str]] = set()
        self._squares: dict[str, float] = {}
        self._open = ExitStack()
        if steps % every == 0:
            self._look()

    def __repr__(self) -> str:
        codes = list(dict.fromkeys(finding.code for finding in self.findings))
        named = ", ".join(codes[:5]) + ", ..." * (len(codes) > 5)
        found = f"{counted(len(self.findings), 'finding')} ({named})" if codes else "no findings"
        look = f"looks again in {counted(n, 'step')}" if (n := -self.steps % self.every) else "looks at the next one"
        name = type(self.model).__name__
        return f"<Monitor of {name}, every={self.every}: {counted(self.steps, 'step')} done, {look}; {found}>"

    def step(self) -> Look | None:
        """Once for each step of the optimizer, after `backward()` and before the next `zero_grad()`.

        Returns:
            What was seen, where this was a step to look at and the model was called in train mode.
        """
        look = self._seen()
        if look is not None:
            for log in self.writers:
                log(look)
        self.steps += 1
        if self.steps % self.every == 0:
            self._look()
        return look

    def read_gradients(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take the norms of the parameters' gradients now, rather than in `step()`: for loops that have emptied or
        changed them by then. Of those of one optimizer, where there are several."""
        if self.watch is None:
            return
        meant = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and (meant is None or id(parameter) in meant):
                self._squares[name] = squared_norm(parameter.grad, fast=True)

    def pause(self) -> None:
        """No hooks, until `resume()`: for an evaluation in the middle of a step."""
        self._open.close()

    def resume(self) -> None:
        """Go on after `pause()`."""
        if self.watch is not None:
            self._open.close()
            self._open.enter_context(run_eagerly())
            self._open.enter_context(self.watch)

    def close(self) -> None:
        """Take all hooks away."""
        self._open.close()
        self.watch = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the steps, and which findings were written."""
        return {"steps": self.steps, "findings": sorted(list(known) for known in self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken: a finding that was written then is not written again."""
        self.close()
        self.steps = int(state["steps"])
        self._known = {(str(code), str(layer)) for code, layer in state["findings"]}
        if self.steps % self.every == 0:
            self._look()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        self.close()
        self._squares.clear()
        modes = {name: module.training for name, module in self.model.named_modules()}
        scale = {} if self.scaler is None else {"scale": self.scaler.get_scale}
        self.watch = Watch(self.model, modes, lean=True, **scale)
        self.watch.begin(0, None)
        self.watch.recording = self.watch.backward = True
        self.resume()

    def _seen(self) -> Look | None:
        watch = self.watch
        if watch is None:
            return None
        if not self._squares:
            self.read_gradients()
        self.close()
        watch.end_with(self._squares)
        seen = sorted((s for s in watch.layers.values() if s.order is not None), key=lambda s: s.order or 0)
        if not seen:
            return None
        for one in seen:
            if one.norm is not None:
                one.norm.finish()
        layers = [record(one, {}, {}) for one in seen]
        name = type(self.model).__name__
        gains = {
            f"normwise/{one.name or name}/{what}": values.detach().float().cpu()
            for one in seen
            if one.norm is not None
            for what, parameter in (("gain", "weight"), ("bias", "bias"))
            if isinstance(values := getattr(one.module, parameter, None), Tensor) and bool(torch.isfinite(values).all())
        }
        return Look(self.steps, layers, self._new_findings(watch, layers), name, gains)

    def _new_findings(self, watch: Watch, layers: list[Layer]) -> list[Finding]:
        # A scaler tries factors until gradients are finite, and leaves such steps out.
        spoilt = [] if self.scaler is not None else [n for n, s in self._squares.items() if not math.isfinite(s)]
        first, way_back = (watch.forward_trail.first, watch.backward_trail.first) if spoilt else (None, None)
        diagnosis = Diagnosis(
            model=type(self.model).__name__,
            wrapper=self.wrapper,
            ranks=ranks(),
            was_training=watch.modes[""],
            parameters=sum(p.numel() for p in self.model.parameters()),
            trainable=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            data=Data(batches=1, sizes=[0], steps=[], padding=None, told_by=None),
            layers=[_judgeable(layer) for layer in layers],
            nonfinite=NonFinite(gradients=spoilt, first=first, first_gradient=way_back),
            optimizer=[] if self.optimizer is None else groups(layers_of(self.model), self.optimizer),
        )
        new = [f for f in judged(diagnosis, self.silenced).findings if (f.code, f.layer) not in self._known]
        self._known |= {(finding.code, finding.layer) for finding in new}
        self.findings += new
        return new


def _judgeable(layer: Layer) -> Layer:
    """Without running statistics that are still on their way from where they started, which mean nothing yet."""
    norm = layer.norm
    if norm is None or norm.running is None or norm.running.tracked is None or norm.running.nonfinite:
        return layer
    started = 0.0 if norm.momentum is None else (1 - norm.momentum) ** norm.running.tracked
    if norm.running.tracked and started < START:
        return layer
    unknown = distribution([])
    running = dataclasses.replace(norm.running, distance=unknown, log_ratio=unknown)
    return dataclasses.replace(layer, norm=dataclasses.replace(norm, running=running))


def _writers(given: Any) -> list[Callable[[Look], None]]:
    """A function of a look for each writer.

    Raises:
        DiagnosisError: something that writes nothing.
    """
    if given is None:
        return []
    several = given if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else [given]
    found: list[Callable[[Look], None]] = []
    for one in several:
        if callable(getattr(one, "add_scalar", None)):
            found.append(functools.partial(write, writer=one))
        elif callable(getattr(one, "log", None)) and not isinstance(one, nn.Module):
            found.append(one.log)
        else:
            raise DiagnosisError(
                "writer must have add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter has, or "
                f"log(look), as the loggers of normwise.integrations have, but got {type(one).__name__}: "
                "normwise.integrations.CSVLogger('folder') needs no further library"
            )
    return found
