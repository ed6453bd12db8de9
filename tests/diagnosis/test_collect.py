"""The numbers of a diagnosis against the same numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis import diagnose
from support.tolerances import tolerance

cross_entropy = nn.functional.cross_entropy


def small_conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6 * 9, 4),
    )


def images(batches: int = 3, samples: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(samples, 3, 8, 8) * 2 + 1, torch.randint(4, (samples,))) for _ in range(batches)]


def test_distributions_of_a_conv_net():
    net, batches = small_conv_net(), images()
    found = diagnose(net, batches, loss=cross_entropy)
    assert [layer.kind for layer in found.layers] == [type(m).__name__ for m in net]
    x = torch.cat([inputs for inputs, _ in batches]).double()
    seen = found.layer("0").input
    assert seen.shape == [12, 3, 8, 8]
    assert seen.all.mean == pytest.approx(float(x.mean()), rel=1e-6)
    assert seen.all.std == pytest.approx(float(x.std(correction=0)), rel=1e-6)
    by_channel = x.transpose(0, 1).flatten(1)
    assert seen.features.means.mean == pytest.approx(float(by_channel.mean(1).mean()), rel=1e-6)
    assert seen.features.stds.maximum == pytest.approx(float(by_channel.std(1, correction=0).max()), rel=1e-6)
    by_sample = x.flatten(1)
    assert seen.samples.means.count == 36
    assert seen.samples.stds.minimum == pytest.approx(float(by_sample.std(1, correction=0).min()), rel=1e-6)
    # The norm's output before its ReLU wrote over it.
    assert found.layer("1").output.all.minimum < 0
    assert found.layer("2").units.saturated == pytest.approx(0.5, abs=0.1)


def test_gradients_are_those_of_backward():
    net, batches = small_conv_net().requires_grad_(), images(1)
    net[6].p = 0.0
    found = diagnose(net, batches, loss=cross_entropy)
    kept = []

    def keep(module: nn.Module, args: object, out: torch.Tensor) -> None:
        out.register_hook(kept.append)

    net[3].register_forward_hook(keep)
    cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    gradient = found.layer("3").gradient
    assert gradient.weights["weight"] == pytest.approx(float(net[3].weight.grad.norm()), rel=1e-5)
    assert gradient.output == pytest.approx(float(kept[0].norm()), rel=1e-5)
    rows = kept[0].transpose(0, 1).flatten(1)
    share = rows.sum(1).abs() / rows.abs().sum(1)
    assert gradient.bias_share == pytest.approx(float(share.max()), rel=1e-4)


def test_running_against_batch_statistics():
    net, batches = small_conv_net(), images()
    with torch.no_grad():
        net[1].running_mean.fill_(3.0)
        net[1].running_var.fill_(0.25)
    found = diagnose(net, batches, loss=cross_entropy).layer("1").norm
    x = torch.cat([net[0](inputs).detach() for inputs, _ in batches]).double().transpose(0, 1).flatten(1)
    distance = (3.0 - x.mean(1)).abs() / (x.var(1, correction=0) + 1e-5).sqrt()
    ratio = torch.log2((0.25 + 1e-5) / (x.var(1, correction=0) + 1e-5))
    assert found.running.distance.percentile(50) == pytest.approx(float(distance.quantile(0.5)), rel=1e-4)
    assert found.running.log_ratio.mean == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert (found.values, found.samples, found.running.moves) == (12 * 64, 12, True)


def test_the_gap_is_split_by_layer():
    """Only the layer whose statistics are wrong, and the dropout, move the output when put into train mode."""
    net, batches = small_conv_net(), images()
    with torch.no_grad():
        net[1].running_mean.fill_(3.0)
    found = diagnose(net, batches, loss=cross_entropy)
    assert found.gap.output > 0.1
    gaps = {layer.name: layer.gap for layer in found.layers}
    assert gaps["1"] > gaps["6"] > 0
    assert gaps["0"] is None
    assert gaps["3"] is None
    net.eval()
    with torch.no_grad():
        expected = torch.cat([net(inputs) for inputs, _ in batches[:2]])
        net[1].train()
        changed = torch.cat([net(inputs) for inputs, _ in batches[:2]])
    apart = (changed - expected).square().mean().sqrt() / expected.std(correction=0)
    assert gaps["1"] == pytest.approx(float(apart), rel=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, normwise.LSTM, normwise.GRU, normwise.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_gates_of_recurrent_layers_are_recomputed(kind, options):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = kind(5, 6, **options)
            self.linear = nn.Linear(12 if options else 6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.recurrent(x)[0].mean(1 if options else 0))

    shape = (8, 11, 5) if options else (11, 8, 5)
    batches = [(torch.randn(shape).double(), torch.randint(3, (8,))) for _ in range(2)]
    layer = diagnose(Net().double(), batches, loss=cross_entropy).layer("recurrent")
    assert [r.place for r in layer.recurrence] == (["l0", "l0_reverse", "l1", "l1_reverse"] if options else ["l0"])
    for inside in layer.recurrence:
        assert inside.error < tolerance(torch.float64, "composed")["rtol"]
        assert len(inside.summed) == len(inside.gradient) == len(inside.gates[0].over_time) == 11
        assert min(inside.gradient) > 0
    assert len(layer.output.time.mean) == 11


def test_steps_end_where_too_few_sequences_of_all_batches_go_on():
    """Not where the first sequence of a small batch ends."""
    lstm = normwise.LSTM(4, 5, batch_first=True)
    batches = [((torch.randn(3, 10, 4), torch.tensor([9, 8, 3])), None) for _ in range(4)]
    found = diagnose(
        lstm,
        batches,
        loss=lambda output, _: output[0].square().mean(),
        forward=lambda model, batch: model(batch[0][0], lengths=batch[0][1]),
    )
    # Of 12 sequences 8 have step 8, and 4 have step 9.
    inside = found.layers[0].recurrence[0]
    assert len(inside.summed) == len(inside.gates[0].over_time) == len(inside.gradient) == 8


def test_the_gradient_over_time_is_the_total_one():
    """Against a loop over cells, whose states' gradients autograd gives."""
    lstm = nn.LSTM(4, 5)
    x, target = torch.randn(7, 6, 4), torch.randn(6, 5)
    found = diagnose(lstm, [(x, target)], loss=lambda out, y: (out[1][0][0] - y).square().mean())
    cell = nn.LSTMCell(4, 5)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    h, c, states = torch.zeros(6, 5), torch.zeros(6, 5), []
    for step in x:
        h, c = cell(step, (h, c))
        states.append(h)
    gradients = torch.autograd.grad((h - target).square().mean(), states)
    inside = found.layers[0].recurrence[0]
    assert inside.gradient == pytest.approx([float(g.norm()) for g in gradients], rel=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, normwise.LSTMCell, normwise.GRUCell])
