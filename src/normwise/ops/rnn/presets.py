"""The published recurrences, by name."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import get_args

from normwise.backends.recurrence import ACCEPTED, Cell, NormKind, Recurrence
from normwise.words import did_you_mean


def _presets(cell: Cell) -> dict[str, Recurrence]:
    lstm = cell == "lstm"
    return {
        # Laurent et al. 2015, "Batch Normalized Recurrent Neural Networks", eq. 10: BN(W_ih x) + W_hh h + b.
        "laurent2015": Recurrence(cell, "batch", "input", hidden_bias=cell == "gru"),
        # Cooijmans et al. 2016, "Recurrent Batch Normalization", eq. 6-8: BN(W_hh h; g, 0) + BN(W_ih x; g, 0) + b,
        # h = s(o) * tanh(BN(c'; g_c, b_c)); g = 0.1 keeps tanh's gradient from vanishing (section 4). Written there for
        # the LSTM; GRU and RNN take the same norms at the same terms.
        "cooijmans2016": Recurrence(
            cell, "batch", gain=0.1, hidden_bias=cell == "gru", cell_norm="readout" if lstm else None
        ),
    }


PRESETS: dict[str, dict[str, Recurrence]] = {
    "lstm": {
        # Ba, Kiros & Hinton 2016, "Layer Normalization", eq. 20-22.
        "ba2016": Recurrence("lstm", cell_norm="readout"),
        # PyTorch, benchmarks/fastrnns/custom_lstms.py, LayerNormLSTMCell.
        "fastrnns": Recurrence("lstm", cell_norm="state"),
        # TensorFlow Addons, LayerNormLSTMCell: its kernel norm's bias, recurrent norm's bias and `bias` add up.
        "tfa": Recurrence("lstm", cell_norm="state", eps=1e-3, forget_bias=1.0),
        # torchaudio, the predictor of the Emformer RNN-T: norms over the summed gates and over the cell.
        "torchaudio": Recurrence("lstm", norm_placement="sum", hidden_bias=False, cell_norm="state"),
        # TensorFlow 1, contrib LayerNormBasicLSTMCell: its constant forget_bias=1 starts the forget gate's bias here.
        "per_gate": Recurrence(
            "lstm", norm_placement="sum", groups=(1, 1, 1, 1), hidden_bias=False, cell_norm="state", forget_bias=1.0
        ),
        # icefall, LayerNormLSTMCell: as per_gate, but bias_ih + bias_hh stand inside the gate norms, where a forget
        # bias of 1 for a whole gate changes nothing: the norm takes its mean away.
        "icefall": Recurrence(
            "lstm", norm_placement="sum", groups=(1, 1, 1, 1), hidden_bias=False, inner_bias=True, cell_norm="state"
        ),
        # haste, LayerNormLSTM: gains only on both terms, one bias, gain and bias on the cell; zoneout on h.
        "haste": Recurrence("lstm", hidden_bias=False, cell_norm="readout", forget_bias=1.0),
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
            norm_placement="sum",
            hidden_bias=False,
            eps=1e-3,
            reset_after=False,
            update_gate="paper",
            update_offset=-1.0,
        ),
        **_presets("gru"),
    },
    "rnn": {
        # Ba, Kiros & Hinton 2016, eq. 4: one norm over the summed input of the step.
        "ba2016": Recurrence("rnn", norm_placement="sum", hidden_bias=False),
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
    if norm not in ACCEPTED["norm"]:
        hint = did_you_mean(norm, get_args(NormKind))
        raise ValueError(f"norm={norm!r} is not known: expected 'layer', 'rms', 'batch' or None{hint}")
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
