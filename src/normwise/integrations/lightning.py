"""`LightningMonitor`: a callback of Lightning's Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.look import Look, write
from normwise.diagnosis.records import Finding
from normwise.integrations.hook import Recalibrate, TrainingHook, settings_of
from normwise.integrations.missing import needed
from normwise.surgery.batches import run

with needed("lightning", "lightning", "LightningMonitor"):
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.utilities import CombinedLoader


class LightningMonitor(Callback):
    """`TrainingHook` as a callback: `Trainer(callbacks=[LightningMonitor(every=100, recalibrate=True)])`.

    It looks at the LightningModule from outside: `training_step` stays as it is. A step is one after which an optimizer
    stepped: with `accumulate_grad_batches` all batches that it came from count. The gradients' norms are those before
    clipping, without the loss scale of mixed precision. Its state goes into checkpoints, so a run that goes on does not
    repeat its findings. On several ranks rank 0 looks.

    With `recalibrate`, running statistics are re-estimated from the train loader before each validation of a fit (not
    before its sanity check), and put back before the checkpoint of that epoch is written, unless
    `Recalibrate(keep=True)`. Of several train loaders the batches are taken in turn, or, with a `forward=`, together as
    `training_step` gets them. `Recalibrate(at_end=True)` follows when `fit` ends, after StochasticWeightAveraging and
    EMAWeightAveraging have put the averages into the module: save that with `trainer.save_checkpoint`.

    Args:
        loggers: as for `TrainingHook`; None writes to the trainer's own loggers.
        every: optimizer steps from one look to the next.
        module: the part of the LightningModule to look at, by its dotted name; "" is all of it.
        ignore: findings to leave out: ["NW005", "NW001:encoder.*"].
        recalibrate: True for `Recalibrate()`, or one with other settings.

    Attributes:
        hook: the `TrainingHook`, from the start of the first fit.
        findings: all so far.

    Raises:
        ModuleNotFoundError: lightning is not installed.
        DiagnosisError: when a fit starts: as `TrainingHook`; a WeightAveraging callback before this one; no module of
            that name.
    """

    def __init__(
        self,
        loggers: Any = None,
        *,
        every: int = 100,
        module: str = "",
        ignore: Sequence[str] = (),
        recalibrate: bool | Recalibrate = False,
    ) -> None:
        self.loggers, self.every, self.module, self.ignore = loggers, every, module, ignore
        self.recalibrate = settings_of(recalibrate)
        self.hook: TrainingHook | None = None
        self._state: dict[str, Any] | None = None
        self._stepped = self._validating = False

    @property
    def findings(self) -> list[Finding]:
        """All so far."""
        return [] if self.hook is None else self.hook.findings

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is where and what it will be: hooks may go on."""
        if self.hook is not None:
            self.hook.close()
        if self.recalibrate is not None:
            _check_order(trainer.callbacks, self)
        optimizers = trainer.optimizers
        state = self._state or {"steps": trainer.global_step, "findings": []}
        self.hook = TrainingHook(
            self._part(pl_module),
            _TrainersOwn(trainer) if self.loggers is None else self.loggers,
            every=self.every,
            optimizer=optimizers[0] if len(optimizers) == 1 and not self.module else None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            ignore=self.ignore,
            recalibrate=self.recalibrate or False,
            steps=state["steps"],
        )
        self.hook.load_state_dict(state)
        self._state = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are complete, and not scaled."""
        self._stepped = True
        if self.hook is not None:
            self.hook.read_gradients(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The end of a step, if an optimizer has stepped."""
        if self._stepped and self.hook is not None:
            self.hook.step()
        self._stepped = False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is looked at meanwhile."""
        if self.hook is not None and self.hook.monitor is not None and not trainer.sanity_checking:
            self.hook.monitor.pause()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before the first batch of all: by then averaged weights are in the module."""
        if self.hook is None or self._validating or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validating = True
        self.hook.begin_evaluation(self._batches(trainer), forward=_as_the_trainer_runs(trainer))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Before averaged weights leave the module, and before a checkpoint is written."""
        self._validating = False
        if self.hook is not None:
            self.hook.end_evaluation()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Where there was no batch."""
        if self.hook is not None and self.hook.monitor is not None and not trainer.sanity_checking:
            self.hook.monitor.resume()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """All callbacks have ended their training."""
        if self.hook is None:
            return
        pl_module.to(trainer.strategy.root_device)  # from where the trainer has taken it by now
        try:
            self.hook.end(self._batches(trainer), forward=_as_the_trainer_runs(trainer))
        finally:
            pl_module.cpu()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """No hook stays behind."""
        self._stepped = self._validating = False
        if self.hook is not None:
            self.hook.close()

    def state_dict(self) -> dict[str, Any]:
        """Steps, and which findings were written."""
        return self._state or {} if self.hook is None else self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For the fit that starts next."""
        self._state = state_dict or None

    def _part(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise DiagnosisError(
                f"module={self.module!r} is no part of {type(pl_module).__name__}, whose parts are {', '.join(names)}"
            ) from None

    def _batches(self, trainer: Any) -> Iterable[Any]:
        loaders = trainer.train_dataloader
        if isinstance(loaders, DataLoader) or not isinstance(loaders, (list, tuple, dict)):
            return loaders
        if self.recalibrate is not None and self.recalibrate.forward is not None:
            return _Together(loaders)
        return _InTurn(list(loaders.values() if isinstance(loaders, dict) else loaders))


class _TrainersOwn:
    """The trainer's loggers, of any kind; histograms and findings to those that know them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def log(self, look: Look) -> None:
        for logger in self.trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if callable(getattr(experiment, "add_scalar", None)):
                write(look, experiment)
            else:
                logger.log_metrics(look.scalars, step=look.step)


class _Together:
    """Batches of several loaders as training gets them, until the shortest ends."""

    def __init__(self, loaders: Any) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in iter(CombinedLoader(self.loaders, "min_size")))


class _InTurn:
    """Batches of several loaders in turn, until all have ended."""

    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        end = object()
        rounds = itertools.zip_longest(*self.loaders, fillvalue=end)
        return (batch for one_each in rounds for batch in one_each if batch is not end)


def _as_the_trainer_runs(trainer: Any) -> Any:
    """The model on a batch, in the trainer's precision."""

    def forward(model: nn.Module, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return run(model, batch)

    return forward


def _check_order(callbacks: Sequence[Any], own: Callback) -> None:
    """What swaps averaged weights in and out at the ends of a validation must do so outside of ours."""
    before = callbacks[: [callback is own for callback in callbacks].index(True)]
    for callback in before:
        if isinstance(callback, WeightAveraging):
            raise DiagnosisError(
                f"{type(callback).__name__} stands before LightningMonitor among the callbacks, and would take the "
                "recalibrated statistics for its own at the end of a validation: callbacks=[LightningMonitor(...), "
                f"{type(callback).__name__}(...)]"
            )
