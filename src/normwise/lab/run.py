"""Train one spec and record what happens."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from normwise.lab import watch
from normwise.lab.errors import UndefinedError
from normwise.lab.norms import UNDEFINED_WORDS
from normwise.lab.spec import Spec
from normwise.lab.tasks import Task, load_task

GRADIENT_POINTS = 50
PROBE_POINTS = 6


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


def run(spec: Spec) -> Result:
    """Train ``spec``. The same spec gives the same numbers, times apart, for the same number of threads.

    Raises:
        LabError: the spec asks for something that does not exist.
    """
    result = Result("done")
    # A layer has the last word on what it can normalize; any other ValueError is a fault and passes on.
    try:
        _train(spec, load_task(spec.task).task, result)
    except UndefinedError as error:
        return Result("undefined", str(error))
    except ValueError as error:
        if not str(error).startswith(UNDEFINED_WORDS):
            raise
        return Result("undefined", str(error))
    return result


def _train(spec: Spec, task: Task, result: Result) -> None:
    torch.manual_seed(spec.seed)
    model = task.model(spec.norm, spec.seed).train()
    optimizer = task.optimizer(model, spec.learning_rate)
    weights = watch.weights(model)
    probe = watch.Probe(task, spec.batch_size)
    lengths = task.cases[0].lengths
    if lengths is not None:
        result.record(0, {"train/longest": float(lengths.max())})
        result.record_over_time("start", probe.over_time(model))
    gradients_every = max(1, spec.steps // GRADIENT_POINTS)
    probe_every = max(1, spec.steps // PROBE_POINTS)
    for step, batch in enumerate(task.batches(spec.batch_size, spec.steps, spec.seed)):
        if step % probe_every == 0 and step + probe_every <= spec.steps:
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
        start = time.perf_counter()
        optimizer.step()
        seconds = forward_backward + time.perf_counter() - start
        with torch.no_grad():
            right = watch.accuracy(scores, batch.targets)
        result.record(step, {"train/loss": value, "train/accuracy": right, "time/step": seconds})
    result.record(spec.steps, probe.look(model))
    if lengths is not None:
        result.record_over_time("end", probe.over_time(model))
    result.record(spec.steps, watch.final(model, task))
