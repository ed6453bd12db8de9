"""Instructions in the inner loops of the kernels (csrc/tests/loops.cpp), on arm64 beside AVX2: what a compiler makes of
them can be compared where there is no such processor to measure time on.

    python scripts/count_instructions.py

Compiles the file for both, disassembles it and prints a table. A loop is what lies between a conditional backward jump
and its target, with no other such jump inside; of a function's loops the longest counts, the one over whole vectors.
Needs g++, aarch64-linux-gnu-g++ and their objdump.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Those of CMakeLists.txt.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


class Target(NamedTuple):
    """How a processor's code is compiled and read."""

    name: str
    compiler: list[str]
    objdump: str
    jump: str
    call: str


TARGETS = (
    Target("AVX2", ["g++", "-march=x86-64-v3"], "objdump", r"j(?!mp)\w+", r"call\w*"),
    Target("NEON", ["aarch64-linux-gnu-g++"], "aarch64-linux-gnu-objdump", r"(?:b\.\w+|cbn?z|tbn?z)", r"blr?"),
)
# Each function of loops.cpp but the product: what its loop computes, and how many vectors at a turn.
LOOPS = {
    "moments_float": ("mean and deviations, float32", 4),
    "moments_bf16": ("the same, bfloat16", 4),
    "moments_masked": ("the same with a mask, float32", 4),
    "normalize_float": ("gain and bias, float32", 1),
    "normalize_bf16": ("the same, bfloat16", 1),
    "normalize_relu": ("the same with ReLU, float32", 1),
    "normalize_silu": ("the same with SiLU, float32", 1),
    "backward_float": ("input gradient, float32", 1),
}


class Counted(NamedTuple):
    instructions: int
    calls: int  # in the whole function, its ends of rows included
    multiply_adds: int  # of vectors, in the loop
    stack: int  # accesses of the stack in the loop: registers that were not enough


def disassembled(target: Target, folder: Path) -> str:
    compiled = folder / f"{target.name}.o"
    include = [f"-I{ROOT / 'csrc' / part}" for part in ("include", "src")]
    source = ROOT / "csrc" / "tests" / "loops.cpp"
    command = [*target.compiler, *FLAGS, "-DNW_ISA=counted", *include, "-c", str(source), "-o", str(compiled)]
    subprocess.run(command, check=True)
    told = [target.objdump, "-d", "--no-show-raw-insn", str(compiled)]
    return subprocess.run(told, check=True, capture_output=True, text=True).stdout


def functions(text: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of each function by its name; the compiler's `.cold` and `.part` ones are left out."""
    found: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(\w+)>:", line):
            lines = found[head[1]] = []
        elif body := re.match(r"\s+([0-9a-f]+):\s+(\S.*)", line):
            lines.append((int(body[1], 16), body[2]))
    return found


def longest_inner_loop(lines: list[tuple[int, str]], target: Target) -> list[str]:
    jumps = [
        (int(jump[1], 16), address)
        for address, instruction in lines
        if (jump := re.match(target.jump + r"\s+(?:\w+,\s+)?(?:#\d+,\s+)?([0-9a-f]+) <", instruction))
        and int(jump[1], 16) <= address
    ]
    inner = [
        (to, at)
        for to, at in jumps
        if not any((to, at) != other and to <= other[0] and other[1] <= at for other in jumps)
    ]
    loops = [[text for address, text in lines if to <= address <= at] for to, at in inner]
    # What lies behind the end of a function, such as the last part of a row, jumps back as well.
    loops = [loop for loop in loops if not any(text.startswith("ret") for text in loop)]
    return max(loops, key=len, default=[])


def count(target: Target, folder: Path) -> dict[str, Counted]:
    counted = {}
    for name, lines in functions(disassembled(target, folder)).items():
        loop = longest_inner_loop(lines, target)
        counted[name] = Counted(
            instructions=sum(not text.startswith("nop") for text in loop),
            calls=sum(re.match(target.call + r"\s", text) is not None for _, text in lines),
            multiply_adds=sum(re.match(r"vfn?m(?:add|sub)\w*p|fml[as]\s+v", text) is not None for text in loop),
            stack=sum(re.search(r"\(%rsp|\[sp", text) is not None for text in loop),
        )
    return counted


def count_all() -> dict[str, dict[str, Counted]]:
    """By the target's name and the function's."""
    with tempfile.TemporaryDirectory() as folder:
        return {target.name: count(target, Path(folder)) for target in TARGETS}


def table(counted: dict[str, dict[str, Counted]]) -> str:
    """Markdown: instructions for a vector and for eight numbers."""
    avx2, neon = counted["AVX2"], counted["NEON"]
    lines = ["| loop | AVX2, a vector of 8 | NEON, a vector of 4 | NEON, 8 numbers |", "|---|---|---|---|"]
    for name, (what, vectors) in LOOPS.items():
        a, n = avx2[name].instructions / vectors, neon[name].instructions / vectors
        lines.append(f"| {what} | {a:g} | {n:g} | {2 * n:g} |")
    a, n = (c["product"].instructions / c["product"].multiply_adds for c in (avx2, neon))
    lines.append(f"| matrix product, for each multiply-add | {a:.2f} | {n:.2f} | {2 * n:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(count_all()))
