"""Norm layers from Keras and from Flax: their weights, in a layer of ours.

Neither library is needed: weights come as arrays, of whatever kind torch.as_tensor takes.

What differs there, and is seen to here:

- `momentum` weighs the OLD running average, torch's the new batch: theirs is 1 - ours.
- eps is 1e-3 in Keras; in Flax 1e-5 (BatchNorm), 1e-6 (the others).
- The running variance is an average of biased variances, torch's of unbiased ones (n / (n - 1) times as large). Our
  layers go on as there, by correction=0; to one of torch.nn it is given as it is, for the same outputs in evaluation.
- Channels are on the last axis, in torch on axis 1: give the layer dim=-1 to keep the input as it is there. The weights
  are one number a channel in either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.surgery.select import BATCH, NORMS, RECURRENT
from normwise.words import counted


def from_keras_momentum(momentum: float) -> float:
    """torch's momentum for that of Keras or Flax: 1 - momentum.

    Raises:
        ValueError: outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], but got {momentum}: it is the weight of the old running average"
        )
    return 1 - momentum


def from_keras(
    layer: type[nn.Module],
    weights: Sequence[Any],
    *,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    scale: bool = True,
    center: bool = True,
    **options: Any,
) -> nn.Module:
    """A `layer` with the weights of a Keras layer, as its `get_weights()` returns them.

        bn = normwise.from_keras(normwise.BatchNorm2d, keras_layer.get_weights())

    Keras layer | order of its weights | `layer`
    --- | --- | ---
    BatchNormalization | gamma, beta, moving_mean, moving_variance | BatchNorm1d, 2d, 3d, FrozenBatchNorm1d, ...
    LayerNormalization | gamma, beta | LayerNorm
    GroupNormalization | gamma, beta | GroupNorm, with `num_groups=` (Keras: groups=32)

    Args:
        layer: a class of normwise or torch.nn.
        weights: arrays in this order; without gamma if `scale` is False, without beta if `center` is.
        epsilon, momentum, scale, center: as they were given to the Keras layer; the defaults are Keras' own.
        options: further arguments of `layer`.

    Raises:
        ValueError: not as many weights as these arguments mean, of different shapes, or momentum outside [0, 1].
        TypeError: `layer` is no class of norm layers.
    """
    _norm_class("from_keras", layer)
    names = [*(["gamma"] if scale else []), *(["beta"] if center else [])]
    if issubclass(layer, BATCH):
        names += ["moving_mean", "moving_variance"]
    if len(weights) != len(names):
        raise ValueError(
            f"expected {counted(len(names), 'weight')} for {layer.__name__} with scale={scale} and center={center}, "
            f"{', '.join(names) or 'none'} in this order, but got {len(weights)}: pass scale= and center= as the Keras "
            "layer has them"
        )
    given = dict(zip(names, map(torch.as_tensor, weights), strict=True))
    return _built(
        layer,
        (given.get("gamma"), given.get("beta"), given.get("moving_mean"), given.get("moving_variance")),
        epsilon,
        momentum,
        options,
    )


def from_flax(
    layer: type[nn.Module],
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any] | None = None,
    *,
    epsilon: float | None = None,
    momentum: float = 0.99,
    **options: Any,
) -> nn.Module:
    """A `layer` with the parameters of a Flax layer.

        bn = normwise.from_flax(normwise.BatchNorm2d, v["params"]["bn"], v["batch_stats"]["bn"])

    Args:
        layer: a class of normwise or torch.nn: BatchNorm1d, 2d, 3d, LayerNorm, RMSNorm, GroupNorm (with `num_groups=`).
        params: of this layer, "scale" and "bias", either of which may be missing.
        batch_stats: of a BatchNorm, "mean" and "var".
        epsilon, momentum: as they were given to the Flax layer; the defaults are Flax's own (epsilon 1e-5 for
            BatchNorm, 1e-6 for the others).
        options: further arguments of `layer`.

    Raises:
        ValueError: names that are not these, statistics missing or not wanted, shapes that differ, momentum outside
            [0, 1].
        TypeError: `layer` is no class of norm layers.
    """
    _norm_class("from_flax", layer)
    stats = batch_stats or {}
    if set(params) - {"scale", "bias"} or set(stats) - {"mean", "var"}:
        raise ValueError(
            "expected params with 'scale' and 'bias', and batch_stats with 'mean' and 'var', but got "
            f"{sorted(params)} and {sorted(stats)}: pass those of the one layer, e.g. v['params']['BatchNorm_0']"
        )
    wanted = {"mean", "var"} if issubclass(layer, BATCH) else set()
    if set(stats) != wanted:
        raise ValueError(f"expected batch_stats with {sorted(wanted)} for {layer.__name__}, but got {sorted(stats)}")
    values = [*(params.get(name) for name in ("scale", "bias")), *(stats.get(name) for name in ("mean", "var"))]
    if epsilon is None:
        epsilon = 1e-5 if wanted else 1e-6
    tensors = tuple(None if value is None else torch.as_tensor(value) for value in values)
    return _built(layer, tensors, epsilon, momentum, options)


