"""What a suite yields: something that can be measured, and that can say in a line what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.measure import Probe, compare

Figure = dict[str, Any]


class Measurable(Protocol):
    """A case of a suite. A figure's "error" above 1 means a wrong result, of which nothing else is said."""

    name: str

    def figure(self, probe: Probe) -> Figure: ...

    def line(self, figure: Figure) -> str: ...


@dataclass(frozen=True)
class Case:
    """One thing done in two ways, to be timed.

    Attributes:
        name: what is done, with the shape.
        ours, theirs: the two ways, each a call that does all of it.
        against: whose way `theirs` is.
        error: how far ours is from the truth, as a share of what its dtype allows: above 1 is wrong.
        limit: a call that does nothing but what cannot be avoided, such as moving the bytes, and what it is called.
        limit_scale: how many such calls the case amounts to.
        must, aim: the ratio ours/theirs that is demanded and the one that is hoped for.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    against: str
    error: Callable[[], float]
    limit: Callable[[], object] | None = None
    limit_name: str = ""
    limit_scale: float = 1.0
    must: float | None = None
    aim: float | None = None

    def figure(self, probe: Probe) -> Figure:
        """Times of both and their ratio; of a wrong result the error alone."""
        figure: Figure = {"against": self.against, "must": self.must, "aim": self.aim, "error": self.error()}
        if figure["error"] <= 1:
            ratio = compare(self.ours, self.theirs, self.limit, probe)
            figure |= ratio._asdict() | {"limit_name": self.limit_name}
            if ratio.limit is not None:
                figure["limit"] = ratio.limit * self.limit_scale
        return figure

    def line(self, figure: Figure) -> str:
        text = f"{figure['median']:.2f} ({figure['p20']:.2f}..{figure['p80']:.2f})  {figure['ours'] * 1e6:9.1f} us"
        if figure["limit"] is not None:
            text += f"  limit {figure['limit'] / figure['theirs']:.2f}"
        if figure["must"] is not None and figure["threads"] > 1:
            text += f"  must {figure['must']:.2f} {'ok' if figure['median'] <= figure['must'] else 'SHORT'}"
        return text if figure["quiet"] else text + "  (the machine was busy)"
