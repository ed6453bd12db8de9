"""normwise: the normalization toolkit for PyTorch.

Drop-in replacements for torch.nn's norm layers that stay correct for any batch size, mask, length, world size or dtype.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normwise import functional
from normwise.backends.recurrence import Recurrence
from normwise.nn import (
    GRU,
    LSTM,
    RNN,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GroupNorm,
    GRUCell,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LinearRamp,
    LSTMCell,
    RMSNorm,
    RNNCell,
    RunningNorm,
    SyncBatchNorm,
    accumulated_backward,
)
from normwise.ops.dispatch import BackendError, KernelWarning, backend
from normwise.ops.errors import ShapeError

if TYPE_CHECKING:
    from normwise.diagnosis import Diagnosis, Monitor, diagnose, recommend
    from normwise.surgery.adapt import adapt
    from normwise.surgery.convert import convert
    from normwise.surgery.fold import fold
    from normwise.surgery.foreign import from_flax, from_keras, from_keras_momentum
    from normwise.surgery.freeze import freeze, frozen, unfreeze
    from normwise.surgery.fuse import fuse
    from normwise.surgery.parameters import decay_groups, norm_parameters
    from normwise.surgery.recalibrate import recalibrate

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Diagnosis",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "KernelWarning",
    "LSTMCell",
    "LayerNorm",
    "LinearRamp",
    "Monitor",
    "RMSNorm",
    "RNNCell",
    "Recurrence",
    "RunningNorm",
    "ShapeError",
    "SyncBatchNorm",
    "__version__",
    "accumulated_backward",
    "adapt",
    "backend",
    "convert",
    "decay_groups",
    "diagnose",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "from_keras_momentum",
    "frozen",
    "functional",
    "fuse",
    "norm_parameters",
    "recalibrate",
    "recommend",
    "unfreeze",
]

# Loaded at first use: who builds and trains a model need not wait for what looks at one or changes it.
_AT_FIRST_USE = {
    "diagnosis": ("Diagnosis", "Monitor", "diagnose", "recommend"),
    "integrations": (),
    "surgery": (
        "adapt",
        "convert",
        "decay_groups",
        "fold",
        "freeze",
        "from_flax",
        "from_keras",
        "from_keras_momentum",
        "frozen",
        "fuse",
        "norm_parameters",
        "recalibrate",
        "unfreeze",
    ),
}


def __getattr__(name: str) -> Any:
    for room, names in _AT_FIRST_USE.items():
        if name == room or name in names:
            found = importlib.import_module(f"normwise.{room}")
            return found if name == room else getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
