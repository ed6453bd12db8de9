"""convert(to="rms"): another norm; and exact=True: the same results, by centring what writes into the stream."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normwise
from support.surgery_models import assert_same_state, state
from support.tolerances import assert_close
from support.transformer_nets import GPT, Block, Encoder, SelfAttention, ViT

WIDTH = 16
TOKENS = torch.tensor([[3, 7, 1, 9, 4], [2, 2, 8, 0, 5]])


def randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """No gain is 1, no bias 0, and what is written has a mean."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p) + 0.1)
    return model.to(dtype).eval()


def gpt() -> nn.Module:
    model = GPT(WIDTH, blocks=2, norm=nn.LayerNorm)
    model.norm = nn.LayerNorm(WIDTH)
    return randomized(model)


class Heads(nn.Module):
    """nn.MultiheadAttention as SelfAttention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """One pre-norm block over tokens; `change` gets the stream at its end, `end` the result of the last norm."""

    def __init__(self, attention: nn.Module | None = None, change=lambda net, x: x, end=lambda net, y: net.head(y)):
        super().__init__()
        self.tokens = nn.Embedding(10, WIDTH)
        self.block = Block(WIDTH, attention or SelfAttention(WIDTH, 4, causal=True), nn.LayerNorm)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.change, self.end = change, end

    def forward(self, tokens: Tensor) -> Tensor:
        return self.end(self, self.norm(self.change(self, self.block(self.tokens(tokens)))))


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm1, self.norm2 = nn.Embedding(10, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.linear = SelfAttention(WIDTH, 4, causal=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear(x))


def convert(model: nn.Module, example: object, **options: object):
    return normwise.convert(model, to="rms", exact=True, example=example, **options)


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]


@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (gpt(), [TOKENS, torch.randint(50, (3, 11)), torch.randint(50, (1, 1))]),
        (randomized(ViT(WIDTH, 2)), [torch.randn(n, 3, 12, 12).double() for n in (2, 3)]),
        (randomized(Net(Heads())), [TOKENS, TOKENS[:, :3]]),
    ],
    ids=["GPT", "ViT", "MultiheadAttention"],
)
def test_every_norm_of_a_pre_norm_net_becomes_an_rms_norm_of_the_same_results(model, examples):
    before, count = state(model), len(norms_of(model))
    new, report = convert(model, examples[0])
    assert [type(m) for m in norms_of(new)] == [normwise.RMSNorm] * count
    assert not report.skipped
    assert sum("RMSNorm" in change.after for change in report.changed) == count
    for x in examples:
        assert_close(new(x), model(x), kind="composed", count=WIDTH)
    assert_same_state(model, before)
    assert len(norms_of(model)) == count
    assert type(norms_of(model)[0]) is nn.LayerNorm


def test_what_writes_into_the_stream_has_mean_zero_and_the_report_names_it():
    new, report = convert(gpt(), TOKENS)
    centred = {change.name: change.before for change in report.changed if change.after.startswith("centred")}
    assert centred == {
        "tokens": "nn.Embedding",
        "positions": "Parameter",
        **{f"blocks.{n}.{name}": "nn.Linear" for n in (0, 1) for name in ("attention.out", "down")},
    }
    for written in (new.tokens.weight, new.positions, new.blocks[0].down.weight.T, new.blocks[1].attention.out.bias):
        assert float(written.detach().mean(-1).abs().max()) < 1e-15
    assert "its bias is in head" in str(report)
    assert "proved in float64" in str(report)


def test_a_norms_bias_goes_into_linear_layers_without_one_too():
    model = gpt()
    assert model.head.bias is None
    new, _ = convert(model, TOKENS)
    assert_close(new.head.bias, model.head.weight @ model.norm.bias, kind="composed")


def test_in_float32_it_is_proved_in_float64_and_rounded_once():
    model = randomized(ViT(WIDTH, 2), torch.float32)
    x = torch.randn(2, 3, 12, 12)
    new, _ = convert(model, x)
    assert new.head.weight.dtype == torch.float32
    assert_close(new(x), model(x), kind="composed", count=100)


def test_in_place_gains_and_weights_stay_the_same_objects():
    model = gpt()
    expected, gain, weight, optimizer = model(TOKENS), model.norm.weight, model.tokens.weight, list(model.parameters())
    new, _ = convert(model, TOKENS, inplace=True)
    assert new is model
    assert model.norm.weight is gain
    assert model.tokens.weight is weight
    assert {id(p) for p in model.parameters()} - {id(p) for p in optimizer} == {id(model.head.bias)}
    assert_close(model(TOKENS), expected, kind="composed", count=WIDTH)


def test_the_mode_stays_and_the_random_state_too():
    model = gpt().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    new, _ = convert(model, TOKENS)
    assert torch.equal(torch.rand(3), expected)
    assert all(m.training for m in (*model.modules(), *new.modules()))


def test_where_limits_it_to_some_norms():
    model = gpt()
    new, report = convert(model, TOKENS, where="blocks.1.*")
    assert [type(m) for m in norms_of(new)] == [nn.LayerNorm] * 2 + [normwise.RMSNorm] * 2 + [nn.LayerNorm]
    assert [skip.reason for skip in report.skipped] == ["not meant by where="] * 3
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def test_dropout_in_the_stream_is_exact_in_evaluation_and_said_so():
    model = Net(change=lambda net, x: F.dropout(x, 0.3, net.training))
    model.block.attention = nn.Sequential(model.block.attention, nn.Dropout(0.1))
    model = randomized(model)
    new, report = convert(model, TOKENS)
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)
    notes = {change.name: change.note for change in report.changed}
    assert "dropout" not in notes["block.norm1"]
    assert "in training dropout (p=0.1)" in notes["block.norm2"]
    assert "in training dropout (p=0.3)" in notes["norm"]


def test_a_norm_whose_result_is_returned_keeps_its_bias_and_stays():
    model = randomized(Net(end=lambda net, y: y))
    new, report = convert(model, TOKENS)
    assert type(new.norm) is nn.LayerNorm
    assert type(new.block.norm1) is type(new.block.norm2) is normwise.RMSNorm
    assert [skip.name for skip in report.skipped] == ["norm"]
    assert "the model returns its result" in report.skipped[0].reason
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)
    model.norm = nn.LayerNorm(WIDTH, bias=False).double()
    assert type(convert(model, TOKENS).model.norm) is normwise.RMSNorm


def test_a_dropout_of_nothing_is_no_obstacle_to_a_bias():
    model = randomized(Net(end=lambda net, y: net.head(F.dropout(y, 0.0, net.training))))
    new, report = convert(model, TOKENS)
    assert not report.skipped
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


@pytest.mark.parametrize(
    "end",
    [
        lambda net, y: net.head(F.gelu(y)),
        lambda net, y: net.head(y + 1.0),
        lambda net, y: net.head(F.dropout(y, 0.1, net.training)),  # in training it would drop the bias too
    ],
)
def test_a_bias_goes_into_nothing_but_linear_layers(end):
    model = randomized(Net(end=end))
    new, report = convert(model, TOKENS)
    assert type(new.norm) is nn.LayerNorm
    assert "reads its result, and an RMSNorm has no bias" in report.skipped[0].reason
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def test_a_linear_layer_that_has_other_inputs_too_takes_no_bias():
    model = randomized(Net(end=lambda net, y: net.head(y) + net.head(torch.ones_like(y))))
    new, report = convert(model, TOKENS)
    assert type(new.norm) is nn.LayerNorm
    assert "head.weight, which would take its bias, has other inputs too" in report.skipped[0].reason
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def tied() -> nn.Module:
    model = Net()
    model.head.weight = model.tokens.weight
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (PostNorm(), "norm1.*attention.qkv reads the stream(?s:.*)norm2.*as in a post-norm net"),
        (tied(), r"tokens.weight, .* is a parameter of another layer too.*untie them first .*head.weight = "),
        (
            Net(end=lambda net, y: y @ net.tokens.weight.mT),
            "matmul reads the stream that tokens.weight writes into, and not through a LayerNorm",
        ),
        (Net(end=lambda net, y: F.linear(y, net.tokens.weight)), "is the weight of a linear layer too.*untie"),
        (Net(change=lambda net, x: x + net.head(x).sum()), "head reads the stream .* not through a LayerNorm"),
        (Net(change=lambda net, x: x if x.max().item() > 1e9 else x.clone()), "max reads the stream"),
        (Net(end=lambda net, y: (net.head(y), net.tokens(TOKENS))), "the model returns the stream itself"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_not_exact_is_refused_with_the_reason_and_nothing_has_changed(model, words, inplace):
    model = randomized(model)
    before, layers, expected = state(model), list(model.modules()), model(TOKENS)
    with pytest.raises(ValueError, match=words):
        convert(model, TOKENS, inplace=inplace)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net, x: x + 1.0, "a number is added to the stream"),
        (lambda net, x: x + torch.arange(WIDTH).to(x), "or makes by itself, goes into its stream"),
        (lambda net, x: x + F.gelu(net.block.down.weight.mean()), "gelu writes into its stream"),
    ],
)
def test_a_stream_that_something_else_writes_into_is_left_to_its_layer_norm(change, reason):
    model = randomized(Net(change=change))
    new, report = convert(model, TOKENS)
    assert type(new.norm) is nn.LayerNorm
    assert type(new.block.norm2) is normwise.RMSNorm
    assert [skip.name for skip in report.skipped] == ["norm"]
    assert reason in report.skipped[0].reason
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net, x: x * torch.linspace(0.5, 2, WIDTH).to(x), "(?s)mul reads.*norm: .*by another tensor"),
        (lambda net, x: F.dropout(x, 0.3, True), "dropout reads the stream"),
    ],
)
def test_a_stream_that_is_changed_feature_by_feature_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        convert(randomized(Net(change=change)), TOKENS)


def test_a_norm_with_hooks_stays():
    model = randomized(Net())
    model.norm.register_forward_hook(lambda *_: None)
    new, report = convert(model, TOKENS)
    assert type(new.norm) is nn.LayerNorm
    assert [skip.reason for skip in report.skipped] == ["it has hooks, which would see other numbers"]


def test_a_weight_that_is_computed_cannot_be_centred():
    model = Net()
    parametrizations.weight_norm(model.block.down)
    model = randomized(model)
    new, report = convert(model, TOKENS)
    assert type(new.block.norm1) is type(new.block.norm2) is normwise.RMSNorm
    assert type(new.norm) is nn.LayerNorm
    assert "weight of a layer that writes into its stream is computed in each call" in report.skipped[0].reason
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def test_untied_as_the_error_says_it_can_be_converted():
    model = randomized(tied())
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    new, report = convert(model, TOKENS)
    assert not report.skipped
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def test_what_scales_whole_rows_leaves_the_mean_at_zero():
    """A constant, stochastic depth, padding that is set to zero."""

    def change(net, x):
        keep = torch.tensor([[[1.0]], [[0.5]]]).to(x)
        return (0.5 * x / 3 * keep[: len(x)]).masked_fill(torch.zeros_like(x[..., :1], dtype=torch.bool), 0.0)

    model = randomized(Net(change=change))
    new, report = convert(model, TOKENS)
    assert not report.skipped
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


def test_a_sum_in_place_is_followed():
    def change(net, x):
        x += net.block.down(F.gelu(net.block.up(net.block.norm2(x))))
        return x

    model = randomized(Net(change=change))
    new, report = convert(model, TOKENS)
    assert not report.skipped
    assert_close(new(TOKENS), model(TOKENS), kind="composed", count=WIDTH)


class Transposed(nn.Module):
    """The norm goes over the positions, of which there are as many as features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, WIDTH, 1), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).flatten(2)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_proof_that_fails_says_by_how_much_and_nothing_has_changed(inplace):
    model = randomized(Transposed())
    before = state(model)
    with pytest.raises(
        ValueError, match=r"would differ by [\d.e-]+ of the largest, and what norm is given has a mean of"
    ):
        convert(model, torch.randn(2, 3, 4, 4).double(), inplace=inplace)
    assert_same_state(model, before)
    assert type(model.norm) is nn.LayerNorm


