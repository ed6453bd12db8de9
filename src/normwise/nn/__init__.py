"""Layers: parameters, running state and initialisation; each forward is one call into `normwise.ops`."""

from normwise.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normwise.nn.group_norm import GroupNorm
from normwise.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normwise.nn.layer_norm import LayerNorm, RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]
