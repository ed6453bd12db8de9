"""Text with deep and narrow causal transformers, norms where papers put them: what claims about depth run on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.lab.norms import feature_norm
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.charlm import CharLm
from normwise.lab.tasks.transformer import places

HELD_OUT_CASES = 640
LOWEST_SHARE = 0.02
LATE_BLOCKS = 4


class Placement(NamedTuple):
    """Where a sublayer F of block l (of N, from 1) has its norms: outer(alpha x + after(F(scale before(x))))."""

    before: bool = False
    after: bool = False
    outer: bool = False
    final: bool = True
    """Whether there is a norm behind the last block."""
    alpha: Callable[[int], float] = lambda blocks: 1.0
    scale: Callable[[int], float] = lambda block: 1.0
    beta: Callable[[int], float] = lambda blocks: 1.0
    """The factor of the initial weights of the feed-forward layers, the values and the attention's output."""


PLACEMENTS: Mapping[str, Placement] = {
    # x + F(norm(x)), a last norm: Xiong et al. 2020, figure 1b
    "pre": Placement(before=True),
    # norm(x + F(x)): Vaswani et al. 2017
    "post": Placement(outer=True, final=False),
    # x + norm(F(norm(x))), a last norm: Kim et al. 2025
    "peri": Placement(before=True, after=True),
    # x + F(norm(x) / sqrt(l)), a last norm without the factor: Sun et al. 2025
    "lns": Placement(before=True, scale=lambda block: block**-0.5),
    # norm(alpha x + F(x)), alpha = (2N)^(1/4), beta = (8N)^(-1/4): Wang et al. 2022, a single stack
    "deepnorm": Placement(
        outer=True, final=False, alpha=lambda blocks: (2 * blocks) ** 0.25, beta=lambda blocks: (8 * blocks) ** -0.25
    ),
}


class Attention(nn.Module):
    """Causal attention. With ``qk_norm`` a LayerNorm of queries and of keys, head by head (Dehghani et al. 2023); the
    factor 1 / sqrt(d) stays."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_q = feature_norm("layer" if qk_norm else "none", width // heads)
        self.norm_k = feature_norm("layer" if qk_norm else "none", width // heads)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, heads, T, width / heads)."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(queries), self.norm_k(keys), values

    def damped(self) -> list[Tensor]:
        """The weights that DeepNorm multiplies by beta: those of the values and of the output."""
        return [self.qkv.weight.chunk(3)[2], self.out.weight]

    def largest_logit(self, x: Tensor) -> float:
        """max |q . k| / sqrt(d) over all that attend."""
        queries, keys, _ = self.parts(x)
        return float((queries @ keys.mT / queries.shape[-1] ** 0.5).tril().abs().max())

    def forward(self, x: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(*self.parts(x), is_causal=True)
        y: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """down(relu(up(x))), four times as wide between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.relu = nn.ReLU()
        self.down = nn.Linear(4 * width, width)

    def damped(self) -> list[Tensor]:
        """The weights that DeepNorm multiplies by beta."""
        return [self.up.weight, self.down.weight]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.relu(self.up(x)))
        return y


class Sublayer(nn.Module):
    """outer(alpha x + after(F(scale before(x)))) with the norms that ``placement`` has."""

    def __init__(
        self, width: int, function: nn.Module, norm: str, placement: Placement, block: int, blocks: int
    ) -> None:
        super().__init__()
        self.function = function
        self.before, self.after, self.outer = (
            feature_norm(norm if there else "none", width) for there in placement[:3]
        )
        self.alpha, self.scale = placement.alpha(blocks), placement.scale(block)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.before(x)
        if self.scale != 1:
            inner = self.scale * inner
        y: Tensor = self.outer(torch.add(self.after(self.function(inner)), x, alpha=self.alpha))
        return y


class DeepTransformer(nn.Module):
    """Characters, their places as sines (Vaswani et al. 2017), blocks, the last norm if there is one, scores."""

    def __init__(
        self, characters: int, width: int, heads: int, blocks: int, norm: str, placement: Placement, qk_norm: bool
    ):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList()
        for block in range(1, blocks + 1):
            functions = (Attention(width, heads, qk_norm=qk_norm), FeedForward(width))
            self.blocks.append(nn.Sequential(*(Sublayer(width, f, norm, placement, block, blocks) for f in functions)))
        self.norm = feature_norm(norm if placement.final else "none", width)
        self.linear = nn.Linear(width, characters)

    def forward(self, numbers: Tensor, skip: int | None = None) -> Tensor:
        """The scores (N, T, characters), without block ``skip`` (from 0)."""
        x = self.embed(numbers)
        x = x + places(*x.shape[1:])
        for at, block in enumerate(self.blocks):
            x = x if at == skip else block(x)
        scores: Tensor = self.linear(self.norm(x))
        return scores


class Scheduled(torch.optim.Adam):
    """Adam. Its rate is the peak times min(1, (t + 1) / warm_up) times max(1 - t / steps, ``LOWEST_SHARE``)."""

    def __init__(self, parameters: Iterable[nn.Parameter], peak: float, warm_up: int, steps: int) -> None:
        group = {"params": list(parameters), "peak": peak, "warm_up": warm_up, "steps": steps, "taken": 0}
        super().__init__([group], lr=peak, betas=(0.9, 0.95), fused=True)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            taken = group["taken"]
            rising = min(1.0, (taken + 1) / group["warm_up"]) if group["warm_up"] else 1.0
            group["lr"] = group["peak"] * rising * max(LOWEST_SHARE, 1 - taken / group["steps"])
            group["taken"] = taken + 1
        return super().step(closure)


