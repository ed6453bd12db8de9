"""Which second input tells padding, and which near twin of it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normwise.diagnosis.batches import take
from normwise.diagnosis.pace import Pace
from normwise.diagnosis.padding import Valid, valid_positions

SAMPLES, STEPS, FEATURES = 16, 20, 4


class Takes(nn.Module):
    """Its forward names what stands second in a tuple."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x


def seen(inputs: object, model: nn.Module | None = None) -> Valid | None:
    model = model or Takes()
    (batch,) = take([(inputs, torch.zeros(SAMPLES))], 1, model, None, Pace(None, lambda *_: None))
    return valid_positions(batch, model)


def lengths(longest: int = STEPS) -> Tensor:
    drawn = torch.randint(3, longest, (SAMPLES,))
    drawn[0] = longest
    return drawn


def until(ends: Tensor) -> Tensor:
    return torch.arange(STEPS) < ends[:, None]


def sequences(valid: Tensor, padding: float = 0.5) -> Tensor:
    return torch.where(valid[..., None], torch.randn(SAMPLES, STEPS, FEATURES), padding)


DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("longest", [STEPS, STEPS - 2], ids=["to the longest", "further"])
def test_an_attention_mask_of_any_dtype(dtype, left, longest):
    valid = until(lengths(longest))
    valid = valid.flip(1) if left else valid
    found = seen({"x": sequences(valid), "attention_mask": valid.to(dtype)})
    assert found.told_by == "attention_mask"
    assert torch.equal(found.mask, valid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["src_key_padding_mask", "paddingMask", "pad_mask"])
@pytest.mark.parametrize("longest", [STEPS, STEPS - 2])
def test_a_mask_that_says_what_is_padding(dtype, name, longest):
    valid = until(lengths(longest))
    found = seen({"x": sequences(valid), name: (~valid).to(dtype)})
    assert torch.equal(found.mask, valid)


@pytest.mark.parametrize("shape", [(SAMPLES, 1, STEPS), (SAMPLES, STEPS, 1), (SAMPLES, 1, 1, STEPS)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_with_axes_of_size_one(shape, dtype):
    valid = until(lengths())
    found = seen({"mask": valid.reshape(shape).to(dtype), "x": sequences(valid)})
    assert torch.equal(found.mask, valid)


@pytest.mark.parametrize("low", [-torch.inf, -1e4, torch.finfo(torch.float32).min])
def test_a_mask_that_is_added_to_scores(low):
    valid = until(lengths())
    added = torch.zeros(SAMPLES, STEPS).masked_fill(~valid, low)
    assert torch.equal(seen({"x": sequences(valid), "attention_mask": added}).mask, valid)


def test_tokens_beside_their_mask_in_any_order():
    valid = until(lengths())
    tokens, mask = torch.randint(1, 50, (SAMPLES, STEPS)) * valid, valid.long()
    types = (torch.arange(STEPS) >= 5).long().expand(SAMPLES, -1) * valid
    for order in (("input_ids", "token_type_ids", "attention_mask"), ("attention_mask", "token_type_ids", "input_ids")):
        batch = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
        found = seen({name: batch[name] for name in order})
        assert (found.told_by, torch.equal(found.mask, valid)) == ("attention_mask", True)
    assert seen({"input_ids": tokens.int(), "token_type_ids": types.int()}) is None


def test_layouts_in_which_time_stands_elsewhere():
    valid = until(lengths())
    x = sequences(valid)
    for inputs, first in ((x.transpose(1, 2), True), (x.transpose(0, 1), False)):
        found = seen({"x": inputs, "mask": valid.long()})
        assert torch.equal(found.mask, valid)
        assert found.samples_first == first
    found = seen({"x": x.transpose(0, 1), "mask": valid.T.long()})
    assert torch.equal(found.mask, valid)
    assert not found.samples_first


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_waveforms(dtype):
    valid = until(lengths())
    waves = torch.randn(SAMPLES, STEPS) * valid
    assert torch.equal(seen({"input_values": waves, "attention_mask": valid.to(dtype)}).mask, valid)
    ends = valid.sum(1)
    assert torch.equal(seen((waves, ends)).mask, valid)
    assert torch.equal(seen({"waves": waves, "wave_lens": ends}).mask, valid)
    long = torch.randn(SAMPLES, 400)
    long[3, 300:] = 0
    found = seen(long)
    assert (found.told_by, float(found.mask.double().mean())) == ("trailing zeros", 1 - 100 / (400 * SAMPLES))


def twins() -> dict[str, dict[str, Tensor]]:
    """Each looks like a mask or like lengths, and is none."""
    ends = lengths()
    valid = until(ends)
    x = sequences(valid, 0.0) + 0.1 * torch.randn(SAMPLES, STEPS, FEATURES)
    tail = (torch.arange(STEPS) >= 12).long().expand(SAMPLES, -1)
    special = torch.zeros(SAMPLES, STEPS, dtype=torch.long)
    special[:, 0] = 1
    return {
        "types of tokens": {"x": x, "token_type_ids": tail},
        "binary tags": {"x": x, "tags": valid.long()},
        "which tokens are special": {"x": x, "special_tokens_mask": 1 - special},
        "global attention": {"x": x, "global_attention_mask": special},
        "what the loss counts": {"x": x, "loss_mask": tail},
        "what is the answer": {"x": x, "completion_mask": tail},
        "patches that are hidden": {"x": x, "bool_masked_pos": torch.rand(SAMPLES, STEPS) < 0.5},
        "values that are missing": {"x": x, "mask": torch.rand(SAMPLES, STEPS).round()},
        "weights": {"x": x, "mask": torch.rand(SAMPLES, STEPS)},
        "segments": {"x": x, "mask": torch.randint(3, (SAMPLES, STEPS))},
        "speakers": {"x": x, "speaker": torch.randint(1, 10, (SAMPLES,))},
        "speakers as many as steps": {"x": x, "speaker": ends},
        "labels": {"x": x, "labels": ends},
        "missing features": {"x": x[:, :, 0], "mask": torch.rand(SAMPLES, STEPS).round()},
        "a feature called length": {"x": x[:, :, 0], "length": ends},
        "features with a class": {"x": x[:, :, 0], "kind": ends},
        "counts of words": {"x": torch.poisson(torch.full((SAMPLES, 400), 0.05))},
        "short features that end in zeros": {"x": torch.randn(SAMPLES, STEPS) * valid},
    }


@pytest.mark.parametrize("name", twins())
def test_what_only_looks_like_it(name):
    assert seen(twins()[name]) is None


def test_a_causal_mask_of_as_many_steps_as_samples():
    causal = torch.ones(SAMPLES, SAMPLES).tril()
    assert seen({"x": torch.randn(SAMPLES, SAMPLES, 3), "mask": causal}) is None
    assert seen({"x": torch.randn(SAMPLES, SAMPLES, 3), "attn_mask": causal.log()}) is None


def test_lengths_without_a_name_are_told_by_the_padding_behind_them():
    ends = lengths()
    assert torch.equal(seen({"x": sequences(until(ends), -1.0), "n": ends}).mask, until(ends))
