"""What a normalized recurrence is: one description of orthogonal options, and the presets that people know by name.

In all equations N_g(v) = g * (v - mean(v)) / sqrt(var(v) + eps) with the biased variance. For `norm="layer"` mean and
variance are over the features of one sample at one step, for `norm="rms"` the mean stays in and the mean square stands
for the variance, for `norm="batch"` they are over the samples of one step. A bias is always added AFTER a norm: what
other libraries call the norm's bias and the layer's bias is one parameter here, since only their sum matters.

Gates are stacked in torch's order: LSTM i, f, g, o; GRU r, z, n.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Cell = Literal["lstm", "gru", "rnn"]
NormKind = Literal["layer", "rms", "batch"]

GATES: dict[str, tuple[str, ...]] = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n"), "rnn": ("h",)}


@dataclass(frozen=True)
class Recurrence:
    """A recurrent cell and where normalization stands in it.

    With p = W_ih x_t, q = W_hh h_(t-1), H units and G*H rows of gates, the summed input of a step is

        terms="separate":  (N_ih(p) + b_ih) + (N_hh(q) + b_hh)
        terms="sum":       N_sum(p + q + b_inner) + b_ih
        terms="input":     (N_ih(p) + b_ih) + (q + b_hh)
        norm=None:         (p + b_ih) + (q + b_hh)

    LSTM: c' = s(f)*c + s(i)*tanh(g) and h' = s(o)*tanh(c'), where
        cell_norm="output":   h' = s(o)*tanh(N_c(c') + b_c), c' is carried as it is;
        cell_norm="carried":  c' = N_c(s(f)*c + s(i)*tanh(g)) + b_c.
    GRU: r = s(r), z = s(z + update_offset), and
        reset_gate="hidden":     n = tanh(input term of n + r * hidden term of n)    (torch)
        reset_gate="candidate":  n = tanh(r * summed input of n)                     (Dreamer)
        update_gate="torch":     h' = z*h + (1-z)*n
        update_gate="paper":     h' = (1-z)*h + z*n
    RNN: h' = nonlinearity(summed input).

    Attributes:
        cell: "lstm", "gru" or "rnn".
        norm: "layer", "rms", "batch", or None for torch.nn's own layer.
        terms: which terms of the summed input have a norm, see above.
        groups: gates that share statistics, as counts of gates in stacking order: (1, 1, 1, 1) is one norm per LSTM
            gate, (2, 1) one over r and z and one over n. () is one norm over all gates. Batch statistics are per
            feature, so groups mean nothing to them.
        hidden_bias: the hidden term has a bias of its own, b_hh. (b_ih is there unless the layer has `bias=False`.)
        inner_bias: a bias b_inner inside the norm over the sum.
        cell_norm: the norm of an LSTM's cell state, see above.
        cell_bias: that norm has a bias.
        eps: added to the variance, in units of the summed input squared.
        gain: what gains start from.
        forget_bias: what the forget gate's bias starts from.
        zoneout: the probability with which a unit of h keeps its previous value in training; outside training h is
            the expectation, zoneout * h_(t-1) + (1 - zoneout) * h'.
        statistics: of a batch norm on the input term, "frame" (each step its own) or "sequence" (one for all steps).
        reset_gate, update_gate, update_offset: the GRU's, see above.
        nonlinearity: the RNN's, "tanh" or "relu".

    Raises:
        ValueError: for a value or a combination that does not exist.
    """

    cell: Cell
    norm: NormKind | None = "layer"
    terms: Literal["separate", "sum", "input"] = "separate"
    groups: tuple[int, ...] = ()
    hidden_bias: bool = True
    inner_bias: bool = False
    cell_norm: Literal["output", "carried"] | None = None
    cell_bias: bool = True
    eps: float = 1e-5
    gain: float = 1.0
    forget_bias: float = 0.0
    zoneout: float = 0.0
    statistics: Literal["frame", "sequence"] = "frame"
    reset_gate: Literal["hidden", "candidate"] = "hidden"
    update_gate: Literal["torch", "paper"] = "torch"
    update_offset: float = 0.0
    nonlinearity: Literal["tanh", "relu"] = "tanh"

    def __post_init__(self) -> None:
        for name, accepted in _ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name}={value!r} is not known: expected one of {', '.join(map(repr, accepted))}")
        gates = len(GATES[self.cell])
        if self.groups and (sum(self.groups) != gates or min(self.groups) < 1):
            raise ValueError(
                f"groups={self.groups} must be positive and add up to the {gates} gates of a {self.cell} cell, "
                f"in the order {', '.join(GATES[self.cell])}"
            )
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, but got {self.eps}")
        if not 0 <= self.zoneout <= 1:
            raise ValueError(f"zoneout is a probability in [0, 1], but got {self.zoneout}")
        if self.cell_norm is not None and self.cell != "lstm":
            raise ValueError(f"cell_norm={self.cell_norm!r} needs a cell state, which a {self.cell} cell has not")
        if self.forget_bias and self.cell != "lstm":
            raise ValueError(f"forget_bias={self.forget_bias} needs a forget gate, which a {self.cell} cell has not")
        if self.cell == "gru" and self.terms == "sum" and self.reset_gate == "hidden":
            raise ValueError(
                "terms='sum' leaves no hidden term for the reset gate to act on: "
                "use reset_gate='candidate' or terms='separate'"
            )
        if self.norm is None and (self.cell_norm is not None or self.inner_bias):
            raise ValueError("cell_norm and inner_bias belong to a norm, but norm=None has none: leave them out")
        if self.inner_bias and self.terms != "sum":
            raise ValueError("inner_bias=True stands inside the norm over the sum: it needs terms='sum'")
        input_only = self.norm == "batch" and self.terms == "input" and self.cell_norm is None
        if self.statistics == "sequence" and not input_only:
            raise ValueError(
                "statistics='sequence' needs the whole sequence before its first step, so it exists only for batch "
                "norm on the input term alone: norm='batch', variant='laurent2015'"
            )

    @property
    def gates(self) -> int:
        """How many gates are stacked in weight_ih and weight_hh."""
        return len(GATES[self.cell])

    def sites(self, hidden_size: int) -> dict[str, int]:
        """The places that have a norm, in the order in which a step meets them, and how many features each has."""
        if self.norm is None:
            return {}
        named = {"separate": ("ih", "hh"), "sum": ("sum",), "input": ("ih",)}[self.terms]
        places = dict.fromkeys(named, self.gates * hidden_size)
        if self.cell_norm is not None:
            places["c"] = hidden_size
        return places

    def shapes(
        self, input_size: int, hidden_size: int, *, proj_size: int = 0, bias: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer in one direction: the fields of `Weights` that are not None, and their shapes."""
        stacked = self.gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (stacked, input_size),
            "weight_hh": (stacked, proj_size or hidden_size),
        }
        if bias:
            shapes["bias_ih"] = (stacked,)
            if self.hidden_bias or self.norm is None:
                shapes["bias_hh"] = (stacked,)
        if proj_size:
            shapes["weight_hr"] = (proj_size, hidden_size)
        sites = self.sites(hidden_size)
        shapes |= {f"gain_{site}": (width,) for site, width in sites.items()}
        if bias and self.inner_bias and "sum" in sites:
            shapes["bias_inner"] = (stacked,)
        if bias and self.cell_bias and "c" in sites:
            shapes["bias_c"] = (hidden_size,)
        return shapes


