"""How large attention's logits are, and how many of its rows have collapsed onto one key.

The logits of a row are q . k * scale over the keys that its query sees. Softmax goes by their differences alone, so a
row's mean is taken off before they are called large: a bias of the keys adds the same number to all of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A row is collapsed where one key has more than this. p (1 - p), softmax's slope there, is then below 0.0025, a
# sigmoid's at 6: the place from which `saturation` counts that as saturated.
COLLAPSED = 0.9975
# A number this far below 0, added to a logit, hides its key: e^-50 is no share in any format.
HIDDEN = -50.0
# Logits of a call that are looked at: of longer sequences evenly spaced queries, against all their keys.
MOST = 1 << 22


class AttentionLogits:
    """The logits of softmax(q k^T * scale + mask) over calls.

    Attributes:
        largest: the largest |q . k * scale| among the keys that are seen.
        spread: the largest distance of such a logit from the mean of its row.
        collapsed_rows, rows: of the rows that see two keys at least, those that give one of them more than `COLLAPSED`;
            every head has rows of its own.
        heads: how many there are; None where the last call's tensors had no such axis.
    """

    def __init__(self) -> None:
        self.largest = self.spread = 0.0
        self.collapsed_rows = self.rows = self.calls = 0
        self.heads: int | None = None

    @property
    def collapsed(self) -> float:
        """The share of collapsed rows; 0 where there were no rows."""
        return self.collapsed_rows / max(1, self.rows)

    @torch.no_grad()
    def add(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """One call, with arguments as `torch.nn.functional.scaled_dot_product_attention` has them.

        Args:
            query: (..., heads, L, E).
            key: (..., heads, S, E), or with fewer heads, each of which serves several of the query's.
            attn_mask: (..., L, S), bool with True = seen, or numbers that are added.
            is_causal: query i sees the keys up to i.
            scale: 1/sqrt(E) where it is None.
        """
        self.calls += 1
        self.heads = query.shape[-3] if query.dim() > 2 else None
        if not query.numel() or not key.numel():
            return
        q, k = query.detach(), key.detach()
        if q.dim() > 2 and k.dim() > 2 and q.shape[-3] != k.shape[-3]:
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        mask = attn_mask
        length, keys = q.shape[-2], k.shape[-2]
        each = keys * math.prod(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]))
        if q.dim() == k.dim() == 4 and len(q) == len(k) and each > MOST:
            samples = max(1, MOST * len(q) // each)
            mask = mask[:samples] if mask is not None and mask.dim() == 4 and len(mask) == len(q) else mask
            each, q, k = each * samples // len(q), q[:samples], k[:samples]
        chosen = torch.linspace(0, length - 1, min(length, max(1, MOST // each)), device=q.device).round().long()
        q = q.index_select(-2, chosen)
        if mask is not None and mask.dim() > 1 and mask.shape[-2] == length:
            mask = mask.index_select(-2, chosen)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.float() @ k.float().mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        seen = torch.ones_like(logits, dtype=torch.bool)
        if is_causal:
            seen = seen & (torch.arange(keys, device=q.device) <= chosen[:, None])
        added = logits
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            added = logits + mask
            seen = seen & (mask > HIDDEN)
        self._add(logits, added, seen)

    def _add(self, logits: Tensor, added: Tensor, seen: Tensor) -> None:
        """`logits` without and with what a mask adds to them; a row that is not finite belongs to another fault."""
        finite = torch.isfinite(torch.where(seen, added, 0.0)).all(-1, keepdim=True)
        seen = seen & finite
        count = seen.sum(-1, keepdim=True)
        rows = count[..., 0] > 1
        if not bool(rows.any()):
            return
        shown = torch.where(seen, logits, 0.0)
        apart = torch.where(seen, shown - shown.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
        self.largest = max(self.largest, float(shown.abs().max()))
        self.spread = max(self.spread, float(apart.abs().max()))
        most = torch.softmax(added.masked_fill(~seen, -torch.inf), -1).amax(-1)
        self.collapsed_rows += int(((most > COLLAPSED) & rows).sum())
        self.rows += int(rows.sum())
