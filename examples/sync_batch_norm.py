"""SyncBatchNorm: a conv net trained on several ranks with two images on each, with and without shared statistics.

    torchrun --nproc-per-node 4 examples/sync_batch_norm.py
    torchrun --nproc-per-node 4 examples/sync_batch_norm.py --steps 50

It runs on the CPU (gloo), or with one GPU a rank (nccl). Three nets start from the same weights and see the same
images: one whose norms take the statistics of all ranks together, one whose norms take those of their own two images,
and, on rank 0 alone, one that sees all images as a single batch. The first and the last come out the same. The second
learns from rougher statistics, different ones on each rank, and its running averages are those of rank 0's images only.
"""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import normwise

IMAGES_A_RANK = 2
SIZE = 12  # pixels along an edge
CLASSES = 4  # directions of the waves in the images


class Trained(NamedTuple):
    """A net and what it is worth: loss of the last 20 steps, and share of new images that it gets right in eval."""

    net: nn.Module
    loss: float
    accuracy: float


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves of one of CLASSES directions, of any phase, brightness and contrast, in noise: (N, 1, SIZE, SIZE)."""
    direction = torch.randint(CLASSES, (count,), generator=generator)
    phase, brightness, contrast = torch.rand(3, count, 1, 1, generator=generator)
    angle = direction.view(-1, 1, 1) * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = torch.sin(1.3 * (x * angle.cos() + y * angle.sin()) + 2 * torch.pi * phase)
    noise = torch.randn(count, SIZE, SIZE, generator=generator)
    return ((0.3 + contrast) * (wave + noise) + 3 * brightness).unsqueeze(1).double(), direction


def build(norm: type[nn.Module]) -> nn.Module:
    """The same weights whatever the norm, and on every rank; in float64, since training makes much of rounding."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), norm(after, act="relu")]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)).double()


def train(norm: type[nn.Module], steps: int, share: slice, device: torch.device, parallel: bool) -> Trained:
    """Train on this rank's `share` of each batch; gradients are averaged over the ranks if `parallel`."""
    net = build(norm).to(device)
    model = DistributedDataParallel(net) if parallel else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, truth = (t[share].to(device) for t in images(IMAGES_A_RANK * dist.get_world_size(), generator))
        loss = cross_entropy(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    loss = torch.stack(losses[-20:]).mean()
    if parallel:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    net.eval()
    x, truth = (t.to(device) for t in images(1000, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == truth).float().mean()
    return Trained(net, float(loss), float(accuracy))


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest between two nets' weights and running averages."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def main(steps: int) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    own = slice(rank * IMAGES_A_RANK, (rank + 1) * IMAGES_A_RANK)
    synced = train(normwise.SyncBatchNorm, steps, own, device, parallel=True)
    apart = train(normwise.BatchNorm2d, steps, own, device, parallel=True)
    if rank == 0:
        whole = train(normwise.BatchNorm2d, steps, slice(None), device, parallel=False)
        print(f"{dist.get_world_size()} ranks with {IMAGES_A_RANK} images each, {steps} steps")
        print("                            loss   right in eval   differs from one batch by")
        for name, trained in (("SyncBatchNorm", synced), ("BatchNorm on each rank", apart), ("one batch", whole)):
            apart_by = difference(trained.net, whole.net)
            print(f"{name:24s}  {trained.loss:6.3f}   {trained.accuracy:13.1%}   {apart_by:24.2g}")
    dist.barrier()  # rank 0 was busy longer
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each net")
    main(parser.parse_args().steps)
