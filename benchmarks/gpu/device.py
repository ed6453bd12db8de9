"""What the device can do: a copy, a launch, the gap between the nodes of a CUDA graph, a barrier of the whole grid, and
what multiprocessors read from the L2 cache. By these the times of kernels are to be understood."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.clock import Call, Device
from benchmarks.gpu.log import Log

MIB = 1 << 20
COPIES = (4 * MIB, 64 * MIB, 1024 * MIB)
NODES = 200
BARRIERS = (16, 32, 64, 128)
BLOCK = 4096


class Probe(NamedTuple):
    """Something of which a rate or a time is taken; `make` gives a call, and what makes a figure of its seconds."""

    name: str
    unit: str
    make: Callable[[Device], tuple[Call, Callable[[float], float]]]


def probes(dry: bool) -> list[Probe]:
    sizes, programs = ((MIB,), (1,)) if dry else (COPIES, BARRIERS)
    return [
        *[Probe(f"copy of {size // MIB} MiB", "GB/s read and written", _copy(size)) for size in sizes],
        Probe("launch of an empty operation, eager", "us", _launches(replayed=False)),
        Probe("node of a CUDA graph", "us", _launches(replayed=True)),
        *[Probe(f"barrier of {n} programs", "us", _barrier(n)) for n in programs],
        Probe("reads from L2, all multiprocessors", "GB/s", _reads),
    ]


def _copy(size: int) -> Callable[[Device], tuple[Call, Callable[[float], float]]]:
    def make(device: Device) -> tuple[Call, Callable[[float], float]]:
        source = torch.ones(size, dtype=torch.uint8, device=device.type)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), lambda seconds: 2 * size / seconds / 1e9

    return make


def _launches(replayed: bool) -> Callable[[Device], tuple[Call, Callable[[float], float]]]:
    def make(device: Device) -> tuple[Call, Callable[[float], float]]:
        one = torch.zeros(1, device=device.type)

        def many() -> None:
            for _ in range(NODES):
                one.add_(1)

        return device.replayed(many) if replayed else many, lambda seconds: seconds / NODES * 1e6

    return make


def _barrier(programs: int) -> Callable[[Device], tuple[Call, Callable[[float], float]]]:
    def make(device: Device) -> tuple[Call, Callable[[float], float]]:
        from benchmarks.gpu.kernels import barriers

        rounds = 2 if device.dry else 1000
        counter = torch.zeros(1, dtype=torch.int32, device=device.type)
        # Refused by the driver unless all programs are on the device at once: else they would wait for ever.
        together = {} if device.dry else {"launch_cooperative_grid": True}

        def call() -> None:
            counter.zero_()
            barriers[(programs,)](counter, rounds, PROGRAMS=programs, **together)

        call()
        arrived = int(counter)
        if arrived != rounds * programs:
            raise RuntimeError(f"{arrived} arrivals at the barrier where {rounds * programs} were expected")
        return call, lambda seconds: seconds / rounds * 1e6

    return make


def _reads(device: Device) -> tuple[Call, Callable[[float], float]]:
    from benchmarks.gpu.kernels import read_again

    blocks, rounds = (2, 1) if device.dry else (128, 50)  # 2 MiB: more than a multiprocessor keeps, less than L2
    programs = 2 if device.dry else 2 * torch.cuda.get_device_properties(0).multi_processor_count
    source = torch.ones(blocks * BLOCK, device=device.type)
    sums = torch.zeros(programs, device=device.type)

    def call() -> None:
        read_again[(programs,)](source, sums, blocks, rounds, BLOCK=BLOCK, num_warps=8)

    call()
    if not bool((sums == rounds * blocks * BLOCK).all()):
        raise RuntimeError("the sums of what was read are wrong")
    return call, lambda seconds: programs * rounds * blocks * BLOCK * 4 / seconds / 1e9


def measured(probe: Probe, device: Device, seconds: float) -> dict[str, Any]:
    call, figure = probe.make(device)
    times = device.times({probe.name: call}, min(seconds, 2.0))[probe.name]
    median = times["median"]
    return {"unit": probe.unit, "value": None if median is None else figure(median)}


def run(device: Device, log: Log) -> None:
    log.write(machine=describe(device))
    log.each(probes(device.dry), lambda probe: probe.name, lambda probe, s: measured(probe, device, s), say)


def say(figure: dict[str, Any]) -> str:
    return "dry" if figure["value"] is None else f"{figure['value']:.2f} {figure['unit']}"


def describe(device: Device) -> dict[str, Any]:
    """The machine line: what the figures were measured on."""
    import triton

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if device.dry:
        return {"gpu": "none: Triton's interpreter on the CPU"} | found
    properties = torch.cuda.get_device_properties(0)
    about = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }
    return about | found | _by_driver()


def _by_driver() -> dict[str, str]:
    """What nvidia-smi knows beyond that, where there is one."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=False))
