"""Which of a model's tensors belong to its norms: for weight decay, for tuning norms alone, for federated averaging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from normwise.backends import scalars
from normwise.nn import recurrent_base, recurrent_cells
from normwise.nn.running_norm import RunningNorm
from normwise.surgery.norms.recognize import recognize, stands_for
from normwise.surgery.select import require_module


class NormParameters(NamedTuple):
    """By their names in the model, each tensor once: `gains` and `biases` that norms learn, and the buffers that hold
    their `statistics` (running averages and counts)."""

    gains: dict[str, nn.Parameter]
    biases: dict[str, nn.Parameter]
    statistics: dict[str, Tensor]


def norm_parameters(model: nn.Module) -> NormParameters:
    """Gains, biases and statistics of all norms of a model: torch.nn's, normwise's, those inside recurrent layers, and
    layers of other classes that compute what one of these does.

    To train the norms alone, as fine-tuning often does:

        gains, biases, _ = normwise.norm_parameters(model)
        model.requires_grad_(False)
        for parameter in (*gains.values(), *biases.values()):
            parameter.requires_grad_(True)

    In federated averaging, clients keep what is theirs (Li et al. 2021, FedBN: all three) or their statistics alone
    (Andreux et al. 2020, SiloBN).

    Raises:
        TypeError: not a torch.nn.Module.
    """
    require_module("norm_parameters", model)
    found = NormParameters({}, {}, {})
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for kind, name, tensor in tensors_of(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                getattr(found, kind)[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def tensors_of(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, tensor) of what a layer has of a norm: a field of `NormParameters`, the layer's own name for it."""
    if isinstance(module, (recurrent_base.Recurrent, recurrent_cells._Cell)):
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith(("gain_", "bias_c", "bias_between_")):
                yield ("gains" if name.startswith("gain_") else "biases"), name, parameter
        for name, buffer in module.named_buffers(recurse=False):
            yield "statistics", name, buffer
        return
    norm = module if isinstance(module, RunningNorm) else stands_for(module)
    if norm is None:
        return
    if norm is not module:  # a layer of another class: its tensors, which the norm may hold in another shape
        for theirs, mine in recognize(module).form.names.items():
            tensor = getattr(module, theirs)
            kind = "biases" if mine == "bias" else "gains"
            yield (kind if isinstance(tensor, nn.Parameter) else "statistics"), theirs, tensor
        return
    for name, parameter in norm.named_parameters(recurse=False):
        yield ("biases" if "bias" in name else "gains"), name, parameter
    for name, buffer in norm.named_buffers(recurse=False):
        yield "statistics", name, buffer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters for an optimizer: matrices and filters with weight decay; gains and biases without it.

        optimizer = torch.optim.AdamW(normwise.decay_groups(model, 0.1), lr=3e-4)

    Without it are the gains and biases of norms, of whatever shape, and every other vector or number (the biases of
    other layers). The size of a gain is the scale of its norm's output, which decay is not meant to shrink, and a gain
    of 0 turns a channel off. Parameters that are not trained (`requires_grad=False`) are in neither group, and a group
    that would be empty is left out.

    Raises:
        ValueError: a negative `weight_decay`, or nothing to train.
        TypeError: not a torch.nn.Module, or a `weight_decay` that is no number.
    """
    require_module("decay_groups", model)
    scalars.number("weight_decay", weight_decay, "0 or a positive number such as 0.01")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be 0 or positive, but got {weight_decay}")
    norms = norm_parameters(model)
    without = {id(p) for p in (*norms.gains.values(), *norms.biases.values())}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter to train: all have requires_grad=False, or there is none")
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in without]
    rest = [p for p in trained if p.dim() < 2 or id(p) in without]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
