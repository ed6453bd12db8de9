"""normwise: the normalization toolkit for PyTorch.

Layers that replace their namesakes in torch.nn and stay right on every batch size, mask, length, rank and dtype.
"""

from normwise import functional
from normwise.nn import (
    GRU,
    LSTM,
    RNN,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GroupNorm,
    GRUCell,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LSTMCell,
    RMSNorm,
    RNNCell,
    SyncBatchNorm,
)
from normwise.ops.check import ShapeError
from normwise.ops.choose import BackendError, KernelWarning, backend
from normwise.reference.recurrence import Recurrence
from normwise.surgery import convert, freeze, frozen, recalibrate, unfreeze

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
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
    "RMSNorm",
    "RNNCell",
    "Recurrence",
    "ShapeError",
    "SyncBatchNorm",
    "__version__",
    "backend",
    "convert",
    "freeze",
    "frozen",
    "functional",
    "recalibrate",
    "unfreeze",
]
