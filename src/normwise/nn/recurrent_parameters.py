"""What recurrent layers and cells share: their description, and the parameters and tables that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normwise.ops import check, recurrent_running
from normwise.reference import Moments
from normwise.reference.recurrence import DEFAULTS, Cell, NormKind, Recurrence, Weights, preset
from normwise.reference.recurrent import Running

# Told, while `recalibrate` runs, the moments of each call: the end of the tables' names, the moments, the first step.
# Then the layer takes batch statistics in evaluation too, and moves nothing.
Meets: TypeAlias = Callable[[str, Moments, int], None]


def describe(
    cell: Cell,
    norm: NormKind | None,
    variant: str | Recurrence | None,
    *,
    nonlinearity: str | None = None,
    **changes: Any,
) -> tuple[Recurrence, str | None]:
    """The description that a layer's arguments mean, and its preset's name if it has one.

    Args:
        variant: a preset's name, a description of one's own (its `norm` and `nonlinearity` then count, and the
            arguments must be left alone or agree), or None for the norm's default.
        changes: fields to set; None leaves a field as the preset has it.

    Raises:
        ValueError: see `Recurrence` and `preset`.
        TypeError: `variant` is something else.
    """
    if isinstance(variant, Recurrence):
        name, how = None, variant
        if how.cell != cell:
            raise ValueError(f"variant describes a {how.cell} cell, but this layer's is {cell}")
        for field, value, default in (("norm", norm, "layer"), ("nonlinearity", nonlinearity, "tanh")):
            if value is not None and value not in (default, getattr(how, field)):
                raise ValueError(
                    f"{field}={value!r} contradicts the {field}={getattr(how, field)!r} of the given Recurrence: "
                    "leave the argument out, or use dataclasses.replace on the description"
                )
        if norm is None and how.norm is not None:
            raise ValueError(f"norm=None contradicts the norm={how.norm!r} of the given Recurrence")
    elif variant is None or isinstance(variant, str):
        how = preset(cell, norm, variant)
        name = variant or (None if norm is None else DEFAULTS[norm])
        if nonlinearity is not None:
            if nonlinearity not in ("tanh", "relu"):
                raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
            changes["nonlinearity"] = nonlinearity
    else:
        raise TypeError(
            f"variant must be the name of a preset, a normwise.Recurrence or None, but got {type(variant).__name__}"
        )
    return replace(how, **{field: value for field, value in changes.items() if value is not None}), name


def positive_rows(max_length: Any) -> int:
    """`max_length`, an integer of any kind: the tables of running statistics need at least one row."""
    rows = check.whole_number("max_length", max_length)
    if isinstance(max_length, bool) or rows < 1:
        raise ValueError(
            f"max_length must be a positive integer, but got {max_length!r}: it is the number of steps with running "
            "statistics of their own"
        )
    return rows


def step_index(how: Recurrence, max_length: int, t: int | None) -> int:
    """`t`, which per-step batch statistics must be given; 0 where it does not matter."""
    if how.norm == "batch" and max_length > 1 and t is None:
        raise ValueError("per-step batch statistics need to know which step this is: pass t=0, 1, 2, ...")
    if t is not None and t < 0:
        raise ValueError(f"t counts steps from 0, but got {t}")
    return t or 0


def add_to(
    layer: nn.Module,
    how: Recurrence,
    shapes: dict[str, tuple[int, ...]],
    suffix: str = "",
    *,
    rows: int = 1,
    hidden_size: int,
) -> None:
    """Give `layer`, which has torch's own parameters, those of its norms, and take away biases that it does not use.

    A batch norm's tables are buffers `running_mean_<site><suffix>` and `running_var_<site><suffix>`, (rows, features).
    """
    weight: Tensor = getattr(layer, f"weight_ih{suffix}")
    for name, shape in shapes.items():
        if getattr(layer, name + suffix, None) is None:
            layer.register_parameter(name + suffix, nn.Parameter(weight.new_empty(shape)))
    if "bias_hh" not in shapes and getattr(layer, f"bias_hh{suffix}", None) is not None:
        delattr(layer, f"bias_hh{suffix}")
    if how.norm == "batch":
        for site, width in how.sites(hidden_size).items():
            layer.register_buffer(f"running_mean_{site}{suffix}", weight.new_zeros(rows, width))
            layer.register_buffer(f"running_var_{site}{suffix}", weight.new_ones(rows, width))


def reset_norms(layer: nn.Module, how: Recurrence, suffix: str = "") -> None:
    """Gains to `how.gain`, biases to 0 and the forget gate's to `how.forget_bias`, running statistics to 0 and 1.

    Without a norm, biases stay as torch starts them, unless a forget bias was asked for.
    """
    units = getattr(layer, f"weight_hh{suffix}").shape[0] // how.gates
    with torch.no_grad():
        for site in how.sites(units):
            _fill(layer, f"gain_{site}{suffix}", how.gain)
            _fill(layer, f"running_mean_{site}{suffix}", 0.0)
            _fill(layer, f"running_var_{site}{suffix}", 1.0)
        forget = slice(units, 2 * units)
        if how.norm is not None:
            for name in ("bias_ih", "bias_hh", "bias_inner", "bias_c"):
                _fill(layer, name + suffix, 0.0)
        if how.forget_bias:
            _fill(layer, f"bias_hh{suffix}", 0.0, forget)
            _fill(layer, f"bias_ih{suffix}", how.forget_bias, forget)


def _fill(layer: nn.Module, name: str, value: float, where: slice = slice(None)) -> None:
    tensor = getattr(layer, name, None)
    if tensor is not None:
        tensor[where] = value


def forget_bias_needs_bias(forget_bias: float | None, bias: bool) -> None:
    """A forget bias that was asked for must have a place to start from."""
    if forget_bias and not bias:
        raise ValueError(f"forget_bias={forget_bias} is what a bias starts from, but bias=False leaves it out")


def no_projection(proj_size: int) -> None:
    """A projection stands between an LSTM's cell and its hidden state; the others have no such place."""
    if proj_size:
        raise ValueError(
            f"proj_size argument is only supported for LSTM, not RNN or GRU, but got {proj_size}: use normwise.LSTM, "
            "or an nn.Linear behind the layer"
        )


