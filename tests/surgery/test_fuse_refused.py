"""fuse: what must stay as it is, because one call would give other numbers."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normwise
from support.fusing import assert_same_runs, done, fused, reason
from support.tolerances import assert_close

ROWS, IMAGES = torch.randn(6, 5), torch.randn(3, 4, 5, 5)


class Rest(nn.Module):
    """A part that can be fused, so that `fuse` does not raise; `forward` is in the classes derived."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(5)
        self.relu, self.relu_, self.drop = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.rate, self.kept = 0.5, []


def forward_of(function, **options):
    """A model with this forward behind the part that is fused; the fused one and its report."""

    class Model(Rest):
        def forward(self, x):
            return function(self, self.conv(self.fine(x)))

    model = Model()
    new, report = fused(model, IMAGES, **options)
    return model, new, report


def returned(self, x):
    y = self.norm(x)
    return F.relu(y), y


def used_twice(self, x):
    y = self.norm(x)
    return self.relu(y) + self.conv(y)


def used_after_it_was_changed(self, x):
    y = self.norm(x)
    F.relu(y, inplace=True)
    return y.sigmoid()


def dropped_out_between(self, x):
    return self.relu(self.drop(self.norm(x)))


def doubled(self, x):
    y = self.norm(x)
    return F.relu(y + y)


def scaled(self, x):
    return F.relu(torch.add(self.norm(x), x, alpha=2))


def with_a_number(self, x):
    return F.relu(self.norm(x) + 1)


def other_slope(self, x):
    return F.leaky_relu(self.norm(x), 0.2)


def called_in_between(self, x):
    y = self.norm(x)
    z = self.norm(x * 3)
    return F.relu(y) * z.mean()


def into_what_others_hold(self, x):
    held = x.view(-1)
    x += self.norm(x * 2)
    return F.relu(x) + held.view_as(x)


def looks_at_statistics_in_between(self, x):
    y = self.norm(x)
    mean = self.norm.running_mean.clone()
    return F.relu(y) + mean[:, None, None]


def looks_at_statistics_before(self, x):
    mean = self.norm.running_mean
    y = self.norm(x)
    mean = mean * 2
    return F.relu(y) + mean[:, None, None]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (looks_at_statistics_in_between, "statistics are looked at"),
        (looks_at_statistics_before, "statistics are looked at"),
        (returned, "goes into relu and what the forward returns"),
        (used_twice, "goes into nn.ReLU relu and nn.Conv2d conv"),
        (used_after_it_was_changed, "goes into relu and sigmoid"),
        (dropped_out_between, "nn.Dropout drop, which is no activation"),
        (doubled, "add, which is no activation"),
        (scaled, "add, which is no activation"),
        (with_a_number, "add, which is no activation"),
        (other_slope, "leaky_relu, which is no activation"),
        (called_in_between, "called once more before"),
        (into_what_others_hold, r"in place \(\+=\)"),
    ],
)
def test_batch_norms_that_must_be_called_by_themselves(function, why):
    _, _, report = forward_of(function)
    assert "fine.0" in done(report)
    assert re.search(why, reason(report, "norm")), reason(report, "norm")


def test_an_input_that_is_changed_before_the_activation():
    class Model(Rest):
        def forward(self, x):
            x = self.fine(x)
            y = self.norm(x)
            x.mul_(3)
            return F.relu(y) + x

    model = Model().eval()
    new, report = normwise.fuse(model)
    assert "may change its input in place" in reason(report, "norm")
    with torch.no_grad():
        assert torch.allclose(new(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def sum_changed_before_the_norm(self, x):
    total = x + self.conv(x)
    total.mul_(2)
    return self.ln(total) + total


def sum_into_what_others_hold(self, x):
    held = x[:, :2]
    x += x.detach() * 0.5
    return self.ln(x).sum() + held.sum()


def summed_behind(self, x):
    return F.relu(self.ln(self.conv(x)) + x)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (sum_changed_before_the_norm, "changes tensors in place"),
        (sum_into_what_others_hold, r"\(\+=\)"),
        (summed_behind, "adds before it normalizes"),
    ],
)
def test_layer_norms_that_must_be_called_by_themselves(function, why):
    _, _, report = forward_of(function)
    assert re.search(why, reason(report, "ln")), reason(report, "ln")


def test_a_residual_of_another_shape_or_dtype_is_added_as_it_was():
    class Model(Rest):
        def forward(self, x, r):
            return F.relu(self.norm(x) + r)

    model = Model()
    for r in (torch.randn(4, 1, 1), torch.randn(3, 4, 1, 1), torch.randn(1, 4, 5, 5)):
        _, report = fused(model, IMAGES, r)
        assert done(report)["norm"] == "nn.BatchNorm2d + add + relu"
    new, _ = normwise.fuse(model.eval())
    got = new(IMAGES, torch.ones(3, 4, 5, 5, dtype=torch.float64))
    assert got.dtype == torch.float64
    with pytest.raises(RuntimeError, match="size"):
        new(IMAGES, torch.ones(3, 4, 5, 4))
    assert_close(new(IMAGES, 1.0), model(IMAGES, 1.0), kind="composed", count=100)


