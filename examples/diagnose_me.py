"""A small classifier with four faults, for `normwise diagnose` to find.

    normwise diagnose examples/diagnose_me.py:make

It trains, and its loss goes down; that is why faults like these stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Two convolutions and a linear layer on images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)  # fault: a bias that the norm takes away again
        self.norm1 = nn.BatchNorm2d(16, momentum=0.99)  # fault: Keras's momentum, which in torch means 0.01
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(32, 64, bias=False)
        self.norm3 = nn.BatchNorm1d(64)  # fault: statistics of four values, at this batch size
        self.out = nn.Linear(64, 10)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(images)))
        x = self.relu(self.norm2(self.conv2(x)))
        x = self.relu(self.norm3(self.hidden(self.pool(x).flatten(1))))
        return self.out(x)


def make() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], nn.Module, torch.optim.Optimizer]:
    """(model, batches, loss, optimizer)"""
    torch.manual_seed(0)
    model = Classifier()
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(8)]
    # fault: weight decay on gains and biases
    return model, batches, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), weight_decay=0.05)
