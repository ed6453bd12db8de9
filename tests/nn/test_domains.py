"""BatchNorm of several domains, and the adaptation of a model to another one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import normwise
from support.tolerances import assert_close

CHANNELS, DOMAINS = 5, 3


def layer(**options: Any) -> normwise.BatchNorm1d:
    norm = normwise.BatchNorm1d(CHANNELS, domains=DOMAINS, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return norm


def alone(norm: normwise.BatchNorm1d, domain: int) -> normwise.BatchNorm1d:
    """A plain layer with what the domain has."""
    options = {name: getattr(norm, name) for name in ("momentum", "act", "dim", "correction", "affine")}
    one = normwise.BatchNorm1d(CHANNELS, **options).to(norm.running_mean.dtype)
    state = norm.state_dict()
    for name, value in one.state_dict().items():
        value.copy_(state[name][domain] if state[name].dim() > value.dim() else state[name])
    return one.train(norm.training)


OPTIONS = [{}, {"domain_affine": True}, {"momentum": None, "act": "silu"}, {"dim": -1}, {"correction": 0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_of_one_domain_is_that_of_a_layer_of_its_own(options):
    norm = layer(**options)
    twins = [alone(norm, i) for i in range(DOMAINS)]
    for step in range(5):
        i = step % 2  # of the last domain none
        x = torch.randn(4, CHANNELS, CHANNELS) * (1 + i) + i
        assert_close(norm(x, domain=i), twins[i](x))
    for i, twin in enumerate(twins):
        assert_close(norm.running_mean[i], twin.running_mean)
        assert_close(norm.running_var[i], twin.running_var)
        assert norm.num_batches_tracked[i] == twin.num_batches_tracked
    norm.eval()
    for i, twin in enumerate(twins):
        assert_close(norm(x, domain=i), twin.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_mixed_batch_is_normalized_domain_by_domain(options, dtype):
    norm = layer(**options).to(dtype)
    domain = torch.tensor([0, 2, 0, 2, 2, 0, 0])
    twins = [alone(norm, i) for i in range(DOMAINS)]
    for training in (True, False):
        norm.train(training)
        x = torch.randn(7, CHANNELS, CHANNELS, dtype=dtype, requires_grad=True)
        mask = torch.rand(7, CHANNELS) < 0.8
        y = norm(x, domain=domain, mask=mask)
        upstream = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)
        expected, grads = torch.zeros_like(y), torch.zeros_like(x)
        weights = [torch.zeros_like(p) for p in (norm.weight, norm.bias)]
        for i in (0, 2):
            mine = domain == i
            part = x.detach()[mine].requires_grad_()
            twin = twins[i].train(training)
            z = twin(part, mask=mask[mine])
            expected[mine] = z.detach()
            dx, *dw = torch.autograd.grad(z, (part, twin.weight, twin.bias), upstream[mine])
            grads[mine] = dx
            for total, one in zip(weights, dw, strict=True):
                (total[i] if total.dim() == 2 else total).add_(one)
        assert_close(y, expected, kind="composed")
        for a, b in zip(found, (grads, *weights), strict=True):
            assert_close(a, b, kind="composed", count=x.numel())
    for i in (0, 2):
        assert_close(norm.running_mean[i], twins[i].running_mean)
        assert_close(norm.running_var[i], twins[i].running_var)
    assert norm.num_batches_tracked.tolist() == [1, 0, 1]
    assert (norm.running_mean[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_batch_in_half_precision_is_rounded_once(dtype, training):
    norm = layer(act="silu", domain_affine=True).to(dtype).train(training)
    x, residual = (torch.randn(64, CHANNELS, 7).to(dtype) for _ in range(2))
    domain = torch.randint(DOMAINS, (64,))
    exact = copy.deepcopy(norm).double()(x.double(), domain=domain, residual=residual.double()).to(dtype)
    y = norm(x, domain=domain, residual=residual)
    assert (y != exact).float().mean() < 0.01  # ties of the last rounding; rounding twice differs in a fifth


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpoint_runs_a_mixed_batch_twice_and_counts_it_once(reentrant, momentum):
    norm = layer(momentum=momentum)
    twin = copy.deepcopy(norm)
    domain = torch.tensor([0, 1, 0, 1, 0, 1])
    x = torch.randn(6, CHANNELS, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda t: norm(t, domain=domain).sigmoid().exp(), x, use_reentrant=reentrant)
    y.backward(torch.randn_like(y))
    twin(x.detach(), domain=domain)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("one", [torch.tensor(2), np.int64(2), np.array(2), torch.tensor(2, dtype=torch.int32)])
def test_one_domain_is_a_number_of_any_kind(one):
    norm = layer()
    twin = copy.deepcopy(norm)
    x = torch.randn(6, CHANNELS)
    assert torch.equal(norm(x, domain=one), twin(x, domain=2))
    assert torch.equal(norm.running_mean, twin.running_mean)
    compiled = torch.compile(copy.deepcopy(norm).eval(), backend="eager", fullgraph=True)
    assert_close(compiled(x, domain=torch.tensor(2)), norm.eval()(x, domain=2))


def test_second_derivatives_of_a_mixed_batch():
    norm = layer().double()
    x = torch.randn(6, CHANNELS, dtype=torch.float64, requires_grad=True)
    domain = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.autograd.gradgradcheck(lambda t: norm(t, domain=domain), x)


def test_compiled_without_a_break():
    norm = layer()
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, CHANNELS)
    for domain in (1, torch.tensor([0, 0, 1, 1, 1, 0])):
        assert_close(compiled(x, domain=domain), norm(x, domain=domain), kind="composed")
    assert_close(twin.running_var, norm.running_var)
    assert torch.equal(twin.num_batches_tracked, norm.num_batches_tracked)


def test_a_batch_that_is_not_finite_moves_no_domain():
    norm = layer()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(6, CHANNELS)
    x[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="skipped"):
        norm(x, domain=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_checkpoint_goes_there_and_back():
    norm = layer(domain_affine=True)
    norm(torch.randn(8, CHANNELS), domain=1)
    other = normwise.BatchNorm1d(CHANNELS, domains=DOMAINS, domain_affine=True)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(3, CHANNELS)
    assert torch.equal(other.eval()(x, domain=1), norm.eval()(x, domain=1))
    norm.reset_running_stats()
    assert norm.running_var.shape == (DOMAINS, CHANNELS)
    assert (norm.running_var == 1).all()


@pytest.mark.parametrize("affine", [False, True])
def test_a_trained_model_is_given_domains(affine):
    model = nn.Sequential(nn.Linear(4, CHANNELS), nn.BatchNorm1d(CHANNELS))
    for _ in range(3):
        model(torch.randn(9, 4) + 2)
    x = torch.randn(5, 4)
    expected = model.eval()(x)
    converted, report = normwise.convert(model, to="batch", domains=2, domain_affine=affine)
    assert "each domain starts" in str(report)
    norm = converted[1]
    assert norm.weight.shape == ((2, CHANNELS) if affine else (CHANNELS,))
    for domain in (0, 1, torch.tensor([0, 1, 1, 0, 1])):
        assert_close(norm(converted[0](x), domain=domain), expected)
    for to in ("torch", "group", "sync", "frozen"):
        with pytest.raises(ValueError, match="2 domains"):
            normwise.convert(converted, to=to)
    with pytest.raises(ValueError, match="one domain"):
        normwise.convert(model, to="sync", domains=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = layer(momentum=1.0)

    def forward(self, x: Tensor, domain: Any) -> Tensor:
        return self.norm(x, domain=domain)


def test_recalibration_by_domain():
    net = Net()
    parts = [torch.randn(8, CHANNELS) * (i + 1) + i for i in range(2)]
    mixed = torch.randn(6, CHANNELS)
    which = torch.tensor([0, 1, 0, 1, 0, 1])
    batches = [{"x": parts[0], "domain": 0}, {"x": parts[1], "domain": 1}, {"x": mixed, "domain": which}]
    for exact in (False, True):
        net.norm.reset_running_stats()
        normwise.recalibrate(net, batches, exact=exact, forward=lambda model, batch: model(**batch))
        for i in range(2):
            whole = torch.cat([parts[i], mixed[which == i]])
            assert_close(net.norm.running_mean[i], whole.mean(0))
            assert_close(net.norm.running_var[i], whole.var(0))
        assert (net.norm.running_mean[2] == 0).all()  # nothing came
        assert (net.norm.running_var[2] == 1).all()


@pytest.mark.parametrize("domain", [None, 3, -1, torch.tensor([0, 1, 5])])
def test_recalibration_leaves_it_to_the_layer_to_say_what_is_wrong_with_a_domain(domain):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="domain") as own:
        net(torch.randn(3, CHANNELS), domain)
    with pytest.raises(ValueError, match="domain") as error:
        normwise.recalibrate(net, [(torch.randn(3, CHANNELS), domain)], forward=lambda model, batch: model(*batch))
    assert str(error.value).startswith(f"the model raised ValueError on batch 0: {own.value}\n")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("domains", [1, 2])
def test_several_domains_are_not_folded_into_one_weight(domains):
    net = nn.Sequential(nn.Linear(4, CHANNELS), normwise.BatchNorm1d(CHANNELS, domains=domains)).eval()
    with pytest.raises(ValueError, match=f"statistics of {domains} domain{'s' * (domains != 1)}"):
        normwise.fold(net)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: normwise.BatchNorm1d(CHANNELS)(x, domain=0), ValueError, "one set of statistics"),
        (lambda x: layer()(x), ValueError, "say by domain= which one"),
        (lambda x: layer()(x, domain=3), ValueError, r"\[0, 3\)"),
        (lambda x: layer()(x, domain=-1), ValueError, r"\[0, 3\)"),
        (lambda x: layer()(x, domain=True), TypeError, "number"),
        (lambda x: layer()(x, domain=torch.tensor([0, 1])), normwise.ShapeError, "one for each sample"),
        (lambda x: layer()(x, domain=torch.zeros(4)), TypeError, "integer"),
        (lambda x: layer()(x, domain=torch.tensor([0, 1, 5, 0])), ValueError, "from 0 to 5"),
        (lambda x: normwise.BatchNorm1d(CHANNELS, domains=0), ValueError, "at least 1"),
        (lambda x: normwise.BatchNorm1d(CHANNELS, domain_affine=True), ValueError, "domains="),
        (lambda x: layer(virtual_batch_size=2)(x, domain=torch.zeros(4).long()), ValueError, "virtual_batch_size"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(4, CHANNELS))


# Adaptation.


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier of two Gaussians, with data of a domain that is shifted and scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (n,))
        return torch.randn(n, 4) + 2.0 * y[:, None], y

    for _ in range(60):
        x, y = drawn(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = drawn(512)
    return model.eval(), x * 3 - 8, y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def test_statistics_of_the_new_domain_bring_the_accuracy_back():
    model, x, y = trained()
    assert accuracy(model, x, y) < 0.8
    normwise.adapt(model, x.split(64))
    assert accuracy(model, x, y) > 0.95


def test_entropy_goes_down_and_nothing_else_is_trained():
    model, x, y = trained()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = [p.grad.clone() for p in model.parameters()]
    plain = copy.deepcopy(model)
    normwise.adapt(plain, x.split(64))
    report = normwise.adapt(model, x.split(64), entropy=True, lr=1e-2, steps=3)
    with torch.no_grad():
        entropies = [float(-(m(x).softmax(1) * m(x).log_softmax(1)).sum(1).mean()) for m in (plain, model)]
    assert entropies[1] < entropies[0]
    assert accuracy(model, x, y) > 0.95
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {"1.weight", "1.bias"}
    assert "1.weight" in str(report)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(m.training for m in model.modules())


def test_after_an_error_the_model_is_as_it_was():
    model, x, _ = trained()
    before = copy.deepcopy(model.state_dict())
    for arguments, error in (
        ({"logits": lambda out: out * torch.nan}, ValueError),
        ({"logits": lambda out: 1}, TypeError),
    ):
        with pytest.raises(error):
            normwise.adapt(model, x.split(64), entropy=True, **arguments)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_anything_to_adapt_is_refused():
    with pytest.raises(ValueError, match="running statistics"):
        normwise.adapt(nn.Linear(3, 3), [torch.randn(4, 3)])


@pytest.mark.parametrize("call", [normwise.adapt, normwise.recalibrate])
def test_errors_name_what_was_called(call):
    def model():
        return nn.Sequential(normwise.BatchNorm1d(3), nn.Linear(3, 2))

    wrong = {
        "found no norm with running statistics in the model": (nn.Linear(3, 3), [torch.randn(4, 3)]),
        "found nothing to take statistics of: no batch came": (model(), iter([])),
        "on batch 0: give larger batches, or normwise.recalibrate": (model(), [torch.randn(1, 3)]),
        "expects a torch.nn.Module, but got int": (3, [torch.randn(4, 3)]),
        "batch 0 is 3 items": (model(), [(torch.randn(4, 3),) * 3]),
    }
    for said, (net, batches) in wrong.items():
        with pytest.raises((ValueError, TypeError), match=rf"(?m)^{call.__name__}[:,]? {said}"):
            call(net, batches)


def two_norms() -> nn.Sequential:
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def moved_by(model: nn.Module, **options: Any) -> set[str]:
    """The layers in which something is another than before."""
    before = copy.deepcopy(model.state_dict())
    options = {"lr": 0.1, "batches": torch.randn(96, 4).split(32)} | options
    report = normwise.adapt(model, entropy=True, **options)
    assert str(report).startswith("adapt:")
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def of_norm(*layers: int) -> set[str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{i}.{name}" for i in layers for name in (names if i != 5 else names[:2])}


def test_where_names_the_norms_whose_gains_and_statistics_are_adapted():
    assert moved_by(two_norms()) == of_norm(1, 4, 5)
    assert moved_by(two_norms(), where="1") == of_norm(1)
    assert moved_by(two_norms(), where=nn.BatchNorm1d) == of_norm(1, 4)


def test_what_is_frozen_stays():
    model = two_norms()
    normwise.freeze(model, where="1")
    assert moved_by(model) == of_norm(4, 5)
    model = two_norms()
    normwise.freeze(model, where="1", affine=False)
    assert moved_by(model) == of_norm(4, 5) | {"1.weight", "1.bias"}


def test_gradients_are_turned_on_where_they_are_off():
    model = two_norms().requires_grad_(False)
    with torch.no_grad():
        assert moved_by(model) == of_norm(1, 4, 5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_small_steps_too(dtype):
    model = two_norms()
    data = torch.randn(96, 4)
    half = copy.deepcopy(model).to(dtype)
    for one, to in ((model, torch.float32), (half, dtype)):
        normwise.adapt(one, data.to(to).split(4), entropy=True, lr=1e-3)
    for name, p in half.named_parameters():
        assert p.isfinite().all(), name
    moved = [float((one[1].weight.detach().float() - 1).abs().max()) for one in (model, half)]
    assert min(moved) > 5e-3  # 24 steps of 1e-3, each of which bfloat16 would round off


def test_a_class_ruled_out_by_its_logit_adds_nothing():
    model = two_norms()
    never = torch.tensor([False, False, True])
    moved_by(model, logits=lambda out: out.masked_fill(never, -torch.inf))
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="not finite"):
        moved_by(two_norms(), logits=lambda out: out.masked_fill(never, torch.inf))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"batches": iter([torch.randn(8, 4)])}, "DataLoader"),
    ],
)
def test_an_adaptation_that_would_do_nothing_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        moved_by(two_norms(), **options)


def test_a_step_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"lr must be a positive number .*got str \('1e-3'\): write lr=0\.001"):
        moved_by(two_norms(), lr="1e-3")


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_one_domain_says_how_it_becomes_that_of_several(within: bool, strict: bool) -> None:
    theirs, ours = nn.BatchNorm2d(4), normwise.BatchNorm2d(4, domains=3)
    theirs.running_mean.fill_(2.0)
    whose = "0" if within else "the layer"
    if within:
        theirs, ours = nn.Sequential(theirs), nn.Sequential(ours)
    said = rf"size mismatch for .*{whose} has the statistics of 3 domains.*\(model, to='batch', domains=3\)$"
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        ours.load_state_dict(theirs.state_dict(), strict=strict)
    spread = normwise.convert(theirs, to="batch", domains=3).model
    ours.load_state_dict(spread.state_dict())
    assert (ours.state_dict()["0.running_mean" if within else "running_mean"] == 2).all()
    with pytest.raises(RuntimeError) as raised:
        ours.load_state_dict({}, strict=True)
    assert "domain" not in str(raised.value)
