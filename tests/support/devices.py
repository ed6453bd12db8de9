"""Where tests run: always on the CPU, and on a GPU too where there is one."""

from __future__ import annotations

import torch


def devices() -> list[str]:
    """For `@pytest.mark.parametrize("device", devices())`; the fixture `device` does the same."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def devices_and_dtypes(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """The pairs (device, dtype) to run, by default every floating dtype that a norm accepts."""
    chosen = dtypes or (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return [(device, dtype) for device in devices() for dtype in chosen]