def test_a_loop_over_cells_is_seen_like_a_layer(kind):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = None
            for step in x:
                state = self.cell(step, state)
            return state[0] if isinstance(state, tuple) else state

    loop, x, target = Loop().double(), torch.randn(7, 6, 4).double(), torch.randn(6, 5).double()

    def loss(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (output - wanted).square().mean()

    (inside,) = diagnose(loop, [(x, target)], loss=loss).layer("cell").recurrence
    assert inside.error < tolerance(torch.float64, "composed")["rtol"]
    layer = getattr(nn if kind.__module__.startswith("torch") else normwise, kind.__name__.removesuffix("Cell"))(4, 5)
    layer = layer.double()
    layer.load_state_dict({f"{name}_l0": value for name, value in loop.cell.state_dict().items()})
    found = diagnose(layer, [(x, target)], loss=lambda out, y: loss(out[0][-1], y))
    whole = found.layers[0].recurrence[0]
    assert inside.gradient == pytest.approx(whole.gradient, rel=1e-6)
    assert inside.summed == pytest.approx(whole.summed, rel=1e-6)
    assert [gate.name for gate in inside.gates] == [gate.name for gate in whole.gates]


def test_saturated_gates_are_counted_by_step():
    lstm = nn.LSTM(4, 5)
    with torch.no_grad():
        lstm.bias_ih_l0[5:10] = 20.0  # the forget gates
    x = torch.randn(7, 6, 4)
    found = diagnose(lstm, [(x, torch.zeros(6, 5))], loss=lambda out, y: (out[0][-1] - y).square().mean())
    gates = {gate.name: gate for gate in found.layers[0].recurrence[0].gates}
    assert gates["f"].saturated == 1.0
    assert gates["f"].over_time == [1.0] * 7
    assert gates["i"].saturated == 0.0


class Energy(nn.Module):
    """Forces: its forward differentiates, as do those of physics-informed nets and gradient penalties."""

    def __init__(self, norm: nn.Module, leaf: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.leaf = leaf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.leaf else x.detach().requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, normwise.BatchNorm1d])
@pytest.mark.parametrize("leaf", [True, False])
def test_models_that_differentiate_in_forward(norm, leaf):
    model = Energy(norm(8), leaf)
    batches = [(torch.randn(32, 6), torch.randn(32, 6)) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = diagnose(model, batches, loss=nn.functional.mse_loss, optimizer=optimizer)
    assert found.gap.output > 0
    assert found.layer("net.2").gap > 0
    assert len(found.training.losses) == 2
    assert not any(x.requires_grad for x, _ in batches)  # the loader's tensors are not the model's to change
    with torch.no_grad():
        assert diagnose(model, batches, loss=nn.functional.mse_loss).gap.output > 0


def test_inputs_that_require_gradients_still_do():
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(self.linear(x).square().sum(), x, create_graph=True)[0]

    x = torch.randn(8, 6, requires_grad=True)
    diagnose(Penalty(), [(x, torch.zeros(8, 6))], loss=nn.functional.mse_loss)
    assert x.grad is None
