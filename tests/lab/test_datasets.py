from __future__ import annotations

import torch

from normwise.lab.datasets import load_japanese_vowels, load_mnist_5k


def test_mnist_5k_is_split_by_digit_and_without_overlap():
    train, held_out = load_mnist_5k()
    assert train.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert train.images.shape == (4000, 28, 28)
    assert train.images.dtype == torch.uint8
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    everything = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 5000  # no digit twice, so none on both sides


def test_japanese_vowels_has_the_set_s_own_split():
    train, test = load_japanese_vowels()
    assert train.speakers.bincount().tolist() == [30] * 9
    assert test.speakers.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (int(train.lengths.min()), int(train.lengths.max())) == (7, 26)
    assert (int(test.lengths.min()), int(test.lengths.max())) == (7, 29)
    assert train.frames.shape == (270, 26, 12)
    assert test.frames.shape == (370, 29, 12)


def test_japanese_vowels_pads_with_zeros_behind_each_length():
    for part in load_japanese_vowels():
        valid = torch.arange(part.frames.shape[1]) < part.lengths[:, None]
        assert not part.frames[~valid].any()
        assert part.frames[valid].all(dim=-1).float().mean() > 0.99


def test_japanese_vowels_first_value_is_that_of_the_source():
    train, _ = load_japanese_vowels()
    assert train.frames[0, 0, :2].tolist() == torch.tensor([1.860936, -0.207383]).tolist()
    assert (int(train.lengths[0]), int(train.speakers[0])) == (20, 0)
