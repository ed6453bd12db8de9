"""What stored runs say: for each task, batch size and norm one row, with the best marked and ties called ties.

Reads runs and nothing else; trains nothing.

The rules, which the report prints as well:

- **Learning rate.** Every norm is offered the same grid. Of each norm and batch size, the rate with the lowest training
  loss (mean over the last tenth of the steps, then over the seeds) is taken; held-out cases have no say. A run whose
  loss became infinite or NaN counts as an infinite loss.
- **Best.** The highest mean accuracy on the held-out cases, in eval mode, after the last step; on text the fewest
  bits per character.
- **Tie.** Runs of the same seed are paired: they start from the same weights and see the same batches. A norm ties with
  the best if the 95% interval (Student's t) of the paired differences contains 0. With one seed there is no spread,
  and nothing is marked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean, median, stdev

from normwise.lab.intervals import half_width
from normwise.lab.store import Run
from normwise.words import counted

FINAL_SHARE = 0.1
"""The training loss of a run is the mean over this last share of its steps: one batch's loss says little."""

POINTS = 30
"""Of a curve that is drawn, at most."""

BITS = "bits_per_character"
FINAL_ACCURACY = ["final", "accuracy"]  # with the part's name between them


@dataclass(frozen=True)
class Stat:
    """One quantity over the seeds: a value for each seed, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation; None with one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One norm in one task at one batch size, at the learning rate that its training loss chose.

    ``status`` is "done", "undefined" or "diverged" (some seed's loss was not finite even at the best rate), ``mark``
    "best", "tied" (with the best) or "". ``at_edge`` is "lowest" or "highest" where the rate is an end of a grid of
    three or more: a better one may lie beyond.
    """

    task: str
    batch_size: int
    norm: str
    status: str
    reason: str
    learning_rate: float | None
    at_edge: str
    seeds: tuple[int, ...]
    stats: dict[str, Stat]
    mark: str
    runs: tuple[Run, ...]
    offered: dict[float, Stat] = field(default_factory=dict)
    """The training loss at each learning rate of the grid; infinite for a run that diverged."""

    @property
    def criterion(self) -> str:
        """The quantity by which norms are compared: "bits_per_character", where less is better, or "accuracy"."""
        return BITS if BITS in self.stats else "accuracy"

    def merit(self) -> Stat:
        """The criterion, the higher the better."""
        stat = self.stats[self.criterion]
        return Stat(tuple(-value for value in stat.values)) if self.criterion == BITS else stat


def score(runs: Iterable[Run]) -> list[Row]:
    """The rows of all ``runs``, in the order in which tasks, batch sizes and norms first appear in them."""
    cells: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        identity = run.identity
        cells.setdefault((identity["task"], identity["batch_size"], identity["norm"]), []).append(run)
    tasks = [task for task, _, _ in cells]
    sizes = [size for _, size, _ in cells]
    rows = [_row(task, size, norm, found) for (task, size, norm), found in cells.items()]
    rows.sort(key=lambda row: (tasks.index(row.task), sizes.index(row.batch_size)))
    return [
        marked
        for _, group in groupby(rows, key=lambda row: (row.task, row.batch_size))
        for marked in _mark(list(group))
    ]


def _row(task: str, batch_size: int, norm: str, runs: Sequence[Run]) -> Row:
    if runs[0].status == "undefined":
        return Row(task, batch_size, norm, "undefined", runs[0].reason, None, "", (), {}, "", ())
    rates: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.identity["learning_rate"], run.identity["seed"])):
        rates.setdefault(run.identity["learning_rate"], []).append(run)
    offered = {rate: Stat(tuple(map(training_loss, found))) for rate, found in rates.items()}
    rate = min(offered, key=lambda rate: offered[rate].mean)
    at_edge = ""
    if len(rates) > 2 and rate in (min(rates), max(rates)):
        at_edge = "lowest" if rate == min(rates) else "highest"
    chosen = tuple(rates[rate])
    seeds = tuple(run.identity["seed"] for run in chosen)
    lost = [run for run in chosen if run.status == "diverged"]
    if lost:
        reason = f"{len(lost)} of {counted(len(chosen), 'seed')} at the best rate: {lost[0].reason}"
        return Row(task, batch_size, norm, "diverged", reason, rate, at_edge, seeds, {}, "", chosen, offered)
    return Row(task, batch_size, norm, "done", "", rate, at_edge, seeds, _stats(chosen), "", chosen, offered)


