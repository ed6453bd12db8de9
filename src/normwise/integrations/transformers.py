"""`TransformersMonitor`: a callback of the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normwise.diagnosis.records import Finding
from normwise.integrations.hook import Recalibrate, TrainingHook, settings_of
from normwise.integrations.missing import needed

with needed("transformers", "models", "TransformersMonitor"):
    from transformers import TrainerCallback


class TransformersMonitor(TrainerCallback):
    """`TrainingHook` as a callback: `Trainer(..., callbacks=[TransformersMonitor(CSVLogger("runs/1"))])`.

    A step is one of the optimizer, `state.global_step`, also with gradient accumulation and after a resume. The norms
    of the weights' gradients are those that the optimizer gets, after clipping. On several ranks rank 0 looks.

    With `recalibrate`, running statistics are re-estimated from the train loader before each evaluation that the
    trainer makes while it trains, and put back before a checkpoint is written, unless `Recalibrate(keep=True)`. Around
    a `trainer.evaluate()` of your own use `with callback.hook.evaluation(loader):`, since the trainer has no callback
    before an evaluation.

    Args:
        loggers: as for `TrainingHook`; None logs findings alone.
        every: optimizer steps from one look to the next.
        ignore: findings to leave out: ["NW005", "NW001:encoder.*"].
        recalibrate: True for `Recalibrate()`, or one with other settings.

    Attributes:
        hook: the `TrainingHook`, from the start of the first training.
        findings: all so far.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        DiagnosisError: when a training starts: as `TrainingHook`.
    """

    def __init__(
        self,
        loggers: Any = None,
        *,
        every: int = 100,
        ignore: Sequence[str] = (),
        recalibrate: bool | Recalibrate = False,
    ) -> None:
        self.loggers, self.every, self.ignore = loggers, every, ignore
        self.recalibrate = settings_of(recalibrate)
        self.hook: TrainingHook | None = None

    @property
    def findings(self) -> list[Finding]:
        """All so far."""
        return [] if self.hook is None else self.hook.findings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is where and what it will be: hooks may go on."""
        if self.hook is not None:
            self.hook.close()
        optimizer = kwargs.get("optimizer")
        self.hook = TrainingHook(
            kwargs["model"],
            self.loggers,
            every=self.every,
            optimizer=getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
            scaler=getattr(optimizer, "scaler", None),
            ignore=self.ignore,
            recalibrate=self.recalibrate or False,
            steps=state.global_step,
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer empties the gradients before it says that the step has ended."""
        if self.hook is not None:
            self.hook.read_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of a step of the optimizer."""
        if self.hook is not None:
            self.hook.step()
            self._before_evaluation(control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may follow."""
        self._before_evaluation(control, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of an evaluation."""
        if self.hook is not None:
            self.hook.end_evaluation()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are what they will be."""
        if self.hook is not None:
            self.hook.end(kwargs.get("train_dataloader"))

    def _before_evaluation(self, control: Any, given: dict[str, Any]) -> None:
        """An evaluation follows where the trainer's own callback, which comes before all others, has said so."""
        if self.hook is not None and control.should_evaluate:
            self.hook.begin_evaluation(given.get("train_dataloader"))
