"""Layers: parameters, running state and initialisation; each forward is one call into `normwise.ops`."""

from normwise.nn.accumulation import accumulated_backward
from normwise.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normwise.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, LinearRamp
from normwise.nn.frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from normwise.nn.group_norm import GroupNorm
from normwise.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normwise.nn.layer_norm import LayerNorm, RMSNorm
from normwise.nn.recurrent import GRU, LSTM, RNN
from normwise.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell
from normwise.nn.running_norm import RunningNorm
from normwise.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTMCell",
    "LayerNorm",
    "LinearRamp",
    "RMSNorm",
    "RNNCell",
    "RunningNorm",
    "SyncBatchNorm",
    "accumulated_backward",
]
