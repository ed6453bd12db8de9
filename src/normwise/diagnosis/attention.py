"""What is seen of attention: calls of torch's own, wherever in a model's code they stand.

A function mode sees every call of `scaled_dot_product_attention` and of `multi_head_attention_forward`, which is how
nn.MultiheadAttention computes while a mode looks on (its fast path is not taken then). Attention that is written out,
with a softmax of its own, is not seen, and nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from normwise.diagnosis.transformer_records import Attention
from normwise.measure.attention import AttentionLogits
from normwise.ops._torch_internals import is_fake, transforms_active


class AttentionWatch(TorchFunctionMode):
    """Looks at each call while it is active; what the call returns is untouched."""

    def __init__(self, place: Callable[[], str]) -> None:
        """`place` says in which module the model is."""
        super().__init__()
        self.place = place
        self.seen: dict[str, AttentionLogits] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # After the call, which has refused what does not fit.
        if func is F.scaled_dot_product_attention:
            self._dot_product(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self._multi_head(*args, **kwargs)
        return result

    def records(self) -> list[Attention]:
        """In the order of the first calls."""
        return [
            Attention(layer, logits.calls, logits.heads, logits.largest, logits.spread, logits.collapsed, logits.rows)
            for layer, logits in self.seen.items()
        ]

    def _dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        if _readable(query, key, attn_mask):
            self._logits().add(query, key, attn_mask, is_causal, scale)

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None = None,
        bias_v: Tensor | None = None,
        add_zero_attn: bool = False,
        *_: Any,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        **__: Any,
    ) -> None:
        """Projects again as the function does: it keeps queries and keys to itself.

        Keys that come from elsewhere (bias_k, add_zero_attn, static_k) are not looked at.
        """
        if bias_k is not None or add_zero_attn or static_k is not None:
            return
        if not _readable(query, key, key_padding_mask, attn_mask):
            return
        with torch.no_grad():
            if in_proj_weight is not None:
                q_proj_weight, k_proj_weight = in_proj_weight.chunk(3)[:2]
            q_bias, k_bias = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
            if q_proj_weight is None or k_proj_weight is None:
                return
            q = _heads(F.linear(query, q_proj_weight, q_bias), num_heads)
            k = _heads(F.linear(key, k_proj_weight, k_bias), num_heads)
            self._logits().add(q, k, _mask(attn_mask, key_padding_mask, len(q)))

    def _logits(self) -> AttentionLogits:
        return self.seen.setdefault(self.place(), AttentionLogits())


def _heads(x: Tensor, heads: int) -> Tensor:
    """(L, N, E) or (L, E) as (N, heads, L, E / heads)."""
    x = x if x.dim() == 3 else x[:, None]
    length, samples, features = x.shape
    return x.reshape(length, samples, heads, features // heads).permute(1, 2, 0, 3)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, samples: int) -> Tensor | None:
    """Both of nn.MultiheadAttention's masks, in which True hides, as numbers to be added: (N or 1, heads or 1, L, S)
    where there is one of the queries, else (N, 1, 1, S).
    """
    if attn_mask is not None:
        attn_mask = _added(attn_mask)
        attn_mask = attn_mask.unflatten(0, (samples, -1)) if attn_mask.dim() == 3 else attn_mask[None, None]
    if key_padding_mask is None:
        return attn_mask
    padding = _added(key_padding_mask)
    padding = (padding if padding.dim() == 2 else padding[None])[:, None, None]
    return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)


def _readable(*tensors: Tensor | None) -> bool:
    """Whether their values may be looked at, as rows of one length."""
    given = [t for t in tensors if t is not None]
    return not transforms_active() and not any(t.is_nested or t.is_meta or is_fake(t) for t in given)
