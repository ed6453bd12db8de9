"""Steps of whole nets, with torch.nn's layers and with ours: converted, fused, and by torch.compile.

Beside each ratio stands the limit: the same step with norms and activations replaced by nothing. That is what a ratio
would be if they cost no time, allocations and cache misses of the layers around them included; a profiler's shares of
operations leave those out and its own cost in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.case import Figure
from benchmarks.measure import PAIRS, Probe, ratio, rounds
from benchmarks.nets import NETS, Inputs, Net

# A result may be so many times as far from float64's as torch.nn's own is, or this far, as a share of its norm. A sum
# that is rounded to the other side of a ReLU's kink moves gradients by a thousandth, in torch.nn's run or in ours:
# torch is asked with weights and inputs an ulp from their own too, so often that each such sum has been on both sides.
TIMES_TORCH, ALLOWED, MOVED = 5.0, 1e-5, 8
# Of an LSTM that torch.nn lacks: roundings add up over the steps.
ALLOWED_RECURRENT = 1e-4
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid)

BASE, LIMIT = "torch.nn", "without norms and activations"
CONVERTED, FUSED = "converted", "fused"
COMPILED = "{}, compiled"
Call = Callable[[], object]


def cases(pairs: int = PAIRS, compiles: bool = True, nets: dict[str, Net] = NETS) -> Iterator[Step]:
    """Training and inference of each net in each layout; `compiles`: training by torch.compile too."""
    for name, net in nets.items():
        for last in (False, True)[: 1 + net.channels_last]:
            for training in (True, False):
                yield Step(name, net, last, training, pairs, compiles and net.compiles and training)


class Step:
    """One net in one layout: a training step (forward, mean square, backward, SGD), or a forward without gradients."""

    def __init__(
        self, name: str, net: Net, channels_last: bool, training: bool, pairs: int = PAIRS, compiles: bool = False
    ) -> None:
        self.net, self.training, self.pairs, self.compiles = net, training, pairs, compiles
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.must, self.aim = (
            (wanted[channels_last] if training and channels_last < len(wanted) else None)
            for wanted in (net.must, net.aim)
        )
        self.name = f"{name}{', channels-last' if channels_last else ''}, {'training' if training else 'inference'}"

    def figure(self, probe: Probe) -> Figure:
        """Seconds of torch.nn's and for each way its ratio: to torch.nn's, or of both compiled; of a wrong result the
        error alone."""
        torch.manual_seed(0)
        inputs = tuple(self._laid_out(x) for x in self.net.inputs())
        models = self._models(inputs)
        with torch.no_grad():
            target = torch.randn_like(copy.deepcopy(models[BASE])(*inputs))  # a copy's running averages move
        figure: Figure = {"against": BASE, "must": self.must, "aim": self.aim}
        figure["error"] = self._error(models, inputs, target)
        if figure["error"] > 1:
            return figure
        names = list(models)
        calls = [self._call(model, inputs, target) for model in models.values()]
        found = rounds(calls, probe, self.pairs)
        seconds = dict(zip(names, zip(*found.seconds, strict=True), strict=True))
        ratios = {}
        for name in names[1:]:
            compiled_base = COMPILED.format(BASE)
            base = compiled_base if name.endswith("compiled") and name != compiled_base else BASE
            ratios[name] = dict(zip(("median", "p20", "p80"), ratio(seconds[name], seconds[base]), strict=True))
        best = ratios.get(FUSED, ratios[CONVERTED])
        theirs = sorted(seconds[BASE])[len(seconds[BASE]) // 2]
        return figure | best | {"ratios": ratios, "theirs": theirs, "stolen": found.stolen, "quiet": found.quiet}

    def line(self, figure: Figure) -> str:
        found = [f"{way} {r['median']:.2f} ({r['p20']:.2f}..{r['p80']:.2f})" for way, r in figure["ratios"].items()]
        text = f"{figure['theirs'] * 1e3:7.2f} ms  {'; '.join(found)}"
        if figure["must"] is not None and figure["threads"] > 1:
            text += f"  must {figure['must']:.2f} {'ok' if figure['median'] <= figure['must'] else 'SHORT'}"
        return text if figure["quiet"] else text + "  (the machine was busy)"

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.to(memory_format=self.layout) if x.dim() == 4 else x

    def _models(self, inputs: Inputs) -> dict[str, nn.Module]:
        """All ways of the net, with the same weights where they have the same layers; torch.nn's first."""
        base = self.net.build().to(memory_format=self.layout)  # type: ignore[call-overload]
        models = {BASE: base}
        if self.net.ours is not None:
            models[CONVERTED] = self.net.ours()
        else:
            models[CONVERTED] = normwise.convert(base, to="normwise")[0]
            fused = _fused(models[CONVERTED], inputs)
            if fused is not None:
                models[FUSED] = fused
            models[LIMIT] = _emptied(base)
        for model in models.values():
            model.train(self.training)
        if self.compiles:
            torch._dynamo.reset()
            for name in [name for name in models if name != LIMIT]:
                # torch.nn's recurrent layers break a graph; nothing of ours does.
                whole = name != BASE or self.net.ours is None
                compiled = torch.compile(copy.deepcopy(models[name]), fullgraph=whole, dynamic=False)
                models[COMPILED.format(name)] = compiled  # type: ignore[assignment]
        return models

    def _call(self, model: nn.Module, inputs: Inputs, target: Tensor) -> Call:
        if not self.training:
            return torch.no_grad()(lambda: model(*inputs))
        # So slow that what is computed stays the same.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.mse_loss(model(*inputs), target).backward()
            optimizer.step()

        return step

    def _error(self, models: dict[str, nn.Module], inputs: Inputs, target: Tensor) -> float:
        """The largest of all ways, as a share of what is allowed: outputs and, in training, gradients and averages."""
        compared = [name for name in models if name not in (BASE, LIMIT, COMPILED.format(BASE))]
        with normwise.backend("reference" if self.net.ours is not None else None):
            exact = BASE if self.net.ours is None else CONVERTED
            truth = self._results(models[exact], inputs, target, torch.float64)
        allowed = [ALLOWED if self.net.ours is None else ALLOWED_RECURRENT] * len(truth)
        if self.net.ours is None:
            for base, given in [(models[BASE], inputs), *(_moved(models[BASE], inputs) for _ in range(MOVED))]:
                own = self._results(base, given, target)
                far = [_distance(g, t) for g, t in zip(own, truth, strict=True)]
                allowed = [max(TIMES_TORCH * d, a) for d, a in zip(far, allowed, strict=True)]
        found = [self._results(models[name], inputs, target) for name in compared]
        return max(_distance(g, t) / a for results in found for g, t, a in zip(results, truth, allowed, strict=True))

    def _results(
        self, model: nn.Module, inputs: Inputs, target: Tensor, dtype: torch.dtype | None = None
    ) -> list[list[Tensor]]:
        """The output and, in training, gradients and running averages, which are put back. In `dtype` by a copy."""
        if dtype is not None:
            model, target = copy.deepcopy(model).to(dtype), target.to(dtype)
            inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        if not self.training:
            with torch.no_grad():
                return [[model(*inputs)]]
        before = {name: t.clone() for name, t in model.named_buffers()}
        y = model(*inputs)
        grads = torch.autograd.grad(F.mse_loss(y, target), list(model.parameters()))
        after = [t.clone() for t in model.buffers() if t.is_floating_point()]
        for name, t in model.named_buffers():
            t.copy_(before[name])
        return [[y.detach()], list(grads), after]


