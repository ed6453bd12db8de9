"""adapt: a trained model to data of another domain, without labels, by its norms alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends import scalars
from normwise.backends.protocol import accumulation_dtype
from normwise.measure.snapshot import modes_kept
from normwise.ops import hyperparameters
from normwise.surgery.batches import Forward, on_batch
from normwise.surgery.freeze import is_frozen
from normwise.surgery.parameters import tensors_of
from normwise.surgery.recalibrate import re_estimate
from normwise.surgery.report import Change, Report
from normwise.surgery.select import BATCH, Layer, Where, chosen, layers, require_module

Logits = Callable[[Any], Tensor]


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    entropy: bool = False,
    lr: float = 1e-3,
    steps: int = 1,
    logits: Logits | None = None,
    forward: Forward | None = None,
    where: Where = None,
) -> Report:
    r"""Fit the norms of a trained model to unlabelled data of another domain, in place.

    The statistics become those of the new data, pooled over all batches (`recalibrate`; AdaBN). With `entropy=True`
    gains and biases follow (TENT): for each batch, normalized by its own statistics with dropout off, Adam takes
    `steps` steps down the mean entropy of the predictions,

        H = - sum over classes of p log p,   p = softmax(logits),

    after which the statistics are taken once more. All other parameters stay, and so does what `freeze` fixed.

    Args:
        model: a classifier where `entropy` is asked for. Its gains and biases need not have requires_grad.
        batches: of the new domain, as for `recalibrate`; something that can be gone over more than once.
        lr, steps: of Adam; TENT's are 1e-3 and one step a batch.
        logits: takes (..., classes) out of the model's output; None where that is the output itself.
        forward: as for `recalibrate`.
        where: which norms are adapted, their statistics and their gains and biases; as for `recalibrate`.

    Returns:
        What was adapted.

    Raises:
        TypeError: an output that is no tensor, without `logits`; steps or lr that are no numbers.
        ValueError: no gain or bias to train, steps or lr that are not positive, batches that can be gone over only
            once, or an entropy that is not finite.
        Exception: what `recalibrate` raises. After an error the model is as it was.

    Source: Li et al. 2017 (AdaBN); Wang et al. 2021 (TENT), section 3.
    """
    require_module("adapt", model)
    steps = hyperparameters.whole_number("steps", steps)
    scalars.number("lr", lr, "a positive number such as 1e-3")
    if entropy and (steps < 1 or not lr > 0):
        raise ValueError(f"adapt takes at least one step of a positive size, but got steps={steps}, lr={lr}")
    if entropy and not isinstance(batches, Tensor | Mapping) and iter(batches) is iter(batches):
        raise ValueError(
            "entropy=True goes over the batches three times, but these can be gone over only once: pass a list or a "
            "DataLoader instead of an iterator"
        )
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        report = re_estimate("adapt", model, batches, forward, where)
        if entropy:
            trained = _down_the_entropy(model, batches, lr, steps, logits, forward, where)
            report = re_estimate("adapt", model, batches, forward, where)
            report.changed += [Change(name, "parameter", "trained by entropy", "") for name in trained]
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(before[name])
        raise
    return report


def _down_the_entropy(
    model: nn.Module,
    batches: Iterable[Any],
    lr: float,
    steps: int,
    logits: Logits | None,
    forward: Forward | None,
    where: Where,
) -> list[str]:
    """Train gains and biases; their names."""
    learned, meant = _learned(model, where)
    asked = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    # In half precision a step of lr is less than a gain of 1 can be moved by, and Adam's eps is 0.
    masters = [p.detach().to(accumulation_dtype(p.dtype), copy=True) for p in learned.values()]
    optimizer = torch.optim.Adam(masters, lr=lr)
    with modes_kept(model.modules()), torch.inference_mode(False), torch.enable_grad():
        try:
            for p, _, _ in asked:
                p.requires_grad_(False)
                p.grad = None
            for p in learned.values():
                p.requires_grad_(True)
            for module in model.modules():
                module.training = False
            for one in layers(model, BATCH):
                one.module.training = meant(one) and not is_frozen(one.module)
            for number, batch in enumerate(batches):
                for _ in range(steps):
                    entropy_of(on_batch("adapt", forward, model, batch, number), logits).backward()
                    for master, p in zip(masters, learned.values(), strict=True):
                        master.grad, p.grad = None if p.grad is None else p.grad.to(master.dtype), None
                    optimizer.step()
                    with torch.no_grad():
                        for master, p in zip(masters, learned.values(), strict=True):
                            p.copy_(master)
        finally:
            for p, was, grad in asked:
                p.requires_grad_(was)
                p.grad = grad
    return list(learned)


def _learned(model: nn.Module, where: Where) -> tuple[dict[str, nn.Parameter], Callable[[Layer], bool]]:
    """Gains and biases of the norms that are meant, but what `freeze` fixed; and which layers these are.

    Raises:
        ValueError: there is none.
    """
    norms = [
        one for one in layers(model, (nn.Module,)) if any(kind != "statistics" for kind, _, _ in tensors_of(one.module))
    ]
    meant = chosen(norms, where)
    learned: dict[int, tuple[str, nn.Parameter]] = {}
    for one in filter(meant, norms):
        for kind, name, p in tensors_of(one.module):
            is_fixed = is_frozen(one.module) and not p.requires_grad
            if kind != "statistics" and p.is_floating_point() and not is_fixed:
                learned.setdefault(id(p), (f"{one.names[0]}.{name}".lstrip("."), p))
    if not learned:
        raise ValueError("adapt found no gain or bias to train by entropy: leave entropy=True out")
    return dict(learned.values()), meant


def entropy_of(output: Any, logits: Logits | None) -> Tensor:
    """The mean entropy of the predictions of an output.

    Raises:
        TypeError: no tensor. ValueError: not finite.
    """
    found = output if logits is None else logits(output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model gives {type(found).__name__}, not logits: say where they are, e.g. "
            "logits=lambda out: out.logits"
        )
    log_p = found.to(accumulation_dtype(found.dtype)).log_softmax(-1)
    # A class that is ruled out by a logit of -inf adds nothing, and 0 * inf is NaN.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1).mean()
    if not torch.isfinite(entropy):
        raise ValueError("the entropy of the predictions is not finite: look for NaN or infinities in the logits")
    return entropy
