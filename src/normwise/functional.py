"""The stateless forms of the norm layers: functions of the input, the parameters and the running averages."""

from normwise.ops.norm.batch_norm import BatchNormOutput, batch_norm
from normwise.ops.norm.group_norm import group_norm
from normwise.ops.norm.instance_norm import instance_norm
from normwise.ops.norm.layer_norm import layer_norm, rms_norm

__all__ = ["BatchNormOutput", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]
