"""What a normalized recurrence is: one configuration of orthogonal options, and the parameters that it asks for.

In all equations N_g(v) = g * (v - mean(v)) / sqrt(var(v) + eps) with the biased variance. For `norm="layer"` mean and
variance are over the features of one sample at one step, for `norm="rms"` the mean stays in and the mean square stands
for the variance, for `norm="batch"` they are over the samples of one step. A bias is always added AFTER a norm: what
other libraries call the norm's bias and the layer's bias is one parameter here, since only their sum matters.

Gates are stacked in torch's order: LSTM i, f, g, o; GRU r, z, n.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from normwise.backends.scalars import flags, number
from normwise.words import did_you_mean

Cell = Literal["lstm", "gru", "rnn"]
NormKind = Literal["layer", "rms", "batch"]

GATES: dict[str, tuple[str, ...]] = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n"), "rnn": ("h",)}


@dataclass(frozen=True)
class Recurrence:
    """A recurrent cell and where normalization stands in it.

    With p = W_ih x_t, q = W_hh h_(t-1), H units and G*H rows of gates, the summed input of a step is

        norm_placement="separate":  (N_ih(p) + b_ih) + (N_hh(q) + b_hh)
        norm_placement="sum":       N_sum(p + q + b_inner) + b_ih
        norm_placement="input":     (N_ih(p) + b_ih) + (q + b_hh)
        norm=None:                  (p + b_ih) + (q + b_hh)

    LSTM: c' = s(f)*c + s(i)*tanh(g) and h' = s(o)*tanh(c'), where
        cell_norm="readout":  h' = s(o)*tanh(N_c(c') + b_c), and c' itself goes on to the next step;
        cell_norm="state":    c' = N_c(s(f)*c + s(i)*tanh(g)) + b_c.
    GRU: r = s(r), z = s(z + update_offset), and
        reset_after=True:        n = tanh(input term of n + r * hidden term of n)    (torch, cuDNN)
        reset_after=False:       n = tanh(r * summed input of n)                     (Dreamer; Keras's means
                                 tanh(input term + W_hh (r * h)), which is another cell)
        update_gate="torch":     h' = z*h + (1-z)*n
        update_gate="paper":     h' = (1-z)*h + z*n
    RNN: h' = nonlinearity(summed input).

    Attributes:
        cell: "lstm", "gru" or "rnn".
        norm: "layer", "rms", "batch", or None for torch.nn's own layer.
        norm_placement: which terms of the summed input have a norm, see above.
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
        statistics: of a batch norm on the input term, "per_step" (each step its own) or "sequence" (one for all steps).
        reset_after, update_gate, update_offset: the GRU's, see above.
        nonlinearity: the RNN's, "tanh" or "relu".

    Raises:
        ValueError: for a value or a combination that does not exist.
    """

    cell: Cell
    norm: NormKind | None = "layer"
    norm_placement: Literal["separate", "sum", "input"] = "separate"
    groups: tuple[int, ...] = ()
    hidden_bias: bool = True
    inner_bias: bool = False
    cell_norm: Literal["readout", "state"] | None = None
    cell_bias: bool = True
    eps: float = 1e-5
    gain: float = 1.0
    forget_bias: float = 0.0
    zoneout: float = 0.0
    statistics: Literal["per_step", "sequence"] = "per_step"
    reset_after: bool = True
    update_gate: Literal["torch", "paper"] = "torch"
    update_offset: float = 0.0
    nonlinearity: Literal["tanh", "relu"] = "tanh"

    def __post_init__(self) -> None:
        number("eps", self.eps, "a small positive number such as 1e-5")
        number("zoneout", self.zoneout, "a probability in [0, 1]")
        for name in ("gain", "forget_bias", "update_offset"):
            number(name, getattr(self, name), "a number")
            if not -math.inf < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite, but got {getattr(self, name)}")
        flags(hidden_bias=self.hidden_bias, inner_bias=self.inner_bias, cell_bias=self.cell_bias)
        for name, accepted in ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                hint = did_you_mean(value, [word for word in accepted if isinstance(word, str)])
                raise ValueError(
                    f"{name}={value!r} is not known: expected one of {', '.join(map(repr, accepted))}{hint}"
                )
        gates = len(GATES[self.cell])
        if self.groups and (sum(self.groups) != gates or min(self.groups) < 1):
            raise ValueError(
                f"groups={self.groups} must be positive and add up to the {gates} gates of a {self.cell} cell, "
                f"in the order {', '.join(GATES[self.cell])}"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive, but got {self.eps}: use a small number such as 1e-5")
        if not 0 <= self.zoneout <= 1:
            raise ValueError(f"zoneout is a probability in [0, 1], but got {self.zoneout}")
        if self.cell_norm is not None and self.cell != "lstm":
            raise ValueError(f"cell_norm={self.cell_norm!r} needs a cell state, which a {self.cell} cell has not")
        if self.forget_bias and self.cell != "lstm":
            raise ValueError(f"forget_bias={self.forget_bias} needs a forget gate, which a {self.cell} cell has not")
        if self.cell == "gru" and self.norm_placement == "sum" and self.reset_after:
            raise ValueError(
                "norm_placement='sum' leaves no hidden term for the reset gate to act on: "
                "use reset_after=False or norm_placement='separate'"
            )
        if self.norm is None and (self.cell_norm is not None or self.inner_bias):
            raise ValueError("cell_norm and inner_bias belong to a norm, but norm=None has none: leave them out")
        if self.inner_bias and self.norm_placement != "sum":
            raise ValueError("inner_bias=True stands inside the norm over the sum: it needs norm_placement='sum'")
        input_only = self.norm == "batch" and self.norm_placement == "input" and self.cell_norm is None
        if self.statistics == "sequence" and not input_only:
            raise ValueError(
                "statistics='sequence' needs the whole sequence before its first step, so it exists only for batch "
                "norm on the input term alone: norm='batch', variant='laurent2015'"
            )

    @property
    def is_torch_layer(self) -> bool:
        """Whether torch.nn's own layer computes just this."""
        return (
            self.norm is None
            and self.reset_after
            and self.update_gate == "torch"
            and not self.update_offset
            and not self.zoneout
        )

    @property
    def gates(self) -> int:
        """How many gates are stacked in weight_ih and weight_hh."""
        return len(GATES[self.cell])

    def sites(self, hidden_size: int) -> dict[str, int]:
        """The places that have a norm, in the order in which a step meets them, and how many features each has."""
        if self.norm is None:
            return {}
        named = {"separate": ("ih", "hh"), "sum": ("sum",), "input": ("ih",)}[self.norm_placement]
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


ACCEPTED: dict[str, tuple[object, ...]] = {
    "cell": get_args(Cell),
    "norm": (*get_args(NormKind), None),
    "norm_placement": ("separate", "sum", "input"),
    "cell_norm": ("readout", "state", None),
    "statistics": ("per_step", "sequence"),
    "reset_after": (True, False),
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
