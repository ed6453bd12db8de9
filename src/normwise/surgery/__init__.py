"""Changing a user's model: other norms in it, norms folded away, statistics re-estimated or frozen."""

from normwise.surgery.adapt import adapt
from normwise.surgery.convert import convert
from normwise.surgery.fold import fold
from normwise.surgery.foreign import from_flax, from_keras, from_keras_momentum
from normwise.surgery.freeze import freeze, frozen, unfreeze
from normwise.surgery.fuse import fuse
from normwise.surgery.parameters import NormParameters, decay_groups, norm_parameters
from normwise.surgery.recalibrate import recalibrate
from normwise.surgery.report import Report, Surgery

__all__ = [
    "NormParameters",
    "Report",
    "Surgery",
    "adapt",
    "convert",
    "decay_groups",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "from_keras_momentum",
    "frozen",
    "fuse",
    "norm_parameters",
    "recalibrate",
    "unfreeze",
]
