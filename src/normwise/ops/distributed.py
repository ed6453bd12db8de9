"""Statistics that come from other ranks: one exchange of moments per call, and its gradient.

Every rank of a group sends its own moments (count, mean, variance) in one message, receives those of all, and combines
them in the same order, so all ranks hold the same bits afterwards. The message is float64: counts stay exact,
and no precision is lost where the mean is much larger than the deviation.

What holds for every function here: all ranks of the group must call it, in the same order, with the same shapes, also
a rank without data. A rank that dies, or does not call within the group's timeout, is an error on the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normwise.backends.devices import on_cpu
from normwise.backends.reference import Moments, combined

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pool_moments(moments: Sequence[Moments], process_group: Any = None) -> list[Moments]:
    """The moments over all ranks of many layers, in one collective (and a small one first, to compare the shapes).

    Args:
        moments: of each layer, this rank's own. `count` may be any shape that broadcasts against `mean`, and 0 where
            this rank had no data (`mean` and `var` are then ignored). Variances are biased.
        process_group: whose ranks take part; None for all of them. Without torch.distributed, or with one rank, the
            moments are returned as they are, in float64.

    Returns:
        One `Moments` per layer in float64, the same on every rank, in the shapes that were given.

    Raises:
        ValueError, on every rank: the ranks do not give the same number of layers or of channels.
        RuntimeError: a rank did not answer.
    """
    group = group_of(process_group, default=True)
    wide = [Moments(*(t.detach().double() for t in m)) for m in moments]
    if group is None or not wide:
        return wide
    flat = [t for m in wide for t in m]
    facts = {"layers": len(wide), "numbers": sum(t.numel() for t in flat)}
    require_agreement(group, "the moments to be pooled", flat[0].device, facts)
    received = gather(flat, group, torch.float64)
    return [combined(_zero_where_empty(*received[i : i + 3])) for i in range(0, len(received), 3)]


def _zero_where_empty(mean: Tensor, var: Tensor, count: Tensor) -> Moments:
    """Zeros for what a rank without data sends, which may be anything, NaN included."""
    nothing = count == 0
    return Moments(mean.masked_fill(nothing, 0), var.masked_fill(nothing, 0), count)


class StatsGroup:
    """The ranks with which one layer shares statistics, and what they have agreed on.

    A process group can be neither copied nor pickled. A copy of the layer (an average of weights, say) shares its
    group, and pickling it says what to do instead.
    """

    def __init__(self, process_group: Any, *, default: bool = False) -> None:
        """`default`: None stands for all ranks, once there are any; otherwise for no exchange."""
        if process_group is not None:
            group_of(process_group)  # raises now if it is no such group
        if dist.is_available():
            import normwise.ops.distributed_custom_op  # noqa: F401  before anything is compiled
        self.process_group = process_group
        self.default = default
        self._agreed: tuple[Any, ...] | None = None

    def group(self, owner: str, device: torch.device, facts: dict[str, int]) -> dist.ProcessGroup | None:
        """The group to exchange with, or None where this rank stands alone.

        In the first call, and whenever the facts change, the ranks compare their facts first: messages of different
        sizes would abort a process instead of raising an error. (Not in a compiled call, which is traced once.)
        """
        group = group_of(self.process_group, self.default)
        if group is not None and not torch.compiler.is_compiling():
            agreed = (group.group_name, *facts.items())
            if self._agreed != agreed:
                require_agreement(group, owner, device, facts)
                self._agreed = agreed
        return group

    def __repr__(self) -> str:
        return repr(getattr(self.process_group, "group_name", None))

    def __deepcopy__(self, memo: dict[int, Any]) -> StatsGroup:
        return StatsGroup(self.process_group, default=self.default)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "cannot pickle a layer with a process_group: save model.state_dict(), or leave process_group=None, "
                "which stands for all ranks"
            )
        return {"process_group": None, "default": self.default, "_agreed": None}


def stats_group(process_group: Any) -> StatsGroup:
    """A layer's `StatsGroup` as it is; otherwise that of a call, which compares its facts each time."""
    return process_group if isinstance(process_group, StatsGroup) else StatsGroup(process_group)