def _norm_class(verb: str, layer: Any) -> None:
    """Raises TypeError for what is no class of norm layers, with what to do about a recurrent layer."""
    if not isinstance(layer, type):
        named = type(layer).__name__ if isinstance(layer, NORMS) else "BatchNorm2d"
        got, cure = repr(layer), f"give the class itself, e.g. normwise.{named}"
    elif issubclass(layer, NORMS):
        return
    elif issubclass(layer, RECURRENT):
        got, cure = layer.__name__, f"copy recurrent weights by hand: {_RECURRENT[verb]}"
    else:
        got, cure = layer.__name__, "copy the weights of other layers by hand"
    raise TypeError(f"{verb} expects a class of norm layers, such as normwise.BatchNorm2d, but got {got}: {cure}")


# How the weights of the other library's recurrent layers become torch's.
_RECURRENT = {
    "from_keras": (
        "weight_ih_l0 is kernel.T and weight_hh_l0 recurrent_kernel.T; bias_ih_l0 is the bias and bias_hh_l0 zero, or, "
        "where a GRU with reset_after=True has two rows, these two. An LSTM's gates have one order (i, f, c, o); a "
        "GRU's blocks are z, r, h there and r, z, n (r, z, h) in torch"
    ),
    "from_flax": (
        "the blocks of weight_ih_l0 are the transposed kernels of ii, if, ig, io (a GRU: ir, iz, in), those of "
        "weight_hh_l0 of hi, hf, hg, ho (hr, hz, hn), and the biases likewise"
    ),
}


def _built(
    layer: type[nn.Module],
    tensors: tuple[Tensor | None, ...],
    epsilon: float,
    momentum: float,
    options: dict[str, Any],
) -> nn.Module:
    """`layer` with gain, bias, running mean and variance; a missing gain or bias is what leaves the input as it is."""
    present = [t for t in tensors if t is not None]
    shapes = {tuple(t.shape) for t in present}
    if len(shapes) != 1:
        raise ValueError(f"expected weights of one shape, one number per channel, but got {sorted(shapes)}")
    (shape,) = shapes
    gain, bias, mean, var = tensors
    affine = gain is not None or bias is not None
    sizes: tuple[Any, ...] = shape
    given: dict[str, Any]
    if issubclass(layer, (nn.LayerNorm, nn.RMSNorm)):
        sizes, given = (shape,), {"elementwise_affine": affine}
    elif issubclass(layer, nn.GroupNorm):
        sizes, given = (options.pop("num_groups", 32), *shape), {"affine": affine}
    else:
        given = {"affine": affine}
        if issubclass(layer, nn.modules.batchnorm._BatchNorm):
            given["momentum"] = from_keras_momentum(momentum)
            if "correction" in inspect.signature(layer).parameters:
                given["correction"] = options.pop("correction", 0)
    new = layer(*sizes, eps=epsilon, dtype=present[0].dtype, **given, **options)
    named = {"weight": gain, "bias": bias, "running_mean": mean, "running_var": var}
    with torch.no_grad():
        for name, value in named.items():
            if value is not None:
                getattr(new, name).copy_(value)
    return new
