"""`convert(to="rms", exact=True)`: RMSNorms in the places of LayerNorms, with the same results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normwise.surgery import norms
from normwise.surgery.batches import call, without_graph
from normwise.surgery.centre import Plan, plan
from normwise.surgery.models import copied
from normwise.surgery.observe import tensors_in
from normwise.surgery.report import Change, Refusal, Report, Skip, Surgery
from normwise.surgery.select import Where, chosen, kind_of

# In float64 (1e-16 a step), of many layers in a row; a mean that is left in shows at 1e-3 and more.
_CLOSE = 1e-9
_DRAWN = 2

Replaced: TypeAlias = Callable[[nn.Module, list[str]], Surgery]


@dataclass
class _Means:
    """The largest mean of what the norms are given, by its root mean square."""

    worst: float = 0.0
    name: str = ""

    def look(self, name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Any) -> None:
            size = args[0].square().mean(-1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            mean = float((args[0].mean(-1).abs() / size).max()) if args[0].numel() else 0.0
            if not mean <= self.worst:
                self.worst, self.name = mean, name

        return hook


def to_exact_rms(model: nn.Module, example: Any, where: Where, inplace: bool, replaced: Replaced) -> Surgery:
    """Convert what can be converted exactly, having proved it on a copy in float64.

    Args:
        replaced: puts RMSNorms in the places of the norms of these names, in the model itself.

    Raises:
        ValueError: none can, or the copy computes something else.
    """
    if example is None:
        raise ValueError(
            "convert(to='rms', exact=True) follows what goes through the model: pass example=, the argument of one "
            "call of the model (a tuple of several, a mapping of named ones)"
        )
    if not inplace:
        model = copied(model, "convert")
    candidates = norms.norm_layers(model)
    if not candidates:
        raise ValueError(f"convert found no normalization layer in the model ({type(model).__name__})")
    meant = chosen(candidates, where)
    found = plan(model, [one for one in candidates if meant(one)], example)
    report = Report("convert to rms, exact")
    for one in candidates:
        if one.names[0] not in found.norms:
            why = found.refused.get(id(one.module), Refusal("not meant by where="))
            report.skipped.append(Skip(one.name, one.kind, str(why)))
    if not found.norms:
        raise ValueError(
            f"{report.verb}: none of the norms can become an RMSNorm with the same results, and the model is as it "
            "was. That takes a pre-norm net, in which embeddings and linear layers alone write into the residual "
            f"stream and LayerNorms alone read it; to='rms' without exact=True puts other norms there.{report.reasons}"
        )
    how = _proved(model, found, example, replaced)
    writers = _writers(model, found)
    done = _apply(model, found, replaced)
    for change in done.report.changed:
        own = found.norms[change.name.split(", ")[0]]
        report.changed.append(change._replace(note="; ".join(filter(None, [own, how]))))
    report.changed += writers
    return Surgery(done.model, report)


def _apply(model: nn.Module, found: Plan, replaced: Replaced) -> Surgery:
    found.apply(model)
    done = replaced(model, list(found.norms))
    if len(done.report.changed) != len(found.norms):
        stayed = [skip for skip in done.report.skipped if skip.name.split(", ")[0] in found.norms]
        raise ValueError(f"convert(to='rms', exact=True): a norm cannot be replaced.{Report('', [], stayed).reasons}")
    return done


def _writers(model: nn.Module, found: Plan) -> list[Change]:
    """What is centred, for the report: each layer once, single parameters by themselves."""
    lines = {}
    for name in found.centred:
        owner, _, key = name.rpartition(".")
        layer = model.get_submodule(owner)
        of_layer = key in ("weight", "bias") or key.endswith(("proj_weight", "proj_bias"))
        place = owner if of_layer else name
        kind = kind_of(layer) if of_layer else type(getattr(layer, key)).__name__
        lines[place] = Change(place, kind, "centred: what it writes has mean zero over the features")
    return list(lines.values())


def _proved(model: nn.Module, found: Plan, example: Any, replaced: Replaced) -> str:
    """How it was proved, for the report. Raises ValueError where a copy in float64 computes something else."""
    with torch.random.fork_rng(devices=[]):
        old = copied(model, "convert").double().eval()
        new = _apply(copied(model, "convert").double().eval(), found, replaced).model
        means = _Means()
        worst = 0.0
        with ExitStack() as hooks, without_graph(old, new):
            for name in found.norms:
                hooks.callback(new.get_submodule(name).register_forward_pre_hook(means.look(name)).remove)
            for inputs in _inputs(example):
                results = []
                for one in (old, new):
                    torch.manual_seed(0)
                    results.append(list(tensors_in(call(one, copy.deepcopy(inputs)))))
                worst = max([worst, *(_apart(a, b) for a, b in zip(*results, strict=True))], key=_nan_last)
                if not results[0]:
                    raise ValueError("convert(to='rms', exact=True): the model returns no tensors to compare")
    if not worst <= _CLOSE or not means.worst <= _CLOSE:
        raise ValueError(
            f"convert(to='rms', exact=True): in float64 the results would differ by {worst:.1g} of the largest, and "
            f"what {means.name or 'a norm'} is given has a mean of {means.worst:.1g} of its size, so the model is as "
            "it was. Limit it with where= to norms that read the residual stream, or do without exact=True"
        )
    return (
        f"proved in float64 on the example and {_DRAWN} others drawn like it, up to {worst:.0e} of the largest result"
    )


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, by the largest value; masked values (-inf) may be the same."""
    if a.shape != b.shape:
        return float("inf")
    different = (a != b) & ~(a.isnan() & b.isnan())
    if not a.numel() or not bool(different.any()):
        return 0.0
    size = a[a.isfinite()].double().abs().max() if bool(a.isfinite().any()) else a.new_ones(()).double()
    return float(((a.double() - b.double()).abs()[different] / size.clamp(min=1e-30)).max())


def _inputs(example: Any) -> Iterator[Any]:
    """The example and others of its shapes, in float64: floats are drawn anew, tokens put in another order."""
    generator = torch.Generator().manual_seed(0)

    def as_is(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    def drawn(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if t.dim() < 2 or t.dtype == torch.bool or bool(((t == 0) | (t == 1)).all()):  # lengths, masks
            return t
        return t.gather(-1, torch.rand(t.shape, generator=generator).argsort(-1).to(t.device))

    yield _mapped(example, as_is)
    for _ in range(_DRAWN):
        yield _mapped(example, drawn)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return type(value)(_mapped(part, change) for part in value) if type(value) in (tuple, list) else value
