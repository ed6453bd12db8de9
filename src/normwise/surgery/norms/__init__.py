"""Norm layers of any class: which modules are some, and the layer of normwise that computes the same."""

from normwise.surgery.norms.catalogue import Entry, entry_of
from normwise.surgery.norms.exchange import Exchange, calls_of, exchange, original_of, proved, remember, restored
from normwise.surgery.norms.find import norm_layers
from normwise.surgery.norms.gated import GatedRMSNorm
from normwise.surgery.norms.proof import Call
from normwise.surgery.norms.recognize import is_norm_name, is_own, proposed, recognize, stands_for
from normwise.surgery.norms.stands import Stands

__all__ = [
    "Call",
    "Entry",
    "Exchange",
    "GatedRMSNorm",
    "Stands",
    "calls_of",
    "entry_of",
    "exchange",
    "is_norm_name",
    "is_own",
    "norm_layers",
    "original_of",
    "proposed",
    "proved",
    "recognize",
    "remember",
    "restored",
    "stands_for",
]
