"""torch.onnx.export of the layers in evaluation: the operators that ONNX has for them, and the numbers that ONNX
Runtime then gives."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.norm_cases import randomize
from support.recurrent_cases import away_from_start
from support.tolerances import assert_close

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra normwise[onnx] and onnxruntime are not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # of the exporter's own code
    "ignore::FutureWarning",
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The exporter logs that torchvision is missing, at every export."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Padded(nn.Module):
    """Layers that are told which steps count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = randomize(normwise.BatchNorm1d(4, act="silu"))
        self.lstm = normwise.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[-1]) < lengths[:, None]
        y = self.norm(x, mask=mask, residual=x)
        output: Tensor = self.lstm(y.transpose(1, 2), lengths=lengths)[0]
        return output


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **options: Any) -> tuple[Counter, Callable]:
    """The operators of the graph, and a function that runs it."""
    program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False, opset_version=18, **options)
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [i.name for i in session.get_inputs()]

    def run(*values: Tensor) -> Tensor:
        fed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return Counter(node.op_type for node in program.model.graph), run


IMAGE, ROWS, SERIES = (2, 4, 5, 6), (2, 3, 4), (5, 2, 4)


@pytest.mark.parametrize(
    ("layers", "shape", "operators"),
    [
        (
            [normwise.BatchNorm2d(4, act="relu"), normwise.FrozenBatchNorm2d(4), normwise.BatchRenorm2d(4)],
            IMAGE,
            {"BatchNormalization": 3, "Relu": 1},
        ),
        (
            [normwise.SyncBatchNorm(4), normwise.LayerNorm(4, dim=1), normwise.LayerNorm((5, 6))],
            IMAGE,
            {"BatchNormalization": 1, "LayerNormalization": 2, "Transpose": 2},
        ),
        (
            [normwise.InstanceNorm2d(4, affine=True), normwise.GroupNorm(2, 4)],
            IMAGE,
            {"InstanceNormalization": 2, "Reshape": 2, "Mul": 1, "Add": 1},
        ),
        (
            [normwise.BatchNorm2d(4, act="hardswish"), normwise.BatchNorm2d(4, act="relu6")],
            IMAGE,
            {"BatchNormalization": 2, "HardSwish": 1, "Clip": 1},
        ),
        (
            [normwise.RMSNorm(4, act=act) for act in ("hardsigmoid", "elu", "gelu_tanh", "softplus", "mish")],
            ROWS,
            None,
        ),
        ([normwise.RMSNorm(4)], ROWS, None),  # ONNX has it from opset 23
        ([normwise.RMSNorm(4, offset=1.0), normwise.LayerNorm(4, offset=1.0, cast="input")], ROWS, None),
        ([normwise.LSTM(4, 6, norm=None)], SERIES, None),
    ],
    ids=["batch", "layer", "instance and group", "hard acts", "smooth acts", "rms", "offset and cast", "plain lstm"],
)
def test_standard_operators_and_the_same_numbers(layers, shape, operators, tmp_path):
    model = nn.Sequential(*map(randomize, layers))
    x = torch.randn(shape)
    found, run = exported(model, (x,), tmp_path)
    if operators is not None:
        assert dict(found) == operators
    y = model(x)
    assert_close(run(x), y[0] if isinstance(y, tuple) else y, kind="composed", count=60)


def test_a_normalized_lstm_is_unrolled_without_the_operator_lstm(tmp_path):
    """A norm stands inside the step, which ONNX' LSTM has not: as many steps as the example had are written out."""
    layer, x = normwise.LSTM(4, 6), torch.randn(SERIES)
    found, run = exported(layer, (x,), tmp_path)
    assert found["LSTM"] == found["Loop"] == found["Scan"] == 0
    assert found["LayerNormalization"] == 1 + 2 * len(x)  # over all inputs at once; then over h and c in each step
    assert_close(run(x), layer(x)[0], kind="composed", count=60)


@pytest.mark.parametrize(
    ("norm", "options"),
    [("layer", {"between": "layer", "residual": True}), (None, {"between": "rms"}), ("rms", {"residual": True})],
    ids=str,
)
def test_norms_and_skips_between_the_layers_of_a_stack(norm, options, tmp_path):
    layer, x = normwise.LSTM(4, 6, 2, norm=norm, bidirectional=True, **options), torch.randn(SERIES)
    away_from_start(layer)
    found, run = exported(layer, (x,), tmp_path)
    assert norm is not None or found["LSTM"] == 2
    assert_close(run(x), layer(x)[0], kind="composed", count=60, scale=2.0)


def test_masks_lengths_and_residuals(tmp_path):
    model, x, lengths = Padded().eval(), torch.randn(2, 4, 5), torch.tensor([3, 5])
    _, run = exported(model, (x, lengths), tmp_path)
    assert_close(run(x, lengths), model(x, lengths), kind="composed", count=60)
    other = torch.tensor([4, 1])
    assert_close(run(x, other), model(x, other), kind="composed", count=60)


def test_the_batch_may_vary(tmp_path):
    layer = randomize(normwise.LayerNorm(4, dim=1))
    _, run = exported(layer, (torch.randn(IMAGE),), tmp_path, dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(7, *IMAGE[1:])
    assert_close(run(x), layer(x), count=4)


def test_a_folded_model_has_no_norm_left(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 3, 2), randomize(normwise.BatchNorm2d(3, act="relu"))).eval()
    x = torch.randn(IMAGE)
    found, run = exported(normwise.fold(model).model, (x,), tmp_path)
    assert dict(found) == {"Conv": 1, "Relu": 1}
    assert_close(run(x), model(x), kind="composed", count=60)
