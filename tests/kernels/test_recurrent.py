"""The recurrent kernels in both dtypes against the reference in float64, over sizes that fill tiles, panels and vectors
and that do not, sequences of different lengths, resets, every number of threads, every instruction set, and memory full
of NaN."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from normwise.backends.cpu import rnn as kernels
from normwise.backends.cpu.library import load
from normwise.backends.protocol import LayerRequest, Layout
from normwise.backends.recurrence import Weights
from normwise.ops.rnn.presets import PRESETS
from support.instruction_sets import USABLE
from support.pairwise import pairwise
from support.recurrences import random_weights
from support.recurrent_samples import BATCH_CONFIGS, CONFIGS, FEW_UNITS, Sample, check, error
from support.tolerances import assert_close

Size = tuple[int, int, int, int]  # T, B, I, H
DTYPES = [torch.float32, torch.bfloat16]
LOST_DIGITS = 1.45
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decided_by_rounding(name: str, dtype: torch.dtype, units: int) -> bool:
    """Where nothing can be said of a gradient: that of a norm over one unit or two is all rounding, in bfloat16 that of
    a norm over a few; and bfloat16 decides on which side of 0 a ReLU is."""
    if dtype == torch.bfloat16:
        return units < FEW_UNITS or name == "rnn relu"
    return units < 3 and CONFIGS[name].norm is not None


# One of everything; partial vectors; whole panels and a rest; few samples and many units, which threads share; more
# rows than a chunk; no sample.
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 7, 7),
    (5, 7, 3, 3),
    (33, 2, 3, 31),
    (3, 9, 63, 63),
    (4, 1, 7, 160),
    (3, 4, 63, 130),
    (24, 33, 2, 17),
    (2, 33, 64, 17),
    (3, 0, 5, 7),
]


@pytest.mark.parametrize(
    ("dtype", "name", "size"),
    [
        pytest.param(dtype, name, size, id=f"{dtype}-{name}-{size}")
        for dtype in DTYPES
        for name in CONFIGS
        for size in SIZES
        if not decided_by_rounding(name, dtype, size[3])
    ],
)
def test_the_kernels_are_the_reference(dtype: torch.dtype, name: str, size: Size) -> None:
    check(lambda: Sample(CONFIGS[name], size, dtype), threads=(1, 2))


# Batch norm: a sample alone, which has no deviation, and two; more columns than a block, and more than 256 samples; so
# few inputs that their product is not kept, and more.
BATCH_SIZES = [
    (1, 2, 1, 1),
    (3, 1, 2, 5),
    (2, 3, 7, 7),
    (5, 7, 3, 3),
    (33, 5, 3, 31),
    (4, 5, 7, 100),
    (3, 64, 5, 130),
    (24, 33, 2, 17),
    (2, 300, 4, 17),
    (3, 0, 5, 7),
]
# Samples from which on no draw is decided by rounding. Over two or three, and where few sequences are left, a norm may
# divide a rounding by next to no deviation: of 219 draws of each recurrence up to one in twenty (of one unit) exceed,
# by luck, what an eager loop's error allows; of five samples none is above 0.61 of that, with running statistics none
# above 0.4.
FEW_SAMPLES = 5
LAYOUTS = [
    {},
    {"ragged": True, "resets": True},
    {"reverse": True, "resets": True, "offset": 1},
    {"reverse": True, "ragged": True, "offset": 3},
]


def all_rounding(name: str, size: Size, tables: int | None) -> bool:
    """Where a gradient of c0 has passed a norm over two samples and nothing beside it."""
    return tables is None and size[1] == 2 and BATCH_CONFIGS[name].cell_norm == "state"


@pytest.mark.parametrize(
    ("name", "size", "layout", "tables"),
    [
        case
        for case in pairwise(sorted(BATCH_CONFIGS), BATCH_SIZES, LAYOUTS, [None, 1, 3])
        if not all_rounding(case[0], case[1], case[3])
    ],
)
def test_batch_statistics_of_each_step_and_running_ones_are_the_references(
    name: str, size: Size, layout: dict[str, bool], tables: int | None
) -> None:
    """Outputs, moments of the batch and gradients; all pairs of a recurrence, a size, a layout and tables."""
    check(lambda: Sample(BATCH_CONFIGS[name], size, **layout, tables=tables), threads=(1, 2))


@pytest.mark.parametrize("tables", [None, 2])
@pytest.mark.parametrize("name", sorted(BATCH_CONFIGS))
def test_no_bit_of_batch_norm_depends_on_the_number_of_threads(name: str, tables: int | None) -> None:
    """Nor of a gradient: threads divide the columns."""
    sample = Sample(BATCH_CONFIGS[name], (6, 9, 40, 200), ragged=True, resets=True, tables=tables)
    one = sample.by_kernel(1)
    for threads in (2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(one, sample.by_kernel(threads), strict=True))


def test_a_large_mean_costs_no_variance() -> None:
    """Of inputs near 1000, where E[x^2] - E[x]^2 would lose all digits of a variance near 1."""
    sample = Sample(PRESETS["rnn"]["laurent2015"], (2, 64, 1, 20))
    x = (torch.randn(2, 64, 1) + 1000).requires_grad_()
    given = sample.given._replace(x=x.detach())
    found = kernels.forward(given, False).statistics["ih"]
    projected = x.detach().double() @ sample.weights.weight_ih.double().t()
    true = projected.var(1, correction=0)
    assert_close(found.var, true, kind="composed", count=1000)


@pytest.mark.parametrize("name", ["lstm ba2016", "lstm unnormalized", "gru ba2016", "gru unnormalized", "rnn ba2016"])
@each_dtype
def test_every_number_of_threads(dtype: torch.dtype, name: str) -> None:
    threads = (1, 3, 4)
    check(lambda: Sample(CONFIGS[name], (3, 9, 63, 63), dtype, reverse=True), threads)
    check(lambda: Sample(CONFIGS[name], (3, 4, 63, 130), dtype, reverse=True, resets=True, offset=1), threads)
    check(lambda: Sample(CONFIGS[name], (24, 33, 2, 17), dtype, ragged=True, resets=True, offset=3), threads)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    dtype=st.sampled_from(DTYPES),
    size=st.tuples(st.integers(1, 6), st.integers(0, 40), st.integers(1, 70), st.integers(3, 70)),
    rows=st.fixed_dictionaries({"reverse": st.booleans(), "ragged": st.booleans(), "resets": st.booleans()}),
    offset=st.integers(0, 3),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
def test_any_size_of_any_recurrence(
    name: str, dtype: torch.dtype, size: Size, rows: dict[str, bool], offset: int, threads: int, seed: int
) -> None:
    assume(not decided_by_rounding(name, dtype, size[3]))
    torch.manual_seed(seed)
    check(lambda: Sample(CONFIGS[name], size, dtype, **rows, offset=offset), [threads])


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(BATCH_CONFIGS)),
    tables=st.sampled_from([None, 1, 4]),
    size=st.tuples(st.integers(1, 6), st.integers(0, 40), st.integers(1, 70), st.integers(1, 70)),
    rows=st.fixed_dictionaries({"reverse": st.booleans(), "ragged": st.booleans(), "resets": st.booleans()}),
    offset=st.integers(0, 3),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
def test_any_size_with_batch_norm(
    name: str, tables: int | None, size: Size, rows: dict[str, bool], offset: int, threads: int, seed: int
) -> None:
    assume(tables is not None or size[1] == 0 or (size[1] >= FEW_SAMPLES and not rows["ragged"]))
    torch.manual_seed(seed)
    check(lambda: Sample(BATCH_CONFIGS[name], size, **rows, offset=offset, tables=tables), [threads])


@each_dtype
def test_outputs_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    sample = Sample(CONFIGS["lstm ba2016"], (12, 9, 40, 200), dtype)
    one = sample.by_kernel(1)[:3]
    for threads in (2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(one, sample.by_kernel(threads)[:3], strict=True))


@pytest.mark.parametrize("name", ["lstm ba2016", "lstm unnormalized"])
def test_threads_do_not_write_where_another_still_reads(name: str) -> None:
    """Without a gradient the summed inputs of one chunk of steps take the place of those of the chunk before. Where the
    sequences that still run are an odd number, rows of another thread lay there. Of 60 such calls of two threads more
    than 30 were wrong without a barrier between chunks; 40 that are all right by luck are less than one in 1e12."""
    config, (steps, batch, inputs, units) = CONFIGS[name], (40, 32, 16, 128)
    weights = Weights(**{key: w.float() for key, w in random_weights(config.shapes(inputs, units)).items()})
    layout = Layout(steps, batch, torch.tensor([batch] * 3 + [batch - 1] * (steps - 3)))
    state = torch.randn(batch, units)
    rows = torch.randn(int(layout.batch_sizes.sum()), inputs)
    c0 = state if config.cell == "lstm" else None
    request = LayerRequest(config, rows, state, c0, weights, layout)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, *[2] * 40, *[3] * 10):
            torch.set_num_threads(threads)
            outputs.append(kernels.forward(request, False).output)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# One step of many samples, and a few steps of few.
@pytest.mark.parametrize("size", [(1, 32, 8, 24), (20, 4, 8, 24)], ids=["a step", "some steps"])
@pytest.mark.parametrize("name", ["lstm ba2016", "lstm unnormalized", "gru ba2016", "rnn ba2016"])
def test_no_digits_are_lost_beside_an_eager_loop(name: str, size: Size) -> None:
    """The median error over draws and tensors, in units of the loop's in float32.

    In a net that magnifies roundings, as most do over a thousand steps, the ratio of two errors is anything from .15 to
    100. Here it says how many digits a step costs. Over 96 draws, 12 medians of 8 draws each: .95 to 1.1 with AVX-512
    and AVX2, .97 to 1.17 on the baseline, which has no fused multiply-add; the widest spread had a standard deviation
    of .053 about 1.11. Of 12 draws 1.45 is thus eight standard deviations away: a false alarm in less than 1e-12 runs.
    Weights that lost three of their 24 bits give 1.7 to 3.9.
    """
    samples = [Sample(CONFIGS[name], size) for _ in range(12)]
    loops = [[error(t, true) for t, true in zip(s.eager, s.truth, strict=True)] for s in samples]

    def median(level: str, bits: int | None = None) -> float:
        ratios: list[float] = []
        for sample, loop in zip(samples, loops, strict=True):
            found = zip(sample.by_kernel(1, level, bits), sample.truth, loop, strict=True)
            ratios += [error(t, true) / loops_error for t, true, loops_error in found if loops_error]
        return statistics.median(ratios)

    for level in USABLE:
        assert median(level) < LOST_DIGITS, level
        assert median(level, bits=21) > LOST_DIGITS, level


@each_dtype
def test_memory_stays_flat(dtype: torch.dtype) -> None:
    """Also where each call's scratch, results and what is kept take but a few KiB."""
    sample = Sample(CONFIGS["lstm ba2016"], (4, 6, 17, 40), dtype, ragged=True, resets=True)

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


