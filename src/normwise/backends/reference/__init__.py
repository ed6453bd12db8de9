"""What is true: every computation of the library once more in plain PyTorch, upcasting, slow and readable.

Each function here is differentiable by torch's own autograd, any number of times, and runs on any device.
Kernels are tested against it and never the other way round.
"""

from normwise.backends.protocol import Moments, accumulation_dtype
from normwise.backends.reference.batch_renorm import batch_renorm, renorm_correction
from normwise.backends.reference.moments import (
    centre,
    centre_in_two,
    combined,
    count_valid,
    mean_square,
    moments,
    rstd_of,
)
from normwise.backends.reference.norm import norm, norm_backward

__all__ = [
    "Moments",
    "accumulation_dtype",
    "batch_renorm",
    "centre",
    "centre_in_two",
    "combined",
    "count_valid",
    "mean_square",
    "moments",
    "norm",
    "norm_backward",
    "renorm_correction",
    "rstd_of",
]
