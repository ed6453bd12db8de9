"""The nodes that torch.compile and torch.export see of norms and of recurrent layers.

Eager calls go straight to the computation. While compiling or exporting, the same call is one node, whose backward is
one node too.
"""

from typing import Any

from normwise.ops.custom_op.norm import norm
from normwise.ops.custom_op.recurrence import recurrence

__all__ = ["norm", "norm_by_kernels", "recurrence"]


def norm_by_kernels(*arguments: Any) -> Any:
    """`kernel_norm.kernel_norm`, which is registered where Triton is forced (see `dispatch.force`) and not before: that
    takes a sixth of the time of `import normwise`."""
    from normwise.ops.custom_op import kernel_norm

    return kernel_norm.kernel_norm(*arguments)
