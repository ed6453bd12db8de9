"""The deep transformers of the claims: each placement against its equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from normwise.lab.norms import DYT_ALPHAS, feature_norm, sequence_norm
from normwise.lab.run import run
from normwise.lab.spec import Spec
from normwise.lab.tasks import CLAIM_TASKS, TASKS, load_task
from normwise.lab.tasks.charlm_deep import DEEP, PLACEMENTS, CharLmDeep
from normwise.lab.tasks.transformer import places

NAMES = sorted(DEEP)
EQUATIONS = {
    "pre": lambda x, f, n, block, blocks: x + f(n(x)),
    "post": lambda x, f, n, block, blocks: n(x + f(x)),
    "peri": lambda x, f, n, block, blocks: x + n(f(n(x))),
    "lns": lambda x, f, n, block, blocks: x + f(n(x) / math.sqrt(block)),
    "deepnorm": lambda x, f, n, block, blocks: n((2 * blocks) ** 0.25 * x + f(x)),
}


def task_of(placement, blocks=3, **settings):
    return CharLmDeep(placement=placement, blocks=blocks, width=8, heads=2, length=8, **settings)


def by_hand(model, numbers, placement, *, qk_norm=False):
    """The scores in float64, from the weights alone; gains are 1 and biases of norms 0 in a new net."""
    heads, blocks = 2, len(model.blocks)

    def normalize(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def attend(layer):
        def of(x):
            q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
            out = []
            for h in range(heads):
                part = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
                qh, kh = (normalize(t[..., part]) if qk_norm else t[..., part] for t in (q, k))
                logits = qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[-1])
                future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                out.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
            return torch.cat(out, -1) @ layer.out.weight.T + layer.out.bias

        return of

    def feed(layer):
        return lambda x: (x @ layer.up.weight.T + layer.up.bias).relu() @ layer.down.weight.T + layer.down.bias

    x = model.embed.weight[numbers]
    x = x + places(*x.shape[1:])
    for block, parts in enumerate(model.blocks, 1):
        for function in (attend(parts[0].function), feed(parts[1].function)):
            x = EQUATIONS[placement](x, function, normalize, block, blocks)
    if placement in ("pre", "peri", "lns"):
        x = normalize(x)
    return x @ model.linear.weight.T + model.linear.bias


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_is_its_equation(placement, qk_norm):
    task = task_of(placement, qk_norm=qk_norm)
    model = task.model("layer", 0).double()
    numbers = task.cases[0].inputs[:3]
    assert set(EQUATIONS) == set(PLACEMENTS)
    torch.testing.assert_close(
        model(numbers), by_hand(model, numbers, placement, qk_norm=qk_norm), rtol=1e-9, atol=1e-9
    )


def test_deepnorm_scales_the_weights_that_the_paper_names_and_draws_them_as_the_others():
    plain, scaled = (task_of(placement, blocks=4).model("layer", 5).state_dict() for placement in ("post", "deepnorm"))
    beta = (8 * 4) ** -0.25
    for name, weight in plain.items():
        if name.endswith("qkv.weight"):
            assert torch.equal(scaled[name][:16], weight[:16])
            torch.testing.assert_close(scaled[name][16:], beta * weight[16:])
        elif name.rpartition("function.")[2] in ("out.weight", "up.weight", "down.weight"):
            torch.testing.assert_close(scaled[name], beta * weight)
        else:
            assert torch.equal(scaled[name], weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_a_task_of_its_own_name_that_compare_does_not_list(name):
    task = load_task(name).task
    assert task.name == name
    assert name in CLAIM_TASKS
    assert name not in TASKS
    assert (task.settings["blocks"], task.settings["placement"]) == (task.blocks, name.split("-")[1])
    assert (task.warm_up > 0) == ("warm-up" in name)
    assert task.qk_norm == name.endswith("qk-norm")
    assert f"-{task.blocks}" in name


def test_weights_depend_on_the_seed_and_neither_on_norm_nor_placement():
    weights = [
        task_of(placement).model(norm, 3).blocks[2][1].function.up.weight
        for placement in ("pre", "post", "peri", "lns")
        for norm in ("layer", "rms", "dyt", "none")
    ]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert not torch.equal(task_of("pre").model("layer", 4).blocks[2][1].function.up.weight, weights[0])


def test_the_rate_rises_and_falls_as_said():
    task = task_of("pre", warm_up=4, decays_over=10)
    model = task.model("layer", 0)
    optimizer = task.optimizer(model, 0.5)
    found = []
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found.append(optimizer.param_groups[0]["lr"])
    expected = [0.5 * min(1, (t + 1) / 4) * max(0.02, 1 - t / 10) for t in range(12)]
    assert found == pytest.approx(expected)
    again = task.optimizer(model, 0.5)
    again.load_state_dict(optimizer.state_dict())  # a resumed run goes on in the schedule
    assert again.param_groups[0]["taken"] == 12


def test_what_is_recorded_is_what_it_says():
    task = task_of("pre", blocks=4)
    model, batch = task.model("layer", 0).eval(), task.cases[1].select(slice(0, 5))
    with torch.no_grad():
        found = task.series(model, batch)
        x = model.embed(batch.inputs)
        x = x + places(*x.shape[1:])
        variances, logits = [], []
        for block in model.blocks:
            q, k, _ = block[0].function.qkv(block[0].before(x)).chunk(3, -1)
            logits += [
                q[:, i, h : h + 4] @ k[:, j, h : h + 4].T / 2 for i in range(8) for j in range(i + 1) for h in (0, 4)
            ]
            x = block(x)
            variances.append(x.var().item())
        largest = max(float(one.diagonal().abs().max()) for one in logits)
        # LayerNorms with gain 0 leave their block out, but for biases, which are 0 in a new net
        whole = task.loss(model(batch.inputs), batch)
        for sublayer in model.blocks[3]:
            sublayer.before.weight.zero_()
        without = task.loss(model(batch.inputs), batch)
    assert found["residual/growth"] == pytest.approx(math.log2(variances[-1] / variances[0]))
    assert found["attention/max-logit"] == pytest.approx(largest, rel=1e-5)
    assert found["skipped/late"] == pytest.approx(float(without - whole), abs=1e-6)


def test_nothing_sees_the_characters_to_come():
    task = task_of("peri", qk_norm=True)
    model, batch = task.model("layer", 0), task.cases[0].select(slice(0, 3))
    changed = batch.inputs.clone()
    changed[:, 5:] = 0
    with torch.no_grad():
        before, after = model(batch.inputs), model(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_the_same_spec_gives_the_same_numbers():
    specs = [Spec("charlm-deepnorm-4", "layer", 4, 0.01, seed, 3) for seed in (1, 1, 2)]
    first, again, other = (
        {name: (s.steps, s.values) for name, s in run(spec).series.items() if not name.startswith("time/")}
        for spec in specs
    )
    assert first == again != other
    assert {"residual/growth", "attention/max-logit", "skipped/late", "final/bits-per-character"} <= set(first)


@pytest.mark.parametrize("name", [*DYT_ALPHAS, "derf"])
def test_dyt_and_derf_are_their_formulas(name):
    alpha = DYT_ALPHAS.get(name, 0.5)
    layer = feature_norm(name, 6).double()
    x = torch.randn(4, 5, 6, dtype=torch.double)
    squash = math.erf if name == "derf" else math.tanh
    inner = alpha * x
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
        layer.bias.copy_(torch.linspace(-1, 1, 6))
        if name == "derf":
            layer.shift.fill_(0.25)
            inner = inner + 0.25
    expected = torch.tensor([squash(v) for v in inner.flatten()], dtype=torch.double).view_as(x)
    torch.testing.assert_close(layer(x), expected * layer.weight + layer.bias)
    assert layer.alpha.item() == alpha
    fresh = sequence_norm(name, 6).double()
    torch.testing.assert_close(
        fresh(x, torch.ones(4, 5, dtype=torch.bool)),
        torch.erf(0.5 * x) if name == "derf" else torch.tanh(alpha * x),
    )
