"""The norm layers of other libraries: what each is known to compute, or why nothing of normwise computes it.

An entry only proposes. What a layer computes is proved by running it (`proof.py`), since names are shared, versions
move, and a forward may be bound to one instance; what an entry says keeps the search short, and lets a layer be
exchanged without an example of its input.
"""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from torch import nn

from normwise.surgery.select import class_of


class Entry(NamedTuple):
    """What is known of classes of norm layers.

    Of wrappers (PyG's and SpeechBrain's BatchNorm) there is nothing here: what they hold is a layer of its own.

    match: shell patterns of "module.Class". family, axis: which statistics, over which axis (-1 or 1). eps: where it
    stands in the code and in no attribute. refused: why it has no counterpart. note: what to say of it. source: where
    this was read.
    """

    match: tuple[str, ...]
    family: Literal["rms", "layer", "group", "batch", "frozen"] | None = None
    axis: Literal[-1, 1] | None = None
    eps: float | None = None
    refused: str = ""
    note: str = ""
    source: str = ""


_OWN_STATISTICS = "it changes its input by statistics or parameters that none of normwise's norms has"
_BY_CONDITION = (
    "gain and bias come from a second input: what it holds inside, where that is a norm layer, is converted by itself"
)

ENTRIES: tuple[Entry, ...] = (
    # No counterpart. First, so that a pattern further down does not take them.
    Entry(
        ("timm.layers.evo_norm.*", "*.EvoNorm*"),
        refused=f"EvoNorm: {_OWN_STATISTICS} (a variance by instance beside one by batch, and a learned gate)",
        source="Liu et al. 2020; timm layers/evo_norm.py",
    ),
    Entry(
        ("timm.layers.filter_response_norm.*", "*.FilterResponseNorm*"),
        refused=f"FilterResponseNorm: {_OWN_STATISTICS} (a mean square by channel, and a learned threshold)",
        source="Singh & Krishnan 2020; timm layers/filter_response_norm.py",
    ),
    Entry(
        ("timm.layers.grn.*", "*.GlobalResponseNorm", "*.ConvNextV2GRN", "*.GRN"),
        refused="global response normalization divides a channel's norm by the mean over channels, and adds its input",
        source="Woo et al. 2023 (ConvNeXt V2)",
    ),
    Entry(
        ("*.NoNorm", "*.Affine"),
        refused="it multiplies by a learned number and normalizes nothing",
        source="Touvron et al. 2021; transformers models/mobilebert",
    ),
    Entry(
        ("*.BiasNorm",),
        refused="BiasNorm subtracts a learned bias inside the root mean square only, and has one log scale",
        source="icefall, zipformer",
    ),
    Entry(
        ("*.ScaleNorm",),
        refused="its gain is one number for all features, which no norm of normwise has",
        source="Nguyen & Salazar 2019; x-transformers",
    ),
    Entry(
        (
            "*.AdaLayerNorm*",
            "*.*AdaLayerNorm*",
            "*.AdaGroupNorm*",
            "*.*AdaRmsNorm*",
            "*.SpatialNorm*",
            "*.*SpatialNorm",
        ),
        refused=_BY_CONDITION,
        source="diffusers models/normalization.py",
    ),
    Entry(
        ("detectron2.*.NaiveSyncBatchNorm*", "*.NaiveSyncBatchNorm*"),
        refused="it gathers its statistics over the ranks by itself: convert(to='sync', subclasses=True) replaces it",
        source="detectron2 layers/batch_norm.py",
    ),
    Entry(
        ("transformer_engine.*.LayerNormLinear", "transformer_engine.*.LayerNormMLP"),
        refused="a norm and a linear layer in one module",
        source="TransformerEngine",
    ),
    Entry(
        (
            "torch_geometric.nn.norm.graph*",
            "torch_geometric.nn.norm.instance_norm.*",
            "torch_geometric.nn.norm.layer_norm.*",
            "torch_geometric.nn.norm.msg_norm.*",
            "*.GraphNorm",
            "*.PairNorm",
            "*.DiffGroupNorm",
            "*.MeanSubtractionNorm",
        ),
        refused="its statistics follow the graphs of a batch",
        source="PyG nn/norm",
    ),
    # Root mean square.
    Entry(
        ("transformers.models.*RMSNormGated", "*.RMSNormGated", "*.FusedRMSNormGated"),
        "rms",
        -1,
        note="a fused kernel of its parent may read its weight and not call it",
        source="transformers models/mamba2, bamba, zamba2, qwen3_next; fla modules",
    ),
    Entry(
        ("transformers.models.*RMSNorm", "transformers.models.*.T5LayerNorm", "transformers.models.*T5*LayerNorm"),
        "rms",
        -1,
        source="transformers models/llama/modeling_llama.py and its copies, gemma, olmo2, t5",
    ),
    Entry(
        (
            "transformers.models.longt5.*LayerNorm",
            "transformers.models.switch_transformers.*LayerNorm",
            "transformers.models.udop.*LayerNorm",
            "transformers.models.pix2struct.*LayerNorm",
            "transformers.models.kosmos2_5.*LayerNorm",
            "transformers.models.pop2piano.*LayerNorm",
            "transformers.models.umt5.*LayerNorm",
            "transformers.models.mt5.*LayerNorm",
            "transformers.models.imagegpt.*LayerNorm",
            "transformers.models.cpmant.*LayerNorm",
            "transformers.models.llama4.*Norm",
        ),
        "rms",
        -1,
        source="transformers models/*/modeling_*.py",
    ),
    Entry(
        ("timm.layers.norm.RmsNorm2d*",),
        "rms",
        1,
        source="timm layers/norm.py",
    ),
    Entry(("timm.layers.norm.RmsNorm*",), "rms", -1, source="timm layers/norm.py"),
    Entry(
        ("timm.layers.norm.SimpleNorm*",),
        refused="it divides by the root of the unbiased variance without taking the mean away",
        source="timm layers/norm.py",
    ),
    Entry(
        ("diffusers.models.normalization.RMSNorm", "diffusers.models.*.MochiRMSNorm", "*.MochiRMSNorm"),
        None,
        -1,
        source="diffusers models/normalization.py",
    ),
    Entry(
        ("apex.normalization.*RMSNorm", "liger_kernel.*RMSNorm", "fla.modules.*RMSNorm", "quack.*RMSNorm"),
        "rms",
        -1,
        note="its kernels run on a GPU only, where this was not verified",
        source="apex, Liger-Kernel, flash-linear-attention, quack",
    ),
    Entry(("x_transformers.*RMSNorm", "x_transformers.*SimpleRMSNorm"), "rms", -1, source="x-transformers"),
    # LayerNorm.
    Entry(
        ("timm.layers.norm.LayerNorm2d*", "timm.layers.norm.LayerNormExp2d", "timm.layers.norm_act.LayerNormAct2d*"),
        "layer",
        1,
        source="timm layers/norm.py, norm_act.py",
    ),
    Entry(("timm.layers.norm.LayerNorm*", "timm.layers.norm_act.LayerNormAct*"), "layer", -1, source="timm"),
    Entry(
        ("torchvision.ops.misc.LayerNorm2d", "torchvision.models.convnext.LayerNorm2d", "*.ChanLayerNorm"),
        "layer",
        1,
        source="torchvision models/convnext.py; imagen-pytorch",
    ),
    Entry(
        ("transformers.models.*LayerNorm", "transformers.models.*LayerNorm1P", "transformers.models.*LayerNorm2d"),
        "layer",
        source="transformers: Cohere, Nemotron (1 + w), ConvNeXt, SAM, ViTDet, DeBERTa",
    ),
    Entry(
        (
            "fairseq.modules.*LayerNorm*",
            "espnet.*LayerNorm",
            "open_clip.*LayerNorm*",
            "torchaudio.models.wav2vec2.*LayerNorm",
            "esm.*LayerNorm*",
            "openfold.*LayerNorm",
            "segment_anything.*LayerNorm2d",
        ),
        "layer",
        source="fairseq, ESPnet, open_clip, torchaudio, ESM, OpenFold, segment-anything",
    ),
    Entry(
        ("apex.normalization.*LayerNorm", "megatron.*LayerNorm", "transformer_engine.*LayerNorm"),
        "layer",
        -1,
        note="its kernels run on a GPU only, where this was not verified",
        source="apex, Megatron-LM, TransformerEngine",
    ),
    # GroupNorm.
    Entry(
        ("timm.layers.norm.GroupNorm*", "timm.layers.norm_act.GroupNorm*", "transformers.models.*GroupNorm*"),
        "group",
        1,
        source="timm layers/norm.py, norm_act.py; transformers models/emu3, bit",
    ),
    # BatchNorm.
    Entry(
        (
            "transformers.models.*FrozenBatchNorm2d",
            "torchvision.ops.misc.FrozenBatchNorm2d",
            "detectron2.layers.*FrozenBatchNorm2d",
            "timm.layers.norm_act.FrozenBatchNormAct2d",
        ),
        "frozen",
        1,
        1e-5,
        source="DETR and its copies, torchvision, detectron2, timm",
    ),
    Entry(
        ("timm.layers.norm_act.*BatchNormAct*", "timm.layers.inplace_abn.*", "inplace_abn.*", "*.ABN", "*.InPlaceABN"),
        "batch",
        1,
        source="timm layers/norm_act.py, inplace_abn.py",
    ),
    Entry(
        ("fairseq.modules.*BatchNorm", "apex.parallel.*SyncBatchNorm"),
        "batch",
        1,
        source="fairseq, apex",
    ),
)


def entry_of(layer: nn.Module) -> Entry | None:
    """What the catalogue says of the layer's class or of the first of its bases that it knows."""
    return _entry(class_of(layer))  # type: ignore[arg-type]


@functools.cache
def _entry(cls: type[nn.Module]) -> Entry | None:
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.nn.", "normwise.")):
            return None
        name = f"{base.__module__}.{base.__qualname__}"
        found = next((entry for entry in ENTRIES if any(fnmatchcase(name, p) for p in entry.match)), None)
        if found is not None:
            return found
    return None
