"""The norm layers of a model, of any class."""

from __future__ import annotations

import re

from torch import nn

from normwise.surgery.norms.catalogue import entry_of
from normwise.surgery.norms.recognize import is_own, proposed, recognize
from normwise.surgery.report import Refusal
from normwise.surgery.select import NORMS, Layer, class_of, layers

# "LlamaRMSNorm", "MyLN", "ABN": but not "Normal".
_NAMED_NORM = re.compile(r"norm(?!al(?![iy]))|(?<![a-z])(rms|ln|bn|gn|abn)(?![a-z])", re.IGNORECASE)


def norm_layers(model: nn.Module) -> list[Layer]:
    """The model's norm layers, each once, in the model's order: torch.nn's and normwise's, those of other classes that
    behave like one, and those that the catalogue or their name calls one although they do not (of which `recognize`
    says why)."""
    return [one for one in layers(model, (nn.Module,)) if _is_candidate(one.module)]


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, NORMS) or is_own(module):
        return True
    entry = entry_of(module)
    if entry is not None and (entry.refused or proposed(module)):
        return True
    if not proposed(module):
        return False
    if _NAMED_NORM.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_of(module).__name__)):
        return True
    try:
        recognize(module)
    except Refusal:
        return False
    return True
