"""Where the blocks, the value projections and the final norm of each known type of transformer are.

This is data, of those whose structure does not say it (`structure.py`): which norm the features pass, and where the
backbone or its cache is another one than it looks.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .lookup import find_submodule

Fused = Literal["one after the other", "by key-value head", "keys and values"]


@dataclass(frozen=True)
class Architecture:
    """Names inside a *backbone*, the module that runs the stack of blocks (`LlamaModel`, `ViTModel`, ...).

    Args:
        blocks: path from the backbone to the `nn.ModuleList` of blocks.
        value_projection: path from a block to the linear layer that computes the attention's values.
        final_norm: path from the backbone to the norm that follows the last block, `None` if there is none.
        normalize_features: whether the feedback starts from the features after `final_norm`. The official code does so
            for ViT, whose final norm all tokens pass, and not for LLaMA.
        fused: how queries, keys and values lie in the output of a projection that computes all three: one after the
            other, or so for each key-value head; or keys and values only, one after the other. `None` if it computes
            only values.
        has_cache: whether the backbone fills a key-value cache. Some encoders take one, but fill it only if their
            config says that they are decoders.
    """

    blocks: str
    value_projection: str
    final_norm: str | None
    normalize_features: bool = False
    fused: Fused | None = None
    has_cache: bool = True

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether a module of this model type has the layers that the row names; other versions may have others."""
        blocks = find_submodule(backbone, self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            return False
        return all(find_submodule(block, self.value_projection) is not None for block in blocks)


_BERT = Architecture("encoder.layer", "attention.self.value", None, has_cache=False)
_OLD_VIT = Architecture("encoder.layer", "attention.attention.value", "layernorm", normalize_features=True)
_VISION_TOWER = Architecture("encoder.layers", "self_attn.v_proj", "post_layernorm", normalize_features=True)
_VIT = Architecture("layers", "attention.v_proj", "layernorm", normalize_features=True)

# The key is the `model_type` in the config of the backbone, not of the whole model: CLIPForImageClassification is a
# "clip" whose backbone is a "clip_vision_model".
ARCHITECTURES = {
    "beit": _VIT,  # its final norm is the identity with the default `use_mean_pooling=True`
    "bert": _BERT,
    "clip_vision_model": _VISION_TOWER,
    "data2vec-vision": _OLD_VIT,
    "deit": _VIT,
    "dinov2": Architecture("encoder.layer", "attention.v_proj", "layernorm", normalize_features=True),
    "dinov3_vit": Architecture("model.layer", "attention.v_proj", "norm", normalize_features=True),
    "dpt": _OLD_VIT,
    "electra": _BERT,
    "opt": Architecture("layers", "self_attn.v_proj", "final_layer_norm"),
    "roberta": _BERT,
    "siglip_vision_model": _VISION_TOWER,
    "t5": Architecture("block", "layer.0.SelfAttention.v", "final_layer_norm", has_cache=False),
    "vit": _VIT,
}

_COPIES = "its blocks hand on several copies of the hidden states, and the attention sees one of them"
_MAPS = "its hidden states are maps with the channels first, and its attention sees them as tokens"
_RUN_FROM_OUTSIDE = "its blocks are run by another module than the one that holds them"
_STATE = "it keeps a state outside of a key-value cache, which pass 1 would advance as well"
# Model types that have a value projection in each block and cannot be run twice, or not steered by its input, and why.
# What can be seen from a model is not listed: blocks inside of blocks, and value projections of another width than the
# hidden states.
UNSUITABLE = {
    "bridgetower_text_model": _RUN_FROM_OUTSIDE,
    "codegen": "the values are between the queries and the keys in the output of its fused projection",
    "deepseek_v4": _COPIES,
    "diffusion_gemma": "its decoder reads the key-value cache that its encoder fills",
    "efficientloftr": _MAPS,
    "eomt": "it adds tokens to the hidden states between its blocks",
    "eomt_dinov3": "it adds tokens to the hidden states between its blocks",
    "gemma3n_text": _COPIES,
    "granite_docling_vision": _RUN_FROM_OUTSIDE,
    "granite_speech5_encoder": "it shortens the sequence between its blocks",
    "informer": "its encoder halves the number of tokens between its blocks",
    "led": "its attention swaps the batch and the tokens",
    "lightglue": "it drops tokens between its blocks",
    "longformer": "its attention swaps the batch and the tokens",
    **dict.fromkeys(["minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"], _RUN_FROM_OUTSIDE),
    **dict.fromkeys(["lw_detr", "rf_detr"], "in training, its attention has groups of queries as rows of the batch"),
    "minimax": "the state of its linear attention is in a cache of its own kind, which holds one pass only",
    "moonshine_streaming": "its decoder writes into the states of its encoder, in the second pass once more",
    "muse_glimmer_assistant": "its attention projects states of another model by the same layers as its tokens",
    "openai-gpt": "its blocks return their hidden states in a list",
    "mra": "its attention computes zeros where there is no CUDA kernel for it, and this one has not been tried",
    "patchtst": "its attention has the channels of a series as rows of the batch",
    "pegasus_x": "its attention projects tokens of its own by the same layers as those of the text",
    "qwen4_exp_text": _COPIES,
    "recurrent_gemma": _STATE,
    "reformer": _STATE,
    "rwkv": _STATE,
    **dict.fromkeys(
        ["sam_hq_mask_decoder", "sam_mask_decoder", "sam2_mask_decoder", "sam3_tracker_mask_decoder"],
        "its blocks have two streams of hidden states, of points and of an image",
    ),
    "seggpt": "it merges the two images of an example between its blocks",
    "superglue": "in every other block, the values are of the other image of a pair",
    "vilt": "it puts the patches of an image into a random order, another one in each pass",
    "t5_gemma_module": "the second pass of its decoder does not compute what a single one does",
    "t5gemma2_decoder": "the second pass of its decoder does not compute what a single one does",
    "vitdet": _MAPS,
    "videomt": "it adds tokens to the hidden states between its blocks",
    "vit_mae": "it puts the patches of an image into a random order, another one in each pass",
    "wavlm": "its attention computes with the weight of the value projection, past the layer",
    "xlstm": _STATE,
}
# The same of whole models, whichever of their parts is adapted.
_DETACHED = "it takes the hidden states of its transformer out of the gradients"
UNSUITABLE_AS_A_WHOLE = {"higgs_audio_v2_tokenizer": _DETACHED, "xcodec": _DETACHED}
