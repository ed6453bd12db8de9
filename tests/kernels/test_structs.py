"""The argument structs that Python packs are those that the header declares, field by field."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from normwise.backends.cpu import library, norms, rnn, structs

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "normwise.h"
CODES = {"int32_t": "i", "int64_t": "q", "double": "d", "float": "f"}
# In the order of the header, which nw_struct_size counts in.
ARGUMENTS = {
    "nw_rows_forward_args": (structs.ROWS_FORWARD, norms.STRUCTS[0]),
    "nw_rows_backward_args": (structs.ROWS_BACKWARD, norms.STRUCTS[1]),
    "nw_groups_forward_args": (structs.GROUPS_FORWARD, norms.STRUCTS[2]),
    "nw_groups_backward_args": (structs.GROUPS_BACKWARD, norms.STRUCTS[3]),
    "nw_channels_forward_args": (structs.CHANNELS_FORWARD, norms.STRUCTS[4]),
    "nw_channels_backward_args": (structs.CHANNELS_BACKWARD, norms.STRUCTS[5]),
    "nw_recurrent_forward_args": (structs.RECURRENT_FORWARD, rnn.STRUCTS[0]),
    "nw_recurrent_backward_args": (structs.RECURRENT_BACKWARD, rnn.STRUCTS[1]),
}


class Declared:
    """The structs of a header: for each its fields as (name, code of its type, offset), and its size."""

    def __init__(self, text: str) -> None:
        self.fields: dict[str, list[tuple[str, str, int]]] = {}
        self.size: dict[str, int] = {}
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, flags=re.DOTALL):
            self._add(name, body)

    def _add(self, name: str, body: str) -> None:
        fields, end = [], 0
        for declaration in filter(str.strip, body.split(";")):
            kind, declarators = re.fullmatch(r"\s*(?:const )?(\w+)(.*)", declaration, flags=re.DOTALL).groups()  # type: ignore[union-attr]
            for declarator in declarators.split(","):
                pointer, field, length = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", declarator).groups()  # type: ignore[union-attr]
                if kind in self.fields and not pointer:  # a struct within the struct, which begins as aligned as any
                    end = -(-end // 8) * 8
                    fields += [(inner, code, end + offset) for inner, code, offset in self.fields[kind]]
                    end += self.size[kind]
                    continue
                code = "P" if pointer else CODES[kind]
                each = struct.calcsize(code)
                start = -(-end // each) * each
                fields.append((field, (length or "") + code, start))
                end = start + each * int(length or 1)
        self.fields[name], self.size[name] = fields, -(-end // 8) * 8


@pytest.fixture(scope="module")
def header() -> Declared:
    return Declared(HEADER.read_text())


def test_the_parser_lays_out_structs_as_c_does() -> None:
    parsed = Declared(
        "typedef struct a { const void* p; /* int32_t no; */ int32_t i, j[3]; double d; int32_t last; } a;\n"
        "typedef struct b { int32_t first; a inner; float* q; } b;"
    )
    assert parsed.fields["a"] == [("p", "P", 0), ("i", "i", 8), ("j", "3i", 12), ("d", "d", 24), ("last", "i", 32)]
    assert parsed.size == {"a": 40, "b": 56}
    assert parsed.fields["b"][0] == ("first", "i", 0)
    assert [(name, offset) for name, _, offset in parsed.fields["b"][1:]] == [
        ("p", 8), ("i", 16), ("j", 20), ("d", 32), ("last", 40), ("q", 48)
    ]  # fmt: skip


def test_every_argument_struct_of_the_header_is_listed_here_in_its_order(header: Declared) -> None:
    assert [name for name in header.fields if name.endswith("_args")] == list(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fields_have_the_names_types_and_offsets_of_the_header(name: str, header: Declared) -> None:
    fields, packer = ARGUMENTS[name]
    packed, codes = [], "@"
    for field, code in fields:
        packed.append((field, code, struct.calcsize(codes + "0" + code[-1])))
        codes += code
    assert packed == header.fields[name]
    assert packer.size == header.size[name]
    assert packer.format == structs.packer(fields).format


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_sizes_are_those_of_the_compiler(header: Declared) -> None:
    handle = library.load().library
    assert handle is not None
    assert [handle.nw_struct_size(i) for i in range(len(ARGUMENTS))] == [header.size[name] for name in ARGUMENTS]
    assert handle.nw_struct_size(len(ARGUMENTS)) == -1
