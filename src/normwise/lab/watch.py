"""What is read off a net while it trains: gradient norms, saturated units, one pre-activation, both modes' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normwise.lab.errors import LabError
from normwise.lab.norms import NORM_LAYERS
from normwise.lab.tasks import Batch, Task
from normwise.lab.tasks.base import IGNORED
from normwise.measure.gradients import gradient_norm
from normwise.measure.saturation import Saturation
from normwise.measure.snapshot import dry_run
from normwise.measure.time_steps import StepMeans

PROBE_BATCHES = 25
OVER_TIME_BATCHES = 12
PERCENTILES = (15, 50, 85)


@dataclass
class Activity:
    """The saturation of the nonlinearities, and the values of the watched pre-activation."""

    saturation: Saturation = field(default_factory=Saturation)
    watched: list[Tensor] = field(default_factory=list)

    def series(self) -> dict[str, float]:
        out = {"saturated": self.saturation.share} if self.saturation.inputs else {}
        if self.watched:
            quantiles = torch.tensor([p / 100 for p in PERCENTILES])
            values = torch.quantile(torch.cat(self.watched).float(), quantiles).tolist()
            out |= {f"preactivation/p{p}": value for p, value in zip(PERCENTILES, values, strict=True)}
        return out


@contextmanager
def activity(model: nn.Module, task: Task) -> Iterator[Activity]:
    """Counts, while open, over the inputs of the task's nonlinearities; the hooks are gone afterwards."""
    seen = Activity()

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.saturation.add(task.saturated[type(module)](args[0]))

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.watched.append(task.watch(args[0].detach()).flatten())

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if type(m) in task.saturated]
    if task.watched is not None:
        modules = dict(model.named_modules())
        if task.watched not in modules:
            raise LabError(f"task {task.name!r} watches {task.watched!r}, which is no module of its network")
        hooks.append(modules[task.watched].register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices and kernels in the order of the layers; gains and biases, of norms too, are left out."""
    norms = {name for name, module in model.named_modules() if isinstance(module, NORM_LAYERS)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and name.rpartition(".")[0] not in norms
    }


def gradient_norms(of: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The Euclidean norm of each weight's gradient, by name."""
    gradients = {name: weight.grad for name, weight in of.items() if weight.grad is not None}
    return {f"gradient/{name}": gradient_norm(gradient) for name, gradient in gradients.items()}


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """The share of cases whose highest score is their class, of those whose target is not ``IGNORED``."""
    return float((scores.argmax(dim=-1) == targets)[targets != IGNORED].double().mean())


class Probe:
    """A fixed, shuffled part of the held-out cases, looked at several times a run in both modes.

    In train mode the cases come in batches of the run's own size, as in training, and at most ``PROBE_BATCHES`` of
    them: so statistics over the batch are those that the net trains with. Everything that a forward pass in train
    mode changes (running statistics, random state) is put back.
    """

    def __init__(self, task: Task, batch_size: int) -> None:
        self.task = task
        _, held_out = task.cases
        shuffled = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        self.batch = held_out.select(shuffled[: task.probe_cases])
        size = min(batch_size, len(self.batch))
        starts = range(0, len(self.batch) - size + 1, size)[:PROBE_BATCHES]
        self.parts = [self.batch.select(slice(start, start + size)) for start in starts]
        self.shared = self.batch.select(slice(0, len(starts) * size))  # the cases that are seen in both modes

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy in both modes, how far their outputs are apart, and the activity in train mode.

        ``gap`` is half the L1 distance between the two modes' class probabilities (total variation, 0 to 1), averaged
        over the cases seen in both. The accuracies and losses of both modes are over these same cases.
        """
        task, shared = self.task, self.shared
        with dry_run(model, training=True), activity(model, task) as seen:
            in_training = torch.cat([task.forward(model, part) for part in self.parts])
        with dry_run(model, training=False):
            in_eval = task.forward(model, shared)
            extra = task.series(model, shared)
        gap = (in_training.softmax(-1) - in_eval.softmax(-1)).abs().sum(-1).mean() / 2
        return {
            **_held_out(task, "heldout/train", in_training, shared),
            **_held_out(task, "heldout/eval", in_eval, shared),
            "heldout/gap": float(gap),
            **seen.series(),
            **extra,
        }

    def over_time(self, model: nn.Module) -> dict[str, list[float]]:
        """What the task measures at each time step, in both modes: the root of the mean over the cases that have it.

        Train mode sees the cases in batches of the run's own size, ``OVER_TIME_BATCHES`` of them; eval mode sees the
        same cases all at once.
        """
        found = {}
        batches = self.parts[:OVER_TIME_BATCHES]
        together = self.batch.select(slice(0, sum(map(len, batches))))
        for mode, parts in (("train", batches), ("eval", [together])):
            with dry_run(model, training=mode == "train"):
                seen = [(self.task.over_time(model, part), part.lengths) for part in parts]
            for name in seen[0][0]:
                found[f"{name}/{mode}"] = _over_cases([(squares[name], lengths) for squares, lengths in seen])
        return found


def _over_cases(parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[float]:
    """The root of the mean over the cases, at each time step, of squares (N, T), of which ``lengths`` count.

    It ends where too few cases go on (`StepMeans.steps`).
    """
    means = StepMeans()
    for squares, lengths in parts:
        cases, steps = squares.shape
        ends = torch.full((cases,), steps) if lengths is None else lengths
        means.add(squares.T, torch.arange(steps)[:, None] < ends)
    values: list[float] = means.mean()[: means.steps()].sqrt().tolist()
    return values


@torch.no_grad()
def final(model: nn.Module, task: Task) -> dict[str, float]:
    """Loss and accuracy in eval mode, on all held-out cases and on the task's parts of them."""
    _, held_out = task.cases
    model.eval()
    found: dict[str, float] = {}
    for prefix, cases in {"final": held_out, **{f"final/{name}": part for name, part in task.parts().items()}}.items():
        found |= _held_out(task, prefix, task.forward(model, cases), cases)
    return found


def _held_out(task: Task, prefix: str, scores: Tensor, cases: Batch) -> dict[str, float]:
    loss = float(task.loss(scores, cases))
    values = {"loss": loss, "accuracy": accuracy(scores, cases.targets), **task.derived(loss)}
    return {f"{prefix}/{name}": value for name, value in values.items()}
