"""The published claims that rules and recommendations cite, by id: what is said, by whom, and what our runs say of it.

`normwise claims` has them all; a test holds ids, sources and verdicts equal to its record, `docs/claims.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Source(NamedTuple):
    by: str
    verdict: str  # of the record, in which a claim is as weak as the weakest of its parts


SOURCES: dict[str, Source] = {
    "batch-of-one": Source("Ba et al. 2016", "supported"),
    "bn-columns": Source("Ioffe & Szegedy 2015; Ba et al. 2016", "supported"),
    "cnn": Source("Ba et al. 2016, section 6.7", "undecided"),
    "faster": Source("Ioffe & Szegedy 2015, sections 3.3 and 4.1", "contradicted"),
    "longer": Source("tutorials; Ba et al. 2016", "undecided"),
    "no-affine": Source("Xu et al. 2019", "undecided"),
    "padding": Source("users' reports", "supported"),
    "rnn": Source("Ba et al. 2016; Cooijmans et al. 2016", "undecided"),
    "saturation": Source("tutorials; Ioffe & Szegedy 2015, section 3", "contradicted"),
    "small-batch": Source("Ba et al. 2016, section 6.6; Wu & He 2018", "undecided"),
    "steady-sums": Source("Ba et al. 2016, section 3.1", "supported"),
    "time-average": Source("Cooijmans et al. 2016", "undecided"),
    "train-eval-gap": Source("users' reports", "undecided"),
    "transformer": Source("tutorials; Shen et al. 2020 (PowerNorm)", "undecided"),
}


def cited(ids: Iterable[str]) -> str:
    """ "claim rnn: Ba et al. 2016; Cooijmans et al. 2016 (undecided in our runs)", in brackets; nothing for no ids."""
    texts = [f"claim {name}: {SOURCES[name].by} ({SOURCES[name].verdict} in our runs)" for name in ids]
    return f" [{'; '.join(texts)}]" if texts else ""
