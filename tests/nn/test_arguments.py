"""What layers take as sizes, lengths, masks and resets, and what they say of anything else."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normwise
from support.layer_samples import same
from support.norm_cases import Case, each_case

SIZES = {
    "LayerNorm": lambda n: normwise.LayerNorm(n(4)),
    "LayerNorm of two axes": lambda n: normwise.LayerNorm((n(3), n(4)), dim=(n(1), n(-1))),
    "LayerNorm of an array": lambda n: normwise.LayerNorm([n(3), n(4)]),
    "RMSNorm": lambda n: normwise.RMSNorm(n(4), dim=n(2)),
    "GroupNorm": lambda n: normwise.GroupNorm(n(1), n(3)),
    "BatchNorm1d": lambda n: normwise.BatchNorm1d(n(3), virtual_batch_size=n(1)),
    "BatchRenorm1d": lambda n: normwise.BatchRenorm1d(n(3)),
    "SyncBatchNorm": lambda n: normwise.SyncBatchNorm(n(3)),
    "FrozenBatchNorm1d": lambda n: normwise.FrozenBatchNorm1d(n(3)),
    "InstanceNorm1d": lambda n: normwise.InstanceNorm1d(n(3)),
    "LSTM": lambda n: normwise.LSTM(n(4), n(6), n(2), proj_size=n(3)),
    "GRU": lambda n: normwise.GRU(n(4), n(6), norm="batch", num_stat_steps=n(5)),
    "RNN": lambda n: normwise.RNN(n(4), n(6)),
    "LSTMCell": lambda n: normwise.LSTMCell(n(4), n(6)),
    "GRUCell": lambda n: normwise.GRUCell(n(4), n(6)),
    "RNNCell": lambda n: normwise.RNNCell(n(4), n(6), norm="batch", num_stat_steps=n(1)),
}


@pytest.mark.parametrize("build", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("integral", [np.int64, np.uint8, lambda n: np.prod((n, 1))], ids=["int64", "uint8", "prod"])
def test_sizes_are_integers_of_any_kind(build: Callable[..., nn.Module], integral: Callable[[int], Any]) -> None:
    def size(n: int) -> Any:
        return integral(n) if n > 0 else np.int64(n)

    layer, plain = build(size), build(int)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4) if "Cell" in type(layer).__name__ else torch.randn(2, 3, 4)
    same(layer(x), plain(x))
    assert repr(layer) == repr(plain)


@pytest.mark.parametrize("build", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("wrong", [float, str], ids=str)
def test_sizes_that_are_no_integers_are_refused(build: Callable[..., nn.Module], wrong: type) -> None:
    with pytest.raises(TypeError, match=rf"\w+ should be of type int, got: {wrong.__name__} \(.*: give a whole number"):
        build(lambda n: wrong(n))


TWO = torch.ones(2)
STANDS_FOR_NOTHING = ("device", "dtype", "process_group")  # torch's own business
ARGUMENTS = [
    (name, parameter)
    for name, build in {**SIZES, "RunningNorm": lambda n: normwise.RunningNorm(n(3))}.items()
    for kind in [type(build(int))]
    if " of " not in name
    for parameter in inspect.signature(kind).parameters.values()
    if parameter.name not in STANDS_FOR_NOTHING and not (name in ("GRU", "RNN") and parameter.name == "proj_size")
]


def built(name: str, **given: Any) -> nn.Module:
    kind = getattr(normwise, name)
    needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return kind(**{**dict.fromkeys(needed, 2), **given})


@pytest.mark.parametrize(("name", "parameter"), ARGUMENTS, ids=lambda a: a if isinstance(a, str) else a.name)
def test_what_is_no_such_argument_is_named(name: str, parameter: inspect.Parameter) -> None:
    for wrong in (".1", [0.5], 1j, TWO, object()):
        if parameter.name in ("normalized_shape", "shape", "dim") and isinstance(wrong, (list, Tensor)):
            continue  # of which some may be right
        said = rf"(?s)\b{parameter.name}\b.*({type(wrong).__name__}|{re.escape(repr(wrong)[:20])})"
        with pytest.raises((TypeError, ValueError), match=said) as raised:
            built(name, **{parameter.name: wrong})
        assert not re.search("not supported between|unsupported operand|ambiguous|unhashable", str(raised.value))


NO_NUMBERS = [
    (
        "BatchNorm1d",
        "momentum",
        "0.1",
        r"momentum must be a number in \[0, 1\] or None.* got str \('0.1'\): write momentum=0.1$",
    ),
    (
        "BatchNorm1d",
        "momentum",
        False,
        r"got bool \(False\): if it is meant for another argument, give that one by its",
    ),
    (
        "BatchNorm1d",
        "eps",
        None,
        r"eps must be a small positive number such as 1e-5, but got NoneType \(None\): give a num",
    ),
    ("LayerNorm", "eps", True, r"eps must be .*got bool \(True\): if it is meant for another argument"),
    ("LSTM", "eps", "1e-5", r"eps must be .*got str \('1e-5'\): write eps=1e-05$"),
    ("LSTM", "zoneout", "a", r"zoneout must be a probability in \[0, 1\], but got str \('a'\): give a number$"),
    (
        "LSTMCell",
        "forget_bias",
        "1",
        r"forget_bias must be a number or None, but got str \('1'\): write forget_bias=1$",
    ),
    ("GRU", "momentum", None, r"momentum must be a number in \[0, 1\], such as 0.1, but got NoneType"),
    ("RNNCell", "momentum", None, r"momentum must be a number in \[0, 1\], such as 0.1, but got NoneType"),
    ("BatchRenorm1d", "r_max", None, r"r_max must be a number, 1 or more, or a function of the step, but got NoneType"),
    ("RunningNorm", "clip", "5", r"clip must be a positive number or None, but got str \('5'\): write clip=5$"),
    (
        "RMSNorm",
        "elementwise_affine",
        "false",
        r"elementwise_affine should be of type bool, got: str \('false'\): give T",
    ),
    ("GRU", "bidirectional", None, r"bidirectional should be of type bool, got: NoneType \(None\): give True or False"),
    ("GroupNorm", "num_groups", True, r"num_groups should be of type int, got: bool \(True\): give a whole number"),
    (
        "BatchNorm2d",
        "num_features",
        TWO.expand(50, 2),
        r"num_features should be of type int, got: Tensor \(.{37}\.\.\.\)",
    ),
]


@pytest.mark.parametrize(("name", "argument", "wrong", "message"), NO_NUMBERS)
def test_an_argument_of_a_wrong_type_says_what_to_write(name: str, argument: str, wrong: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        built(name, **{argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument", "wrong", "message"),
    [
        *((n, "eps", math.inf, "eps must be positive, but got inf") for n in ("GroupNorm", "LSTM", "GRUCell")),
        ("RunningNorm", "eps", math.nan, "eps must be 0 or positive, but got nan"),
        ("LSTM", "forget_bias", math.nan, "forget_bias must be finite, but got nan"),
        ("LSTM", "dropout", None, r"dropout should be a number in range \[0, 1\] rep.*, but got NoneType \(None\)"),
        ("LSTM", "dropout", "0.5", r"dropout should be a number in range \[0, 1\] rep.*, but got str \('0.5'\)"),
        ("BatchNorm1d", "num_features", -3, "dimension -3: num_features must be 0 or more, but got -3"),
        ("GroupNorm", "num_channels", -2, "num_channels must be 0 or more, but got -2"),
        ("LayerNorm", "normalized_shape", (2, -1), "normalized_shape must be 0 or more, but got -1"),
        ("RunningNorm", "shape", -1, "shape must be 0 or more, but got -1"),
        ("GRUCell", "hidden_size", -1, "hidden_size must be 0 or more, but got -1"),
    ],
)
def test_a_number_that_cannot_be_is_refused(name: str, argument: str, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(name, **{argument: wrong})


@pytest.mark.parametrize("one", [np.float32, np.float64])
def test_numbers_are_of_any_kind(one: Callable[[float], Any]) -> None:
    x = torch.randn(4, 3, 5)
    same(normwise.BatchNorm1d(3, one(0.5), one(0.25))(x), normwise.BatchNorm1d(3, 0.5, 0.25)(x))
    same(normwise.LayerNorm(5, one(0.5), offset=one(0.5))(x), normwise.LayerNorm(5, 0.5, offset=0.5)(x))
    torch.manual_seed(0)
    expected = normwise.GRU(5, 3, eps=0.5, zoneout=0.25).eval()
    torch.manual_seed(0)
    same(normwise.GRU(5, 3, eps=one(0.5), zoneout=one(0.25)).eval()(x), expected(x))
    tensor = torch.tensor(0.5)
    assert normwise.BatchNorm1d(3, tensor, tensor)(x).isfinite().all()


def test_flags_are_of_any_kind() -> None:
    for no in (0, np.bool_(False), np.int64(0)):
        assert normwise.BatchNorm1d(3, affine=no, track_running_stats=no).state_dict() == {}
    for yes in (1, np.bool_(True)):
        assert len(normwise.BatchNorm1d(3, affine=yes, track_running_stats=yes).state_dict()) == 5


CALLS = {
    "batch_norm": lambda x, **given: normwise.functional.batch_norm(x, **given),
    "batch_norm without eps": lambda x, **given: normwise.functional.batch_norm(x, momentum=given["eps"]),
    "layer_norm": lambda x, **given: normwise.functional.layer_norm(x, (3,), **given),
    "rms_norm": lambda x, **given: normwise.functional.rms_norm(x, (3,), **given),
    "group_norm": lambda x, **given: normwise.functional.group_norm(x, 1, **given),
    "instance_norm": lambda x, **given: normwise.functional.instance_norm(x[..., None], **given),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", ["0.1", [1.0], True])
def test_what_is_no_number_in_a_call_is_named(call: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"(eps|momentum) must be a .*but got {type(wrong).__name__} \("):
        call(torch.randn(4, 3), eps=wrong)


LENGTHS = {
    "list": lambda t: t.tolist(),
    "tuple": lambda t: tuple(t.tolist()),
    "array": lambda t: t.numpy(),
    "int32 array": lambda t: t.numpy().astype(np.int32),
    "uint16 array": lambda t: t.numpy().astype(np.uint16),
    "reversed view": lambda t: t.numpy()[::-1].copy()[::-1],
    "read-only array": lambda t: np.broadcast_to(t.numpy(), t.shape),
    "NumPy integers": lambda t: list(t.numpy()),
    "0-d tensors": lambda t: list(t),
    "int8 tensor": lambda t: t.to(torch.int8),
    "uint16 tensor": lambda t: t.to(torch.uint16),
}
MASKS = {
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "reversed view": lambda t: t.numpy()[::-1].copy()[::-1],
    "read-only array": lambda t: np.broadcast_to(t.numpy(), t.shape),
    "list of arrays": lambda t: [row.numpy() for row in t],
}
SERIES = {
    "BatchNorm1d": lambda: normwise.BatchNorm1d(3),
    "BatchNorm1d of virtual batches": lambda: normwise.BatchNorm1d(3, virtual_batch_size=2),
    "BatchRenorm1d": lambda: normwise.BatchRenorm1d(3),
    "SyncBatchNorm": lambda: normwise.SyncBatchNorm(3),
    "FrozenBatchNorm1d": lambda: normwise.FrozenBatchNorm1d(3),
    "GroupNorm": lambda: normwise.GroupNorm(1, 3),
    "InstanceNorm1d": lambda: normwise.InstanceNorm1d(3),
    "LayerNorm": lambda: normwise.LayerNorm(3, dim=1),
    "RMSNorm": lambda: normwise.RMSNorm(3, dim=1),
}
RECURRENT = {
    "LSTM": lambda: normwise.LSTM(3, 4),
    "LSTM without a norm": lambda: normwise.LSTM(3, 4, norm=None),
    "GRU": lambda: normwise.GRU(3, 4, norm="batch"),
    "RNN": lambda: normwise.RNN(3, 4, norm="rms"),
}
each_series = pytest.mark.parametrize("build", SERIES.values(), ids=SERIES)
each_recurrent = pytest.mark.parametrize("build", RECURRENT.values(), ids=RECURRENT)
pytestmark = pytest.mark.filterwarnings("error")


@each_series
@pytest.mark.parametrize("form", LENGTHS.values(), ids=LENGTHS)
def test_norms_take_lengths_in_any_form(build: Callable[[], nn.Module], form: Callable[[Tensor], Any]) -> None:
    x, lengths, layer = torch.randn(4, 3, 5), torch.tensor([5, 2, 0, 3]), build()
    expected = build()(x, lengths=lengths)
    with torch.device("meta"):
        same(layer(x, lengths=form(lengths)), expected)


@each_recurrent
@pytest.mark.parametrize("form", LENGTHS.values(), ids=LENGTHS)
def test_recurrent_layers_take_lengths_in_any_form(
    build: Callable[[], nn.Module], form: Callable[[Tensor], Any]
) -> None:
    x, lengths, layer = torch.randn(5, 4, 3), torch.tensor([5, 2, 1, 3]), build()
    same(layer(x, lengths=form(lengths)), layer(x, lengths=lengths))
    for length in ([3], (3,), 3, np.int64(3), np.array([3])):
        if layer.recurrence.norm != "batch":
            same(layer(x[:, 0], lengths=length), layer(x[:, 0], lengths=torch.tensor([3])))


@each_series
@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS)
def test_norms_take_masks_in_any_form(build: Callable[[], nn.Module], form: Callable[[Tensor], Any]) -> None:
    x, mask, layer = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.7, build()
    same(layer(x, mask=form(mask)), build()(x, mask=mask))


@each_recurrent
@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS)
def test_recurrent_layers_take_resets_in_any_form(
    build: Callable[[], nn.Module], form: Callable[[Tensor], Any]
) -> None:
    x, reset, layer = torch.randn(5, 4, 3), torch.rand(5, 4) < 0.3, build()
    same(layer(x, reset=form(reset)), layer(x, reset=reset))
    if layer.recurrence.norm != "batch":
        same(layer.step(x[0], reset=form(reset[:1])[0]), layer.step(x[0], reset=reset[0]))


def test_one_sample_of_instance_norm() -> None:
    layer, x = normwise.InstanceNorm1d(3), torch.randn(3, 5)
    expected = layer(x, lengths=torch.tensor(2))
    for length in (2, [2], np.array([2])):
        same(layer(x, lengths=length), expected)
    for mask in ([True, True, False, False, False], np.arange(5) < 2):
        same(layer(x, mask=mask), expected)


def test_no_sample_at_all() -> None:
    for lengths in ([], (), np.zeros(0, np.int64)):
        assert normwise.GroupNorm(1, 3)(torch.randn(0, 3, 5), lengths=lengths).shape == (0, 3, 5)


X = torch.randn(4, 3, 5)
TOKENS = torch.randint(0, 2, (4, 5))
WRONG = [
    (
        {"lengths": [5.0, 2, 1, 1]},
        TypeError,
        r"lengths must be of an integer dtype.*float.*torch.tensor\(lengths\).long",
    ),
    ({"lengths": np.ones(4)}, TypeError, r"integer dtype, but got torch.float64: use lengths.astype\(int\)"),
    ({"lengths": torch.ones(4)}, TypeError, r"integer dtype, but got torch.float32: use lengths.long\(\)"),
    ({"lengths": [True] * 4}, TypeError, r"integer dtype, but got torch.bool"),
    ({"lengths": {5, 2}}, TypeError, r"lengths must be integers, one for each sample, as a tensor, list.*but got set"),
    ({"lengths": "5 2"}, TypeError, r"but got str"),
    ({"lengths": [5, None]}, TypeError, r"but got list"),
    ({"lengths": [[5, 2], [1]]}, TypeError, r"but got list"),
    ({"lengths": [5, 2]}, ValueError, r"lengths must be of shape \(4,\)"),
    ({"lengths": np.array([5, 2, 6, 1])}, ValueError, r"lengths must lie in \[0, 5\]"),
    (
        {"mask": TOKENS.tolist()},
        TypeError,
        r"mask must be of dtype torch.bool with True = valid.*tensor\(mask\).bool\(\)",
    ),
    (
        {"mask": TOKENS.numpy()},
        TypeError,
        r"but got torch.int64: use mask.astype\(bool\), inverted if True marks padding",
    ),
    ({"mask": TOKENS.float()}, TypeError, r"but got torch.float32: use mask.bool\(\), inverted"),
    (
        {"mask": "all"},
        TypeError,
        r"mask must be bool with True = valid, as a tensor, list, tuple or array, but got str",
    ),
    ({"mask": [True, False]}, ValueError, r"mask of shape \(2,\) does not fit"),
]


@each_series
@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_what_is_no_mask_or_length_is_named(build, call: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build()(X, **call)


@each_recurrent
@pytest.mark.parametrize(("call", "error", "message"), [w for w in WRONG if "lengths" in w[0]])
def test_what_is_no_length_of_a_sequence_is_named(build, call: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build()(X.permute(2, 0, 1), **call)


@each_recurrent
@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (TOKENS.T.tolist(), r"reset must be of dtype torch.bool with True where an episode starts.*\(reset\).bool\(\)"),
        (TOKENS.T.numpy(), r"but got torch.int64: use reset.astype\(bool\)"),
        (7, r"but got torch.int64"),
        (object(), r"reset must be bool with True where an episode starts, as a tensor.*but got object"),
    ],
)
def test_what_is_no_reset_is_named(build, reset: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()(X.permute(2, 0, 1), reset=reset)


@each_case
@pytest.mark.parametrize("wrong", [[1, 2], np.ones((4, 3)), None, "x"], ids=["list", "array", "None", "str"])
def test_what_is_no_tensor_is_named(case: Case, wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"expected a tensor as input, but got {type(wrong).__name__}: convert it first"
    ):
        case.ours()(wrong)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "LSTM", "GRU", "RNN"])
def test_what_is_no_tensor_is_named_by_recurrent_layers(name: str) -> None:
    layer = getattr(normwise, name)(3, 4)
    for call in (layer, *([layer.step] if hasattr(layer, "step") else [])):
        with pytest.raises(TypeError, match=r"expected a tensor.*but got list"):
            call([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("function", [normwise.functional.layer_norm, normwise.functional.rms_norm])
def test_one_size_is_taken_as_a_number_by_functions_too(function):
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    expected = function(x, (8,), weight)
    for size in (8, np.int64(8), torch.tensor(8), np.array([8]), torch.Size([8])):
        assert torch.equal(function(x, size, weight), expected)
    one, several = (
        torch.compile(lambda x, size=size: function(x, size, weight), backend="eager", fullgraph=True)
        for size in (8, (8,))
    )
    assert torch.equal(one(x), several(x))
    for wrong, said in ((8.0, r"float \(8\.0\)"), ("8", r"str \('8'\)"), (None, r"NoneType \(None\)")):
        with pytest.raises(TypeError, match=f"normalized_shape should be of type int, got: {said}"):
            function(x, wrong, weight)
