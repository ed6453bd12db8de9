"""`normwise.diagnose`: what normalization does in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise.diagnosis import silence
from normwise.diagnosis.batches import Loss
from normwise.diagnosis.collect import collect
from normwise.diagnosis.pace import Pace
from normwise.diagnosis.records import SEVERITIES, Diagnosis, Finding
from normwise.diagnosis.rules.table import RULES
from normwise.surgery.batches import Forward
from normwise.surgery.progress import Progress, told


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    max_batches: int = 8,
    max_seconds: float | None = None,
    progress: Progress = False,
    ignore: Sequence[str] = (),
    use_pyproject: bool = True,
) -> Diagnosis:
    """Look at what normalization does in a model, on a few batches, and leave the model as it was.

        found = normwise.diagnose(model, loader, loss=torch.nn.functional.cross_entropy)
        for finding in found.findings:
            print(finding.code, finding.layer, finding.cause, finding.cure)

    Each batch passes forward and backward in train mode and forward in eval mode; then each layer to which the mode
    makes a difference (a batch norm, a dropout) is put into train mode on its own, on two of the batches. With an
    optimizer each batch also becomes a step, after which weights and optimizer are put back. Parameters, buffers,
    gradients, modes, hooks, the optimizer's state and the random states are afterwards what they were, bit for bit,
    also after an error or Ctrl-C. (Hooks and files of the model's own are outside of this: a forward that writes
    somewhere has written.)

    Args:
        model: any module, in either mode, with layers of torch.nn or of this library; a wrapper (DataParallel,
            DistributedDataParallel, torch.compile) is looked through.
        batches: yields (inputs, target), or a dict with labels, such as a DataLoader; may be endless.
            `normwise.surgery.batches` has the convention.
        loss: `loss(output, target)`, a scalar tensor. None for a model that computes its loss itself and returns it, as
            `output.loss` or alone.
        optimizer: also watch steps: internal covariate shift, weight decay. Its parameters must be the model's.
        forward: runs the model on a batch of any other structure, as in `recalibrate`: `lambda model, batch:
            model(batch.image.cuda())`. What of such a batch is no pair and has no labels is its own target.
        max_batches: no more are taken.
        max_seconds: what has not begun by then is left out, and said in `notes`; one batch is always looked at.
        progress: True shows a bar (by rich, where it is installed); or a function of the number of passes done and
            their total (None while it is unknown).
        ignore: codes to silence, with a pattern of layer names if need be: ["NW005", "NW001:encoder.*"].
        use_pyproject: also silence what `ignore` says in the table [tool.normwise.diagnose] of the nearest
            pyproject.toml from the working directory upwards.

    Returns:
        `Diagnosis`: numbers for each layer, and findings, most severe first. `normwise.diagnosis.records` describes it.

    Raises:
        DiagnosisError: a model, batches, loss or setting that does not fit; says the cure.
    """
    own = silence.checked(ignore)
    silenced = own + (silence.from_pyproject(Path.cwd()) if use_pyproject else [])
    with told(progress, "diagnose") as tell:
        numbers = collect(model, batches, loss, optimizer, max_batches, forward, Pace(max_seconds, tell))
    numbers.notes.extend(silence.without_effect(own, numbers.places))
    return judged(numbers, silenced)


def judged(numbers: Diagnosis, silenced: Sequence[tuple[str, str]] = ()) -> Diagnosis:
    """The same diagnosis with the findings that the rules draw from its numbers."""
    order: dict[str, int] = {}
    for place, layer in enumerate(numbers.layers):
        # A module that holds layers stands where the first of them does.
        parts = layer.name.split(".")
        for length in range(1, len(parts) + 1):
            order.setdefault(".".join(parts[:length]), place)
    findings = [finding for rule in RULES for finding in rule.findings(numbers)]
    # What was given with the model or the data goes before all that follows from it.
    findings.sort(
        key=lambda f: (SEVERITIES.index(f.severity), not f.evidence.get("given"), f.code, order.get(f.layer, -1))
    )
    shown: list[Finding] = [f for f in findings if not silence.is_silenced(f, silenced)]
    hidden = [f for f in findings if silence.is_silenced(f, silenced)]
    return dataclasses.replace(numbers, findings=shown, silenced=hidden)
