"""The trail of a pass: which layer is the first that has a NaN or an infinity, and how large things were before it."""

from __future__ import annotations

import math
from collections import deque

from normwise.diagnosis.transformer_records import FirstNonFinite, Size

BEFORE = 3  # layers whose sizes are kept


class Trail:
    """Of one pass forward, and of its way back."""

    def __init__(self) -> None:
        self.last: deque[Size] = deque(maxlen=BEFORE)
        self.first: FirstNonFinite | None = None

    def add(self, layer: str, size: float, *, comes_in: bool = False) -> None:
        """The next layer's; `size` is NaN or infinite where something in it is."""
        if self.first is not None:
            return
        if math.isfinite(size):
            self.last.append(Size(layer, size))
        else:
            self.first = FirstNonFinite(layer, comes_in, list(self.last))
