"""Attention's logits against a softmax that is written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normwise.measure import attention
from normwise.measure.attention import COLLAPSED, AttentionLogits
from support.tolerances import assert_close


def expected(
    q: Tensor, k: Tensor, seen: Tensor, added: Tensor | float = 0.0, scale: float | None = None
) -> list[float]:
    """(largest, spread, share of collapsed rows), row by row."""
    logits = (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax((logits + added).masked_fill(~seen, -math.inf), -1)
    seen = seen.expand_as(logits)
    largest = spread = 0.0
    collapsed = []
    for row, visible, weight in zip(logits.flatten(0, -2), seen.flatten(0, -2), weights.flatten(0, -2), strict=True):
        if visible.sum() > 1:
            largest = max(largest, float(row[visible].abs().max()))
            spread = max(spread, float((row[visible] - row[visible].mean()).abs().max()))
            collapsed.append(float(weight.max() > COLLAPSED))
    return [largest, spread, sum(collapsed) / len(collapsed)]


def found(*args: object, **kwargs: object) -> list[float]:
    logits = AttentionLogits()
    logits.add(*args, **kwargs)
    return [logits.largest, logits.spread, logits.collapsed]


def check(actual: list[float], wanted: list[float], terms: int) -> None:
    assert_close(torch.tensor(actual), torch.tensor(wanted), kind="composed", count=terms)


@pytest.mark.parametrize("heads_of_keys", [4, 2, 1])
def test_heads_and_scale(heads_of_keys):
    q, k = 4 * torch.randn(3, 4, 7, 8), 4 * torch.randn(3, heads_of_keys, 9, 8)
    seen = torch.ones(7, 9, dtype=torch.bool)
    full = k.repeat_interleave(4 // heads_of_keys, 1)
    check(found(q, k), expected(q, full, seen), 8)
    check(found(q, k, scale=0.05), expected(q, full, seen, scale=0.05), 8)
    assert 0 < found(q, k)[2] < 1


def test_what_a_mask_hides_does_not_count():
    q, k = 4 * torch.randn(3, 4, 7, 8), 4 * torch.randn(3, 4, 7, 8)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    k[..., 6, :] *= 100  # seen by the last query alone
    wanted = expected(q, k, causal)
    check(found(q, k, is_causal=True), wanted, 8)
    check(found(q, k, causal), wanted, 8)
    for hidden in (-math.inf, torch.finfo(torch.float32).min, -1e4, -100.0):
        check(found(q, k, torch.zeros(7, 7).masked_fill(~causal, hidden)), wanted, 8)
    padding = torch.arange(7) < torch.tensor([[7], [5], [2]])
    check(found(q, k, padding[:, None, None]), expected(q, k, padding[:, None, None]), 8)


def test_what_is_added_to_logits_counts_for_the_weights_alone():
    q, k, bias = torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8), 9 * torch.randn(4, 7, 7)
    seen = torch.ones(7, 7, dtype=torch.bool)
    check(found(q, k, bias), expected(q, k, seen, bias.double()), 8)
    assert found(q, k, bias)[:2] == found(q, k)[:2]


def test_a_bias_of_all_keys_is_no_spread():
    """Softmax does not see it: keys of some trained models have one of several hundred."""
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    largest, spread, collapsed = found(q, k + 500.0)
    assert largest > 500
    assert spread == pytest.approx(found(q, k)[1], rel=1e-2)
    assert collapsed == found(q, k)[2]


def test_rows_of_one_key_and_rows_that_are_not_finite_are_no_rows():
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    seen = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    logits = AttentionLogits()
    logits.add(q, k, seen)
    assert logits.rows == 1
    q[0, 0, 1] = math.nan
    logits.add(q, k, seen)
    assert (logits.rows, logits.calls) == (1, 2)
    assert math.isfinite(logits.largest)
    logits.add(q[:, :, :0], k)
    assert logits.rows == 1


def test_of_very_many_logits_evenly_spaced_rows_are_looked_at(monkeypatch):
    q, k = torch.randn(6, 2, 50, 8), torch.randn(6, 2, 40, 8)
    mask = torch.rand(6, 1, 50, 40) < 0.7
    whole = found(q, k, mask)
    monkeypatch.setattr(attention, "MOST", 6 * 2 * 40 * 5)
    rows = torch.linspace(0, 49, 5).round().long()
    check(found(q, k, mask), expected(q[:, :, rows], k, mask[:, :, rows]), 8)
    # Of a batch of which even single rows are too many, the first samples.
    monkeypatch.setattr(attention, "MOST", 2 * 2 * 40)
    check(found(q, k, mask), expected(q[:2, :, :1], k[:2], mask[:2, :, :1]), 8)
    assert found(q, k, mask)[0] <= whole[0]


def test_half_precision_and_autocast_are_looked_at_in_float32():
    q, k = 4 * torch.randn(3, 4, 7, 8).bfloat16(), 4 * torch.randn(3, 4, 9, 8).bfloat16()
    wanted = expected(q, k, torch.ones(7, 9, dtype=torch.bool))
    check(found(q, k), wanted, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(found(q, k), wanted, 8)
