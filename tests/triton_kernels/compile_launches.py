"""Compiles every launch that the norms make on some inputs, for GPUs that need not be there, and prints what came of it
as JSON. Run by test_compiles.py in a process of its own, in which Triton is not interpreted.

    python tests/triton_kernels/compile_launches.py [--budgets FILE]

What is compiled is what a GPU would be given: the launches are those of the real code, with Triton's specialization
(an integer that is 1 is a constant; pointers and integers that 16 divides are known to be so). `--budgets` writes the
most that each kernel took, as budgets.json holds it (`make triton-budgets`): read the difference before you commit it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from normwise.backends.protocol import (
    Gate,
    LayerRequest,
    Layout,
    LengthsRequest,
    NormConfig,
    NormRequest,
    RunningStatsRequest,
)
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import lengths, rnn, running_stats, settings
from normwise.backends.triton.norms import FAMILIES
from normwise.ops.rnn.presets import PRESETS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
launches: dict[str, tuple[Any, ...]] = {}


def record(
    kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """In place of a launch."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, name in enumerate(kernel.arg_names):
        value = args[n] if n < len(args) else constants[name]
        if n >= len(args) or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[(n,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(n,)] = [["tt.divisibility", 16]]
    launches[str((kernel.__name__, signature, constexprs, num_warps, num_stages))] = (
        kernel,
        signature,
        constexprs,
        attributes,
        num_warps,
        num_stages,
    )


def make_launches() -> None:
    layer = NormConfig("layer_norm", "features", 1e-5)
    for cols, dtype in ((64, torch.bfloat16), (1000, torch.float32), (1 << 14, torch.float32)):
        x, w = torch.empty(48, cols, dtype=dtype), torch.empty(cols, dtype=dtype)
        both("features", layer, x, None, w, w, None)
        both("features", layer._replace(center=False), x, x, w, None, torch.ones(48, 1, dtype=torch.bool))
    x, w = torch.empty(48, 100, dtype=torch.float64), torch.empty(100)
    both("features", layer._replace(act="gelu"), x, x, w, w, torch.ones(48, 100, dtype=torch.bool))
    both("features", layer._replace(act="silu"), x.half()[:, :1], None, w[:1], w[:1], None)
    for shape, last, dtype, acts in (
        ((32, 64, 14, 14), False, torch.bfloat16, ("relu", "silu", "leaky_relu")),
        ((32, 64, 14, 14), True, torch.float32, ("relu6", "mish", "elu")),
        ((256, 128), False, torch.float32, ("hardswish", "softplus", "gelu_tanh")),
        ((1, 1, 7), False, torch.float64, ("hardsigmoid", "elu", "softplus")),
    ):
        x, w = torch.empty(shape, dtype=dtype), torch.empty(shape[1], dtype=dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        averages = torch.empty(shape[1]), torch.empty(shape[1]), torch.tensor(0)
        mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
        batch = NormConfig("batch_norm", "channels", 1e-5, momentum=0.1)
        both("channels", batch, x, None, w, w, None, *averages)
        both("channels", batch._replace(act=acts[0], momentum=torch.tensor(0.1)), x, x, w, w, mask, *averages)
        both("channels", batch._replace(act=acts[1], batch_statistics=False), x, x, None, w, None, *averages)
        by_group = NormConfig("group_norm", "groups", 1e-5, act="silu", groups=max(1, shape[1] // 8))
        both("groups", by_group, x, None, w, w, None)
        both("groups", by_group._replace(act=acts[2]), x, x, w, None, mask.expand(shape))


def make_modulated_launches() -> None:
    """With a gain and bias of groups of rows, and with gates in both orders."""
    layer = NormConfig("layer_norm", "features", 1e-5)
    rms = layer._replace(center=False)
    for cols, dtype in ((64, torch.bfloat16), (1 << 13, torch.float32)):
        x = torch.empty(4, 96, cols, dtype=dtype)
        both("features", layer, x, None, *torch.empty(2, 4, 1, cols), None)
        both("features", layer._replace(act="silu"), x, x, *torch.empty(2, 4, 96, cols), None)
    x = torch.empty(48, 8, 64, dtype=torch.float16)  # several groups in a block
    both("features", layer, x, x, *torch.empty(2, 48, 1, 64), torch.ones(48, 8, 1, dtype=torch.bool))
    for cols, dtype in ((1000, torch.float32), (1 << 13, torch.bfloat16)):
        x, w = torch.empty(480, cols, dtype=dtype), torch.empty(cols, dtype=dtype)
        both("features", rms, x, None, w, None, None, gate=Gate(x))
        both("features", layer, x, x, w, w, torch.ones(480, 1, dtype=torch.bool), gate=Gate(x, "silu", first=True))
    x = torch.empty(4, 12, 100, dtype=torch.float64)
    elements = torch.ones(4, 12, 100, dtype=torch.bool)
    both(
        "features", layer._replace(act="gelu"), x, x, *x[:, :1].expand(2, -1, -1, -1), elements, gate=Gate(x, "sigmoid")
    )
    both("features", rms._replace(act="relu"), x, None, None, None, None, gate=Gate(x, "gelu", first=True))


def make_updates() -> None:
    """Of running averages, by what ATen's kernel saved of a batch, and by moments."""
    for channels, dtype in ((64, torch.float32), (2048, torch.bfloat16), (7, torch.float64)):
        averages = torch.empty(channels, dtype=dtype), torch.empty(channels, dtype=dtype), torch.tensor(0)
        batch = torch.empty(2, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for momentum in (0.1, None):
            saved = RunningStatsRequest(*averages, momentum, batch[0], rstd=batch[1], count=12_544, eps=1e-5)
            running_stats.update(saved)
        running_stats.update(RunningStatsRequest(*averages, 0.1, batch[0], batch[1], batch[1]))
        each = RunningStatsRequest(*averages[:2], None, 0.1, batch, batch, batch[:, :1].expand(-1, channels))
        running_stats.update_over_samples(each)


def make_masks() -> None:
    for dtype, steps in ((torch.int64, 4096), (torch.int32, 7)):
        lengths.mask(LengthsRequest(torch.empty(16, dtype=dtype), steps))


def make_recurrent_launches() -> None:
    with settings.recurrent_settings(designs=()):
        for units, dtype in ((5, torch.float64), (256, torch.bfloat16), (1024, torch.float32)):
            for presets in PRESETS.values():
                recurrent(presets["ba2016"], units, dtype)
            recurrent(PRESETS["lstm"]["icefall"], units, dtype)
            recurrent(PRESETS["gru"]["dreamer"], units, dtype)
        recurrent(PRESETS["lstm"]["tfa"], 2048, torch.float16)
        recurrent(Recurrence("lstm", None), 128, torch.float16)
        recurrent(Recurrence("rnn", None, nonlinearity="relu"), 128, torch.bfloat16)
    packed = Layout(2, 2, torch.tensor([2, 1]))
    recurrent(PRESETS["rnn"]["ba2016"], 64, torch.bfloat16, packed)
    recurrent(PRESETS["gru"]["ba2016"], 128, torch.float16)
    recurrent(PRESETS["lstm"]["ba2016"], 128, torch.bfloat16)
    recurrent(PRESETS["lstm"]["ba2016"], 64, torch.float32)
    with settings.recurrent_settings(designs=("grid",), multiprocessors=132):
        recurrent(PRESETS["rnn"]["separate"], 128, torch.bfloat16, packed)
        recurrent(PRESETS["lstm"]["ba2016"], 512, torch.bfloat16)
        recurrent(PRESETS["lstm"]["ba2016"], 256, torch.float32)


def recurrent(config: Recurrence, units: int, dtype: torch.dtype, layout: Layout = Layout(2, 2)) -> None:  # noqa: B008
    """Forward and backward of two steps of a layer."""
    weights = Weights(**{name: torch.zeros(shape, dtype=dtype) for name, shape in config.shapes(3, units).items()})
    shape = (2, 2) if layout.batch_sizes is None else (int(layout.batch_sizes.sum()),)
    h, x = torch.zeros(2, units, dtype=dtype), torch.zeros(*shape, 3, dtype=dtype)
    request = LayerRequest(config, x, h, h if config.cell == "lstm" else None, weights, layout, False, x[..., 0].bool())
    found = rnn.forward(request, True)
    rnn.backward(request, found.saved, (found.output, None, None), [True] * 14)


def both(family: str, config: NormConfig, *tensors: Any, gate: Gate | None = None) -> None:
    """Forward and backward of one call."""
    request = NormRequest(config, *tensors)
    and_gate = () if gate is None else (gate,)
    out = FAMILIES[family].forward(*request, True, *and_gate)
    residual = None if family == "features" or config.act is None else request.residual
    dtotal = out.total if family == "features" and request.residual is not None else None
    after = (request.weight, request.bias, request.mask, out.stats, out.y, dtotal)
    FAMILIES[family].backward(config, out.total, residual, *after, *and_gate)


def compiled(launch: tuple[Any, ...], target: GPUTarget) -> dict[str, Any]:
    kernel, signature, constexprs, attributes, num_warps, num_stages = launch
    if target.backend == "hip":
        num_warps = max(1, num_warps // 2)  # of 64 threads
    source = ASTSource(kernel, signature, constexprs, attributes)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    element = next((t for t in signature.values() if t.startswith("*") and t != "*u8"), "")
    facts = {"kernel": kernel.__name__, "element": element, "warps": num_warps, "shared": made.metadata.shared}
    if target.backend == "cuda":
        registers, spilled = ptxas(made.asm["ptx"], target.arch)
        return {**facts, "registers": registers, "spilled": spilled, "order": order(made.asm["ptx"])}
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", made.asm["amdgcn"]))
    return {**facts, "registers": int(found["vgpr_count"]), "spilled": int(found["vgpr_spill_count"])}


def order(ptx: str) -> dict[str, Any]:
    """What in a kernel whose programs wait for one another keeps its loads and stores in order.

    releases: for each, what comes last before it: a barrier of all threads, or a store. cached: loads of other
    programs' numbers, and how many copies go on while others wait.
    """
    events = re.findall(r"bar\.sync|st\.global|red\.global\S*|atom\.global\S*", ptx)
    before = [events[n - 1] for n, event in enumerate(events) if "release" in event]
    return {
        "released after": before,
        "loads past the cache": len(re.findall(r"ld\.global\.cg", ptx)),
        "acquires": len(re.findall(r"global\S*\.acquire", ptx)),
        "copies ahead": len(re.findall(r"cp\.async", ptx)),
    }


def ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) by the assembler that comes with Triton."""
    assembler = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
        command = [assembler, "-v", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) registers", told)[0]), int(re.findall(r"(\d+) bytes spill stores", told)[0])


def work(names: list[str]) -> list[dict[str, Any]]:
    """What comes of these launches for sm_90, and of the first of each kernel for the other GPUs."""
    done: list[dict[str, Any]] = []
    first = {launch[0].__name__: name for name, launch in reversed(launches.items())}
    for name in names:
        launch = launches[name]
        targets = list(TARGETS) if first[launch[0].__name__] == name else ["sm_90"]
        done += [{"target": target, **compiled(launch, TARGETS[target])} for target in targets]
    return done


MEASURES = ("registers", "spilled", "shared")
# Registers are given to a thread by so many.
REGISTER_UNIT = 8


def budgets(facts: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """The most registers of a thread (rounded up to what one is given), spilled bytes of a thread and bytes of shared
    memory of a block that each kernel took, for each target."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for fact in facts:
        most = found.setdefault(fact["kernel"], {}).setdefault(fact["target"], dict.fromkeys(MEASURES, 0))
        for name in MEASURES:
            unit = REGISTER_UNIT if name == "registers" else 1
            most[name] = max(most[name], -(-fact[name] // unit) * unit)
    return {kernel: dict(sorted(found[kernel].items())) for kernel in sorted(found)}


def written(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """Budgets as JSON with a line for each kernel and target."""
    kernels = []
    for kernel, targets in found.items():
        lines = [f'    "{target}": {json.dumps(most)}' for target, most in targets.items()]
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=Path)
    options = parser.parse_args()
    JITFunction.run = record
    make_launches()
    make_modulated_launches()
    make_updates()
    make_masks()
    make_recurrent_launches()
    workers = os.cpu_count() or 1
    shares = [list(launches)[n::workers] for n in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        facts = [fact for facts in pool.map(work, shares) for fact in facts]
    if options.budgets is not None:
        options.budgets.write_text(written(budgets(facts)))
    print(json.dumps({"triton": triton.__version__, "facts": facts}))


if __name__ == "__main__":
    main()
