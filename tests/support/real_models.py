"""Tiny models of transformers and timm, made from their configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"vocab_size": 99, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, **SIZES}
IMAGE = (2, 3, 64, 64)


class Model(NamedTuple):
    """A tiny model: its class, configuration, the shape of its input (two sizes: of tokens), how many norms it has, and
    of how many of them normwise has no counterpart."""

    cls: str
    config: str
    options: dict[str, Any]
    shape: tuple[int, ...] = (2, 9)
    norms: int = 5
    refused: int = 0


TRANSFORMERS = {
    "BERT": Model("BertModel", "BertConfig", {"vocab_size": 99, **SIZES}),
    "Llama": Model("LlamaModel", "LlamaConfig", DECODER),
    "Gemma": Model("GemmaModel", "GemmaConfig", {**DECODER, "head_dim": 8}),
    "Gemma 2": Model("Gemma2Model", "Gemma2Config", {**DECODER, "head_dim": 8}, norms=9),
    "T5": Model(
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "Qwen3": Model("Qwen3Model", "Qwen3Config", {**DECODER, "head_dim": 8}, norms=9),
    "Olmo 2": Model("Olmo2Model", "Olmo2Config", DECODER, norms=9),
    "Cohere": Model("CohereModel", "CohereConfig", {**DECODER, "use_qk_norm": True}, norms=7, refused=4),
    "Nemotron": Model("NemotronModel", "NemotronConfig", DECODER),
    "Mamba": Model(
        "MambaModel",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        norms=3,
    ),
    "Mamba 2": Model(
        "Mamba2Model",
        "Mamba2Config",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "ViT": Model("ViTModel", "ViTConfig", {**SIZES, "image_size": 64, "patch_size": 16}, IMAGE),
    "ConvNeXt": Model(
        "ConvNextModel", "ConvNextConfig", {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32]}, IMAGE, norms=9
    ),
    "ConvNeXt 2": Model(
        "ConvNextV2Model", "ConvNextV2Config", {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32]}, IMAGE, 13, 4
    ),
    "ResNet": Model(
        "ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, IMAGE, norms=8
    ),
    "Wav2Vec2": Model(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            **SIZES,
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        (2, 800, 1),
        norms=7,
    ),
    "DETR": Model(
        "DetrModel",
        "DetrConfig",
        {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_queries": 5,
        },
        IMAGE,
        norms=19,
    ),
}
# The number of norms of each, by the class of timm or torch that they have.
TIMM = {
    "efficientnet_b0": {"BatchNormAct2d": 49},
    "mobilenetv3_small_100": {"BatchNormAct2d": 34},
    "regnetx_002": {"BatchNormAct2d": 44},
    "resnet18": {"BatchNorm2d": 20},
    "convnext_atto": {"LayerNorm2d": 17},
    "vit_tiny_patch16_224": {"LayerNorm": 25},
    "test_efficientnet_gn": {"GroupNormAct": 13},
    "test_efficientnet_ln": {"LayerNormAct2d": 13},
}


def transformer(name: str, *, fresh: bool = False) -> nn.Module:
    """The model with random weights; unless `fresh`, with gains that are not those it starts with, and statistics that
    fit no batch."""
    import transformers

    torch.manual_seed(0)
    one = TRANSFORMERS[name]
    model = getattr(transformers, one.cls)(getattr(transformers, one.config)(**one.options)).eval()
    if fresh:
        return model
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
        for key, b in model.named_buffers():
            if "running_var" in key:
                b.uniform_(0.5, 2)
    return model


def transformer_input(name: str) -> Tensor:
    shape = TRANSFORMERS[name].shape
    if len(shape) == 2:
        return torch.randint(1, 99, shape)
    return torch.randn(shape[:2] if len(shape) == 3 else shape)


def last_hidden_state(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


def timm_model(name: str, *, fresh: bool = False) -> nn.Module:
    """As `transformer`."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    if fresh:
        return model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def timm_input(name: str) -> Tensor:
    return torch.randn(2, 3, 224, 224) if "vit" in name else torch.randn(2, 3, 64, 64)
