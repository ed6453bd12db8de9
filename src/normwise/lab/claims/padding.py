"""padding: does what is not there count?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import normwise
from normwise.lab.claim import Claim
from normwise.lab.claims.bn_columns import ROUNDING
from normwise.lab.verdict import Check

CHANGED = 1e-2


def checks() -> Sequence[Check]:
    draws = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 4, 7, 5])
    sequences = [torch.randn(int(n), 3, dtype=torch.float64, generator=draws) + 2 for n in lengths]
    alone = normwise.BatchNorm1d(3, dtype=torch.float64)
    expected = alone(torch.cat(sequences)).detach()  # every valid step, no padding at all

    def valid_steps(steps: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The valid outputs of the batch padded to ``steps``, and the running means afterwards."""
        x = torch.zeros(len(sequences), 3, steps, dtype=torch.float64)
        for row, sequence in zip(x, sequences, strict=True):
            row[:, : len(sequence)] = sequence.T
        norm = normwise.BatchNorm1d(3, dtype=torch.float64)
        y = norm(x, lengths=lengths if masked else None).detach()
        outputs = torch.cat([out[:, : int(n)].T for out, n in zip(y, lengths, strict=True)])
        assert norm.running_mean is not None
        return outputs, norm.running_mean

    assert alone.running_mean is not None
    (short, _), (long, _) = valid_steps(9, masked=False), valid_steps(30, masked=False)
    outputs, running = valid_steps(30, masked=True)
    return [
        Check(
            "no mask, padded to 9 or to 30 steps: outputs differ by", float((short - long).abs().max()), CHANGED, False
        ),
        Check("no mask, padded or not: outputs differ by", float((short - expected).abs().max()), CHANGED, False),
        Check("with a mask, padded or not: outputs differ by", float((outputs - expected).abs().max()), ROUNDING),
        Check("and running means by", float((running - alone.running_mean).abs().max()), ROUNDING),
    ]


CLAIM = Claim(
    id="padding",
    sentence="BatchNorm on a padded batch depends on the padding; with a mask it equals the unpadded result.",
    source="users' reports",
    measured="BatchNorm's outputs at the valid steps of four sequences of 4 to 9 steps, alone or padded to 9 and 30 "
    "steps, in float64.",
    rule=f"Without a mask padding changes an output by {CHANGED:g} or more, with a mask by at most {ROUNDING:g}.",
    checks=checks,
)
