"""The nodes that torch.compile and torch.export see of norms and of recurrent layers.

Eager calls go straight to the computation. While compiling or exporting, the same call is one node, whose backward is
one node too.
"""

from normwise.ops.custom_op.kernel_norm import kernel_norm
from normwise.ops.custom_op.norm import norm
from normwise.ops.custom_op.recurrence import recurrence

__all__ = ["kernel_norm", "norm", "recurrence"]