def test_the_residual_may_be_the_input_of_the_norm():
    _, _, report = forward_of(lambda self, x: F.relu(self.norm(x) + x))
    assert done(report)["norm"] == "nn.BatchNorm2d + add + relu"


def test_layer_norm_of_a_tensor_and_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x):
            y = x + x
            return self.norm(y) * y

    _, report = fused(Model(), ROWS)
    assert done(report) == {"norm": "add + nn.LayerNorm"}


def test_a_norm_with_two_calls_in_a_row_updates_its_averages_in_their_order():
    def forward(self, x):
        return F.relu(self.norm(x)) + F.relu(self.norm(2 * x))

    _, _, report = forward_of(forward)
    assert done(report)["norm"].count("relu") == 1


def test_one_activation_in_several_places():
    def forward(self, x):
        return self.relu_(self.conv(self.relu_(self.norm(x)))) + self.relu_(x * 1)

    _, new, report = forward_of(forward)
    assert done(report)["norm"] == "nn.BatchNorm2d + nn.ReLU relu_"
    assert type(new.relu_) is nn.ReLU


def test_a_shared_norm_is_fused_where_it_can_be():
    class Model(Rest):
        def forward(self, x):
            return self.tail(self.conv(F.relu(self.norm(x))))

    model = Model()
    model.tail = nn.Sequential(model.norm, nn.Conv2d(4, 2, 1))
    new, report = fused(model, IMAGES)
    assert new.tail[0] is new.norm
    (change,) = [c for c in report.changed if "norm" in c.name]
    assert change.name == "norm, tail.0"
    assert "behind it comes nn.Conv2d 1" in change.note


def test_other_branches_in_training_and_evaluation():
    def forward(self, x):
        if self.training:
            return self.conv(self.norm(x))
        return F.relu(self.norm(x))

    _, new, report = forward_of(forward)
    assert done(report)["norm"] == "nn.BatchNorm2d + relu"
    for training in (True, False):
        assert bool((new.train(training)(IMAGES) < 0).any()) is training


def test_flags_and_numbers_that_change_later():
    class Model(Rest):
        activated, skip = True, None

        def forward(self, x, gain=1.0):
            y = self.norm(x * self.rate)
            y = F.relu(y) if self.activated else y
            return (y if self.skip is None else y + self.skip) * gain

    model = Model()
    new, report = fused(model, IMAGES)
    assert "norm" in done(report)
    for name, value in (("rate", 2.0), ("activated", False), ("skip", 3.0)):
        for one in (model, new):
            setattr(one, name, value)
        assert_same_runs(new, model, (IMAGES,))
    assert torch.allclose(new.eval()(IMAGES, 3.0), model.eval()(IMAGES, 3.0), atol=1e-5)


def test_layers_taken_out_or_put_in_later():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
            self.extra = None
            self.between = nn.Identity()

        def forward(self, x):
            for norm in self.norms:
                x = F.relu(self.between(norm(x)))
            return x if self.extra is None else self.extra(x)

    model = Model()
    new, report = fused(model, IMAGES)
    assert len(report.changed) == 2
    for one in (model, new):
        one.norms.append(nn.BatchNorm2d(4, eps=3.0))
    assert_same_runs(new, model, (IMAGES,))
    for one in (model, new):
        del one.norms[1:]
        one.extra = nn.Tanh()
    assert_same_runs(new, model, (IMAGES,))
    for one in (model, new):
        one.between = nn.Hardtanh(-0.5, 0.5)
    assert_same_runs(new, model, (IMAGES,))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 5


def draws(self, x):
    return F.relu(self.norm(x)) if random.random() < 2 else x


def draws_by_torch(self, x):
    return F.relu(self.norm(x)) if float(torch.rand(())) < 2 else x


def without_gradients(self, x):
    with torch.no_grad():
        y = self.norm(x)
    return F.relu(y) + x


def asks_for_gradients(self, x):
    return F.relu(self.norm(x)) if torch.is_grad_enabled() else self.norm(x)


def gradient_of_its_own(self, x):
    return F.relu(self.norm(Double.apply(x)))


def checkpointed(self, x):
    return checkpoint(lambda x: F.relu(self.norm(x)), x, use_reentrant=False)


def keeps_it(self, x):
    y = F.relu(self.norm(x))
    self.last = y
    return y


def keeps_it_in_a_list(self, x):
    y = self.norm(x)
    self.kept.append(y)
    return F.relu(y)


def counts(self, x):
    self.rate = self.rate + 1
    return F.relu(self.norm(x))


def goes_by_values(self, x):
    return F.relu(self.norm(x)) if x.sum() > -1e9 else x


