"""The stateless forms of the norm layers: functions of the input, the parameters and the running averages."""

from normwise.ops.batch_norm import batch_norm
from normwise.ops.group_norm import group_norm
from normwise.ops.instance_norm import instance_norm
from normwise.ops.layer_norm import layer_norm
from normwise.ops.rms_norm import rms_norm

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]
