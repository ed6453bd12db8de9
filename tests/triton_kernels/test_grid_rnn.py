"""Recurrences whose programs wait for one another, each in a process of its own: against the reference in float64, and
that a meeting left out would show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from normwise.backends.protocol import LayerResult
from normwise.backends.recurrence import Recurrence
from normwise.backends.triton import rnn, runtime, settings
from normwise.backends.triton.rnn import requests
from support import triton_processes
from support.recurrent_samples import Sample
from support.triton_recurrences import ALL, RECURRENCES, RUNS, by_triton, moved

on_kernels = pytest.mark.skipif(not RUNS, reason="runs on a GPU, or where TRITON_INTERPRET=1")
in_processes = pytest.mark.skipif(not runtime.interpreted(), reason="programs are processes where TRITON_INTERPRET=1")

# Which of the meetings of a step are there: by how many have been before, of two a step.
Meetings = Callable[[int], bool]


@pytest.fixture(autouse=True)
def on_a_grid() -> Iterator[None]:
    """For every test here."""
    with settings.recurrent_settings(designs=("grid", "persistent"), multiprocessors=8):
        yield


def launched(sample: Sample, times: int = 1) -> tuple[list[LayerResult], list[triton_processes.Launch]]:
    """Results that are there once the launches have run."""
    from normwise.backends.triton.kernels import grid as kernels

    request = sample.given
    assert rnn.chosen(requests.Readable.of(request)) == ("grid", {})
    with triton_processes.recorded(kernels, "grid_forward") as launches:
        results = [rnn.forward(request, True) for _ in range(times)]
    return results, launches


class Backward:
    """Of what a forward has kept: a launch, and what comes of it once that has run."""

    def __init__(self, sample: Sample, result: LayerResult) -> None:
        from normwise.backends.triton.kernels import grid_backward as kernels

        self.sample, self.result, self.kernels = sample, result, kernels
        self.launch = triton_processes.launch_of(kernels, "grid_backward", self.gradients)

    def gradients(self) -> list[torch.Tensor | None]:
        upstream = [*self.sample.upstream_of_rows, None][:3]
        return rnn.backward(self.sample.given, self.result.saved, upstream, ALL)

    def found(self) -> list[torch.Tensor]:
        """What `Sample.truth` lists."""
        with triton_processes.replayed(self.kernels, "grid_backward", self.launch):
            gradients = self.gradients()
        return self.sample.as_given([t for t in self.result[:3] if t is not None], gradients)


@in_processes
def test_every_recurrence_is_the_reference() -> None:
    """Of two programs the last has one unit, and so has the second half of h."""
    samples = {name: Sample(config, (2, 3, 2, 9), ragged=True, resets=True) for name, config in RECURRENCES.items()}
    with settings.recurrent_settings(share=8, grid_units=((4, 16),)):
        calls = {name: launched(sample) for name, sample in samples.items()}
        launches = [launch for _, made in calls.values() for launch in made]
        assert {launch.grid for launch in launches} == {(1, 2)}
        assert triton_processes.run(launches, 240)
        backward = {name: Backward(sample, calls[name][0][0]) for name, sample in samples.items()}
        launches = [made.launch for made in backward.values()]
        assert {launch.grid for launch in launches} == {(1, 2)}
        assert triton_processes.run(launches, 240)
        excess = {name: sample.excess(backward[name].found()) for name, sample in samples.items()}
    assert max(excess.values()) <= 1, excess


@on_kernels
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lstm ba2016", torch.float32),
        ("lstm ba2016", torch.bfloat16),
        ("lstm icefall", torch.float16),
        ("lstm unnormalized", torch.bfloat16),
        ("gru ba2016", torch.float16),
        ("gru ba2016", torch.bfloat16),
        ("rnn ba2016", torch.bfloat16),
    ],
    ids=str,
)
def test_one_program_a_tile(name: str, dtype: torch.dtype) -> None:
    """Which waits for nobody; backwards, and two tiles of samples."""
    sample = Sample(RECURRENCES[name], (2, 17, 2, 13), dtype, ragged=True, resets=True, reverse=True)
    assert rnn.chosen(requests.Readable.of(moved(sample.given))) == ("grid", {})
    assert sample.excess(by_triton(sample)) <= 1


GRIDS = [
    ("rnn ba2016", (2, 3, 1, 8), (1, 2), 25),
    ("lstm ba2016", (2, 3, 1, 12), (1, 3), 10),
    ("rnn ba2016", (2, 17, 1, 13), (2, 4), 15),
]


@in_processes
@pytest.mark.parametrize(("name", "size", "grid", "repeats"), GRIDS, ids=str)
def test_programs_wait_for_one_another(
    name: str, size: tuple[int, int, int, int], grid: tuple[int, int], repeats: int
) -> None:
    """A hundred launches in all, half of them backward, and each time the same bits."""
    sample = Sample(RECURRENCES[name], size, reverse=True)
    with settings.recurrent_settings(share=4):
        results, launches = launched(sample, repeats)
        assert launches[0].grid == grid
        assert triton_processes.run(launches, 240)
        backward = Backward(sample, results[0])
        launches = [backward.launch, *(backward.launch.again() for _ in range(repeats - 1))]
        assert launches[0].grid == grid
        assert triton_processes.run(launches, 240)
        assert sample.excess(backward.found()) <= 1
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result.saved, results[0].saved, strict=True) if a is not None)
        assert torch.equal(result.output, results[0].output)
    for launch in launches[1:]:
        for a, b in zip(launch.args, launches[0].args, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def planted(is_there: Meetings, programs: int, missing: int = 0) -> Any:
    """In place of `meet`: programs arrive, but do not wait where a meeting is not there, and never for the last
    `missing` ones. One of them is slow after each meeting, so that the others would not wait for it by chance alone."""
    import triton.language as tl

    def meet(counter: Any, arrivals: Any) -> None:
        before = int(arrivals.handle.data.item() if hasattr(arrivals, "handle") else arrivals) // programs - 1
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        while is_there(before) and tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals - missing:
            pass
        if int(tl.program_id(1).handle.data.item()) == 0:
            time.sleep(0.02)

    return meet


PLANTED: dict[str, tuple[Meetings, int, bool]] = {
    "as it is": (lambda _: True, 0, True),
    "no meeting": (lambda _: False, 0, False),
    "none for the norm": (lambda before: before % 2 == 1, 0, False),
    "none for the states": (lambda before: before % 2 == 0, 0, False),
    "all but one program": (lambda _: True, 1, False),
}


@in_processes
@pytest.mark.parametrize("fault", PLANTED)
def test_a_missing_meeting_shows(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from normwise.backends.triton.kernels import grid as kernels

    is_there, missing, correct = PLANTED[fault]
    monkeypatch.setattr(kernels, "meet", planted(is_there, 3, missing))
    sample = Sample(RECURRENCES["rnn ba2016"], (3, 3, 1, 12))
    with settings.recurrent_settings(share=4):
        results, launches = launched(sample, 3)
        assert triton_processes.run(launches, 240)
    truth = sample.truth[0]
    right = [bool(((sample.padded(r.output).double() - truth).abs() < 1e-4).all()) for r in results]
    assert all(right) == correct, right


@in_processes
@pytest.mark.parametrize("fault", PLANTED)
def test_so_does_one_of_the_backward(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    is_there, missing, correct = PLANTED[fault]
    sample = Sample(RECURRENCES["rnn ba2016"], (3, 3, 1, 12))
    with settings.recurrent_settings(designs=("persistent",)):
        result = rnn.forward(sample.given, True)
    with settings.recurrent_settings(share=4):
        backward = Backward(sample, result)
        monkeypatch.setattr(backward.kernels, "meet", planted(is_there, 3, missing))
        launches = [backward.launch.again() for _ in range(3)]
        assert triton_processes.run(launches, 240)
    of_h = backward.launch.kernel.arg_names.index("dh_ptr")
    truth = sample.truth[3]
    right = [bool(((launch.args[of_h].double() - truth).abs() < 1e-4).all()) for launch in launches]
    assert all(right) == correct, right


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        ((1, 1, 1, 513), torch.bfloat16, "W_hh of at most 512 units in torch.bfloat16, not of 513"),
        ((1, 1, 1, 257), torch.float32, "of at most 256 units in torch.float32, not of 257"),
        ((1, 1, 1, 16), torch.float64, "of at most 0 units in torch.float64"),
        ((1, 1, 1, 129), torch.float32, "9 programs wait for one another, but 8 surely run at once"),
        ((1, 33, 1, 33), torch.bfloat16, "9 programs wait for one another, but 8 surely run at once"),
    ],
    ids=str,
)
@on_kernels
def test_what_it_cannot_run_is_refused_with_the_reason(size: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    if not runtime.interpreted():
        pytest.skip("a GPU has more multiprocessors")
    request = Sample(Recurrence("rnn", None), size, dtype).given
    name, refused = rnn.chosen(requests.Readable.of(request))
    assert name != "grid"
    assert reason in refused["grid"]
