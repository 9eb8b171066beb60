"""Where the blocks, the value projections and the final norm of each supported model type are.

This is data. A model type is supported when it has a row here; everything else works when the user names the value
projections with `target_modules`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Names inside a *backbone*, the module that owns the stack of blocks (`LlamaModel`, `ViTModel`, ...).

    Args:
        blocks: path from the backbone to the `nn.ModuleList` of blocks.
        value_projection: path from a block to the linear layer that computes the attention's values.
        final_norm: path from the backbone to the norm that follows the last block.
        normalize_features: whether the feedback starts from the features after `final_norm`. The official code does so
            for ViT, whose final norm all tokens pass, and not for LLaMA.
    """

    blocks: str
    value_projection: str
    final_norm: str
    normalize_features: bool


_VIT = Architecture("layers", "attention.v_proj", "layernorm", normalize_features=True)
_OLD_VIT = Architecture("encoder.layer", "attention.attention.value", "layernorm", normalize_features=True)
_VISION_TOWER = Architecture("encoder.layers", "self_attn.v_proj", "post_layernorm", normalize_features=True)
_LLAMA = Architecture("layers", "self_attn.v_proj", "norm", normalize_features=False)

# The key is the `model_type` in the config of the backbone, not of the whole model: CLIPForImageClassification is a
# "clip" whose backbone is a "clip_vision_model".
ARCHITECTURES = {
    # Its final norm is the identity with the default `use_mean_pooling=True`.
    "beit": _VIT,
    "clip_vision_model": _VISION_TOWER,
    "data2vec-vision": _OLD_VIT,
    "deit": _VIT,
    "dinov2": Architecture("encoder.layer", "attention.v_proj", "layernorm", normalize_features=True),
    "dpt": _OLD_VIT,
    "gemma3_text": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "siglip_vision_model": _VISION_TOWER,
    "vit": _VIT,
}
