"""The recurrent kernels against the reference in float64, over sizes that fill tiles, panels and vectors and that do
not, every number of threads, every instruction set, and memory full of NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normwise.kernels import recurrent as kernels
from normwise.kernels.library import load
from normwise.ops.recurrent_cpu import kernel_layer, kernel_weights
from recurrent_samples import HOWS, Sample

# (T, B, I, H): one of everything; partial vectors; whole panels and a rest; few samples and many units, which threads
# share; more rows than a chunk; no sample.
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 7, 7),
    (5, 7, 3, 3),
    (33, 2, 3, 31),
    (3, 9, 63, 63),
    (4, 1, 7, 160),
    (3, 4, 63, 130),
    (24, 33, 2, 17),
]
EMPTY = (3, 0, 5, 6)


@pytest.mark.parametrize("size", [*SIZES, EMPTY], ids=str)
@pytest.mark.parametrize("name", HOWS)
def test_the_kernels_are_the_reference(name: str, size: tuple[int, int, int, int]) -> None:
    if size[3] == 1 and HOWS[name].norm == "layer":
        pytest.skip("the layer norm of one number is 0, and its gradient in float the rounding error of 0")
    sample = Sample(HOWS[name], size)
    for threads in (1, 2):
        sample.check(threads)


@pytest.mark.parametrize("threads", [1, 3, 4])
@pytest.mark.parametrize("name", ["lstm ba2016", "lstm plain", "gru ba2016", "gru plain", "rnn ba2016"])
def test_every_instruction_set_and_number_of_threads(name: str, threads: int, isa_with_tiles: str) -> None:
    for size in [(3, 9, 63, 63), (3, 4, 63, 130), (24, 33, 2, 17)]:
        sample = Sample(HOWS[name], size, reverse=True)
        sample.check(threads)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(HOWS)),
    # One or two units under a layer norm have no deviation to speak of: its gradient is then all rounding.
    size=st.tuples(st.integers(1, 6), st.integers(0, 12), st.integers(1, 9), st.integers(3, 70)),
    reverse=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
def test_any_size_of_any_recurrence(
    name: str, size: tuple[int, int, int, int], reverse: bool, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    Sample(HOWS[name], size, reverse=reverse).check(threads)


def test_outputs_do_not_depend_on_the_number_of_threads() -> None:
    sample = Sample(HOWS["lstm ba2016"], (12, 9, 40, 200))
    one = sample.by_kernel(1)[:3]
    for threads in (2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(one, sample.by_kernel(threads)[:3], strict=True))


def test_long_sequences_are_as_exact_as_an_eager_loop() -> None:
    sample = Sample(HOWS["lstm ba2016"], (1000, 2, 8, 24))

    def error(found: list[Tensor]) -> float:
        return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, sample.truth, strict=True))

    assert error(sample.by_kernel(2)) <= 1.5 * error(sample.eager)


def test_memory_stays_flat() -> None:
    sample = Sample(HOWS["lstm ba2016"], (2, 3, 7, 33))

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    try:
        resident()
    except OSError:
        pytest.skip("no /proc to read the memory's size from")
    for _ in range(200):
        sample.by_kernel(1)
    before = resident()
    for _ in range(1000):
        sample.by_kernel(1)
    assert resident() - before < 512  # pages of 4 KiB: what Python itself may take


def test_what_is_refused() -> None:
    sample = Sample(HOWS["lstm plain"], (2, 3, 4, 5))
    given = [kernel_layer(sample.how), kernel_weights(sample.weights), sample.x.flatten(0, 1), sample.h0, sample.c0]
    with pytest.raises(
        ValueError, match=r"x: expected \(6, 4\) of torch.float32 or torch.bfloat16 on the CPU, but got \(5, 4\)"
    ):
        kernels.forward(given[0], given[1], given[2][:5], *given[3:], sample.order, save=False)
    grown = kernels.Steps(2, 3, torch.tensor([2, 3]))  # samples cannot come back
    with pytest.raises(ValueError, match="a kernel refused its arguments"):
        kernels.forward(given[0], given[1], given[2][:5], *given[3:], grown, save=False)
    with pytest.raises(ValueError, match="an LSTM, and it alone, has a cell state c0"):
        kernels.forward(*given[:4], None, sample.order, save=False)


def test_argument_structs_have_the_size_that_the_header_gives_them() -> None:
    library = load().library
    assert library is not None
    assert [s.size for s in kernels.STRUCTS] == [library.nw_struct_size(6 + n) for n in range(len(kernels.STRUCTS))]
