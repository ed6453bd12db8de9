"""How many values a norm's statistics come from, and into how many groups that allows the channels to be divided.

Of n values a norm leaves n - 2 degrees of freedom: of one the bias, of two +1 and -1, whatever they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.measure.snapshot import modes_kept
from normwise.nn.construct import channel_axis
from normwise.surgery.batches import call_example, without_graph
from normwise.surgery.norms import Call, calls_of, is_own
from normwise.surgery.report import Refusal
from normwise.words import counted

# A mean of m values strays by 1/sqrt(m) deviations: a quarter of one at 16. Wu & He 2018, table 3, find groups of 16
# channels as good as their 32 groups to within .3 % of ImageNet's error, at which they stop (section 4.1).
ENOUGH, FEWEST, MOST = 16, 4, 32

# Of a layer of somebody else's class, calls on which its successor is proved.
_CALLS = 2


def number_of_groups(
    channels: int, rank: int | None, positions: int | None, asked: int | Callable[[int], int] | None
) -> tuple[int, str]:
    """A number of groups, and why: what was asked for, or the most up to `MOST` that leave each `ENOUGH` values.

    Args:
        rank: the axes behind the channels as the layer's class has them: 1 of BatchNorm1d; None if it does not say.
        positions: how many positions an example has, at least; None if there was none. Then the channels alone must
            be enough, since the example may be a map of 1 x 1.
        asked: the number, or a function of the channels.

    Raises:
        Refusal: a group would hold fewer than `FEWEST` values, where that is known or the input may be rows (N, C).
    """
    if asked is None:
        divisors = (g for g in range(min(MOST, channels), 0, -1) if channels % g == 0)
        groups = next((g for g in divisors if channels // g * (positions or 1) >= ENOUGH), 1)
    else:
        groups = asked(channels) if callable(asked) else asked
        if not isinstance(groups, int) or groups < 1 or channels % groups:
            return groups, ""  # the layer's own error says what is wrong with it
    each = channels // groups
    size = counted(each, "channel") + (f" x {counted(positions, 'position')}" if positions else "")
    if each * (positions or 1) < FEWEST and (positions or rank not in (2, 3)):
        fewer = groups > 1 and channels * (positions or 1) >= FEWEST
        raise Refusal(_too_few(f"a group of {size}", channels if fewer else 0, bool(positions)))
    found = counted(groups, "group")
    if positions:
        few = "" if each * positions >= ENOUGH else f", fewer than the {ENOUGH} that steady statistics take"
        values = counted(each * positions, "value")
        return groups, f"{found} of {values} ({size}){few}" if asked is None or few else ""
    if asked is None and each >= ENOUGH:
        return groups, f"{found} of {size}, enough at maps of any size; with example= perhaps more groups"
    if asked is None or each < FEWEST:
        return groups, f"{found} of {size}, the size of its input being unknown: example= tells"
    return groups, ""


def enough_channels(channels: int) -> None:
    """Raises `Refusal` where a norm over the channels of each position would have too few values."""
    if channels < FEWEST:
        raise Refusal(_too_few(f"a LayerNorm over {counted(channels, 'channel')}", 0, True))


def _too_few(what: str, layer_norm_over: int, known: bool) -> str:
    doubt = "" if known else " where the input is rows (N, C), as is taken for granted without example="
    cure = (
        f"take fewer groups, or to='layer', a LayerNorm over all {layer_norm_over} channels"
        if layer_norm_over
        else "a LayerNorm has no more of them; keep statistics of the batch, with to='batch' or to='renorm'"
    )
    return f"{what} would hold fewer than {FEWEST} values{doubt}, and put out next to nothing but its bias: {cure}"


class Met(NamedTuple):
    """What a layer is called with in an example: the shapes of all calls, channels on axis 1, the first calls
    themselves where the layer is of a class of its own, and what any call gives by name."""

    shapes: Sequence[torch.Size] = ()
    calls: Sequence[Call] = ()
    given: Set[str] = frozenset()


def inputs_met(model: nn.Module, layers: Iterable[nn.Module], example: Any) -> dict[int, Met]:
    """What each of the layers is called with in one call of the model in evaluation, by the layer's id.

    Calls with a mask or lengths count as calls of one position, since the valid ones may be no more.
    """
    met: dict[int, Met] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = met.setdefault(id(layer), Met([], [], set()))
        found.given.update(name for name, value in kwargs.items() if value is not None)  # type: ignore[attr-defined]
        if not is_own(layer) and len(found.calls) < _CALLS:
            found.calls.append(calls_of(args, kwargs))  # type: ignore[attr-defined]
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and not x.is_nested and x.dim() > 1:
            ragged = any(kwargs.get(name) is not None for name in ("mask", "lengths"))
            axis = channel_axis(layer) % x.dim()
            sizes = [x.shape[0], x.shape[axis], *(n for d, n in enumerate(x.shape) if d not in (0, axis))]
            shape = torch.Size([*sizes[:2], *(1 for _ in sizes[2:])]) if ragged else torch.Size(sizes)
            found.shapes.append(shape)  # type: ignore[attr-defined]

    with ExitStack() as hooks, modes_kept(model.modules()), without_graph(model):
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        for module in model.modules():
            module.training = False
        call_example(model, example)
    return met
