"""normwise: the normalization toolkit for PyTorch.

Layers that replace their namesakes in torch.nn and stay right on every batch size, mask, length, rank and dtype.
"""

from normwise import functional
from normwise.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from normwise.ops.check import ShapeError
from normwise.ops.choose import BackendError, backend

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "ShapeError",
    "__version__",
    "backend",
    "functional",
]