def goes_by_sizes(self, x):
    return F.relu(self.norm(x)) if x.shape[0] > 0 else x


def makes_a_tensor(self, x):
    return F.relu(self.norm(x + torch.ones(5)))


def asks_what_came_out(self, x):
    y = self.norm(x)
    return F.relu(y) if isinstance(y, torch.Tensor) else y[0]


def sets_the_data(self, x):
    y = F.relu(self.norm(x))
    y.data = y.data * 2
    return y


def another_operator(self, x):
    y = F.relu(self.norm(x))
    y //= 2
    return y


@pytest.mark.parametrize(
    "function",
    [
        draws,
        draws_by_torch,
        without_gradients,
        asks_for_gradients,
        gradient_of_its_own,
        checkpointed,
        keeps_it,
        keeps_it_in_a_list,
        counts,
        goes_by_values,
        goes_by_sizes,
        makes_a_tensor,
        asks_what_came_out,
        another_operator,
        sets_the_data,
    ],
)
def test_forwards_that_are_not_followed(function):
    class Model(Rest):
        def forward(self, x):
            return function(self, self.conv(self.fine(x)))

    model = Model()
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    new, report = normwise.fuse(model)
    assert list(done(report)) == ["fine.0"]
    assert "Model" in reason(report, "norm") or "forward" in reason(report, "norm")
    assert model.kept == new.kept == []
    assert not hasattr(new, "last")
    assert model.rate == new.rate == 0.5
    assert type(new) is Model
    assert torch.equal(torch.get_rng_state(), torch_state) or function is draws_by_torch
    assert random.getstate() == random_state or function is draws


def test_an_object_that_a_forward_goes_by():
    class Config:
        activated = True

    class Model(Rest):
        def __init__(self):
            super().__init__()
            self.config = Config()

        def forward(self, x):
            y = self.norm(self.fine(x))
            return F.relu(y) if self.config.activated else y

    _, report = fused(Model(), IMAGES)
    assert "config, a Config" in reason(report, "norm")


def test_layers_with_hooks():
    class Model(Rest):
        def forward(self, x):
            return self.relu(self.other(self.conv(self.relu_(self.norm(self.fine(x))))))

    model, seen = Model(), []
    model.norm.register_forward_hook(lambda m, a, y: seen.append(y))
    model.relu.register_full_backward_hook(lambda m, a, b: None)
    _, report = fused(model, IMAGES)
    assert "it has hooks" in reason(report, "norm")
    assert "nn.ReLU behind it has hooks" in reason(report, "other")
    assert seen


def test_norms_that_are_not_only_norms():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Kept(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        nn.Sequential(Kept(4), nn.ReLU()),
        nn.Sequential(Scaled(4), nn.ReLU()),
        nn.Sequential(normwise.BatchNorm2d(4, act="gelu"), nn.ReLU()),
    )
    _, report = fused(model, IMAGES)
    assert done(report) == {"0.0": "Kept + nn.ReLU 1"}
    assert "example=" in reason(report, "1.0") or "nothing" in reason(report, "1.0")
    assert "activation already" in reason(report, "2.0")


def test_normwises_own_norms_and_those_without_affine_parts_or_averages():
    model = nn.Sequential(
        nn.Sequential(normwise.GroupNorm(2, 4), nn.SiLU(inplace=True)),
        nn.Sequential(nn.InstanceNorm2d(4), nn.LeakyReLU()),
        nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.GELU()),
        nn.Sequential(normwise.LayerNorm(4, dim=1), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU()),
    )
    _, report = fused(model, IMAGES)
    assert len(report.changed) == 5


def test_a_frozen_norm_stays_frozen():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    normwise.freeze(model, inplace=True) if "inplace" in normwise.freeze.__code__.co_varnames else normwise.freeze(
        model
    )
    new, _ = normwise.fuse(model)
    new.train()
    assert not new[1].training
    before = new[1].running_mean.clone()
    new(IMAGES)
    assert torch.equal(new[1].running_mean, before)


def test_a_proof_that_fails_leaves_the_model_as_it_was(monkeypatch):
    from normwise.surgery.fusing import pairs

    monkeypatch.setattr(pairs, "named", lambda module: "relu" if isinstance(module, nn.SiLU) else None)
    monkeypatch.setattr(pairs.Graph, "_act", lambda self, node: "relu")
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"differs by .* the model is as it was"):
        normwise.fuse(model, example=IMAGES, inplace=True)
    assert [type(m) for m in model.modules()] == kinds
    assert int(model[0].num_batches_tracked) == 0


def test_a_copy_of_a_model_is_needed():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

        def __deepcopy__(self, memo):
            raise RuntimeError("there can be only one")

        def forward(self, x):
            return self.part(x)

    with pytest.raises(RuntimeError, match="inplace=True"):
        normwise.fuse(Alone())
    _, report = normwise.fuse(Alone(), example=IMAGES, inplace=True)
    assert len(report.changed) == 1
