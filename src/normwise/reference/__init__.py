"""What is true: every computation of the library once more in plain PyTorch, upcasting, slow and readable.

Each function here is differentiable by torch's own autograd, any number of times, and runs on any device.
Kernels are tested against it and never the other way round.
"""

from normwise.reference.activations import ACTIVATIONS, activation
from normwise.reference.batch_renorm import batch_renorm, renorm_correction
from normwise.reference.moments import (
    Moments,
    accumulation_dtype,
    centre,
    centre_in_two,
    combined,
    count_valid,
    mean_square,
    moments,
    rstd_of,
)
from normwise.reference.norm import norm, norm_backward

__all__ = [
    "ACTIVATIONS",
    "Moments",
    "accumulation_dtype",
    "activation",
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
