"""`TrainingHook`: what the callbacks of this room do, for any training loop."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import unwrapped
from normwise.diagnosis.look import Look, said
from normwise.diagnosis.monitor import Monitor
from normwise.diagnosis.records import Finding
from normwise.measure.preserve import generators_of
from normwise.measure.snapshot import RandomState, Values, state_of
from normwise.surgery.batches import Forward
from normwise.surgery.recalibrate import has_running_statistics, recalibrate
from normwise.surgery.report import Report

log = logging.getLogger("normwise")


@dataclass(frozen=True)
class Recalibrate:
    """When a model's running statistics are re-estimated, and from what: see `normwise.recalibrate`.

    Attributes:
        batches: how many batches of the train loader; or batches of your own, such as a DataLoader without
            augmentation. Some thousand samples do (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm").
        before_validation: before each validation. Training's statistics are restored after it, so that training goes on
            as without.
        keep: do not put it back.
        at_end: once more when training has ended and averaged weights, if there are any (SWA, EMA), are in the model.
            This stays in the model.
        forward: runs the model on a batch that is not as `normwise.surgery.batches` has it: `lambda model, batch:
            model(batch.image)`.
        exact: layer after layer, as in `normwise.recalibrate`: a pass over the batches for each layer.

    Raises:
        ValueError: batches that are no positive number, and no batches that can be gone over more than once.
    """

    batches: int | Iterable[Any] = 64
    before_validation: bool = True
    keep: bool = False
    at_end: bool = False
    forward: Forward | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        given = self.batches
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return
        once = False
        if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Tensor, Mapping)):
            once = iter(given) is given
            if not once:
                return
        what = "an iterator, which is empty after the first time" if once else repr(given)
        raise ValueError(
            "Recalibrate(batches=...) takes how many batches of the train loader, a positive integer, or a "
            f"DataLoader or list of batches, but got {what}"
        )


class TrainingHook:
    """Watches a training loop of your own: one call a step, and a context around each evaluation.

        with TrainingHook(model, CSVLogger("runs/1"), every=100, recalibrate=True) as hook:
            for epoch in range(epochs):
                for inputs, target in train_loader:
                    loss = criterion(model(inputs), target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    hook.step()
                with hook.evaluation(train_loader):
                    validate(model)

    It is a `normwise.Monitor`, which says what is looked at and what that means for compiled models, gradient
    accumulation and mixed precision, and besides that: a new finding also goes to the logger "normwise" of Python's
    `logging` (advice at level INFO); with torch.distributed only rank 0 measures and writes; and running statistics can
    be re-estimated for each evaluation. Handlers of other trainers call the same methods: in ignite
    `trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: hook.step())`, in fastai `after_step` and
    `before_validate` of a callback.

    Args:
        model, every, optimizer, scaler, ignore, steps: as for `normwise.Monitor`.
        loggers: one of `normwise.integrations`, a SummaryWriter, whatever has `log(look)` or `add_scalar(tag, value,
            step)`; or a list of them. None logs findings alone.
        recalibrate: True for `Recalibrate()`, or one with other settings: see there.

    Attributes:
        findings: all so far.
        steps: how many steps there were.

    Raises:
        DiagnosisError: as `normwise.Monitor`; `recalibrate` for a model that has no running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        loggers: Any = None,
        *,
        every: int = 100,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        ignore: Sequence[str] = (),
        recalibrate: bool | Recalibrate = False,
        steps: int = 0,
    ) -> None:
        self.model, _ = unwrapped(model)
        self.recalibrate = settings_of(recalibrate)
        if self.recalibrate is not None and not has_running_statistics(self.model):
            raise DiagnosisError(
                f"recalibrate was asked for, but {type(self.model).__name__} has no norm with running statistics of "
                "its own, as a BatchNorm that is not frozen: leave recalibrate out"
            )
        monitor = Monitor(
            model, loggers, every, optimizer=optimizer, scaler=scaler, ignore=ignore, steps=steps
        )  # on each rank, which checks what was given
        self.steps = steps
        self.monitor: Monitor | None = monitor if _rank() == 0 else None
        if self.monitor is None:
            monitor.close()
        self._evaluation: ExitStack | None = None

    def __repr__(self) -> str:
        watched = "watched by rank 0" if self.monitor is None else repr(self.monitor)
        return f"<TrainingHook of {type(self.model).__name__}: {watched}>"

    @property
    def findings(self) -> list[Finding]:
        """All so far, in the order in which they arose; on rank 0."""
        return [] if self.monitor is None else self.monitor.findings

    def step(self) -> Look | None:
        """Once for each step of the optimizer, after `backward()` and before the next `zero_grad()`: `Monitor.step`."""
        self.steps += 1
        look = None if self.monitor is None else self.monitor.step()
        for finding in () if look is None else look.findings:
            log.log(logging.INFO if finding.severity == "advice" else logging.WARNING, "%s", said(finding))
        return look

    def read_gradients(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """For loops that empty the gradients before they call `step()`: `Monitor.read_gradients`."""
        if self.monitor is not None:
            self.monitor.read_gradients(optimizer)

    @contextmanager
    def evaluation(
        self, train_batches: Iterable[Any] | None = None, *, forward: Forward | None = None
    ) -> Iterator[None]:
        """Around an evaluation: nothing is looked at, and running statistics are those of the train data, if
        `recalibrate` was asked for; afterwards those of the training. On every rank.

        Args:
            train_batches: the train loader, for `recalibrate`; gone over anew, with random states put back, so that
                training goes on as it would have. A loader that can be gone over only once is used up.
            forward: as for `Recalibrate`, which goes before.

        Raises:
            DiagnosisError: `recalibrate` was asked for, and there are no batches to take statistics of.
            Exception: whatever `normwise.recalibrate` raises; the model is then as it was.
        """
        self.begin_evaluation(train_batches, forward=forward)
        try:
            yield
        finally:
            self.end_evaluation()

    def begin_evaluation(self, train_batches: Iterable[Any] | None = None, *, forward: Forward | None = None) -> None:
        """What `evaluation` does first, for trainers that say begin and end by events."""
        self.end_evaluation()
        with ExitStack() as undo:
            if self.monitor is not None:
                self.monitor.pause()
                undo.callback(self.monitor.resume)
            settings = self.recalibrate
            if settings is not None and settings.before_validation:
                if not settings.keep:
                    undo.callback(Values(state_of(self.model)).restore)
                self.recalibrated(train_batches, forward=forward)
            self._evaluation = undo.pop_all()

    def end_evaluation(self) -> None:
        """What `evaluation` does at its end."""
        undo, self._evaluation = self._evaluation, None
        if undo is not None:
            undo.close()

    def end(self, train_batches: Iterable[Any] | None = None, *, forward: Forward | None = None) -> Report | None:
        """When training has ended and the weights are what they will be: `Recalibrate(at_end=True)`. Closes the hook.

        Arguments and errors as for `evaluation`.
        """
        self.close()
        if self.recalibrate is None or not self.recalibrate.at_end:
            return None
        return self.recalibrated(train_batches, forward=forward)

    def recalibrated(self, train_batches: Iterable[Any] | None, *, forward: Forward | None = None) -> Report:
        """Re-estimate the running statistics now, whatever the settings say of when."""
        settings = self.recalibrate or Recalibrate()
        if not isinstance(settings.batches, int):
            batches: Iterable[Any] = settings.batches
        elif train_batches is not None:
            batches = _First(train_batches, settings.batches)
        else:
            raise DiagnosisError(
                "recalibrate was asked for, but there are no batches to take statistics of: pass the train loader, "
                "hook.evaluation(train_loader), or Recalibrate(batches=loader)"
            )
        random = RandomState(generators_of(getattr(batches, "loader", batches)))
        try:
            with torch.inference_mode(False):
                return recalibrate(self.model, batches, forward=settings.forward or forward, exact=settings.exact)
        finally:
            random.restore()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers and strings."""
        return {"steps": self.steps, "findings": []} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken."""
        self.steps = int(state["steps"])
        if self.monitor is not None:
            self.monitor.load_state_dict(state)

    def close(self) -> None:
        """Take all hooks away, and end an evaluation."""
        self.end_evaluation()
        if self.monitor is not None:
            self.monitor.close()

    def __enter__(self) -> TrainingHook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def settings_of(given: bool | Recalibrate) -> Recalibrate | None:
    """What `recalibrate=` means.

    Raises:
        TypeError: something else.
    """
    if not isinstance(given, (bool, Recalibrate)):
        raise TypeError(
            f"recalibrate must be True, False or normwise.integrations.Recalibrate(...), but got {given!r}: "
            "Recalibrate(batches=32)"
        )
    return (Recalibrate() if given else None) if isinstance(given, bool) else given


class _First:
    """The first so many batches of a loader, each time anew, however far others have gone over it."""

    def __init__(self, loader: Iterable[Any], most: int) -> None:
        # accelerate's keeps books on who goes over it, which a walk that breaks off would leave open.
        self.loader = getattr(loader, "base_dataloader", loader)
        self.most = most
        if isinstance(self.loader, DataLoader) and self.loader.persistent_workers:
            # Its workers serve one walk at a time: a second one would end that of the training.
            self.loader = _without_workers(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), self.most)


def _without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    batching: dict[str, Any] = (
        {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        if loader.batch_sampler is None or isinstance(loader.dataset, torch.utils.data.IterableDataset)
        else {"batch_sampler": loader.batch_sampler}
    )
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **batching)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
