"""Where a phase runs, and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.log import reason

Call = Callable[[], object]
Times = dict[str, dict[str, Any]]

ROUNDS, LEAST_ROUNDS = 15, 3
SAMPLE_SECONDS = 0.002  # long enough for the events' clock of half a microsecond
MOST_REPEATS = 200
WARM_CALLS = 3


class Device:
    """A GPU; or dry, the CPU with Triton's interpreter, on which nothing has a time."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.type = "cpu" if dry else "cuda"

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def times(self, ways: Mapping[str, Call], seconds: float, against: Mapping[str, str] | None = None) -> Times:
        """Seconds of a call of each way, measured in turn, A B C A B C ...: median and 20th and 80th percentile, and
        the same of the ratio in each round to the way that it is held `against`. Ends early, after three rounds, if it
        takes longer than `seconds`."""
        if self.dry:
            return {name: {"median": None, "rounds": 0} for name in ways}
        repeats = {name: self._repeats(call) for name, call in ways.items()}
        rounds: list[dict[str, float]] = []
        end = time.monotonic() + seconds
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < ROUNDS and time.monotonic() < end):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(ways) + 1)]
            marks[0].record()
            for mark, (name, call) in zip(marks[1:], ways.items(), strict=True):
                for _ in range(repeats[name]):
                    call()
                mark.record()
            self.wait()
            pairs = zip(ways, marks, marks[1:], strict=False)
            rounds.append({name: a.elapsed_time(b) / 1e3 / repeats[name] for name, a, b in pairs})
        found: Times = {}
        for name in ways:
            found[name] = spread([one[name] for one in rounds]) | {"rounds": len(rounds)}
            base = (against or {}).get(name)
            if base in ways:
                found[name]["ratio"] = spread([one[name] / one[base] for one in rounds])
        return found

    def _repeats(self, call: Call) -> int:
        for _ in range(WARM_CALLS):
            start = time.monotonic()
            call()
            self.wait()
            took = time.monotonic() - start
            if took > 0.2:  # slow, and warm after a call or two
                break
        return min(MOST_REPEATS, max(1, math.ceil(SAMPLE_SECONDS / max(took, 1e-6))))

    def keep(self, name: str, make: Callable[[], Call], calls: dict[str, Call], refused: dict[str, str]) -> None:
        """Put what `make` makes into `calls` if it runs, else why it does not into `refused`."""
        try:
            call = make()
            call()
            self.wait()
        except Exception as error:
            refused[name] = reason(error)
        else:
            calls[name] = call

    def replayed(self, call: Call) -> Call:
        """The call captured as a CUDA graph, and replayed. Raises what the capture raises."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        self.wait()
        return graph.replay

    def launches(self, call: Call) -> int | None:
        """How many kernels and copies a call, which has run before, starts on the device; None where none is seen."""
        from torch.profiler import ProfilerActivity, profile

        kind = ProfilerActivity.CPU if self.dry else ProfilerActivity.CUDA
        with profile(activities=[kind]) as seen:
            if not self.dry:
                call()
            self.wait()
        started = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return len(started) or None


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    values = sorted(values)
    last = len(values) - 1
    return {"median": values[len(values) // 2], "p20": values[round(0.2 * last)], "p80": values[round(0.8 * last)]}


@contextmanager
def products(dtype: str) -> Iterator[torch.dtype]:
    """The dtype of this name: "tf32" is float32 whose products may be rounded to TF32, by torch and by cuDNN."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: an element that a kernel forgets shows."""
    from unittest import mock

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() else t

        return call

    places = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    patches = [mock.patch.object(owner, name, poisoned(getattr(owner, name))) for owner, name in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
