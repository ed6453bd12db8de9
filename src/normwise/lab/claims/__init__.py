"""What people claim about normalization: one file a claim, each with its rule.

Every module in this folder has a ``CLAIM``; a file that is put here is a claim.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence

from normwise.lab.claim import Claim
from normwise.lab.errors import unknown


@functools.cache
def claims() -> dict[str, Claim]:
    """All claims by id: those that are computed first, then by name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    ordered = sorted((module.CLAIM for module in modules), key=lambda claim: (claim.kind == "run", claim.id))
    return {claim.id: claim for claim in ordered}


def chosen(ids: Sequence[str] | None) -> list[Claim]:
    """The claims with these ids, or all.

    Raises:
        LabError: an id that is no claim's; it names the nearest.
    """
    known = claims()
    for name in ids or ():
        if name not in known:
            raise unknown("claim", name, known)
    return [claim for name, claim in known.items() if not ids or name in ids]
