"""The private names of torch that backends use; those of ops are in `ops/_torch_internals.py`, with tests for both."""

from __future__ import annotations

import torch

# What torch.batch_norm calls, on a GPU cuDNN's kernel where it does: it keeps the mean and 1 / sqrt(var + eps) too.
batch_norm_with_stats = torch._batch_norm_impl_index
