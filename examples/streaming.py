"""Streaming with `step()`: frames arrive one at a time, and the answer is ready after each.

    python examples/streaming.py

A tagger listens to a noisy signal and says at every frame how likely it is that a tone is sounding. It is trained on
whole recordings and then runs frame by frame with the same weights, giving the same numbers. The state between two
frames is all there is to keep: it can be saved when a connection breaks and loaded when it comes back.
"""

from __future__ import annotations

import io
import math
import time

import torch
from torch import Tensor, nn

import normwise

FRAME = 16  # samples in one frame
State = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    """Logit of "a tone is sounding" after each frame; sees no future, so it need not wait."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.lstm = normwise.LSTM(FRAME, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """(T, B, FRAME) -> (T, B) logits of whole recordings."""
        features, _ = self.lstm(frames)
        return self.head(features).squeeze(-1)

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, FRAME) -> (B,) logits after one more frame, and the state to pass in with the next."""
        features, state = self.lstm.step(frame, state)
        return self.head(features).squeeze(-1), state


def recordings(frames: int, batch: int) -> tuple[Tensor, Tensor]:
    """Noise with a tone in it from one random frame to another: (T, B, FRAME) and the truth (T, B)."""
    first, last = torch.rand(2, batch).sort(0).values * frames
    t = torch.arange(frames)[:, None]
    sounding = (t >= first) & (t < last)
    sample = torch.arange(frames * FRAME).view(frames, 1, FRAME)
    tone = torch.sin(2 * math.pi * sample / 7 + 6 * torch.rand(1, batch, 1))
    return torch.randn(frames, batch, FRAME) + tone * sounding[..., None], sounding.float()


def train(model: Tagger, steps: int) -> float:
    """Train on fresh recordings; the share of frames tagged rightly at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    accuracy = 0.0
    for _ in range(steps):
        frames, truth = recordings(40, 32)
        logits = model(frames)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = ((logits > 0) == truth.bool()).float().mean().item()
    return accuracy


@torch.no_grad()
def stream(model: Tagger, frames: Tensor) -> Tensor:
    """Tag (T, 1, FRAME) frame by frame, with a broken connection in the middle."""
    model.eval()
    state: State | None = None
    logits = []
    for n, frame in enumerate(frames):
        if n == len(frames) // 2:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        logit, state = model.step(frame, state)
        logits.append(logit)
    return torch.stack(logits)


def main(steps: int = 100) -> tuple[float, float]:
    """Train, stream, compare: (accuracy, largest difference between streaming and the whole sequence)."""
    torch.manual_seed(0)
    model = Tagger()
    accuracy = train(model, steps)
    frames, _ = recordings(200, 1)
    began = time.perf_counter()
    streamed = stream(model, frames)
    milliseconds = (time.perf_counter() - began) / len(frames) * 1e3
    with torch.no_grad():
        difference = (streamed - model(frames)).abs().max().item()
    print(f"{accuracy:.1%} of the frames tagged rightly")
    print(f"streaming differs from the whole sequence by at most {difference:.1e}; {milliseconds:.2f} ms a frame")
    return accuracy, difference


if __name__ == "__main__":
    main()