def test_bad_arguments_are_refused() -> None:
    sample = Sample(CONFIGS["lstm unnormalized"], (2, 3, 4, 5))
    given = sample.given
    short = given._replace(x=given.x[:1])
    with pytest.raises(
        ValueError, match=r"x: expected \(2, 3, 4\) of torch.float32 or torch.bfloat16 on the CPU, but got \(1, 3, 4\)"
    ):
        kernels.forward(short, False)
    rows = given.x.flatten(0, 1)
    layout = Layout(2, 3, torch.tensor([3, 2]))
    with pytest.raises(
        ValueError, match=r"x: expected \(5, 4\) of torch.float32 or torch.bfloat16 on the CPU, but got \(6, 4\)"
    ):
        kernels.forward(given._replace(x=rows, layout=layout), False)
    grown = Layout(2, 3, torch.tensor([2, 3]))  # samples cannot come back
    with pytest.raises(ValueError, match="a kernel refused its arguments"):
        kernels.forward(given._replace(x=rows[:5], layout=grown), False)
    with pytest.raises(ValueError, match="flip: missing"):
        kernels.forward(given._replace(x=rows[:5], layout=layout, reverse=True), False)
    with pytest.raises(ValueError, match="an LSTM, and it alone, has a cell state c0"):
        kernels.forward(given._replace(c0=None), False)
    normalized = Sample(BATCH_CONFIGS["rnn cooijmans2016"], (2, 3, 4, 5), tables=2).given
    mean, var = normalized.running["hh"]
    narrow = {**normalized.running, "hh": (mean[:, :4], var)}
    with pytest.raises(ValueError, match=r"running mean of hh: expected \(2, 5\) of torch.float32 on the CPU"):
        kernels.forward(normalized._replace(running=narrow), False)
    other = {**normalized.running, "hh": (mean, var[:1])}
    with pytest.raises(ValueError, match=r"running variance of hh: expected \(2, 5\) of torch.float32"):
        kernels.forward(normalized._replace(running=other), False)


def test_argument_structs_have_the_size_that_the_header_gives_them() -> None:
    library = load().library
    assert library is not None
    assert [s.size for s in kernels.STRUCTS] == [library.nw_struct_size(6 + n) for n in range(len(kernels.STRUCTS))]
