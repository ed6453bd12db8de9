"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from normwise.backends.cpu import library


def describe() -> dict[str, object]:
    """Processor, instruction set in use, versions and load."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "isa": library.isa() if (library.missing() is None) else f"none: {library.missing()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def line(machine: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def _processor() -> str:
    """The model's name and numbers: virtual machines often hide the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t: ", 1) for line in info.read_text().splitlines() if "\t: " in line)
    fields = {key.strip(): value for key, value in fields.items()}
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family})"
