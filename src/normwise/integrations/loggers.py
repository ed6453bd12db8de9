"""Loggers: what a look at a training step shows, into CSV files, TensorBoard and Weights & Biases.

Each has `log(look)` and `close()`, and may be given to `normwise.Monitor` or anything in this room; a logger of your
own needs no more than the first.
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from normwise.diagnosis.look import Look, write
from normwise.integrations.missing import needed

SCALARS = ("step", "tag", "value")
FINDINGS = ("step", "code", "severity", "layer", "cause", "cure")

Own = TypeVar("Own", bound="_Closing")


class _Closing:
    """Closed at the end of a `with` block."""

    def close(self) -> None:
        """Nothing more comes."""

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class CSVLogger(_Closing):
    """Two files: `scalars.csv` with the columns step, tag, value, and `findings.csv` with step, code, severity, layer,
    cause, cure. Each look is on disk when `log` returns.

    Args:
        folder: where; made if it is not there.
        append: go on with the files of an earlier run, as after a checkpoint.

    Raises:
        FileExistsError: the folder has such files, and `append` is False.
        ValueError: with `append`, they have other columns.
    """

    def __init__(self, folder: str | Path, *, append: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {self.folder / "scalars.csv": SCALARS, self.folder / "findings.csv": FINDINGS}
        for path, columns in files.items():
            if not append or not path.exists():
                continue
            with path.open(newline="", encoding="utf-8") as file:
                there = next(csv.reader(file), [])
            if there != list(columns):
                raise ValueError(
                    f"{path} has the columns {', '.join(there) or '(none)'}, but {', '.join(columns)} are written: "
                    "give another folder"
                )
        if not append and (there_already := [path.name for path in files if path.exists()]):
            raise FileExistsError(
                f"{self.folder} has {' and '.join(there_already)} of an earlier run: give another folder, or "
                "append=True to go on with them"
            )
        for path, columns in files.items():
            if not path.exists():
                self._add(path.name, [columns])

    def log(self, look: Look) -> None:
        """Append its numbers and new findings."""
        self._add("scalars.csv", [(look.step, tag, repr(float(value))) for tag, value in look.scalars.items()])
        self._add("findings.csv", [(look.step, f.code, f.severity, f.layer, f.cause, f.cure) for f in look.findings])

    def _add(self, name: str, rows: list[Any]) -> None:
        with (self.folder / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


class TensorBoardLogger(_Closing):
    """Scalars, histograms of gains and biases, and findings as text, for TensorBoard.

    Args:
        folder: where the event file goes; or a torch.utils.tensorboard.SummaryWriter that is there already.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
        TypeError: neither a folder nor a writer.
    """

    def __init__(self, folder: Any) -> None:
        if isinstance(folder, (str, Path)):
            with needed("tensorboard", "tensorboard", "TensorBoardLogger"):
                from torch.utils.tensorboard import SummaryWriter
            self.writer: Any = SummaryWriter(str(folder))
        elif callable(getattr(folder, "add_scalar", None)):
            self.writer = folder
        else:
            raise TypeError(
                f"TensorBoardLogger takes a folder or a SummaryWriter, but got {type(folder).__name__}: "
                "TensorBoardLogger('runs/1')"
            )

    def log(self, look: Look) -> None:
        """Write it, and flush: what has been seen is there if the run breaks off."""
        write(look, self.writer)
        if callable(getattr(self.writer, "flush", None)):
            self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandbLogger(_Closing):
    """Scalars, histograms of gains and biases, and a table of the findings, for Weights & Biases.

    The numbers are drawn over `normwise/step`, so that they get along with what else a run logs at steps of its own.

    Args:
        run: what wandb.init returned; None takes the run that is open, or else begins one. Without a network set
            WANDB_MODE=offline, or pass mode="offline".
        settings: for wandb.init, where a run is begun: project=, name=, mode=, dir=, ...

    Raises:
        ModuleNotFoundError: wandb is not installed.
        TypeError: something that is no run; settings for a run that is open already.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        with needed("wandb", "wandb", "WandbLogger"):
            import wandb
        if run is not None and not callable(getattr(run, "log", None)):
            raise TypeError(f"run must be what wandb.init() returned, but got {type(run).__name__}")
        self.wandb: Any = wandb
        there = wandb.run if run is None else run
        if there is not None and settings:
            raise TypeError(
                f"WandbLogger got settings of wandb.init ({', '.join(settings)}), but a run is open already: leave "
                "them out to log to it, or finish it first"
            )
        self.owned = there is None
        self.run = wandb.init(**settings) if there is None else there
        self.run.define_metric("normwise/step", hidden=True)
        self.run.define_metric("normwise/*", step_metric="normwise/step")
        self.findings: list[tuple[Any, ...]] = []

    def log(self, look: Look) -> None:
        """One row of the run's history."""
        histograms = {tag: self.wandb.Histogram(values.numpy()) for tag, values in look.gains.items()}
        row = {"normwise/step": look.step, **look.scalars, **histograms}
        if look.findings:
            self.findings += [(look.step, f.code, f.severity, f.layer, f.cause, f.cure) for f in look.findings]
            row["normwise/findings"] = self.wandb.Table(columns=list(FINDINGS), data=[list(x) for x in self.findings])
        self.run.log(row)

    def close(self) -> None:
        """Finish the run, if this logger began it."""
        if self.owned:
            self.run.finish()
