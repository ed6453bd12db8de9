"""What recurrent layers and cells share: their description, and the parameters and tables that it asks for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.protocol import Running
from normwise.backends.recurrence import Cell, NormKind, Recurrence, Weights
from normwise.backends.scalars import number
from normwise.ops import hyperparameters, inputs
from normwise.ops.rnn.between import Between, BetweenNorm
from normwise.ops.rnn.presets import DEFAULTS, preset
from normwise.ops.rnn.running_stats import BatchStats


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
        name, config = None, variant
        if config.cell != cell:
            raise ValueError(f"variant describes a {config.cell} cell, but this layer's is {cell}")
        for field, value, default in (("norm", norm, "layer"), ("nonlinearity", nonlinearity, "tanh")):
            if value is not None and value not in (default, getattr(config, field)):
                raise ValueError(
                    f"{field}={value!r} contradicts the {field}={getattr(config, field)!r} of the given Recurrence: "
                    "leave the argument out, or use dataclasses.replace on the description"
                )
        if norm is None and config.norm is not None:
            raise ValueError(f"norm=None contradicts the norm={config.norm!r} of the given Recurrence")
    elif variant is None or isinstance(variant, str):
        config = preset(cell, norm, variant)
        name = variant or (None if norm is None else DEFAULTS[norm])
        if nonlinearity is not None:
            if nonlinearity not in ("tanh", "relu"):
                raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
            changes["nonlinearity"] = nonlinearity
    else:
        raise TypeError(
            f"variant must be the name of a preset, a normwise.Recurrence or None, but got {type(variant).__name__}"
        )
    return replace(config, **{field: value for field, value in changes.items() if value is not None}), name


def positive_rows(num_stat_steps: Any) -> int:
    """`num_stat_steps`, an integer of any kind: the tables of running statistics need at least one row."""
    rows = hyperparameters.whole_number("num_stat_steps", num_stat_steps)
    if rows < 1:
        raise ValueError(
            f"num_stat_steps must be a positive integer, but got {num_stat_steps!r}: it is the number of steps with "
            "running statistics of their own"
        )
    return rows


def register_norm_parameters(
    layer: nn.Module,
    config: Recurrence,
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
    if config.norm == "batch":
        for site, width in config.sites(hidden_size).items():
            layer.register_buffer(f"running_mean_{site}{suffix}", weight.new_zeros(rows, width))
            layer.register_buffer(f"running_var_{site}{suffix}", weight.new_ones(rows, width))


def reset_norms(layer: nn.Module, config: Recurrence, suffix: str = "") -> None:
    """Gains to `config.gain`, biases to 0 and the forget gate's to `config.forget_bias`, running statistics to 0 and 1.

    Without a norm, biases stay as torch starts them, unless a forget bias was asked for.
    """
    units = getattr(layer, f"weight_hh{suffix}").shape[0] // config.gates
    with torch.no_grad():
        for site in config.sites(units):
            _fill(layer, f"gain_{site}{suffix}", config.gain)
            _fill(layer, f"running_mean_{site}{suffix}", 0.0)
            _fill(layer, f"running_var_{site}{suffix}", 1.0)
        forget = slice(units, 2 * units)
        if config.norm is not None:
            for name in ("bias_ih", "bias_hh", "bias_inner", "bias_c"):
                _fill(layer, name + suffix, 0.0)
        if config.forget_bias:
            _fill(layer, f"bias_hh{suffix}", 0.0, forget)
            _fill(layer, f"bias_ih{suffix}", config.forget_bias, forget)


def _fill(layer: nn.Module, name: str, value: float, where: slice = slice(None)) -> None:
    tensor = getattr(layer, name, None)
    if tensor is not None:
        tensor[where] = value


def forget_bias_needs_bias(forget_bias: float | None, bias: bool) -> None:
    """ValueError for `forget_bias` in a layer without biases, TypeError for one that is no number."""
    if forget_bias is not None:
        number("forget_bias", forget_bias, "a number or None")
    if forget_bias and not bias:
        raise ValueError(f"forget_bias={forget_bias} is what a bias starts from, but bias=False leaves it out")


def no_projection(proj_size: int) -> None:
    """ValueError for `proj_size` in a layer other than an LSTM."""
    if proj_size:
        raise ValueError(
            f"proj_size argument is only supported for LSTM, not RNN or GRU, but got {proj_size}: use normwise.LSTM, "
            "or an nn.Linear behind the layer"
        )


def weights_of(layer: nn.Module, suffix: str = "") -> Weights:
    """The parameters of one layer in one direction, or what stands for them: torch.nn.utils.parametrize makes
    properties of them, others attributes.

    nn.Module's own look for what is not there ends in an error, which takes longer than all the others together.
    """
    parameters, attributes, kind = layer._parameters, layer.__dict__, type(layer)
    found = []
    for field in Weights._fields:
        name = field + suffix
        value: Any = parameters.get(name)
        if value is None and (name in attributes or hasattr(kind, name)):
            value = getattr(layer, name)
        found.append(value)
    return Weights(*found)


def running_of(layer: nn.Module, config: Recurrence, suffix: str = "") -> Running:
    """Its tables of running mean and variance by site; none unless the norm is "batch"."""
    if config.norm != "batch":
        return {}
    weight = getattr(layer, f"weight_hh{suffix}")
    tables = {
        site: (getattr(layer, f"running_mean_{site}{suffix}"), getattr(layer, f"running_var_{site}{suffix}"))
        for site in config.sites(weight.shape[0] // config.gates)
    }
    for mean, var in tables.values():  # they move after the call, when it is too late for an error
        inputs.beside(weight, running_mean=mean, running_var=var)
    return tables


def batch_stats_of(layer: Any, suffixes: tuple[str, ...]) -> BatchStats | None:
    """What a batch norm inside the recurrence keeps; None unless there is one."""
    config: Recurrence = layer.recurrence
    if config.norm != "batch":
        return None
    uses_batch = layer.training or layer.stats_observer is not None
    tables = tuple(running_of(layer, config, suffix) for suffix in suffixes)
    return BatchStats(tables, suffixes, layer.momentum, uses_batch, layer.stats_observer)


def check_between(between: Any, residual: Any, num_layers: int) -> None:
    """ValueError or TypeError for what cannot stand between layers; a warning where there is one layer alone, as
    torch gives for dropout."""
    if between not in (None, "layer", "rms"):
        raise ValueError(
            f"between={between!r} is not known: expected 'layer', 'rms' or None, a norm of the outputs of each layer "
            "before they go into the next"
        )
    if not isinstance(residual, bool):
        raise TypeError(
            f"residual must be True or False, whether layers from the second on add their input to their output, but "
            f"got {type(residual).__name__}"
        )
    if num_layers == 1 and (between is not None or residual):
        given = f"between={between!r}" if between is not None else "residual=True"
        warnings.warn(f"{given} stands between layers, and num_layers=1 has no two: it changes nothing", stacklevel=4)


def register_between(layer: Any, width: int) -> None:
    """Give `layer` the parameters of the norms of its layers' outputs, `gain_between_l<k>` and `bias_between_l<k>`."""
    for k in range(layer.num_layers - 1 if layer.between is not None else 0):
        for name in ("gain", "bias") if layer.between == "layer" and layer.bias else ("gain",):
            value = nn.Parameter(layer.weight_ih_l0.new_empty(width))
            layer.register_parameter(f"{name}_between_l{k}", value)


