"""The set-ups of the papers: that they are the papers', and what they record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from normwise.lab.errors import LabError
from normwise.lab.figures_of_papers import of_paper
from normwise.lab.report import commands
from normwise.lab.reproduce import reference, specs
from normwise.lab.run import Result, Series
from normwise.lab.score import score
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import PAPERS, load_task
from support.idx_files import write_folder

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("idx"), train=600, test=120)


def rows_of(wanted, path):
    with Store(path / "runs.sqlite") as store:
        sweep(wanted, store, jobs=1, finished=lambda *_: None, checkpoints=path / "checkpoints")
        return score(store.runs(spec.key() for spec in wanted))


@pytest.mark.parametrize(
    ("paper", "norms", "sizes", "steps"),
    [
        ("bn-mnist", {"none", "batch"}, {60}, {50_000}),
        ("ln-mnist", {"none", "batch", "layer"}, {128, 4}, {60 * (600 // 128), 60 * (600 // 4)}),
        ("rbn-pmnist", {"none", "batch-per-step", "layer"}, {100}, {100_000}),
    ],
)
def test_sizes_are_the_papers_(folder, paper, norms, sizes, steps):
    wanted = specs(paper, folder, seeds=2)
    assert {spec.norm for spec in wanted} == norms
    assert {spec.batch_size for spec in wanted} == sizes
    assert {spec.steps for spec in wanted} == steps
    assert {spec.seed for spec in wanted} == {0, 1}
    few = {spec.steps for spec in specs(paper, folder, seeds=1, quick=True)}
    assert few == {PAPERS[paper].quick_steps}
    assert {spec.steps for spec in specs(paper, folder, seeds=1, steps=7)} == {7}
    with pytest.raises(LabError, match="--quick and --steps both say"):
        specs(paper, folder, seeds=1, steps=7, quick=True)


def test_some_of_a_paper_s_arms_alone(folder):
    wanted = specs("ln-mnist", folder, seeds=3, norms=["layer"], batch_sizes=[128])
    assert {(spec.norm, spec.batch_size, spec.steps) for spec in wanted} == {("layer", 128, 60 * (600 // 128))}
    assert [spec.seed for spec in wanted] == [0, 1, 2]
    # The same run as among all of them: what was trained alone is not trained again.
    assert {spec.key() for spec in wanted} < {spec.key() for spec in specs("ln-mnist", folder, seeds=3)}
    assert specs("ln-mnist", folder, seeds=3, norms=["layer", "layer"], batch_sizes=[128, 128]) == wanted
    with pytest.raises(LabError, match="ln-mnist has no batch size 32: the paper trains at 128 and 4"):
        specs("ln-mnist", folder, seeds=3, batch_sizes=[32])


def test_the_nets_are_the_papers_(folder):
    def shapes(paper, norm):
        model = load_task(reference(paper, folder)).task.model(norm, 0)
        return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]

    assert shapes("bn-mnist", "batch") == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert shapes("ln-mnist", "layer") == [(1000, 784), (1000, 1000), (10, 1000)]
    task = load_task(reference("rbn-pmnist", folder)).task
    for norm in task.norms:
        model = task.model(norm, 0)
        assert [tuple(p.shape) for n, p in model.recurrent.named_parameters() if "weight" in n][:2] == [
            (400, 1),
            (400, 100),
        ]
        assert torch.equal(model.recurrent.weight_hh_l0, torch.eye(100).repeat(4, 1))
    assert task.clip == 1
    train, _ = task.cases
    assert train.inputs.shape == (600, 784, 1)
    plain = load_task(reference("bn-mnist", folder)).task.cases[0].inputs
    assert torch.equal((train.inputs[0, :, 0] > 127 / 255).sum(), plain[0].bool().sum())  # the same pixels,
    assert not torch.equal(train.inputs[0, :, 0] > 127 / 255, plain[0].bool())  # elsewhere


def test_bn_mnist_learns_and_has_its_figures(folder, tmp_path):
    rows = rows_of(specs("bn-mnist", folder, seeds=1, steps=300), tmp_path)
    batch = next(row for row in rows if row.norm == "batch")
    assert batch.stats["accuracy"].mean > 0.8
    series = batch.runs[0].series
    assert series["test/accuracy"].steps == list(range(0, 301, 20))
    assert series["test/accuracy"].values[-1] == pytest.approx(series["final/accuracy"].values[-1])
    titles = [figure.title for figure in of_paper(rows)]
    assert titles[0].startswith("Figure 1a")
    assert titles[1].startswith("Figure 1b and 1c")
    assert [panel.title for panel in of_paper(rows)[1].panels] == ["none", "batch"]


def test_ln_mnist_has_its_figures_over_epochs(folder, tmp_path):
    rows = rows_of(specs("ln-mnist", folder, seeds=1, norms=["layer"], steps=6), tmp_path)
    above, below = of_paper(rows)
    assert [panel.title for panel in above.panels] == ["batch size 128", "batch size 4"]
    assert above.panels[0].lines[0].x[-1] == pytest.approx(5 * 128 / 600)
    assert below.panels[1].lines[0].x[-1] == pytest.approx(6 * 4 / 600)
    (line,) = below.panels[1].lines
    assert all(0 <= low <= y <= high <= 1 for low, y, high in zip(line.low, line.y, line.high, strict=True))
    for row, _, command in commands(rows):
        assert command == (
            f"normwise reproduce ln-mnist --data DIR --norms layer --batch-sizes {row.batch_size} --steps 6 --seeds 1 "
            "--out again"
        )


@pytest.mark.parametrize("norm", ["none", "batch-per-step", "layer"])
def test_rbn_pmnist_learns_from_all_784_steps(folder, norm):
    task = load_task(reference("rbn-pmnist", folder)).task
    model, batch = task.model(norm, 0).train(), task.cases[0].select(slice(0, 4))
    optimizer = task.optimizer(model, 0.001)
    before = task.loss(task.forward(model, batch), batch)
    before.backward()
    optimizer.step()
    assert task.loss(task.forward(model, batch), batch) < before
    gradient = task.over_time(model, batch)["gradient"]
    assert gradient.shape == (4, 784)
    assert (gradient >= 0).all()  # without a norm the early ones are too small for float32
    assert (gradient[:, -100:] > 0).all()


@pytest.mark.parametrize("norm", ["none", "batch-per-step", "layer"])
def test_the_first_gradients_of_rbn_pmnist_are_finite(folder, norm):
    """Images begin with black pixels, row by row with more than a hundred: without noise in the initial state norms of
    zeros make the gradient overflow."""
    task = load_task(reference("rbn-pmnist", folder)).task
    train = task.cases[0].select(slice(0, 20))
    dark = replace(train, inputs=train.inputs.clone())
    dark.inputs[:, :100] = 0

    def largest(noise):
        model = replace(task, noise=noise).model(norm, 0).train()
        task.loss(task.forward(model, dark), dark).backward()
        assert all(p.grad is not None for p in model.parameters())
        of_time = task.over_time(model, dark)["gradient"]
        return torch.cat([of_time.flatten(), *[p.grad.flatten() for p in model.parameters()]]).abs().max()

    assert largest(task.noise).isfinite()
    if norm == "layer":
        assert not largest(0.0).isfinite()


def test_noise_in_the_initial_state_is_of_training_with_a_norm_alone(folder):
    task = load_task(reference("rbn-pmnist", folder)).task
    batch = task.cases[0].select(slice(0, 8))
    for norm, noisy in (("none", False), ("batch-per-step", True), ("layer", True)):
        model = task.model(norm, 0).train()
        start = model.initial(batch.inputs)
        assert bool(start.any()) == noisy
        assert float(start.std()) == pytest.approx(0.1 * noisy, rel=0.2)
        with torch.no_grad():
            assert torch.equal(task.forward(model, batch), task.forward(model, batch)) != noisy
            model.eval()
            assert torch.equal(task.forward(model, batch), task.forward(model, batch))


def test_rbn_pmnist_has_its_figures(folder, tmp_path):
    made_up = {
        "train/loss": Series([0, 1], [2.3, 2.2]),
        "time/step": Series([0, 1], [1.0, 1.0]),
        "heldout/gap": Series([0], [0.1]),
        "test/accuracy": Series([0, 2], [0.1, 0.3]),
        "final/accuracy": Series([2], [0.3]),
        "final/loss": Series([2], [2.0]),
        **{f"over-time/gradient/train/{when}": Series(list(range(784)), [0.5] * 784) for when in ("start", "end")},
    }
    with Store(tmp_path / "runs.sqlite") as store:
        wanted = specs("rbn-pmnist", folder, seeds=1, steps=2)
        for spec in wanted:
            store.add(spec.key(), spec.identity(), Result("done", "", made_up))
        accuracy, gradient = of_paper(score(store.runs(spec.key() for spec in wanted)))
    assert [line.norm for line in accuracy.panels[0].lines] == ["none", "batch-per-step", "layer"]
    assert [panel.title for panel in gradient.panels] == ["before the training", "after it"]
    assert [line.norm for line in gradient.panels[1].lines] == ["none", "batch-per-step", "layer"]
    assert gradient.panels[1].lines[0].x[-1] > 770


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_paper_size_is_60_000_cases(tmp_path):
    small, large = (spec.steps for spec in specs("ln-mnist", FASHION, seeds=1)[::3])
    assert (small, large) == (60 * 468, 60 * 15_000)
    rows = rows_of(specs("bn-mnist", FASHION, seeds=1, steps=20), tmp_path)
    assert rows[0].runs[0].series["train/cases"].values == [60_000]
