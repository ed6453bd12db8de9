"""One convention for batches: `diagnose` and `recalibrate` call a model alike, and so does whatever else runs one."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.surgery.batches import moved, run, split

X, N, Y = torch.randn(8, 4, 5), torch.randint(1, 6, (8,)), torch.randint(2, (8,))
Pair = namedtuple("Pair", "x y")
# What forwards were given; not in the model, where a diagnosis would put it back as it was.
GOT: list[tuple[str, ...]] = []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = normwise.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        GOT.append(("x", *(["lengths"] if lengths is not None else [])))
        return self.head(self.norm(x, lengths=lengths).mean(2))


class Labelled(Net):
    """As those of transformers: it is given labels, and computes its loss."""

    def forward(self, x: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = super().forward(x, lengths)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return OrderedDict(loss=loss, logits=logits)


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Returning(Labelled):
    def forward(self, x: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return Output(**super().forward(x, lengths, labels))


class Passing(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def loss(output: Any, target: Tensor) -> Tensor:
    assert torch.equal(target, Y)
    return nn.functional.cross_entropy(output, target)


BATCHES = {
    "pair": ((X, Y), ("x",)),
    "list": ([X, Y], ("x",)),
    "named pair": (Pair(X, Y), ("x",)),
    "several inputs": (((X, N), Y), ("x", "lengths")),
    "list of inputs": ([[X, N], Y], ("x", "lengths")),
    "named inputs": (({"x": X, "lengths": N}, Y), ("x", "lengths")),
    "dict with labels": ({"x": X, "lengths": N, "labels": Y}, ("x", "lengths")),
    "dict with a target": ({"x": X, "target": Y}, ("x",)),
    "encoding": (UserDict(x=X, label=Y), ("x",)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_diagnose_and_recalibrate_call_the_model_alike(name):
    batch, given = BATCHES[name]
    for call in (lambda m: normwise.diagnose(m, [batch], loss=loss), lambda m: normwise.recalibrate(m, [batch])):
        for model in (Net(), Passing(Net())):
            GOT.clear()
            call(model)
            assert set(GOT) == {given}


@pytest.mark.parametrize("model", [Labelled, Returning])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_a_model_that_computes_its_own_loss(model, wrap):
    batch = {"x": X, "lengths": N, "labels": Y}
    found = normwise.diagnose(wrap(model()), [batch, batch], use_pyproject=False)
    assert found.gap.eval_loss > 0
    # The gap is that of the logits, not of the loss that stands before them.
    assert found.layer("norm").gap > 0
    assert found.data.sizes == [8, 8]
    normwise.recalibrate(wrap(model()), [batch])


def test_the_error_of_a_loss_that_meets_an_output_with_logits_says_where_they_are():
    batch = {"x": X, "labels": Y}
    for model, words in ((Returning(), "output.logits"), (Labelled(), "output.logits")):
        with pytest.raises(normwise.diagnosis.DiagnosisError, match=f"(?s)Cure.*{words}.*leave out loss="):
            normwise.diagnose(model, [batch], loss=nn.functional.cross_entropy)
    found = normwise.diagnose(Returning(), [batch], loss=lambda out, y: nn.functional.cross_entropy(out.logits, y))
    assert found.gap.train_loss > 0


def test_a_batch_without_target_is_its_own():
    found = normwise.diagnose(nn.Linear(5, 5), [X[:, 0]], loss=nn.functional.mse_loss)
    assert found.data.sizes == [8]
    (alone,) = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:, 0]), batch_size=8)
    normwise.diagnose(nn.Linear(5, 5), [alone], loss=nn.functional.mse_loss)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    assert split(packed, nn.LSTM(4, 4)).inputs is packed


def test_three_parts_are_refused_by_both_with_the_way_out():
    batches, words = [(X, N, Y)], r"3 items, of which .*\(\(x, lengths\), target\).*forward=lambda"
    with pytest.raises(ValueError, match=words):
        normwise.diagnose(Net(), batches, loss=loss)
    with pytest.raises(ValueError, match=words):
        normwise.recalibrate(Net(), batches)
    for exact in (False, True):
        with pytest.raises(ValueError, match=f"^recalibrate: batch 2 is {words}"):
            normwise.recalibrate(Net(), [((X, N), Y), ((X, N), Y), (X, N, Y)], exact=exact)


def test_classes_that_are_floats_are_said_to_be():
    with pytest.raises(normwise.diagnosis.DiagnosisError, match=r"target is torch\.float32, and .*: target\.long\(\)"):
        normwise.diagnose(nn.Linear(5, 5), [(X[:, 0], Y.float())], loss=nn.functional.cross_entropy)


def test_labels_of_another_name_are_said_to_be_missing():
    with pytest.raises(normwise.diagnosis.DiagnosisError, match=r"one of labels, label, targets, target names: here"):
        normwise.diagnose(nn.Linear(5, 5), [{"input": X[:, 0], "y": Y}], loss=loss)


def test_a_data_set_is_no_batches():
    data = torch.utils.data.TensorDataset(X, Y)
    words = r"got TensorDataset: torch\.utils\.data\.DataLoader\(dataset, batch_size=32\)"
    with pytest.raises(TypeError, match=words):
        normwise.recalibrate(Net(), data)
    with pytest.raises(normwise.diagnosis.DiagnosisError, match=words):
        normwise.diagnose(Net(), data, loss=loss)


def test_a_loss_that_is_a_class_is_said_to_be():
    with pytest.raises(normwise.diagnosis.DiagnosisError, match=r"the class MSELoss.*loss=MSELoss\(\)"):
        normwise.diagnose(nn.Linear(5, 5), [X[:, 0]], loss=nn.MSELoss)


@dataclasses.dataclass
class Own:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("batch", [(X, N, Y), Own(X, Y), "a name"])
def test_forward_runs_any_other_structure(batch):
    def forward(model: nn.Module, given: Any) -> Any:
        assert given is batch
        return model(X)

    normwise.recalibrate(Net(), [batch], forward=forward)
    found = normwise.diagnose(
        Net(), [batch], loss=lambda out, b: nn.functional.cross_entropy(out, Y), forward=forward, use_pyproject=False
    )
    assert found.layer("norm").calls == 1


def test_the_error_of_a_forward_names_it():
    with pytest.raises(normwise.diagnosis.DiagnosisError, match=r"(?s)rain.*Cure: see that forward\(model, batch\)"):
        normwise.diagnose(Net(), [(X, Y)], loss=loss, forward=raising)


def raising(model: nn.Module, batch: Any) -> None:
    raise RuntimeError("rain")


def test_everything_goes_to_the_models_device():
    device = torch.device("meta")
    inside = moved({"a": X, "b": (N, [Y, "word"])}, device)
    assert all(t.is_meta for t in (inside["a"], inside["b"][0], inside["b"][1][0]))
    assert inside["b"][1][1] == "word"
    assert run(nn.Linear(5, 3, device="meta"), (X, Y)).is_meta


def test_a_monitor_looks_at_whatever_the_loop_runs():
    class Writer:
        tags: set[str] = set()  # noqa: RUF012

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags.add(tag)

    model = Returning()
    with normwise.Monitor(model, Writer()) as monitor:
        run(model, {"x": X, "lengths": N, "labels": Y}).loss.backward()
        monitor.step()
    assert {"normwise/norm/std", "normwise/head/gradient/weight"} <= Writer.tags


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


EXAMPLE_VERBS = {
    "convert": lambda model, x: normwise.convert(model, to="group", example=x),
    "fuse": lambda model, x: normwise.fuse(model, example=x),
    "fold": normwise.fold,
    "exact": lambda model, x: normwise.convert(model, to="rms", exact=True, example=x),
}


@pytest.mark.parametrize("verb", EXAMPLE_VERBS)
def test_an_example_on_which_the_model_raises_is_named(verb):
    model = nn.Sequential(*small(), nn.LayerNorm(2), nn.Linear(2, 2)).eval()
    with pytest.raises(RuntimeError, match=r"^the model raised RuntimeError on example=: mat1.*\nCure: ") as caught:
        EXAMPLE_VERBS[verb](model, torch.randn(3, 5))
    assert str(caught.value.__cause__).startswith("mat1 and mat2")
    with pytest.raises(TypeError, match=r"(?s)^the model raised TypeError on example=: .*as model\(\*example\)"):
        EXAMPLE_VERBS[verb](model, (torch.randn(3, 6), torch.randn(3, 6)))


BATCH_VERBS = {
    "recalibrate": normwise.recalibrate,
    "exact": lambda model, batches, **options: normwise.recalibrate(model, batches, exact=True, **options),
    "adapt": normwise.adapt,
    "entropy": lambda model, batches, **options: normwise.adapt(model, batches, entropy=True, **options),
}


@pytest.mark.parametrize("verb", BATCH_VERBS)
def test_a_batch_on_which_the_model_raises_is_named(verb):
    good, bad = torch.randn(4, 6), torch.randn(4, 5)
    with pytest.raises(
        RuntimeError, match=r"^the model raised RuntimeError on batch 1: mat1(?s:.*)Cure: see that model"
    ):
        BATCH_VERBS[verb](small(), [good, bad])
    with pytest.raises(
        TypeError, match=r"^the model raised TypeError on batch 0: (?s:.*)a tuple of inputs is given as"
    ):
        BATCH_VERBS[verb](small(), [((good, good), 0)])
    with pytest.raises(RuntimeError, match=r"on batch 0: mat1(?s:.*)Cure: see that forward\(model, batch\) runs"):
        BATCH_VERBS[verb](small(), [bad], forward=lambda model, batch: model(batch))
    for given in ("train", b"train"):
        with pytest.raises(TypeError, match=f"but got {type(given).__name__}: give the batches themselves"):
            BATCH_VERBS[verb](small(), given)
    with pytest.raises(TypeError, match=r"forward must be a function of model and batch, or None, but got str \('f'\)"):
        BATCH_VERBS[verb](small(), [good], forward="f")


def test_entropy_names_the_batch_too():
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 4:  # after the two that took the statistics
            raise ZeroDivisionError("of the user's")
        return model(batch)

    with pytest.raises(ZeroDivisionError, match="the model raised ZeroDivisionError on batch 1: of the user's"):
        normwise.adapt(small(), [torch.randn(4, 6)] * 2, entropy=True, forward=forward)


def test_an_error_that_is_not_made_of_a_text_stays_as_it_is():
    class Odd(Exception):
        def __init__(self, code, why):
            super().__init__(code, why)
            self.code = code

    def forward(model, batch):
        raise error

    for error in (Odd(3, "why"), KeyError("x")):
        with pytest.raises(type(error)) as caught:
            normwise.recalibrate(small(), [torch.randn(4, 6)], forward=forward)
        assert caught.value is error
        if sys.version_info >= (3, 11):
            assert "on batch 0" in error.__notes__[0]


def test_an_error_keeps_what_else_it_says():
    class Coded(ValueError):
        code = 0

    def forward(model, batch):
        error = Coded("of the user's")
        error.code = 7
        raise error

    with pytest.raises(Coded, match="on batch 0: of the user's") as caught:
        normwise.recalibrate(small(), [torch.randn(4, 6)], forward=forward)
    assert caught.value.code == 7


def test_torch_s_words_on_a_batch_of_one_come_first():
    with pytest.raises(ValueError, match=r"^Expected more than 1 value.*\nrecalibrate, on batch 1: give larger"):
        normwise.recalibrate(small(), [torch.randn(4, 6), torch.randn(1, 6)])
