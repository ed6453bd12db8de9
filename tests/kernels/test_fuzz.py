"""Any shape with any combination of options: the compiled kernels against float64 formulas."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import kernel_truth as truth
from support.kernel_checks import check_channels, check_groups, check_rows

# The fixtures (instruction set, poisoned memory) hold for all examples of a test alike.
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
OPTIONS = {
    "act": st.sampled_from([None, *truth.ACTIVATIONS]),
    "residual": st.booleans(),
    "masked": st.booleans(),
    "affine": st.booleans(),
    "offset": st.integers(0, 3),
    "threads": st.integers(1, 4),
}
SIZES = st.integers(1, 70)


@FUZZ
@given(
    rows=st.integers(0, 70),
    cols=st.one_of(SIZES, st.integers(71, 9000)),
    dtype=st.sampled_from(truth.DTYPES),
    center=st.booleans(),
    dsum=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_random_rows_match_the_formula(isa, rows, cols, dtype, center, dsum, options):
    check_rows(rows, cols, dtype, center=center, dsum=dsum, **options)


@FUZZ
@given(
    groups=st.integers(1, 40),
    each=st.one_of(st.integers(1, 5), st.integers(6, 70)),
    cols=st.one_of(SIZES, st.integers(71, 2000)),
    dtype=st.sampled_from(truth.DTYPES),
    center=st.booleans(),
    gate=st.sampled_from([None, True, False]),
    gate_act=st.sampled_from([None, "silu", "sigmoid", "gelu", "relu"]),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_random_gains_of_groups_and_gates_match_the_formula(
    isa, groups, each, cols, dtype, center, gate, gate_act, options
):
    if gate is False:
        options["act"] = None
    given = {"groups": groups, "gate_first": gate, "gate_act": gate_act, "dsum": options["residual"], **options}
    check_rows(groups * each, cols, dtype, center=center, **given)


@FUZZ
@given(
    batch=st.integers(1, 5),
    groups=st.integers(1, 4),
    each=st.integers(1, 4),
    positions=st.one_of(SIZES, st.integers(71, 2000)),
    dtype=st.sampled_from(truth.DTYPES),
    channels_last=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_random_groups_match_the_formula(isa, batch, groups, each, positions, dtype, channels_last, options):
    check_groups((batch, groups * each, positions), groups, dtype, channels_last=channels_last, **options)


@FUZZ
@given(
    shape=st.one_of(st.tuples(st.integers(2, 70), SIZES), st.tuples(st.integers(1, 6), SIZES, st.integers(2, 300))),
    dtype=st.sampled_from(truth.DTYPES),
    training=st.booleans(),
    channels_last=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_random_channels_match_the_formula(isa, shape, dtype, training, channels_last, options):
    check_channels(shape, dtype, training=training, channels_last=channels_last, **options)