_ACCEPTED: dict[str, tuple[object, ...]] = {
    "cell": get_args(Cell),
    "norm": (*get_args(NormKind), None),
    "terms": ("separate", "sum", "input"),
    "cell_norm": ("output", "carried", None),
    "statistics": ("frame", "sequence"),
    "reset_gate": ("hidden", "candidate"),
    "update_gate": ("torch", "paper"),
    "nonlinearity": ("tanh", "relu"),
}


class Weights(NamedTuple):
    """The parameters of one layer in one direction; `Recurrence.shapes` says which there are. Torch's layouts."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    gain_ih: Tensor | None = None
    gain_hh: Tensor | None = None
    gain_sum: Tensor | None = None
    bias_inner: Tensor | None = None
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None


def _presets(cell: Cell) -> dict[str, Recurrence]:
    lstm = cell == "lstm"
    return {
        # Laurent et al. 2015, "Batch Normalized Recurrent Neural Networks", eq. 10: BN(W_ih x) + W_hh h + b.
        "laurent2015": Recurrence(cell, "batch", "input", hidden_bias=cell == "gru"),
        # Cooijmans et al. 2016, "Recurrent Batch Normalization", eq. 6-8: BN(W_hh h; g, 0) + BN(W_ih x; g, 0) + b,
        # h = s(o) * tanh(BN(c'; g_c, b_c)); g = 0.1 keeps tanh's gradient from vanishing (section 4). Written there for
        # the LSTM; GRU and RNN take the same norms at the same terms.
        "cooijmans2016": Recurrence(
            cell, "batch", gain=0.1, hidden_bias=cell == "gru", cell_norm="output" if lstm else None
        ),
    }


PRESETS: dict[str, dict[str, Recurrence]] = {
    "lstm": {
        # Ba, Kiros & Hinton 2016, "Layer Normalization", eq. 20-22.
        "ba2016": Recurrence("lstm", cell_norm="output"),
        # PyTorch, benchmarks/fastrnns/custom_lstms.py, LayerNormLSTMCell.
        "fastrnns": Recurrence("lstm", cell_norm="carried"),
        # TensorFlow Addons, LayerNormLSTMCell: its kernel norm's bias, recurrent norm's bias and `bias` add up.
        "tfa": Recurrence("lstm", cell_norm="carried", eps=1e-3, forget_bias=1.0),
        # torchaudio, the predictor of the Emformer RNN-T: norms over the summed gates and over the cell.
        "torchaudio": Recurrence("lstm", terms="sum", hidden_bias=False, cell_norm="carried"),
        # TensorFlow 1, contrib LayerNormBasicLSTMCell: its constant forget_bias=1 starts the forget gate's bias here.
        "per_gate": Recurrence(
            "lstm", terms="sum", groups=(1, 1, 1, 1), hidden_bias=False, cell_norm="carried", forget_bias=1.0
        ),
        # icefall, LayerNormLSTMCell: as per_gate, but bias_ih + bias_hh stand inside the gate norms, where a forget
        # bias of 1 for a whole gate changes nothing: the norm takes its mean away.
        "icefall": Recurrence(
            "lstm", terms="sum", groups=(1, 1, 1, 1), hidden_bias=False, inner_bias=True, cell_norm="carried"
        ),
        # haste, LayerNormLSTM: gains only on both terms, one bias, gain and bias on the cell; zoneout on h.
        "haste": Recurrence("lstm", hidden_bias=False, cell_norm="output", forget_bias=1.0),
        **_presets("lstm"),
    },
    "gru": {
        # Ba, Kiros & Hinton 2016, eq. 25-28. The authors' released code blends as torch does, their paper the other
        # way round: update_gate says which.
        "ba2016": Recurrence("gru", groups=(2, 1)),
        # haste, LayerNormGRU: one norm over all three gates, a bias on each term.
        "haste": Recurrence("gru"),
        # DreamerV2 (Hafner et al. 2021) and its ports: one Linear on [x, h], one norm over its output.
        "dreamer": Recurrence(
            "gru",
            terms="sum",
            hidden_bias=False,
            eps=1e-3,
            reset_gate="candidate",
            update_gate="paper",
            update_offset=-1.0,
        ),
        **_presets("gru"),
    },
    "rnn": {
        # Ba, Kiros & Hinton 2016, eq. 4: one norm over the summed input of the step.
        "ba2016": Recurrence("rnn", terms="sum", hidden_bias=False),
        "separate": Recurrence("rnn", hidden_bias=False),
        **_presets("rnn"),
    },
}

DEFAULTS: dict[str, str] = {"layer": "ba2016", "rms": "ba2016", "batch": "cooijmans2016"}


def preset(cell: Cell, norm: NormKind | None, variant: str | None = None) -> Recurrence:
    """The preset called `variant` for `cell`, with `norm` in its places; `variant=None` is the norm's default.

    A preset of layer norms also takes `norm="rms"`; its cell norm then has no bias.

    Raises:
        ValueError: unknown variant (names the known ones and the nearest), one that this cell has not, one whose
            norm is another kind, or any variant together with `norm=None`.
    """
    if norm not in _ACCEPTED["norm"]:
        raise ValueError(f"norm={norm!r} is not known: expected 'layer', 'rms', 'batch' or None")
    if norm is None:
        if variant is not None:
            raise ValueError(f"variant={variant!r} says where norms stand, but norm=None has none: leave one out")
        return Recurrence(cell, None)
    name = DEFAULTS[norm] if variant is None else variant
    if name not in PRESETS[cell]:
        raise ValueError(_unknown(cell, name))
    found = PRESETS[cell][name]
    if (found.norm == "batch") != (norm == "batch"):
        fitting = [n for n, p in PRESETS[cell].items() if (p.norm == "batch") == (norm == "batch")]
        raise ValueError(
            f"variant={name!r} is a recurrence with {found.norm} normalization, but norm={norm!r}: pass "
            f"norm={found.norm!r}, or one of {', '.join(map(repr, fitting))} as variant"
        )
    return replace(found, norm="rms", cell_bias=False) if norm == "rms" else found


def _unknown(cell: str, name: str) -> str:
    known = ", ".join(map(repr, PRESETS[cell]))
    elsewhere = [other for other, presets in PRESETS.items() if name in presets]
    if elsewhere:
        return f"variant={name!r} exists for {' and '.join(elsewhere)}, not for {cell}: expected one of {known}"
    nearest = difflib.get_close_matches(str(name), PRESETS[cell], n=1, cutoff=0.0)
    return f"unknown variant {name!r} for {cell}: expected one of {known}. Nearest: {nearest[0]!r}"
