"""What a diagnosis refuses, with the cure; and what it takes although it looks odd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import DiagnosisError, diagnose

cross_entropy = nn.functional.cross_entropy


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(samples: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.randint(3, (samples,))


X, Y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], cross_entropy, "batches is empty"),
        (X, cross_entropy, r"batches must be an iterable of pairs \(inputs, target\).*Tensor.*\[\(inputs, target\)\]"),
        (3, cross_entropy, "batches must be an iterable of pairs"),
        ("train", cross_entropy, r"batches must be an iterable of pairs .*, but got str: give the batches themselves"),
        ([X], cross_entropy, r"loss raised.*batch 0 is Tensor without a target.*several inputs as a tuple"),
        ([{"input": X}], cross_entropy, "loss raised.*batch 0 is dict without a target.*hold one of labels"),
        ([(X, Y)], None, "no loss was given, and the model's output .Tensor. holds none: pass loss="),
        ([(X, Y, Y)], cross_entropy, "batch 0 is 3 items"),
        (
            [(X[:, :5], Y)],
            cross_entropy,
            "the model raised RuntimeError in train mode on batch 0: .*Cure: see that model",
        ),
        ([((X, X), Y)], cross_entropy, "TypeError.*Cure: a tuple of inputs is given as model"),
        ([({"y": X}, Y)], cross_entropy, "TypeError.*a dict as model"),
        (
            [(X[:1], Y[:1])],
            cross_entropy,
            "more than 1 value per channel.*two samples, or model, _ = normwise.convert",
        ),
        ([(X, Y)], lambda out, y: out, r"loss must return a scalar tensor, but got shape \(4, 3\)"),
        ([(X, Y)], lambda out, y: cross_entropy(out, y).item(), "loss must return a scalar tensor, but got float"),
        ([(X, Y)], lambda out, y: cross_entropy(out.detach(), y), "without a gradient. Leave out .detach"),
        ([(X, Y)], lambda out: out, "loss raised TypeError.*Cure: loss is called as loss"),
        ([(X, Y[:3])], cross_entropy, "loss raised ValueError"),
    ],
)
def test_batches_and_losses_that_do_not_fit(batches, loss, message):
    with pytest.raises(DiagnosisError, match=f"(?s){message}"):
        diagnose(net(), batches, loss=loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "net", "model must be a torch.nn.Module, but got str"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0.weight' is not initialized yet.*run model\(inputs\)"),
        (lambda: nn.Linear(6, 3, device="meta"), "meta device"),
    ],
)
def test_models_that_do_not_fit(make, message):
    with pytest.raises(DiagnosisError, match=message):
        diagnose(make(), [batch()], loss=cross_entropy)


def test_a_loss_and_a_forward_that_are_no_functions_are_refused_before_the_model_runs():
    model = net()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(DiagnosisError, match=r"loss must be a function of output and target, .*got str \('ce'\)"):
        diagnose(model, [batch()], loss="ce")
    with pytest.raises(DiagnosisError, match=r"forward must be a function of model and batch, .*got str \('forward'\)"):
        diagnose(model, [batch()], loss=cross_entropy, forward="forward")


def test_arguments_that_do_not_fit():
    for value in (0, -1, True, 2.5):
        with pytest.raises(DiagnosisError, match="max_batches must be a positive integer"):
            diagnose(net(), [batch()], loss=cross_entropy, max_batches=value)
    with pytest.raises(DiagnosisError, match="none of the optimizer's parameters is the model's"):
        diagnose(net(), [batch()], loss=cross_entropy, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(DiagnosisError, match=r"must be a torch.optim.Optimizer, but got float"):
        diagnose(net(), [batch()], loss=cross_entropy, optimizer=0.1)


def test_reentrant_checkpoints_are_refused_and_the_others_taken():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = net(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)

    with pytest.raises(DiagnosisError, match=r"checkpoint\(..., use_reentrant=False\)"):
        diagnose(Checkpointed(True), [batch()], loss=cross_entropy)
    found = diagnose(Checkpointed(False), [batch()], loss=cross_entropy)
    assert found.layer("inner.1").calls == 1


def test_an_endless_loader_is_bounded():
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield batch()

    assert diagnose(net(), endless(), loss=cross_entropy, max_batches=3).data.batches == 3
    assert drawn == [0, 1, 2]


def test_modules_used_several_times_or_never():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.again = self.shared

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.shared(x))
            return self.out(x)

    found = diagnose(Odd(), [batch()], loss=cross_entropy)
    assert [layer.name for layer in found.layers] == ["shared", "out", "idle"]
    assert (found.layer("shared").calls, found.layer("shared").output.all.count) == (3, 3 * 20 * 6)
    idle = found.layer("idle")
    assert (idle.order, idle.calls, idle.input, idle.gradient) == (None, 0, None, None)
    assert found.findings == []


def test_wrappers_are_looked_through():
    model = net()
    parallel = diagnose(nn.DataParallel(model), [batch()], loss=cross_entropy)
    assert (parallel.wrapper, parallel.model) == ("DataParallel", "Sequential")
    compiled = diagnose(torch.compile(model, backend="eager"), [batch()], loss=cross_entropy)
    assert [layer.name for layer in compiled.layers] == ["0", "1", "2", "3"]
    inside = nn.Sequential(model[0], torch.compile(nn.Sequential(model[1], model[2]), backend="eager"), model[3])
    found = diagnose(inside, [batch()], loss=cross_entropy)
    assert sum(layer.calls for layer in found.layers) == 4


def test_a_model_without_parameters_or_without_trainable_ones():
    frozen = diagnose(net().requires_grad_(False), [batch()], loss=cross_entropy)
    assert frozen.trainable == 0
    assert frozen.layer("0").gradient is None
    bare = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Flatten())
    assert diagnose(bare, [batch()], loss=cross_entropy).layer("0").norm.gain is None


def test_inputs_of_every_kind():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(5, 6), nn.Linear(6, 3)

        def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.linear(self.lstm(x)[1][0][-1])

    parts = [torch.randn(length, 5) for length in (7, 4, 5, 2, 6)]
    packed = nn.utils.rnn.pack_sequence(parts, enforce_sorted=False)
    found = diagnose(Packed(), [(packed, torch.randint(3, (5,)))], loss=cross_entropy)
    inside = found.layer("lstm").recurrence[0]
    assert inside.error < 1e-5
    assert min(inside.gradient[:2]) > 0
    named = diagnose(
        normwise.BatchNorm1d(6), [({"input": X, "mask": torch.ones(4, 1, dtype=torch.bool)}, Y)], loss=cross_entropy
    )
    assert named.layers[0].norm.masked


def test_no_module_is_looked_at_on_the_way_back_of_a_checkpoint():
    """Its forward runs a second time there, which must not count."""
    inner = net()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert diagnose(Twice(), [batch()], loss=cross_entropy).layer("inner.0").output.all.count == 20 * 8


def test_layers_inside_a_transform_of_torch_func_are_left_alone_and_named():
    class OfEachSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head, self.out = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            slopes = torch.func.vmap(torch.func.jacrev(lambda row: self.head(self.norm(row))))(x)
            return self.out(slopes.sum(-1))

    found = diagnose(OfEachSample(), [batch()], loss=cross_entropy)
    assert found.layer("out").calls == 1
    assert any("torch.func" in note and "norm" in note and "head" in note for note in found.notes)


def test_what_is_nan_is_no_gap():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    text = str(diagnose(model, [batch()], loss=cross_entropy))
    assert "cannot be compared" in text
    assert "nan deviations" not in text
