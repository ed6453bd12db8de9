"""The equations of every recurrent preset once more, one by one and in float64, with no code of the library.

Layer and RMS presets run one sample at a time, so that no statistic can leak between samples; batch presets run one
step of all samples at a time. Weights come as a dict with the library's names and torch's gate order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

W = dict[str, Tensor]
State = tuple[Tensor, ...]


def ln(v: Tensor, gain: Tensor, eps: float) -> Tensor:
    mean = v.sum() / v.numel()
    deviation = v - mean
    return gain * deviation / torch.sqrt((deviation * deviation).sum() / v.numel() + eps)


def rms(v: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * v / torch.sqrt((v * v).sum() / v.numel() + eps)


def sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def get(w: W, name: str) -> Tensor:
    """A bias that the layer may lack counts as 0."""
    return w.get(name, torch.zeros((), dtype=torch.float64))


def _h(w: W, o: Tensor, shown: Tensor) -> Tensor:
    h = sigmoid(o) * torch.tanh(shown)
    return w["weight_hr"] @ h if "weight_hr" in w else h


# --- LSTM: (x (I,), (h, c), weights, n) -> (h', c'), where n is ln or rms.


def lstm_ba2016(x, state, w, n, eps=1e-5):
    h, c = state
    size = len(c)
    a = n(w["weight_hh"] @ h, w["gain_hh"], eps) + n(w["weight_ih"] @ x, w["gain_ih"], eps)
    a = a + get(w, "bias_ih") + get(w, "bias_hh")
    i, f, g, o = a[:size], a[size : 2 * size], a[2 * size : 3 * size], a[3 * size :]
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
    return _h(w, o, n(c, w["gain_c"], eps) + get(w, "bias_c")), c


def lstm_fastrnns(x, state, w, n, eps=1e-5):
    h, c = state
    igates = n(w["weight_ih"] @ x, w["gain_ih"], eps) + get(w, "bias_ih")
    hgates = n(w["weight_hh"] @ h, w["gain_hh"], eps) + get(w, "bias_hh")
    i, f, g, o = (igates + hgates).view(4, -1)
    c = n(sigmoid(f) * c + sigmoid(i) * torch.tanh(g), w["gain_c"], eps) + get(w, "bias_c")
    return _h(w, o, c), c


def lstm_tfa(x, state, w, n):
    return lstm_fastrnns(x, state, w, n, eps=1e-3)


def lstm_torchaudio(x, state, w, n, eps=1e-5):
    h, c = state
    gates = n(w["weight_ih"] @ x + w["weight_hh"] @ h, w["gain_sum"], eps) + get(w, "bias_ih")
    i, f, g, o = gates.view(4, -1)
    c = n(sigmoid(f) * c + sigmoid(i) * torch.tanh(g), w["gain_c"], eps) + get(w, "bias_c")
    return _h(w, o, c), c


def lstm_per_gate(x, state, w, n, eps=1e-5):
    h, c = state
    size = len(c)
    both = w["weight_ih"] @ x + w["weight_hh"] @ h + get(w, "bias_inner")
    gates = []
    for k in range(4):
        rows = slice(k * size, (k + 1) * size)
        bias = w["bias_ih"][rows] if "bias_ih" in w else 0
        gates.append(n(both[rows], w["gain_sum"][rows], eps) + bias)
    i, f, g, o = gates
    c = n(c * sigmoid(f) + sigmoid(i) * torch.tanh(g), w["gain_c"], eps) + get(w, "bias_c")
    return _h(w, o, c), c


# --- GRU, torch's row order r, z, n.


def gru_ba2016(x, state, w, n, eps=1e-5, paper=False):
    (h,) = state
    size = len(h)
    two = slice(0, 2 * size)
    last = slice(2 * size, 3 * size)
    p, q = w["weight_ih"] @ x, w["weight_hh"] @ h
    b, d = get(w, "bias_ih").expand(3 * size), get(w, "bias_hh").expand(3 * size)
    rz = n(q[two], w["gain_hh"][two], eps) + d[two] + n(p[two], w["gain_ih"][two], eps) + b[two]
    r, z = sigmoid(rz[:size]), sigmoid(rz[size:])
    candidate = torch.tanh(
        n(p[last], w["gain_ih"][last], eps) + b[last] + r * (n(q[last], w["gain_hh"][last], eps) + d[last])
    )
    return ((1 - z) * h + z * candidate if paper else z * h + (1 - z) * candidate,)


def gru_haste(x, state, w, n, eps=1e-5):
    (h,) = state
    vx = n(w["weight_ih"] @ x, w["gain_ih"], eps) + get(w, "bias_ih")
    vh = n(w["weight_hh"] @ h, w["gain_hh"], eps) + get(w, "bias_hh")
    vx, vh = vx.view(3, -1), vh.view(3, -1)
    r, z = sigmoid(vx[0] + vh[0]), sigmoid(vx[1] + vh[1])
    g = torch.tanh(vx[2] + r * vh[2])
    return (z * h + (1 - z) * g,)


def gru_dreamer(x, state, w, n):
    (h,) = state
    joint = torch.cat([w["weight_ih"], w["weight_hh"]], 1) @ torch.cat([x, h])
    out = n(joint, w["gain_sum"], 1e-3) + get(w, "bias_ih")
    reset, update, cand = out.view(3, -1)
    cand = torch.tanh(sigmoid(reset) * cand)
    update = sigmoid(update - 1)
    return (update * cand + (1 - update) * h,)


# --- Plain RNN.


def rnn_ba2016(x, state, w, n, eps=1e-5):
    (h,) = state
    return (torch.tanh(n(w["weight_hh"] @ h + w["weight_ih"] @ x, w["gain_sum"], eps) + get(w, "bias_ih")),)


def rnn_separate(x, state, w, n, eps=1e-5):
    (h,) = state
    a = n(w["weight_hh"] @ h, w["gain_hh"], eps) + n(w["weight_ih"] @ x, w["gain_ih"], eps)
    return (torch.tanh(a + get(w, "bias_ih")),)


EQUATIONS: dict[tuple[str, str], Callable[..., State]] = {
    ("lstm", "ba2016"): lstm_ba2016,
    ("lstm", "fastrnns"): lstm_fastrnns,
    ("lstm", "tfa"): lstm_tfa,
    ("lstm", "torchaudio"): lstm_torchaudio,
    ("lstm", "per_gate"): lstm_per_gate,
    ("lstm", "icefall"): lstm_per_gate,  # told apart by bias_inner
    ("lstm", "haste"): lstm_ba2016,  # told apart by having no bias_hh
    ("gru", "ba2016"): gru_ba2016,
    ("gru", "haste"): gru_haste,
    ("gru", "dreamer"): gru_dreamer,
    ("rnn", "ba2016"): rnn_ba2016,
    ("rnn", "separate"): rnn_separate,
}
BATCH = [(cell, name) for cell in ("lstm", "gru", "rnn") for name in ("laurent2015", "cooijmans2016")]


def run(cell: str, name: str, x: Tensor, states: State, w: W, norm: str = "layer", **options) -> tuple[Tensor, State]:
    """All samples of (T, B, I), one at a time: (output (T, B, H), final states)."""
    n = {"layer": ln, "rms": rms}[norm]
    outputs, finals = [], []
    for b in range(x.shape[1]):
        state = tuple(s[b] for s in states)
        steps = []
        for x_t in x[:, b]:
            state = EQUATIONS[cell, name](x_t, state, w, n, **options)
            steps.append(state[0])
        outputs.append(torch.stack(steps))
        finals.append(state)
    return torch.stack(outputs, 1), tuple(torch.stack(s) for s in zip(*finals, strict=True))


def run_batch(cell: str, name: str, x: Tensor, states: State, w: W, lengths: list[int], sequence: bool = False):
    """The batch presets in training: (output, final states, {site: [(mean, var, count) of each step]})."""
    steps, batch = x.shape[:2]
    states = tuple(s.clone() for s in states)
    used: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    outputs = []

    def bn(site, rows, gain):
        mean = rows.sum(0) / len(rows)
        var = ((rows - mean) ** 2).sum(0) / len(rows)
        used.setdefault(site, []).append((mean, var, len(rows)))
        return (rows - mean) / torch.sqrt(var + 1e-5) * gain

    if sequence:
        everything = torch.cat([x[: lengths[b], b] for b in range(batch)]) @ w["weight_ih"].T
        whole = bn("ih", everything, w["gain_ih"])
        starts = [sum(lengths[:b]) for b in range(batch)]
    for t in range(steps):
        alive = [b for b in range(batch) if lengths[b] > t]
        output = torch.zeros(batch, states[0].shape[1], dtype=x.dtype)
        if alive:
            h = states[0][alive]
            if sequence:
                p = whole[[starts[b] + t for b in alive]]
            else:
                p = bn("ih", x[t, alive] @ w["weight_ih"].T, w["gain_ih"])
            q = h @ w["weight_hh"].T
            if name == "cooijmans2016":
                q = bn("hh", q, w["gain_hh"])
            p, q = p + get(w, "bias_ih"), q + get(w, "bias_hh")
            if cell == "lstm":
                i, f, g, o = (p + q).chunk(4, 1)
                c = sigmoid(f) * states[1][alive] + sigmoid(i) * torch.tanh(g)
                shown = bn("c", c, w["gain_c"]) + w["bias_c"] if name == "cooijmans2016" else c
                new = (sigmoid(o) * torch.tanh(shown), c)
            elif cell == "gru":
                (r, z, n), (hr, hz, hn) = p.chunk(3, 1), q.chunk(3, 1)
                z = sigmoid(z + hz)
                new = (z * h + (1 - z) * torch.tanh(n + sigmoid(r + hr) * hn),)
            else:
                new = (torch.tanh(p + q),)
            states = tuple(s.index_put((torch.tensor(alive),), v) for s, v in zip(states, new, strict=True))
            output = output.index_put((torch.tensor(alive),), new[0])
        outputs.append(output)
    return torch.stack(outputs), states, used


def random_weights(shapes: dict[str, tuple[int, ...]], generator: torch.Generator | None = None) -> W:
    """Weights of unit size over their inputs; gains around 1, of both signs."""
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        / math.sqrt(shape[-1] if len(shape) > 1 else 1)
        + (1.0 if name.startswith("gain") else 0.0)
        for name, shape in shapes.items()
    }
