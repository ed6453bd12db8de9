"""The norm layers of a model, of any class."""

from __future__ import annotations

from torch import nn

from normwise.surgery.norms.catalogue import entry_of
from normwise.surgery.norms.recognize import is_called_norm, proposed, recognize
from normwise.surgery.report import Refusal
from normwise.surgery.select import NORMS, Layer, layers


def norm_layers(model: nn.Module) -> list[Layer]:
    """The model's norm layers, each once, in the model's order: torch.nn's and normwise's, those of other classes that
    behave like one, and those that the catalogue or their name calls one although they do not (of which `recognize`
    says why)."""
    return [one for one in layers(model, (nn.Module,)) if _is_candidate(one.module)]


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, NORMS):
        return True
    entry = entry_of(module)
    if entry is not None and (entry.refused or proposed(module)):
        return True
    if not proposed(module):
        return False
    if is_called_norm(module):
        return True
    try:
        recognize(module)
    except Refusal:
        return False
    return True