def _moved(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A copy and inputs of which each number is multiplied by 1 and up to an ulp more or less."""

    def moved(t: Tensor) -> Tensor:
        return t * (1 + (2 * torch.rand_like(t) - 1) * torch.finfo(t.dtype).eps) if t.is_floating_point() else t

    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(moved(p))
    return model, tuple(moved(x) for x in inputs)


def _distance(got: list[Tensor], truth: list[Tensor]) -> float:
    """The root mean square over tensors of how far each is off, as a share of its norm.

    What is nothing but roundings, the gradient of what has no influence, is left out.
    """
    pairs = [(g.double(), t) for g, t in zip(got, truth, strict=True) if t.norm() > 1e-12]
    shares = [float((g - t).norm() / t.norm()) ** 2 for g, t in pairs]
    return math.sqrt(sum(shares) / max(len(shares), 1))


def _fused(model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """What `normwise.fuse` makes of it; None where there is nothing to fuse."""
    try:
        return normwise.fuse(model, example=inputs)[0]
    except ValueError as error:
        if "nothing in the model that can be fused" not in str(error):
            raise
        return None


def _emptied(model: nn.Module) -> nn.Module:
    """A copy without norms and activations."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NORMS + ACTIVATIONS):
                setattr(parent, name, nn.Identity())
    return model
