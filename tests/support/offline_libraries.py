"""What transformers, timm, diffusers and Lightning need before they can be imported."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is made from its configuration

# torchvision's wheel lacks its compiled operators beside the CPU build of torch, and cannot be imported without the
# schemas of these two; nothing here calls them. torchmetrics, and so Lightning, imports it where it is installed.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
