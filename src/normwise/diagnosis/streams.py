"""Chains of blocks in a model of any library, and the stream that runs through them: see `Stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis.layers import norm_kind, norm_of, role_of, tensors_in
from normwise.diagnosis.transformer_records import Stream, StreamPoint
from normwise.measure.outliers import FeatureSizes

# Fewer blocks in a row make no chain, over which something could be said to grow.
FEWEST = 3
# Features that are named: of this many times the median one's size.
OUTLIER = 5.0


class Block:
    """One block over all batches."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.before, self.after = FeatureSizes(), FeatureSizes()
        self.shape: torch.Size | None = None
        self.calls = 0
        self.place: int | None = None
        # Whether all that came and went was (batch, tokens, features), of one shape a call, and one call a pass.
        self.fits = True

    @property
    def is_part(self) -> bool:
        return self.fits and self.place is not None and len(self.after.sums) > 0 and self._has_features()

    def _has_features(self) -> bool:
        """Whether a layer in it takes the last axis for that of the features: (N, C, L) is no stream of tokens."""
        return any(_features(module) == len(self.after.sums) for module in self.module.modules())


class StreamWatch:
    """The blocks of a model while it runs: `handles` are hooks, which look while `counts()`."""

    def __init__(self, model: nn.Module, counts: Callable[[], bool]) -> None:
        self.counts = counts
        self.chains = {name: [Block(*block) for block in blocks] for name, blocks in _chains(model)}
        self.next = 0
        # The output of each chain's last block, which is mostly the next one's input.
        self.last: dict[str, Tensor] = {}

    def handles(self) -> Iterator[Any]:
        for chain, blocks in self.chains.items():
            for block in blocks:
                yield block.module.register_forward_pre_hook(self._before(chain, block), with_kwargs=True)
                yield block.module.register_forward_hook(self._after(chain, block))

    def begin(self) -> None:
        """Before a pass."""
        self.last.clear()
        for blocks in self.chains.values():
            for block in blocks:
                block.calls, block.shape = 0, None

    def end(self) -> None:
        """After a pass: keeps no graph alive."""
        self.last.clear()

    def records(self) -> list[Stream]:
        """In the order of the first calls; a chain inside a block of another is a part of it."""
        runs = [(name, run) for name, blocks in self.chains.items() for run in [_longest(blocks)] if len(run) >= FEWEST]
        runs.sort(key=lambda pair: pair[1][0].place or 0)
        return [
            Stream(
                name,
                [block.name for block in run],
                len(run[0].after.sums),
                [_point(run[0].before), *(_point(block.after) for block in run)],
            )
            for name, run in runs
            if not any(f"{name}.".startswith(f"{block.name}.") for _, other in runs for block in other)
        ]

    def _before(self, chain: str, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.counts():
                return
            block.calls += 1
            x = next(tensors_in((*args, *kwargs.values())), None)
            block.fits = block.fits and block.calls == 1 and _is_stream(x)
            if block.place is None:
                block.place, self.next = self.next, self.next + 1
            if block.fits and x is not None:
                block.shape = x.shape
                if x is not self.last.get(chain):
                    block.before.add(x)

        return hook

    def _after(self, chain: str, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if not self.counts():
                return
            y = next(tensors_in(result), None)
            block.fits = block.fits and _is_stream(y) and y is not None and y.shape == block.shape
            if block.fits and y is not None:
                block.after.add(y)
                self.last[chain] = y

        return hook


def _chains(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """(name of the container, its children that are made of modules)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks = [
                (f"{name}.{child_name}" if name else child_name, child)
                for child_name, child in module.named_children()
                if role_of(child) == "other" and any(True for _ in child.children())
            ]
            if len(blocks) >= FEWEST:
                yield name, blocks


def _longest(blocks: Iterable[Block]) -> list[Block]:
    """The longest run of blocks that follow upon each other and are called in that order, of one number of features."""
    best: list[Block] = []
    run: list[Block] = []
    for block in blocks:
        follows = bool(run) and len(block.after.sums) == len(run[-1].after.sums) and _called_after(run[-1], block)
        run = ([*run, block] if follows else [block]) if block.is_part else []
        best = run if len(run) > len(best) else best
    return best


def _called_after(first: Block, second: Block) -> bool:
    return first.place is not None and second.place is not None and first.place < second.place


def _is_stream(x: Tensor | None) -> bool:
    return x is not None and not x.is_nested and x.dim() == 3


def _features(module: nn.Module) -> int | None:
    """How many features a layer takes on the last axis; None for layers to which that axis is something else."""
    shape: Any = None
    if isinstance(module, nn.Linear):
        shape = (module.in_features,)
    elif isinstance(module, nn.MultiheadAttention):
        shape = (module.embed_dim,)
    elif norm_kind(module) in ("layer", "rms"):
        shape = getattr(norm_of(module), "normalized_shape", None)
    return int(shape[-1]) if shape else None


def _point(sizes: FeatureSizes) -> StreamPoint:
    largest = torch.argsort(sizes.squares, descending=True)[:8]
    outliers = largest[sizes.squares[largest].sqrt() > OUTLIER * sizes.median].tolist()
    return StreamPoint(sizes.typical, sizes.kurtosis, sizes.peak, sizes.median, outliers)
