"""Train one spec and record what happens."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch

from normwise.lab import checkpoint, watch
from normwise.lab.errors import UndefinedError
from normwise.lab.norms import UNDEFINED_WORDS
from normwise.lab.shift import Shift
from normwise.lab.spec import Spec
from normwise.lab.tasks import Task, load_task

TRAIN_POINTS = 5000
"""Of more steps than these, each value of a series of all steps is a mean over as many as keep it this short."""
GRADIENT_POINTS = 50


@dataclass
class Series:
    """Values over steps; step 0 is before the first update."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class Result:
    """A finished run.

    ``status`` is "done"; "undefined", where the norm has no meaning in this setting; or "diverged", where the loss
    became infinite or NaN. ``reason`` says why for the latter two. The series are listed in ``docs/lab.md``.
    """

    status: str
    reason: str = ""
    series: dict[str, Series] = field(default_factory=dict)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            series = self.series.setdefault(name, Series())
            series.steps.append(step)
            series.values.append(value)

    def record_over_time(self, when: str, values: Mapping[str, list[float]]) -> None:
        """Series whose steps are not those of the training but the time steps of the held-out sequences, from 0."""
        for name, of_steps in values.items():
            self.series[f"over-time/{name}/{when}"] = Series(list(range(len(of_steps))), of_steps)


def run(spec: Spec, kept: Path | None = None) -> Result:
    """Train ``spec``. The same spec gives the same numbers, times apart, for the same number of threads.

    Args:
        spec: the run.
        kept: a file in which the run keeps how far it is (``checkpoint.py``). If it is there, the run goes on from
            it, to the numbers of a run that was never stopped.

    Raises:
        LabError: the spec asks for something that does not exist, or ``kept`` is damaged or cannot be written.
    """
    result = Result("done")
    # A layer has the last word on what it can normalize; any other ValueError is a fault and passes on.
    try:
        with warnings.catch_warnings():
            # A net that diverges is a result, recorded with its step: its layers need not warn of it as well.
            warnings.filterwarnings("ignore", r"\w+ skipped an update of its running averages", UserWarning)
            _train(spec, load_task(spec.task).task, result, kept)
    except UndefinedError as error:
        return Result("undefined", str(error))
    except ValueError as error:
        if not str(error).startswith(UNDEFINED_WORDS):
            raise
        return Result("undefined", str(error))
    return result


def _train(spec: Spec, task: Task, result: Result, kept: Path | None) -> None:
    torch.manual_seed(spec.seed)
    model = task.model(spec.norm, spec.seed).train()
    optimizer = task.optimizer(model, spec.learning_rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    weights = watch.weights(model)
    probe = watch.Probe(task, spec.batch_size)
    lengths = task.cases[0].lengths
    batches = task.batches(spec.batch_size, spec.steps, spec.seed)
    first = 0
    if kept is not None and kept.exists():
        first, random_state = checkpoint.load(kept, model, optimizer, result)
        for _ in islice(batches, first):
            pass
        torch.set_rng_state(random_state)
    else:
        result.record(0, {"train/cases": float(len(task.cases[0]))})
        if lengths is not None:
            result.record(0, {"train/longest": float(lengths.max())})
            result.record_over_time("start", probe.over_time(model))
    gradients_every = max(1, spec.steps // GRADIENT_POINTS)
    probe_every = max(task.looks_apart, spec.steps // task.looks)
    record_every = math.ceil(spec.steps / TRAIN_POINTS)
    window: list[tuple[float, float, float]] = []
    kept_last = time.monotonic()
    for step, batch in enumerate(batches, first):
        looking = step % probe_every == 0 and step + probe_every <= spec.steps
        if looking:
            result.record(step, probe.look(model))
        start = time.perf_counter()
        optimizer.zero_grad()
        scores = task.forward(model, batch)
        loss = task.loss(scores, batch)
        loss.backward()
        forward_backward = time.perf_counter() - start
        value = loss.item()
        if not math.isfinite(value):
            result.status, result.reason = "diverged", f"the training loss became {value} at step {step}"
            return
        if step % gradients_every == 0:
            result.record(step, watch.gradient_norms(weights))
        shift = Shift(model, task, batch) if looking else None
        start = time.perf_counter()
        if task.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * task.rate_factor(step, spec.steps)
        optimizer.step()
        seconds = forward_backward + time.perf_counter() - start
        if shift is not None:
            result.record(step, shift.after_update())
        with torch.no_grad():
            right = watch.accuracy(scores, batch.targets)
        window.append((value, right, seconds))
        if len(window) == record_every or step + 1 == spec.steps:
            names = ("train/loss", "train/accuracy", "time/step")
            result.record(step, dict(zip(names, map(fmean, zip(*window, strict=True)), strict=True)))
            window.clear()
            if kept is not None and time.monotonic() - kept_last >= checkpoint.SECONDS:
                checkpoint.save(kept, step + 1, model, optimizer, result)
                kept_last = time.monotonic()
    result.record(spec.steps, probe.look(model))
    if lengths is not None:
        result.record_over_time("end", probe.over_time(model))
    result.record(spec.steps, watch.final(model, task))
    more = task.at_end(model, spec.batch_size, spec.seed)
    result.record(spec.steps, {f"final/{name}": value for name, value in more.items()})
