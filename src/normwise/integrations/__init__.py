"""normwise in other people's trainers: what normalization does while a model trains, and statistics worth evaluating.

    TrainingHook          for any loop: one call a step, one context around each evaluation
    LightningMonitor      a callback of Lightning's Trainer
    TransformersMonitor   a callback of the Trainer of Hugging Face transformers
    Recalibrate           running statistics re-estimated before a validation, and after weights were averaged
    CSVLogger, TensorBoardLogger, WandbLogger   write what is seen; so does whatever has `log(look)` or `add_scalar`

The first, `Recalibrate` and `CSVLogger` need torch alone. The others import their library when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normwise.diagnosis.look import Logger, Look
from normwise.integrations.hook import Recalibrate, TrainingHook
from normwise.integrations.loggers import CSVLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from normwise.integrations.lightning import LightningMonitor
    from normwise.integrations.transformers import TransformersMonitor

__all__ = [
    "CSVLogger",
    "LightningMonitor",
    "Logger",
    "Look",
    "Recalibrate",
    "TensorBoardLogger",
    "TrainingHook",
    "TransformersMonitor",
    "WandbLogger",
]

# They are subclasses of their library's callback.
_AT_FIRST_USE = {"LightningMonitor": "lightning", "TransformersMonitor": "transformers"}


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return getattr(importlib.import_module(f"normwise.integrations.{_AT_FIRST_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
