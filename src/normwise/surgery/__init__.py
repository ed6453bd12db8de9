"""Changing a user's model: other norms in it, norms folded away, statistics taken anew or frozen."""

from normwise.surgery.convert import convert
from normwise.surgery.fold import fold
from normwise.surgery.freeze import freeze, frozen, unfreeze
from normwise.surgery.recalibrate import recalibrate
from normwise.surgery.report import Report

__all__ = ["Report", "convert", "fold", "freeze", "frozen", "recalibrate", "unfreeze"]
