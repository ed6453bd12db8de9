"""`normwise info`: what runs on this machine, and why."""

from __future__ import annotations

from typing import Any

import typer

from normwise.cli.json_output import AsJson, print_json
from normwise.words import counted


def info(json: AsJson = False) -> None:
    """Show what runs on this machine, and why: versions, devices and backends.

    Each backend is listed as found, or with the reason why it was not. NORMWISE_BACKEND=NAME in the environment
    forces one; a forced backend never falls back. NORMWISE_ISA=LEVEL chooses the C++ kernels' instruction set, "none"
    turns them off.
    """
    facts = gather()
    if json:
        from normwise.lab.strict_json import to_json

        print_json(to_json(facts, indent=2))
    else:
        typer.echo(as_text(facts))


def gather() -> dict[str, Any]:
    """What there is to know, as plain data."""
    import platform

    import torch

    import normwise
    from normwise.backends.cpu import library
    from normwise.ops import dispatch

    return {
        "untried": untried(platform.system(), platform.machine()),
        "versions": {
            "normwise": normwise.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "devices": [
            {
                "device": "cpu",
                "name": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "threads": torch.get_num_threads(),
            },
            *(_accelerator(index) for index in range(torch.accelerator.device_count())),
        ],
        "backends": [
            {"backend": name, "found": obstacle is None, "reason": obstacle}
            for name, obstacle in dispatch.found().items()
        ],
        "instruction_set": library.isa() if (library.missing() is None) else None,
        "forced": dispatch.forced(),
    }


def untried(system: str, machine: str) -> str | None:
    """What of normwise was never tried on such a machine; None where everything is tested."""
    if (system, machine) == ("Linux", "x86_64"):
        return None
    if (system, machine) == ("Linux", "aarch64"):
        return "only the kernels were tested, in an emulator; no wheel was built, and nothing ran with torch"
    return "nothing of normwise was ever built or tested"


def as_text(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [versions, *([f"On this platform {untried}."] if (untried := facts["untried"]) else []), "", "Devices"]
    for device in facts["devices"]:
        size = f", {counted(device['threads'], 'thread')}" if "threads" in device else ""
        size += f", {device['memory_gib']:.0f} GiB" if "memory_gib" in device else ""
        lines.append(f"  {device['device']:<10} {device['name']}{size}")
    lines += ["", "Backends"]
    for backend in facts["backends"]:
        lines.append(f"  {backend['backend']:<10} {'found' if backend['found'] else 'not found: ' + backend['reason']}")
    if isa := facts["instruction_set"]:
        how = "in AMX tiles" if isa.endswith("amx") else "with operands rounded, at float32's speed"
        lines.append(f"  The cpu kernels use {isa}; recurrent layers in bfloat16 multiply {how}.")
    lines.append("  The triton kernels were proven by Triton's interpreter; nothing was measured on a GPU yet.")
    forced = facts["forced"]
    lines += [
        "",
        f"Forced: {forced}" if forced else "Forced: none; each call takes the fastest backend that can run it.",
    ]
    lines += ["", "python -m normwise.selftest checks that everything computes correctly here."]
    return "\n".join(lines)


def _accelerator(index: int) -> dict[str, Any]:
    """One GPU or other accelerator; torch tells the name and memory of CUDA devices."""
    import torch

    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # device_count() was not 0
    if kind.type != "cuda":
        return {"device": f"{kind.type}:{index}", "name": kind.type}
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
    }
