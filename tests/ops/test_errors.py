"""Bad input gets an error that says what was given and what to do, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import normwise

x2, x3, x4 = torch.randn(4, 6), torch.randn(3, 6, 5), torch.randn(2, 6, 4, 5)
lengths = torch.tensor([1, 5, 3])
valid = torch.arange(5) < lengths[:, None]

BAD_CALLS: dict[str, tuple[Callable[[], Any], torch.Tensor, dict[str, Any], type[Exception], str]] = {
    "rank of BatchNorm2d": (lambda: normwise.BatchNorm2d(6), x3, {}, ValueError, r"expected 4D input \(got 3D input\)"),
    "rank of BatchNorm1d": (lambda: normwise.BatchNorm1d(6), x4, {}, ValueError, r"expected 2D or 3D input \(got 4D"),
    "rank of InstanceNorm2d": (lambda: normwise.InstanceNorm2d(6), x2, {}, ValueError, r"expected 3D or 4D input"),
    "rank of GroupNorm": (lambda: normwise.GroupNorm(2, 6), x2[0], {}, RuntimeError, "at least 2 dimensions"),
    "channels of BatchNorm": (
        lambda: normwise.BatchNorm1d(5),
        x3,
        {},
        RuntimeError,
        r"^the input \(N, C, ...\) of shape \(3, 6, 5\) has 6 channels, but running_mean is of shape \(5,\): expected "
        r"one element per channel.*give x.transpose\(1, 2\) or the layer's dim=.*running_mean should contain 6 "
        r"elements not 5$",
    ),
    "channels of BatchNorm, no averages": (
        lambda: normwise.BatchNorm1d(5, track_running_stats=False),
        x3,
        {},
        RuntimeError,
        r"^the input .* has 6 channels, but weight is of shape \(5,\).*In torch's words: weight should contain 6 "
        r"elements not 5$",
    ),
    "channels of GroupNorm": (
        lambda: normwise.GroupNorm(2, 4),
        x3,
        {},
        RuntimeError,
        r"num_channels \(4\), but got: 6",
    ),
    "channels of GroupNorm, no affine": (
        lambda: normwise.GroupNorm(2, 4, affine=False),
        x3,
        {},
        ValueError,
        r"num_channels \(4\), but got: 6",
    ),
    "channels of InstanceNorm": (
        lambda: normwise.InstanceNorm1d(4, affine=True),
        x3,
        {},
        ValueError,
        r"num_features \(4\), but got: 6",
    ),
    "features of LayerNorm": (
        lambda: normwise.LayerNorm(7),
        x2,
        {},
        RuntimeError,
        r"Given normalized_shape=\[7\], expected input with shape \[\*, 7\], but got input of size\[4, 6\].*dim=",
    ),
    "features of RMSNorm": (lambda: normwise.RMSNorm((2, 6)), x2, {}, ValueError, r"Given normalized_shape=\[2, 6\]"),
    "dim of another size": (lambda: normwise.LayerNorm(5, dim=1), x3, {}, RuntimeError, r"at dim=1, but got \[6\]"),
    "dim out of range": (lambda: normwise.RMSNorm(5, dim=4), x3, {}, RuntimeError, r"out of range: dim=4 .* 3 axes"),
    "dim twice": (lambda: normwise.LayerNorm((5, 5), dim=(2, -1)), x3, {}, ValueError, "twice"),
    "integers into BatchNorm": (lambda: normwise.BatchNorm1d(6), x3.long(), {}, TypeError, r"torch.int64.*x.float\(\)"),
    "integers into LayerNorm": (
        lambda: normwise.LayerNorm(6),
        x2.int(),
        {},
        TypeError,
        r'"layer_norm" not implemented',
    ),
    "complex numbers": (lambda: normwise.GroupNorm(2, 6), x3.cfloat(), {}, TypeError, "complex64"),
    "one value per channel": (
        lambda: normwise.BatchNorm1d(6),
        x2[:1],
        {},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 6\]\).*"
        r"LayerNorm, GroupNorm.*eval mode.*drop_last",
    ),
    "one valid value per channel": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"lengths": torch.tensor([0, 1, 0])},
        ValueError,
        "Expected more than 1 value per channel when training.*LayerNorm",
    ),
    "one value per group": (lambda: normwise.GroupNorm(6, 6), x2[:1], {}, ValueError, "Expected more than 1 value per"),
    "one position": (
        lambda: normwise.InstanceNorm1d(6),
        x3[..., :1],
        {},
        ValueError,
        "Expected more than 1 spatial element when training.*LayerNorm or GroupNorm",
    ),
    "no valid element": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"mask": torch.zeros(3, 5, dtype=torch.bool)},
        ValueError,
        "no valid element for a channel.*eval mode",
    ),
    "no valid element in one channel": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"mask": (torch.arange(6) > 0)[:, None].expand(3, 6, 5)},
        ValueError,
        "no valid element for a channel",
    ),
    "mask of the wrong shape": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"mask": valid.T},
        ValueError,
        r"mask of shape \(5, 3\) does not fit an input of shape \(3, 6, 5\): expected \(3, 5\)",
    ),
    "mask with too many axes": (
        lambda: normwise.LayerNorm(5),
        x3,
        {"mask": x4 > 0},
        ValueError,
        "does not fit an input",
    ),
    "mask of numbers": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"mask": valid.float()},
        TypeError,
        r"torch.bool with True = valid, but got torch.float32.*key_padding_mask",
    ),
    "mask and lengths": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"mask": valid, "lengths": lengths},
        ValueError,
        "both mask and lengths",
    ),
    "lengths too long": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"lengths": lengths + 1},
        ValueError,
        r"must lie in \[0, 5\].*from 2 to 6",
    ),
    "negative lengths": (lambda: normwise.GroupNorm(2, 6), x3, {"lengths": -lengths}, ValueError, "from -5 to -1"),
    "lengths of the wrong number": (
        lambda: normwise.InstanceNorm1d(6),
        x3,
        {"lengths": lengths[:2]},
        ValueError,
        r"must be of shape \(3,\)",
    ),
    "lengths that are not integers": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"lengths": lengths.float()},
        TypeError,
        "integer dtype, but got torch.float32",
    ),
    "lengths without steps": (lambda: normwise.BatchNorm1d(6), x2, {"lengths": lengths}, ValueError, "use mask="),
    "lengths along one of several axes": (
        lambda: normwise.LayerNorm(5),
        x4,
        {"lengths": lengths[:2]},
        ValueError,
        "give mask=, True = valid, of that shape without the last axis",
    ),
    "lengths beyond the steps of axis 1": (
        lambda: normwise.LayerNorm(5),
        x3,
        {"lengths": lengths + 2},
        ValueError,
        r"lengths must lie in \[0, 6\].* but got values from 3 to 7",
    ),
    "residual of another shape": (
        lambda: normwise.BatchNorm1d(6),
        x3,
        {"residual": x3[..., :1]},
        ValueError,
        r"residual must have the input's shape \(3, 6, 5\), but got \(3, 6, 1\)",
    ),
    "residual that is no tensor": (
        lambda: normwise.LayerNorm(5),
        x3,
        {"add": pack_sequence([x2])},
        TypeError,
        "must be a tensor like the input, but got PackedSequence",
    ),
}


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_a_bad_call_raises_and_changes_nothing(fault: str) -> None:
    build, x, kwargs, error, message = BAD_CALLS[fault]
    layer = build()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        layer(x, **kwargs)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


BAD_LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "eps 0": (lambda: normwise.BatchNorm1d(4, eps=0), "eps must be positive, but got 0"),
    "eps below 0": (lambda: normwise.LayerNorm(4, eps=-1e-5), "eps must be positive"),
    "eps of RMSNorm": (lambda: normwise.RMSNorm(4, eps=0.0), "eps must be positive"),
    "eps of GroupNorm": (lambda: normwise.GroupNorm(2, 4, eps=float("nan")), "eps must be positive"),
    "eps of InstanceNorm": (lambda: normwise.InstanceNorm1d(4, eps=0), "eps must be positive"),
    "momentum above 1": (lambda: normwise.BatchNorm2d(4, momentum=1.1), r"momentum must lie in \[0, 1\].*Keras"),
    "momentum below 0": (lambda: normwise.InstanceNorm3d(4, momentum=-0.1), r"momentum must lie in \[0, 1\]"),
    "groups": (
        lambda: normwise.GroupNorm(4, 6),
        r"num_channels \(6\) must be divisible by num_groups \(4\): num_groups can be one of \[1, 2, 3, 6\]",
    ),
    "no groups": (lambda: normwise.GroupNorm(0, 6), "must be divisible"),
    "act": (lambda: normwise.BatchNorm1d(4, act="celu"), "unknown act 'celu': expected one of 'relu', 'leaky_relu'"),
    "act of LayerNorm": (lambda: normwise.LayerNorm(4, act="tanh"), "unknown act 'tanh'"),
    "dim and shape": (lambda: normwise.LayerNorm((4, 5), dim=1), r"dim=1 names 1 axis, but .* has 2"),
    "empty shape": (lambda: normwise.functional.layer_norm(x2, ()), "at least 1-dimensional"),
    "half of the averages": (
        lambda: normwise.functional.batch_norm(x2, torch.zeros(6), None, training=True),
        "go together",
    ),
    "no averages to use": (
        lambda: normwise.functional.instance_norm(x3, use_input_stats=False),
        "Expected running_mean and running_var to be defined",
    ),
    "momentum in a call": (lambda: normwise.functional.batch_norm(x2, momentum=2.0), "momentum must lie"),
    "eps in a call": (lambda: normwise.functional.rms_norm(x2, (6,), eps=0.0), "eps must be positive"),
}


@pytest.mark.parametrize("fault", BAD_LAYERS)
def test_bad_construction_raises(fault: str) -> None:
    build, message = BAD_LAYERS[fault]
    with pytest.raises(ValueError, match=message):
        build()


def test_ragged_inputs_state_their_own_lengths() -> None:
    packed = pack_sequence([x2, x2[:2]])
    with pytest.raises(ValueError, match="PackedSequence: it states its own lengths"):
        normwise.LayerNorm(6)(packed, lengths=torch.tensor([4, 2]))
    with pytest.raises(TypeError, match="residual must be a PackedSequence with the same lengths"):
        normwise.LayerNorm(6)(packed, add=pack_sequence([x2, x2[:3]]))
    with pytest.raises(ValueError, match="dim=1 needs a padded tensor"):
        normwise.RMSNorm(6, dim=1)(packed)
    with pytest.raises(ValueError, match="BatchNorm1d does"):
        normwise.BatchNorm2d(6)(packed)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_strided_nested_tensor_is_refused() -> None:
    nested = torch.nested.nested_tensor([x2, x2[:2]])
    with pytest.raises(TypeError, match=r"layout=torch.jagged"):
        normwise.LayerNorm(6)(nested)


def test_unused_channel_count_warns_as_torch_does() -> None:
    with pytest.warns(UserWarning, match=r"\(6\) does not match num_features \(4\), which is not used"):
        normwise.InstanceNorm1d(4)(x3)