@dataclass(frozen=True)
class CharLmDeep(CharLm):
    """``blocks`` causal blocks of ``width``, read ``length`` characters at a time.

    Weights are normal with Glorot's variance, 2 / (inputs + outputs), each of queries, keys and values by itself; those
    that DeepNorm scales are drawn alike and scaled. Adam (0.9, 0.95); the rate falls linearly to 0 over ``decays_over``
    steps.
    """

    summary: ClassVar[str] = (
        "deep and narrow causal transformer that predicts the next character of Python's own help, from 32 before it "
        "at most; the last tenth of the text is held out; Adam, the rate falling linearly"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "layer", "rms", "dyt")
    more_norms: ClassVar[tuple[str, ...]] = ("layer-plain", "dyt-1", "dyt-2", "derf")
    batch_sizes: ClassVar[tuple[int, ...]] = (32,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.001, 0.004, 0.016, 0.064)
    steps: ClassVar[int] = 200
    looks: ClassVar[int] = 2
    probe_cases: ClassVar[int] = 96

    name: str = "charlm-deep"  # type: ignore[misc]
    length: int = 32
    width: int = 16
    heads: int = 2
    blocks: int = 12
    placement: str = "pre"
    qk_norm: bool = False
    warm_up: int = 0
    decays_over: int = 200
    clip: float | None = None  # type: ignore[misc]

    def data(self) -> tuple[Batch, Batch]:
        """Of the pieces that are held out ``HELD_OUT_CASES``, evenly spread: all of them take as long as many steps."""
        return _pieces(self.path, self.length)

    def model(self, norm: str, seed: int) -> nn.Module:
        placement = PLACEMENTS[self.placement]
        characters = len(self.characters)
        model = DeepTransformer(characters, self.width, self.heads, self.blocks, norm, placement, qk_norm=self.qk_norm)
        draws = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.embed.weight, generator=draws)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.detach().chunk(3 if name.endswith(".qkv") else 1):
                    nn.init.xavier_normal_(part, generator=draws)
                nn.init.zeros_(module.bias)
        for module in model.modules():
            if isinstance(module, Attention | FeedForward):
                for weight in module.damped():
                    weight.detach().mul_(placement.beta(self.blocks))
        return model

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Adam with the schedule."""
        return Scheduled(model.parameters(), learning_rate, self.warm_up, self.decays_over)

    def series(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """In eval mode:

        - "residual/growth": log2 of the variance of what leaves the last block over that of what leaves the first;
        - "attention/max-logit": max |q . k| / sqrt(d) over all blocks, heads and pairs that attend;
        - "skipped/late": by how many nats the loss rises where one block is left out, mean over the last quarter of the
          blocks (``LATE_BLOCKS`` at most).
        """
        assert isinstance(model, DeepTransformer)
        variances: list[float] = []
        logits: list[float] = []
        hooks = [b.register_forward_hook(lambda m, args, y: variances.append(float(y.var()))) for b in model.blocks]
        hooks += [
            m.register_forward_pre_hook(lambda m, args: logits.append(m.largest_logit(args[0])))
            for m in model.modules()
            if isinstance(m, Attention)
        ]
        try:
            whole = self.loss(model(batch.inputs), batch)
        finally:
            for hook in hooks:
                hook.remove()
        late = range(self.blocks - min(LATE_BLOCKS, max(1, self.blocks // 4)), self.blocks)
        rises = [float(self.loss(model(batch.inputs, skip=block), batch) - whole) for block in late]
        return {
            "residual/growth": math.log2(variances[-1] / variances[0]) if min(variances) > 0 else math.nan,
            "attention/max-logit": max(logits),
            "skipped/late": sum(rises) / len(rises),
        }


@functools.cache
def _pieces(path: str, length: int) -> tuple[Batch, Batch]:
    """One set for all variants, which differ in the net alone."""
    train, held_out = CharLm.data(CharLmDeep(path=path, length=length))
    return train, held_out.select(torch.linspace(0, len(held_out) - 1, HELD_OUT_CASES).long().unique())


def _variant(placement: str, blocks: int = 12, **more: Any) -> tuple[str, Callable[[], CharLmDeep]]:
    ends = [word.replace("_", "-") for word in ("warm_up", "qk_norm") if more.get(word)]
    name = "-".join(["charlm", placement, str(blocks), *ends])
    return name, functools.partial(CharLmDeep, name=name, placement=placement, blocks=blocks, **more)


DEEP: dict[str, Callable[[], CharLmDeep]] = dict(
    [
        *(_variant(placement, blocks) for placement in ("pre", "post") for blocks in (2, 12, 16)),
        *(_variant(placement, warm_up=20) for placement in ("pre", "post", "peri", "lns")),
        *(_variant(*of, decays_over=120) for of in (("post", 48), ("deepnorm", 48), ("deepnorm", 4))),
        *(_variant("pre", 4, warm_up=10, width=32, heads=4, clip=1.0, qk_norm=there) for there in (False, True)),
    ]
)
"""The variants that claims compare, by name."""
