"""What a call keeps for its backward, and how much memory forward and backward take at most."""

from __future__ import annotations

import ctypes
import gc
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def kept(forward: Callable[[], Sequence[Tensor]], parameters: Iterable[Tensor] = ()) -> dict[int, int]:
    """Bytes of each memory block that the graph of `forward` keeps alive, by its address; parameters left out.

    Counted are tensors that were saved for backward and those, and arrays of numbers, that a `torch.autograd.Function`
    written in Python holds as attributes of its context. A block that is saved twice, or through several views, counts
    once.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    blocks: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            blocks[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        outputs = forward()
    for t in beside_saved(outputs):
        if isinstance(t, Tensor):
            count(t)
        else:
            blocks[t.buffer_info()[0]] = len(t) * t.itemsize
    return blocks


def beside_saved(outputs: Sequence[Tensor]) -> Iterator[Tensor | array[Any]]:
    """What Functions written in Python hold as attributes of their contexts, where no hook sees it."""
    for node in _nodes(outputs):
        yield from _held(getattr(node, "__dict__", {}))


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind `outputs`."""
    stack, seen = [y.grad_fn for y in outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def _held(by: Any) -> Iterator[Tensor | array[Any]]:
    if isinstance(by, (Tensor, array)):
        yield by
    elif isinstance(by, dict):
        for value in by.values():
            yield from _held(value)
    elif isinstance(by, (tuple, list)):
        for value in by:
            yield from _held(value)


def peak(step: Callable[[], object]) -> int:
    """Bytes that the process holds at most during `step` beyond what it held before; Linux only.

    Needs a malloc that gives back at once what is freed: an allocator that keeps memory hides the peak.
    """
    step()  # what is allocated once and for all
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
