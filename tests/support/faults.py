"""For each finding a model that has the fault, and its near twin that has not: what differs is the fault alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normwise
from support.transformer_faults import TRANSFORMER_FAULTS

cross_entropy = nn.functional.cross_entropy
Arguments = dict[str, Any]


def batches(
    samples: int = 32, shape: tuple[int, ...] = (6,), classes: int = 3, count: int = 2, size: float = 1.0
) -> list:
    return [(size * torch.randn(samples, *shape), torch.randint(classes, (samples,))) for _ in range(count)]


def given(model: nn.Module, data: list, **more: Any) -> Arguments:
    return {"model": model, "batches": data, "loss": cross_entropy, **more}


def mlp(norm: nn.Module | None = None, *, bias: bool = False, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width, bias=bias), norm or nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def nw001(faulty: bool) -> Arguments:
    return given(mlp(), batches(8 if faulty else 32))


def nw002(faulty: bool) -> Arguments:
    """Statistics of other data; the twin's are of these."""
    model, data = mlp(), batches(64)
    for inputs, _ in 60 * data:
        model(inputs * 4 + 3 if faulty else inputs)
    return given(model, data)


def nw003(faulty: bool) -> Arguments:
    model, data = mlp(), batches()
    spoiled = data[0][0].clone()
    spoiled[3, 2] = torch.nan if faulty else 0.0
    for inputs in [data[0][0]] * 60 + [spoiled] + [data[1][0]] * 3:
        model(inputs)
    return given(model, data)


class OverSteps(nn.Module):
    """A convolution and a BatchNorm over (N, C, T) of padded sequences; the twin tells the norm their lengths."""

    def __init__(self, faulty: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8) if faulty else normwise.BatchNorm1d(8)
        self.faulty = faulty
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.relu(self.norm(y) if self.faulty else self.norm(y, lengths=lengths))
        return self.linear(y.sum(2) / lengths[:, None])


def padded(samples: int = 32, steps: int = 20) -> list:
    data = []
    for _ in range(2):
        lengths = torch.randint(5, steps + 1, (samples,))
        valid = torch.arange(steps) < lengths[:, None]
        data.append((((torch.randn(samples, 5, steps) + 1) * valid[:, None], lengths), torch.randint(3, (samples,))))
    return data


def nw004(faulty: bool) -> Arguments:
    return given(OverSteps(faulty), padded())


def nw005(faulty: bool) -> Arguments:
    """The twin's bias stands before a LayerNorm, which takes away no more of it than its mean."""
    return given(mlp(None if faulty else nn.LayerNorm(8), bias=True), batches())


def nw006(faulty: bool) -> Arguments:
    return given(mlp(nn.BatchNorm1d(8, momentum=0.99 if faulty else 0.01)), batches())


def nw008(faulty: bool) -> Arguments:
    model = mlp()
    with torch.no_grad():
        model[1].weight[2] = 1e-6 if faulty else 0.1
    return given(model, batches())


def nw008_offset(faulty: bool) -> Arguments:
    """A gain that is 1 + weight: a weight of 0 is none that is dead."""
    norm = normwise.LayerNorm(8, offset=1.0)
    with torch.no_grad():
        norm.weight[2] = -1 + 1e-6 if faulty else 0.0
        norm.weight[3:] = 0.5
    return given(mlp(norm), batches())