def group_of(process_group: Any, default: bool = False) -> dist.ProcessGroup | None:
    """`process_group` if this rank shares statistics with others in it, None if it stands alone.

    Args:
        process_group: a torch.distributed.ProcessGroup, or None.
        default: None stands for all ranks.

    Raises:
        RuntimeError: the group is given but not initialised; or the process was started as one of several ranks
            that never called init_process_group.
        ValueError: this rank is not in the group. TypeError: not a process group.
    """
    if process_group is None:
        if not default:
            return None
        if not dist.is_available() or not dist.is_initialized():
            _require_single_process()
            return None
        process_group = dist.group.WORLD
    elif process_group == -100:  # dist.GroupMember.NON_GROUP_MEMBER
        raise ValueError(
            "this rank is not part of the given process group (new_group returned GroupMember.NON_GROUP_MEMBER): give "
            "the layer the group that this rank is in"
        )
    elif not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, but got {type(process_group).__name__}: "
            "make one by torch.distributed.new_group(ranks), or take that of a DeviceMesh by mesh.get_group()"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "Default process group has not been initialized, please make sure to call init_process_group: "
            f"process_group was given, but there is none at present. {_CURE}"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError("this rank is not part of the given process group: give the layer the group that it is in")
    return process_group if dist.get_world_size(process_group) > 1 else None


_CURE = (
    "Start the script by torchrun and call torch.distributed.init_process_group() before the first forward; a layer "
    "that is to work alone needs no process_group"
)


def _require_single_process() -> None:
    """RuntimeError in one of several ranks that are not connected: each would silently normalize by itself."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise RuntimeError(
            "Default process group has not been initialized, please make sure to call init_process_group: this "
            f"process was started as one of WORLD_SIZE={size} ranks, but they are not connected. Call "
            "torch.distributed.init_process_group() before the first forward in training, or unset WORLD_SIZE if "
            "this process is meant to work alone"
        )


def require_agreement(group: dist.ProcessGroup, owner: str, device: torch.device, facts: dict[str, int]) -> None:
    """ValueError on every rank of the group unless all of them state the same facts (as many everywhere)."""
    mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
    answers = _all_gather(mine, group).tolist()
    for name, values in zip(facts, zip(*answers, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"the ranks disagree on {owner}: {name} = {list(values)} on ranks 0 to {len(values) - 1}")


def gather(tensors: Sequence[Tensor], group: dist.ProcessGroup, dtype: torch.dtype) -> list[Tensor]:
    """Each tensor as (ranks, *shape), from all ranks, by one collective in float64; differentiable any number of times.

    Its gradient is one collective as well. `dtype` is that of the data behind the tensors, which must be the same on
    all ranks. On the CPU it is compared, and so is the length; elsewhere a look at them would wait for the device.
    """
    length = sum(t.numel() for t in tensors)
    compared = on_cpu(tensors[0])
    header = [torch.tensor([length, _DTYPES.index(dtype)], dtype=torch.float64, device="cpu")] if compared else []
    received = _Gather.apply(torch.cat([*header, *(t.double().reshape(-1) for t in tensors)]), group)
    if compared:
        _require_equal_headers(received[:, :2].detach())
        received = received[:, 2:]
    parts = received.split([t.numel() for t in tensors], dim=1)
    return [p.unflatten(1, t.shape) if t.dim() else p.squeeze(1) for p, t in zip(parts, tensors, strict=True)]


def _require_equal_headers(headers: Tensor) -> None:
    if bool((headers == headers[0]).all()):
        return
    said = [f"{int(length)} numbers from {_DTYPES[int(code)]}" for length, code in headers.tolist()]
    raise ValueError(
        f"the ranks disagree on the statistics to share: ranks 0 to {len(said) - 1} sent {said}. All of them must run "
        "the same layers in the same order on inputs of one dtype (autocast on all of them or on none)"
    )


def sum_over_ranks(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks, on each of them; differentiable any number of times."""
    return _Sum.apply(t, group)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """(k,) on each rank -> (ranks, k) on all. Every rank's loss depends on every rank's message: gradients add up."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(message, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over_ranks(grad, ctx.group)[dist.get_rank(ctx.group)], None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, which is its own gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        with _explain_failure(group):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over_ranks(grad, ctx.group), None


def _all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = t.new_empty(dist.get_world_size(group), t.numel())
    with _explain_failure(group):
        dist.all_gather(list(received.unbind(0)), t.detach().contiguous(), group=group)
    return received


@contextmanager
def _explain_failure(group: dist.ProcessGroup) -> Iterator[None]:
    """Puts what a failed collective means before the backend's own message."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} could not exchange statistics: another rank "
            "died, raised an error, or did not take part within the group's timeout. Every rank must run the same "
            "layers in the same order, forward and backward, also where its batch is empty. "
            f"The backend says: {error}"
        ) from error