def test_a_norm_that_the_example_does_not_call_stays():
    model = Net()
    model.other = nn.LayerNorm(WIDTH)
    _, report = convert(randomized(model), TOKENS)
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("other", "the example does not call it")]


@pytest.mark.parametrize("options", [{"exact": True, "example": TOKENS}, {}])
def test_torchs_encoder_layer_computes_a_layer_norm_whatever_stands_there(options):
    model = randomized(Encoder(norm_first=True))
    with pytest.raises(ValueError, match="fast path in evaluation computes a LayerNorm itself"):
        normwise.convert(model, to="rms", **options)


def test_exact_asks_for_an_example_and_is_for_rms_alone():
    with pytest.raises(ValueError, match="pass example="):
        normwise.convert(gpt(), to="rms", exact=True)
    with pytest.raises(ValueError, match="exact=True is for to='rms'"):
        normwise.convert(gpt(), to="layer", exact=True, example=TOKENS)
    with pytest.raises(ValueError, match="without options"):
        normwise.convert(gpt(), to="rms", exact=True, example=TOKENS, eps=1e-6)
    with pytest.raises(ValueError, match="no normalization layer"):
        normwise.convert(nn.Linear(2, 2), to="rms", exact=True, example=torch.randn(2, 2))


def test_without_exact_it_is_another_norm_of_the_same_gain():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-3), nn.BatchNorm1d(8), nn.RMSNorm(8))
    new, report = normwise.convert(copy.deepcopy(model), to="rms")
    assert type(new[1]) is type(new[3]) is normwise.RMSNorm
    assert new[1].eps == 1e-3
    assert torch.equal(new[1].weight, model[1].weight)
    assert [change.note for change in report.changed] == [
        "bias dropped; another norm, which leaves the mean in: fine-tune, or exact=True",
        "",
    ]
    assert "it is no LayerNorm" in report.skipped[0].reason
    x = torch.randn(5, 8)
    assert_close(new[1](x), F.rms_norm(x, (8,), model[1].weight, 1e-3))
    gain = model[1].weight
    normwise.convert(model, to="rms", inplace=True)
    assert model[1].weight is gain
