"""The published claims that rules and recommendations cite, by id: what is said, and by whom.

`normwise claims` has them all, with what the lab's runs say of each; a test holds ids and sources equal to its.
"""

from __future__ import annotations

from collections.abc import Iterable

SOURCES: dict[str, str] = {
    "batch-of-one": "Ba et al. 2016",
    "bn-columns": "Ioffe & Szegedy 2015; Ba et al. 2016",
    "cnn": "Ba et al. 2016, section 6.7",
    "faster": "Ioffe & Szegedy 2015, sections 3.3 and 4.1",
    "longer": "tutorials; Ba et al. 2016",
    "no-affine": "Xu et al. 2019",
    "padding": "users' reports",
    "rnn": "Ba et al. 2016; Cooijmans et al. 2016",
    "saturation": "tutorials; Ioffe & Szegedy 2015, section 3",
    "small-batch": "Ba et al. 2016, section 6.6; Wu & He 2018",
    "steady-sums": "Ba et al. 2016, section 3.1",
    "time-average": "Cooijmans et al. 2016",
    "train-eval-gap": "users' reports",
    "transformer": "tutorials; Shen et al. 2020 (PowerNorm)",
}


def cited(ids: Iterable[str]) -> str:
    """ "claim small-batch: Ba et al. 2016, section 6.6; Wu & He 2018", in brackets; nothing for no ids."""
    texts = [f"claim {name}: {SOURCES[name]}" for name in ids]
    return f" [{'; '.join(texts)}]" if texts else ""