def nw009(faulty: bool) -> Arguments:
    """Rows that are constant up to rounding, far from zero."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6, eps=1e-12 if faulty else 1e-2)
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(1e-5 * x + 300))

    return given(Shifted(), batches())


def nw010(faulty: bool) -> Arguments:
    model = mlp()
    if faulty:
        model[1].requires_grad_(False)
        model[1].eval()
    else:
        normwise.freeze(model)
    return given(model, batches())


def nw011(faulty: bool) -> Arguments:
    model = mlp()
    small, large = ([p for p in model.parameters() if (p.dim() < 2) == is_small] for is_small in (True, False))
    groups = [{"params": [*small, *large]}] if faulty else [{"params": large}, {"params": small, "weight_decay": 0.0}]
    return given(model, batches(), optimizer=torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1))


def nw012(faulty: bool) -> Arguments:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    return given(model, batches(size=60.0 if faulty else 1.0))


def nw012_gates(faulty: bool) -> Arguments:
    lstm = nn.LSTM(5, 8)
    with torch.no_grad():
        lstm.weight_ih_l0.mul_(60.0 if faulty else 1.0)
    return {"model": lstm, "batches": [(torch.randn(12, 16, 5), torch.randn(12, 16, 8))], "loss": distance}


def nw012_dead(faulty: bool) -> Arguments:
    model = mlp()
    with torch.no_grad():
        model[1].bias.fill_(-20.0 if faulty else 0.0)
    return given(model, batches())


def distance(output: Any, target: Tensor) -> Tensor:
    return (output[0] - target).square().mean()


def deep(norm: bool) -> nn.Sequential:
    """Ten layers of small initial weights, which norms make up for."""
    net = nn.Sequential()
    for _ in range(10):
        net.extend([nn.Linear(6, 6), *([nn.LayerNorm(6)] if norm else []), nn.Tanh()])
        nn.init.normal_(net[-2 - norm].weight, std=0.1)
    return net.append(nn.Linear(6, 3))


def nw013(faulty: bool) -> Arguments:
    return given(deep(norm=not faulty), batches())


class LastState(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(layer.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer(x)[0][-1])


def sequences(steps: int = 30) -> list:
    return [(torch.randn(steps, 16, 5), torch.randint(3, (16,))) for _ in range(2)]


def recurrent(layer: nn.RNN, gain: float) -> nn.RNN:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter).mul_(gain)
    return layer


def rectified(gain: float) -> nn.RNN:
    """Le et al. 2015: ReLUs, and hidden-to-hidden weights that are (a multiple of) the identity."""
    layer = nn.RNN(5, 8, nonlinearity="relu")
    with torch.no_grad():
        nn.init.eye_(layer.weight_hh_l0).mul_(gain)
    return layer


def nw013_time(faulty: bool) -> Arguments:
    return given(LastState(recurrent(nn.RNN(5, 8), 0.5 if faulty else 1.0)), sequences())


def nw013_exploding(faulty: bool) -> Arguments:
    return given(LastState(rectified(1.5 if faulty else 1.0)), sequences())


def nw014(faulty: bool) -> Arguments:
    return given(deep(norm=not faulty), batches())


def nw014_recurrent(faulty: bool) -> Arguments:
    kind = {} if faulty else {"norm": "layer"}
    layer = normwise.RNN(5, 8, 3, **{"norm": None, **kind})
    if faulty:
        recurrent(layer, 0.6)
    return given(LastState(layer), sequences())


class Unrolled(nn.Module):
    """A cell written out, with a norm on its state at every step."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.into, self.again, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 8)
        for step in x[:6]:
            h = torch.tanh(self.norm(self.into(step) + self.again(h)))
        return self.out(h)


def nw015(faulty: bool) -> Arguments:
    return given(Unrolled(nn.BatchNorm1d(8) if faulty else nn.LayerNorm(8)), sequences())


def nw015_siamese(faulty: bool) -> Arguments:
    """Called twice a pass, side by side: no recurrence."""
    if faulty:
        return nw015(True)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(x) - self.branch(-x)

    return given(Twice(), batches())


def nw015_shared(faulty: bool) -> Arguments:
    layer = normwise.LSTM(5, 8, norm="batch", num_stat_steps=1 if faulty else 30)
    return given(LastState(layer), sequences())


def nw015_lengths(faulty: bool) -> Arguments:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(self.conv(x)).mean(2))

    steps = (10, 30) if faulty else (30, 30)
    return given(Mean(), [(torch.randn(16, 5, n), torch.randint(3, (16,))) for n in steps])


def nw016(faulty: bool) -> Arguments:
    return given(LastState(rectified(1.2 if faulty else 0.9)), sequences())


class Then(nn.Module):
    """A function after a LayerNorm, and a linear map after it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.norm(self.before(x))))


def nw017(faulty: bool) -> Arguments:
    """The logarithm of what is negative; the twin's is away from 0."""
    return given(Then(torch.log if faulty else lambda x: torch.log(x.clamp(min=1e-6))), batches())


def nw017_gradient(faulty: bool) -> Arguments:
    """Finite on the way forward: the slope of the square root at 0 is infinite, and 0 times that is NaN."""
    return given(Then(lambda x: x + torch.sqrt((0 * x).square() + (0.0 if faulty else 1e-6))), batches())


def nw017_loss(faulty: bool) -> Arguments:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) - torch.log(torch.zeros(()) if faulty else torch.ones(()))

    return given(mlp(), batches()) | {"loss": loss}


def nw017_scores(faulty: bool) -> Arguments:
    """The twin masks scores with -inf within, as attention does: softmax makes numbers of them."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.softmax, self.out = nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.linear(x)
            hidden = torch.ones_like(scores, dtype=torch.bool)
            hidden[:, 0] = faulty
            return self.out(self.softmax(scores.masked_fill(hidden, -torch.inf)))

    return given(Attention(), batches())


FAULTS: dict[str, Callable[[bool], Arguments]] = {
    "NW001": nw001,
    "NW002": nw002,
    "NW003": nw003,
    "NW004": nw004,
    "NW005": nw005,
    "NW006": nw006,
    "NW008": nw008,
    "NW008 offset": nw008_offset,
    "NW009": nw009,
    "NW010": nw010,
    "NW011": nw011,
    "NW012": nw012,
    "NW012 gates": nw012_gates,
    "NW012 dead": nw012_dead,
    "NW013": nw013,
    "NW013 time": nw013_time,
    "NW013 exploding": nw013_exploding,
    "NW014": nw014,
    "NW014 recurrent": nw014_recurrent,
    "NW015": nw015,
    "NW015 siamese": nw015_siamese,
    "NW015 shared": nw015_shared,
    "NW015 lengths": nw015_lengths,
    "NW016": nw016,
    "NW017": nw017,
    "NW017 gradient": nw017_gradient,
    "NW017 loss": nw017_loss,
    "NW017 scores": nw017_scores,
    **TRANSFORMER_FAULTS,
}
