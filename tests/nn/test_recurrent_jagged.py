"""Jagged nested tensors in recurrent layers: what the same sequences give padded, with lengths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.tolerances import assert_close

INPUT, HIDDEN = 3, 5
LENGTHS = {"ragged": [4, 0, 6, 1], "equal": [4, 4, 4], "one": [5]}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
LAYERS = {
    "LSTM": lambda **o: normwise.LSTM(INPUT, HIDDEN, **o),
    "LSTM of two layers both ways": lambda **o: normwise.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=2, **o),
    "GRU both ways": lambda **o: normwise.GRU(INPUT, HIDDEN, bidirectional=True, between="rms", num_layers=2, **o),
    "RNN": lambda **o: normwise.RNN(INPUT, HIDDEN, norm="rms", **o),
    "LSTM with batch norm": lambda **o: normwise.LSTM(INPUT, HIDDEN, norm="batch", num_stat_steps=7, **o),
    "LSTM without a norm": lambda **o: normwise.LSTM(INPUT, HIDDEN, norm=None, **o),
    "GRU without a norm": lambda **o: normwise.GRU(INPUT, HIDDEN, norm=None, **o),
}


def jagged(values: Tensor, lengths: list[int]) -> Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def parts(output: Tensor, state: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [output, *(state if isinstance(state, tuple) else (state,))]


@each_lengths
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "with a state"])
@pytest.mark.parametrize("name", LAYERS)
def test_jagged_equals_padded(name: str, lengths: list[int], batch_first: bool, with_state: bool) -> None:
    layer = LAYERS[name](batch_first=batch_first, dtype=torch.float64)
    if layer.recurrence.norm == "batch":
        lengths = [length + 1 for length in lengths] * 2  # each step needs more than one sample
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(sum(lengths), INPUT, dtype=torch.float64, requires_grad=True)
    x = jagged(values, lengths)
    padded = torch.zeros(*valid.shape, INPUT, dtype=torch.float64).masked_scatter(valid[..., None], values)
    states, hx = [], None
    if with_state:
        directions = layer.num_layers * (1 + layer.bidirectional)
        sizes = [layer.proj_size or HIDDEN, *([HIDDEN] if layer.cell == "lstm" else [])]
        states = [torch.randn(directions, len(lengths), s, dtype=torch.float64, requires_grad=True) for s in sizes]
        hx = tuple(states) if len(states) == 2 else states[0]
    other = copy.deepcopy(layer)
    output, ours = layer(x, hx)
    assert output.is_nested
    assert output.layout == torch.jagged
    assert output.shape[:2] == x.shape[:2]  # of the same sequences, so that the two can be added
    found = parts(output.values(), ours)
    y, theirs = other(padded if batch_first else padded.transpose(0, 1), hx, lengths=lengths)
    expected = parts((y if batch_first else y.transpose(0, 1))[valid], theirs)

    upstream = [torch.randn_like(t) for t in found]
    grads = [
        torch.autograd.grad(outputs, [values, *states, *module.parameters()], upstream, allow_unused=True)
        for outputs, module in ((found, layer), (expected, other))
    ]
    for actual, truth in zip(found, expected, strict=True):
        assert_close(actual, truth)
    for actual, truth in zip(*grads, strict=True):
        assert_close(actual, truth, kind="grad", scale=10.0)
    for n, t in other.state_dict().items():
        assert_close(layer.state_dict()[n], t)


def test_what_goes_with_a_jagged_tensor() -> None:
    lengths = LENGTHS["ragged"]
    layer, x = normwise.GRU(INPUT, HIDDEN, batch_first=True), jagged(torch.randn(sum(lengths), INPUT), lengths)
    reset = torch.rand(len(lengths), max(lengths)) < 0.5
    padded = layer(x.to_padded_tensor(0)[:, : max(lengths)], lengths=x.offsets().diff(), reset=reset)[0]
    assert_close(layer(x, reset=reset)[0].to_padded_tensor(0)[:, : max(lengths)], padded)
    model = nn.Sequential(normwise.BatchNorm1d(INPUT), layer)
    assert model(x)[0].shape[1] == x.shape[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_what_does_not_fit_is_named(name: str, norm: str | None) -> None:
    layer = getattr(normwise, name)(INPUT, HIDDEN, norm=norm)
    x = jagged(torch.randn(6, INPUT), [4, 2])
    with pytest.raises(ValueError, match=r"lengths together with a nested tensor: it states its own lengths"):
        layer(x, lengths=[4, 2])
    with pytest.raises(RuntimeError, match=r"Expected 3, got 4"):
        layer(jagged(torch.randn(6, 4), [4, 2]))
    with pytest.raises(ValueError, match=rf"{name}: expected a jagged tensor \(N, L, C\).*but got \(2, 3, L\)"):
        layer(x.transpose(1, 2))
    with pytest.raises(TypeError, match=r"expected a nested tensor with layout=torch.jagged and no holes"):
        layer(torch.nested.nested_tensor([torch.randn(2, INPUT), torch.randn(1, INPUT)]))


def test_where_lengths_are_not_known_the_way_out_is_named() -> None:
    layer = torch.compile(normwise.GRU(INPUT, HIDDEN), backend="eager")
    with pytest.raises(ValueError, match=r"give x.to_padded_tensor\(0\) with lengths=x.offsets\(\).diff\(\)$"):
        layer(jagged(torch.randn(6, INPUT), [4, 2]))