def training_loss(run: Run) -> float:
    """The mean over the last ``FINAL_SHARE`` of the steps; infinite if the run diverged."""
    if run.status != "done":
        return math.inf
    losses = run.series["train/loss"].values
    return fmean(losses[-max(1, round(FINAL_SHARE * len(losses))) :])


def _stats(runs: Sequence[Run]) -> dict[str, Stat]:
    def last(name: str) -> list[float]:
        return [run.series[name].values[-1] for run in runs if name in run.series]

    first = next((name for name in runs[0].series if name.startswith("gradient/")), "")
    quantities = {
        "accuracy": last("final/accuracy"),
        BITS: last("final/bits-per-character"),
        "loss": last("final/loss"),
        "train_loss": [training_loss(run) for run in runs],
        "gap": last("heldout/gap"),
        "saturated": last("saturated"),
        "first_gradient": [median(run.series[first].values) for run in runs if first in run.series],
        "ms_per_step": [1000 * median(run.series["time/step"].values) for run in runs],
        **{f"accuracy/{part}": last(f"final/{part}/accuracy") for part in _parts(runs)},
    }
    return {name: Stat(tuple(values)) for name, values in quantities.items() if values}


def _parts(runs: Sequence[Run]) -> list[str]:
    """The parts of the held-out cases that were looked at on their own."""
    return [names[1] for name in runs[0].series if len(names := name.split("/")) == 3 and names[::2] == FINAL_ACCURACY]


def parts_of(rows: Iterable[Row]) -> list[str]:
    """The parts of which the rows have accuracies, each once."""
    return list(dict.fromkeys(name.split("/")[1] for row in rows for name in row.stats if "/" in name))


def _mark(rows: list[Row]) -> list[Row]:
    """The rows of one task and batch size, with ``mark`` filled in."""
    done = [row for row in rows if row.status == "done"]
    if not done or any(len(row.seeds) < 2 for row in done):
        return rows
    best = max(done, key=lambda row: row.merit().mean)
    with_best = {id(row) for row in done if row is best or tie(_paired(best, row))}
    if len(with_best) == 1 and len(done) > 1:
        marks = {id(best): "best"}
    else:
        marks = dict.fromkeys(with_best, "tied") if len(done) > 1 else {}
    return [replace(row, mark=marks.get(id(row), "")) for row in rows]


def _paired(a: Row, b: Row) -> list[float]:
    """Differences of the criterion, a - b, over the seeds that both have."""
    of_b = dict(zip(b.seeds, b.merit().values, strict=True))
    of_a = zip(a.seeds, a.merit().values, strict=True)
    return [value - of_b[seed] for seed, value in of_a if seed in of_b]


def tie(differences: Sequence[float]) -> bool:
    """Whether the 95% interval of the mean of paired ``differences`` contains 0; True if there are fewer than two."""
    return len(differences) < 2 or abs(fmean(differences)) <= half_width(differences)


@dataclass(frozen=True)
class Band:
    """A series over several seeds: mean, lowest and highest at each step."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(runs: Sequence[Run], name: str, *, bins: int = POINTS) -> Band | None:
    """Series ``name`` over ``runs``, long ones averaged down to ``bins`` points; None where no run has it.

    Runs that diverged are shorter: past their end the band is over the others.
    """
    curves = [run.series[name] for run in runs if name in run.series]
    if not curves:
        return None
    longest = max(curves, key=lambda curve: len(curve.steps))
    width = max(1, math.ceil(len(longest.steps) / bins))
    out = Band([], [], [], [])
    for start in range(0, len(longest.steps), width):
        means = [fmean(part) for curve in curves if (part := curve.values[start : start + width])]
        steps = longest.steps[start : start + width]
        out.steps.append(round(fmean(steps)))
        out.mean.append(fmean(means))
        out.low.append(min(means))
        out.high.append(max(means))
    return out


def as_json(rows: Iterable[Row]) -> list[dict[str, object]]:
    """The rows as plain values."""
    return [
        {
            "task": row.task,
            "batch_size": row.batch_size,
            "norm": row.norm,
            "status": row.status,
            "reason": row.reason,
            "learning_rate": row.learning_rate,
            "at_edge": row.at_edge,
            "seeds": list(row.seeds),
            "criterion": row.criterion,
            "mark": row.mark,
            "training_loss_by_learning_rate": [
                {"learning_rate": rate, "values": list(stat.values)} for rate, stat in row.offered.items()
            ],
            **{
                name: {"mean": stat.mean, "spread": stat.spread, "values": list(stat.values)}
                for name, stat in row.stats.items()
            },
        }
        for row in rows
    ]
