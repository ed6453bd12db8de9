"""diffusers' norm layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery import norms
from support.tolerances import assert_close

normalization = pytest.importorskip("diffusers.models.normalization", reason="pip install 'normwise[models]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: normalization.RMSNorm(16, 1e-6), normwise.RMSNorm),
        (lambda: normalization.RMSNorm(16, 1e-6, elementwise_affine=False), normwise.RMSNorm),
        (lambda: normalization.MochiRMSNorm(16, 1e-6), normwise.RMSNorm),
        (lambda: normalization.FP32LayerNorm(16), normwise.LayerNorm),
    ],
)
def test_a_layer_is_exchanged_and_computes_the_same(layer, expected):
    model = nn.Sequential(nn.Linear(8, 16), layer())
    with torch.no_grad():
        for p in model[1].parameters():
            p.uniform_(0.5, 1.5)
    x = torch.randn(3, 5, 8)
    new, _ = normwise.convert(model, to="normwise", example=x)
    assert type(new[1]) is expected
    assert_close(new(x), model(x), kind="composed", scale=5.0)
    half, twin = new.to(torch.bfloat16), model.to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16()), twin(x.bfloat16()))


def test_of_an_adaptive_norm_the_norm_inside_is_exchanged():
    model = normalization.AdaLayerNormZero(16, num_embeddings=None)
    report = normwise.convert(model, to="normwise").report
    assert [change.name for change in report.changed] == ["norm"]
    assert "second input" in next(skip.reason for skip in report.skipped if skip.layer == "AdaLayerNormZero")


def test_global_response_normalization_is_refused_by_name():
    with pytest.raises(ValueError, match="global response normalization"):
        normwise.convert(nn.Sequential(normalization.GlobalResponseNorm(8)), to="normwise")
    assert norms.stands_for(normalization.GlobalResponseNorm(8)) is None
