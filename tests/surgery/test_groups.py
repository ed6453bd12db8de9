"""A converted norm's statistics come from enough values to say something about the input, or it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery.groups import ENOUGH, FEWEST, MOST
from support.surgery_models import IMAGES, assert_same_state, net, state
from support.tolerances import assert_close


def rows(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("width", [4, 7, 16, 24, 48, 64, 100, 512, 1000, 2048])
@pytest.mark.parametrize(("layer", "maps"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (1, 1))])
def test_a_group_holds_enough_values_where_the_layer_has_them(layer, maps, width, known):
    """Of rows, and of 1 x 1 maps, as behind a global pool or in a squeeze-and-excitation block."""
    x, other = torch.randn(16, width, *maps), torch.randn(16, width, *maps)
    new, report = normwise.convert(nn.Sequential(layer(width)), to="group", example=x if known else None)
    each = width // new[0].num_groups
    assert each >= min(ENOUGH, width)
    assert new[0].num_groups <= MOST
    assert f"of {each} {'values' if known else 'channels'}" in report.changed[0].note
    assert (new(x) - new(other)).abs().max() > 0.5
    assert new(x).detach().abs().round(decimals=2).unique().numel() >= 3


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(64, 8, 32), (64, 2, 16), (64, 1, 4), (6, 8, 6), (6, 2, 1), (3, 3, 1), (3, 8, 3)]
)
def test_an_example_tells_how_many_positions_there_are(channels, size, groups):
    """The most groups up to 32 of 16 values each: of 64 channels on 2 x 2 maps 16 groups of 4 x 4 values."""
    new, report = normwise.convert(
        nn.Sequential(nn.BatchNorm2d(channels)), to="group", example=torch.randn(2, channels, size, size)
    )
    assert new[0].num_groups == groups
    assert ("1 position)" if size == 1 else f"{size * size} positions") in report.changed[0].note
    assert ("fewer than the 16" in report.changed[0].note) == (channels * size * size < ENOUGH)


def test_the_fewest_positions_of_several_calls_count():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).mean() + self.norm(x[..., :1, :1]).mean()

    new, _ = normwise.convert(Twice(), to="group", example=torch.randn(2, 64, 8, 8))
    assert new.norm.num_groups == 4


def test_lengths_may_leave_a_single_position():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normwise.BatchNorm1d(64)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.norm(x, lengths=lengths)

    example = (torch.randn(2, 64, 30), torch.tensor([30, 1]))
    assert normwise.convert(Padded(), to="group", example=example).model.norm.num_groups == 4


@pytest.mark.parametrize(
    ("layer", "arguments", "cure"),
    [
        (nn.BatchNorm1d(2), {}, "to='renorm'"),
        (nn.BatchNorm1d(1), {}, "to='renorm'"),
        (nn.BatchNorm1d(3), {"num_groups": 1}, "to='renorm'"),
        (nn.BatchNorm1d(64), {"num_groups": 32}, "to='layer', a LayerNorm over all 64 channels"),
        (nn.BatchNorm1d(64), {"num_groups": lambda channels: channels // 2}, "to='layer'"),
        (nn.SyncBatchNorm(64), {"num_groups": 64}, "to='layer'"),
        (normwise.LayerNorm(3, dim=1), {}, "to='renorm'"),
        (nn.BatchNorm2d(2), {"example": torch.randn(2, 2, 1, 1)}, "to='renorm'"),
        (nn.BatchNorm2d(16), {"example": torch.randn(2, 16, 1, 1), "num_groups": 8}, "to='layer'"),
        (nn.InstanceNorm2d(3), {"example": torch.randn(2, 3, 1, 1)}, "to='renorm'"),
    ],
)
def test_fewer_than_four_values_a_group_are_refused_with_a_better_target(layer, arguments, cure):
    model = nn.Sequential(layer).eval()  # InstanceNorm takes no single position in training
    if isinstance(layer, nn.InstanceNorm2d):
        layer.track_running_stats, layer.running_mean, layer.running_var = True, torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=f"fewer than {FEWEST} values.*{cure}"):
        normwise.convert(model, to="group", **arguments)


def test_positions_make_up_for_channels():
    """What is refused as rows is not where an example has more positions; maps of unknown size are noted."""
    new, _ = normwise.convert(nn.Sequential(nn.BatchNorm1d(2)), to="group", example=torch.randn(4, 2, 8))
    assert new[0].num_groups == 1
    _, report = normwise.convert(nn.Sequential(nn.BatchNorm2d(3)), to="group")
    assert "the size of its input being unknown: example= tells" in report.changed[0].note
    _, report = normwise.convert(nn.Sequential(nn.BatchNorm2d(16)), to="group", num_groups=8)
    assert "example= tells" in report.changed[0].note


def test_a_group_norm_keeps_its_groups():
    """It is one already, whatever one may think of it."""
    new = normwise.convert(nn.Sequential(nn.GroupNorm(8, 16)), to="group").model
    assert new[0].num_groups == 8


def test_layer_norm_over_too_few_channels_is_refused_too():
    with pytest.raises(ValueError, match="a LayerNorm over 3 channels would hold fewer than 4 values"):
        normwise.convert(nn.Sequential(nn.BatchNorm2d(3)), to="layer")
    assert normwise.convert(nn.Sequential(nn.BatchNorm2d(4)), to="layer").report.changed


def test_an_example_tells_the_rank_too():
    example = torch.randn(2, 4, 5, 5)
    new = normwise.convert(nn.Sequential(nn.SyncBatchNorm(4), nn.GroupNorm(2, 4)), to="batch", example=example).model
    assert [type(layer) for layer in new] == [normwise.BatchNorm2d, normwise.BatchNorm2d]


def test_the_name_of_a_users_class_does_not_tell_the_rank():
    class Norm1d(nn.GroupNorm):
        """Of images all the same."""

    with pytest.raises(ValueError, match="does not say the rank"):
        normwise.convert(nn.Sequential(Norm1d(2, 4)), to="batch")


@pytest.mark.parametrize("inplace", [False, True])
def test_the_example_leaves_the_model_as_it_was(inplace):
    model = net()
    model.stem.eval()
    before = state(model)
    new, _ = normwise.convert(model, to="renorm", example=torch.randn(IMAGES), inplace=inplace)
    if not inplace:
        assert_same_state(model, before)
    after = state(new)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *new.modules()))
    with pytest.raises(RuntimeError):
        normwise.convert(net(), to="group", example=torch.randn(2, 2, 2, 2))


def test_one_group_computes_what_it_says():
    new = normwise.convert(rows(7), to="group").model
    x = torch.randn(5, 8)
    expected = nn.functional.layer_norm(new[0](x), (7,))
    assert_close(new(x), expected, count=7)