def weights_of(layer: nn.Module, suffix: str = "") -> Weights:
    """The parameters of one layer in one direction."""
    return Weights(*[_held(layer, name + suffix) for name in Weights._fields])  # type: ignore[arg-type]


def _held(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter, or what stands for it: torch.nn.utils.parametrize makes a property of it, others an attribute.

    nn.Module's own look for what is not there ends in an error, which takes longer than all the others together.
    """
    found = layer._parameters.get(name)
    if found is None and (name in layer.__dict__ or hasattr(type(layer), name)):
        return getattr(layer, name)  # type: ignore[no-any-return]
    return found


def running_of(layer: nn.Module, how: Recurrence, suffix: str = "") -> Running:
    """Its tables of running mean and variance by site; none unless the norm is "batch"."""
    if how.norm != "batch":
        return {}
    weight = getattr(layer, f"weight_hh{suffix}")
    tables = {
        site: (getattr(layer, f"running_mean_{site}{suffix}"), getattr(layer, f"running_var_{site}{suffix}"))
        for site in how.sites(weight.shape[0] // how.gates)
    }
    for mean, var in tables.values():  # they move after the call, when it is too late for an error
        check.beside(weight, running_mean=mean, running_var=var)
    return tables


def learn(layer: Any, table: Running, used: dict[str, Moments], first: int, suffix: str = "") -> None:
    """What a batch norm does with the moments of a call, by site: its tables move, or `layer.meets` is told."""
    for site, moments in used.items():
        if layer.meets is None:
            recurrent_running.move(*table[site], moments, layer.momentum, first)
        else:
            layer.meets(site + suffix, moments, first)


def start_from(layer: nn.Module, plain: nn.Module, suffix: str = "") -> None:
    """Copy torch's own parameters into `layer`; where it has one bias, it gets the sum of torch's two."""
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            source, target = (getattr(m, name + suffix, None) for m in (plain, layer))
            if source is not None and target is not None:
                target.copy_(source)
            elif source is not None:
                getattr(layer, f"bias_ih{suffix}").add_(source)