def reset_between(layer: Any) -> None:
    """Gains between layers to 1, biases to 0."""
    with torch.no_grad():
        for k in range(layer.num_layers - 1):
            _fill(layer, f"gain_between_l{k}", 1.0)
            _fill(layer, f"bias_between_l{k}", 0.0)


def between_of(layer: Any) -> Between | None:
    """What stands between its layers; None if nothing does."""
    norm: BetweenNorm | None = layer.between
    places = range(layer.num_layers - 1)
    if not places or (norm is None and not layer.residual):
        return None
    if norm is None:
        return Between(residual=True)
    has_bias = norm == "layer" and layer.bias
    gains = tuple(getattr(layer, f"gain_between_l{k}") for k in places)
    biases = tuple(getattr(layer, f"bias_between_l{k}") if has_bias else None for k in places)
    return Between(norm, gains, biases, layer.residual)


def copy_from_torch(layer: nn.Module, source: nn.Module, suffix: str = "") -> None:
    """Copy torch's own parameters into `layer`; where it has one bias, it gets the sum of torch's two."""
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            given, own = (getattr(m, name + suffix, None) for m in (source, layer))
            if given is not None and own is not None:
                own.copy_(given)
            elif given is not None:
                getattr(layer, f"bias_ih{suffix}").add_(given)
