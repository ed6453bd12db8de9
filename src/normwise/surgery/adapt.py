"""adapt: a trained model to data of another domain, without labels, by its norms alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normwise.measure.snapshot import modes_kept
from normwise.surgery.batches import Forward, run
from normwise.surgery.freeze import is_frozen
from normwise.surgery.parameters import norm_parameters
from normwise.surgery.recalibrate import recalibrate
from normwise.surgery.report import Change, Report
from normwise.surgery.select import BATCH, Where, layers, require_module

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

    after which the statistics are taken once more. All other parameters stay.

    Args:
        model: a classifier where `entropy` is asked for; what it keeps of BatchNorm by `freeze` stays.
        batches: of the new domain, as for `recalibrate`; something that can be gone over more than once.
        lr, steps: of Adam; TENT's are 1e-3 and one step a batch.
        logits: takes (..., classes) out of the model's output; None where that is the output itself.
        forward, where: as for `recalibrate`.

    Returns:
        What was adapted.

    Raises:
        What `recalibrate` raises; TypeError: an output that is no tensor, without `logits`; ValueError: no gain or bias
        to train, or an entropy that is not finite. After an error the model is as it was.

    Source: Li et al. 2017 (AdaBN); Wang et al. 2021 (TENT), section 3.
    """
    require_module("adapt", model)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        report = recalibrate(model, batches, forward=forward, where=where)
        if entropy:
            trained = _down_the_entropy(model, batches, lr, steps, logits, forward or run)
            report = recalibrate(model, batches, forward=forward, where=where)
            report.changed += [Change(name, "parameter", "trained by entropy", "") for name in trained]
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(before[name])
        raise
    return report


def _down_the_entropy(
    model: nn.Module, batches: Iterable[Any], lr: float, steps: int, logits: Logits | None, forward: Forward
) -> list[str]:
    """Train gains and biases; their names."""
    gains, biases, _ = norm_parameters(model)
    learned = {name: p for name, p in (gains | biases).items() if p.is_floating_point()}
    if not learned:
        raise ValueError("adapt found no gain or bias to train by entropy: leave entropy=True out")
    asked = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    optimizer = torch.optim.Adam(learned.values(), lr=lr)
    with modes_kept(model.modules()):
        try:
            for p, _, _ in asked:
                p.requires_grad_(False)
                p.grad = None
            for p in learned.values():
                p.requires_grad_(True)
            for module in model.modules():
                module.training = False
            for one in layers(model, BATCH):
                one.module.training = not is_frozen(one.module)
            for batch in batches:
                for _ in range(steps):
                    optimizer.zero_grad()
                    entropy_of(forward(model, batch), logits).backward()
                    optimizer.step()
        finally:
            for p, was, grad in asked:
                p.requires_grad_(was)
                p.grad = grad
    return list(learned)


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
    log_p = found.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    if not torch.isfinite(entropy):
        raise ValueError("the entropy of the predictions is not finite: look for NaN or infinities in the logits")
    return entropy
