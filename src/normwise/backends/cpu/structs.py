"""The argument structs of csrc/include/normwise.h, field by field, and the formats that pack them.

Packing with one precompiled `struct.Struct` takes a fraction of the time of filling a ctypes.Structure.
tests/kernels/test_structs.py compares every field with the header.
"""

from __future__ import annotations

from struct import Struct

Fields = tuple[tuple[str, str], ...]  # (name, code of the struct module), in the header's order


def _of(code: str, names: str) -> Fields:
    return tuple((name, code) for name in names.split())


def _pointers(names: str) -> Fields:
    return _of("P", names)


def _int64(names: str) -> Fields:
    return _of("q", names)


def _double(names: str) -> Fields:
    return _of("d", names)


def _int32(names: str) -> Fields:
    return _of("i", names)


ROWS_FORWARD = (
    *_pointers("x residual mask weight bias gate sum y mean rstd"),
    *_int64("rows cols group_rows"),
    *_double("eps"),
    *_int32("dtype center act threads gate_act gate_first"),
)
ROWS_BACKWARD = (
    *_pointers("dy dsum s mask weight bias gate mean rstd ds dweight dbias dgate"),
    *_int64("rows cols group_rows"),
    *_int32("dtype center act threads gate_act gate_first"),
)
GROUPS_FORWARD = (
    *_pointers("x residual mask weight bias y mean rstd"),
    *_int64("batch channels positions groups"),
    *_double("eps"),
    *_int32("dtype layout act threads"),
)
GROUPS_BACKWARD = (
    *_pointers("dy x residual mask weight bias mean rstd dx dresidual dweight dbias"),
    *_int64("batch channels positions groups"),
    *_int32("dtype layout act threads"),
)
CHANNELS_FORWARD = (
    *_pointers("x residual mask weight bias running_mean running_var y mean rstd num_batches_tracked"),
    *_int64("batch channels positions group_samples"),
    *_double("eps momentum"),
    *_int32("dtype layout training act threads"),
)
CHANNELS_BACKWARD = (
    *_pointers("dy x residual mask weight bias mean rstd dx dresidual dweight dbias"),
    *_int64("batch channels positions group_samples"),
    *_int32("dtype layout training act threads"),
)
RECURRENT = (
    *_pointers("x batch_sizes reset weight_ih weight_hh"),
    *_pointers("bias_ih bias_hh gain_ih gain_hh bias_inner gain_c bias_c"),
    *_pointers("h0 c0 output input_terms hidden_terms cells stats mean var"),
    *_int64("steps batch rows inputs units stat_rows"),
    *_double("eps update_offset"),
    *_int32("dtype cell norm_placement statistics center cell_norm reset_candidate update_paper reverse"),
    *_of("4i", "groups"),
    *_int32("threads products"),
)
RECURRENT_FORWARD = (*RECURRENT, *_pointers("h c"))
RECURRENT_BACKWARD = (
    *RECURRENT,
    *_pointers(
        "doutput dh dc dx dweight_ih dweight_hh dbias_ih dbias_hh dgain_ih dgain_hh dbias_inner dgain_c dbias_c"
    ),
)


def packer(fields: Fields) -> Struct:
    """Packs one number for each field (four for an array of four) into the bytes of the C struct."""
    return Struct("@" + "".join(code for _, code in fields) + "0P")  # 0P: padded at its end as C pads it
