"""Attention is seen wherever torch's own stands, as it is, and named by the module that calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.diagnosis import Diagnosis, diagnose
from normwise.diagnosis.attention import AttentionWatch
from normwise.measure.attention import COLLAPSED
from support.tolerances import assert_close

sys.path.insert(0, str(Path(__file__).parent))
from support.transformer_nets import GPT, Encoder, MultiHead, sentences


def watched(module: nn.Module, *args: object, **kwargs: object) -> tuple[object, AttentionWatch]:
    watch = AttentionWatch(lambda: "here")
    with watch:
        result = module(*args, **kwargs)
    return result, watch


def weights_of(module: nn.MultiheadAttention, *args: Tensor, **kwargs: object) -> Tensor:
    """(N, heads, L, S), as the layer itself returns them."""
    with torch.no_grad():
        return module.eval()(*args, need_weights=True, average_attn_weights=False, **kwargs)[1].double()


def scaled(**options: object) -> nn.MultiheadAttention:
    """With logits of which some rows collapse."""
    module = nn.MultiheadAttention(16, 4, **options).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.mul_(4.0 if "proj" in name and "out" not in name else 1.0)
            if "bias" in name:
                nn.init.normal_(p)
    return module


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [None, "bool", "float", "heads", "padding", "both"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=repr)
def test_multi_head_attention_is_what_it_computes(options, masked, need_weights):
    """From its weights: differences of their logarithms are those of the logits."""
    module = scaled(**options)
    sizes = [(3, 6, 16), (3, 9, module.kdim), (3, 9, module.vdim)]
    given = [torch.randn(*size, dtype=torch.float64) for size in sizes]
    given = given if module.batch_first else [t.transpose(0, 1) for t in given]
    hidden = torch.rand(6, 9) < 0.3
    hidden[:, 0] = False
    padding = torch.arange(9) >= torch.tensor([[9], [7], [3]])
    masks = {
        None: {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.zeros(6, 9).double().masked_fill(hidden, -torch.inf)},
        "heads": {"attn_mask": hidden.expand(12, 6, 9)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
    }[masked]
    _, watch = watched(module, *given, need_weights=need_weights, **masks)
    (found,) = watch.records()
    weights = weights_of(module, *given, **masks)
    seen = weights > 0
    rows = seen.sum(-1) > 1
    logs = torch.where(seen, weights.log(), 0.0)
    apart = torch.where(seen, logs - logs.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True), 0.0)
    collapsed = float((weights.amax(-1) > COLLAPSED)[rows].double().mean())
    assert_close(torch.tensor(found.spread), apart[rows].abs().max().float(), kind="composed", count=16, scale=100.0)
    assert found.collapsed == pytest.approx(collapsed)
    assert 0 < found.collapsed < 1
    assert (found.layer, found.heads, found.rows) == ("here", 4, int(rows.sum()))


def test_multi_head_attention_of_one_sequence():
    module = scaled()
    x = torch.randn(6, 16, dtype=torch.float64)
    alone = watched(module, x, x, x)[1].records()
    assert alone == watched(module, x[:, None], x[:, None], x[:, None])[1].records()
    assert watched(module, x, x, x, key_padding_mask=torch.arange(6) > 3)[1].records() != alone


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_from_elsewhere_are_left_alone(options):
    x = torch.randn(3, 6, 16)
    assert watched(nn.MultiheadAttention(16, 4, **options), x, x, x)[1].records() == []


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=True),
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    ],
)
def test_what_is_looked_at_returns_what_it_would(make, train):
    """Also with the dropout that it draws, and in eval mode without a gradient, where torch has a fast path."""
    module = make().train(train)
    x = torch.randn(3, 6, 16)
    given = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    with torch.set_grad_enabled(train):
        torch.manual_seed(1)
        result, watch = watched(module, *given)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        plain = module(*given)
    first, second = (r[0] if isinstance(r, tuple) else r for r in (result, plain))
    if train:
        assert torch.equal(first, second)
    else:
        assert_close(first, second, kind="composed", count=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(watch.records()) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_what_cannot_be_looked_at_runs_as_it_would():
    x = torch.randn(3, 2, 5, 8)

    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda one: F.scaled_dot_product_attention(one, one, one))(x)

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ragged = torch.nested.nested_tensor(list(x), layout=torch.jagged)
            heads = ragged.transpose(1, 2) if ragged.dim() == 4 else ragged
            return F.scaled_dot_product_attention(heads, heads, heads).values()

    result, watch = watched(Mapped(), x)
    assert_close(result, F.scaled_dot_product_attention(x, x, x), kind="composed", count=8)
    assert watch.records() == []
    result, watch = watched(Nested(), x.transpose(1, 2))
    assert result.numel() == x.numel()
    assert watch.records() == []


def test_an_error_of_the_call_is_torchs_own():
    with pytest.raises(RuntimeError) as plain:
        F.scaled_dot_product_attention(torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    with pytest.raises(RuntimeError) as seen, AttentionWatch(lambda: ""):
        F.scaled_dot_product_attention(torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    assert str(seen.value) == str(plain.value)


def found_in(model: nn.Module) -> Diagnosis:
    return diagnose(model, sentences(), loss=F.cross_entropy)


def test_is_named_by_the_module_that_calls_it():
    found = found_in(GPT(blocks=3))
    assert [a.layer for a in found.attention] == [f"blocks.{n}.attention" for n in range(3)]
    assert all(a.calls == 2 and a.heads == 4 for a in found.attention)
    assert set(found.places) > {"blocks", "blocks.1", "blocks.1.attention", "blocks.1.attention.qkv", "head"}


def test_attention_that_is_written_out_is_not_seen_and_nothing_is_said():
    model = GPT(written_out=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[:64] *= 25.0
    found = found_in(model)
    assert found.attention == []
    assert found.findings == []


def test_is_named_rightly_after_a_module_that_raised():
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Raises(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.inner(x)
            except ValueError:
                y = self.out(F.scaled_dot_product_attention(x, x, x))
            return (y + self.out(F.scaled_dot_product_attention(x, x, x))).mean(1)

    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"{self.linear(x).shape}")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tries = Tries()

        def forward(self, x: Tensor) -> Tensor:
            y = self.tries(x)
            F.scaled_dot_product_attention(x, x, x)
            return y

    data = [(torch.randn(4, 5, 8), torch.randint(4, (4,)))]
    found = diagnose(Outer(), data, loss=F.cross_entropy)
    # The first call after the error is still taken for the inner one's; what comes after the outer one left is not.
    assert [(a.layer, a.calls) for a in found.attention] == [("tries.inner", 2), ("", 1)]


def test_recomputed_blocks_are_looked_at_once():
    class Checkpointed(GPT):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tokens(tokens)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x)).transpose(1, 2)

    found = found_in(Checkpointed())
    assert [a.calls for a in found.attention] == [2, 2, 2, 2]
    assert len(found.streams[0].points) == 5


def test_a_frozen_encoder_that_stays_in_eval_mode_is_seen():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Encoder().requires_grad_(False), nn.Linear(4, 4)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.encoder.eval()
            return self

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.encoder(tokens))

    tokens = torch.randint(1, 50, (8, 12))
    found = diagnose(Frozen(), [(tokens, torch.randint(4, (8,)))], loss=F.cross_entropy)
    assert [a.layer for a in found.attention] == [f"encoder.encoder.layers.{n}.self_attn" for n in range(3)]


def test_asked_for_its_weights_or_not_it_is_the_same():
    torch.manual_seed(0)
    model = MultiHead(need_weights=True)
    data = [(torch.randn(16, 12, 16), torch.randint(4, (16,)))]
    first = diagnose(model, data, loss=F.cross_entropy).attention
    model.need_weights = False
    assert diagnose(model, data, loss=F.cross_entropy).attention == first
    assert first[0].layer == "attention"
