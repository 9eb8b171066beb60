"""The zoo: a tiny model of every supported type, one row each, and inputs for it.

`tests/contract/` goes over all rows. Another class of the same type that differs in its head only is a row of `HEADS`.
"""

import itertools
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn

from .kept_models import remade, seed


class Row(NamedTuple):
    """What a tiny model is made of.

    Args:
        config_class: its config.
        options: those of the config.
        adapter: what an adapter on it needs to be told.
    """

    config_class: type
    options: dict[str, Any]
    adapter: dict[str, Any] = {}


NUM_BLOCKS = 4  # of every row, or as many stages; but T5 has a decoder of three
HIDDEN_SIZE = 32
VOCAB_SIZE = 40

_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1}
_TOKENS |= {"eos_token_id": None}  # so that generation runs to the asked length
_SIZES = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
_VISION = _SIZES | {"image_size": 8, "patch_size": 4}
_ENCODER = _SIZES | _TOKENS | {"max_position_embeddings": 64}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
_LLAMA = _DECODER | {"classifier_dropout": 0.0}
# The windows are shorter than the test sentences.
_MISTRAL = _LLAMA | {"sliding_window": 4}
_GEMMA3 = _MISTRAL | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
_DINOV2 = {name: value for name, value in _VISION.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
_TOWERS = {
    "vision_config": _VISION,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB_SIZE},
}
_EXPERTS = _DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MODERN = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2}
_DISENTANGLED = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "conv_kernel_size": 3,  # a convolution behind the first block
    "conv_act": "gelu",
}
_GEMMA2 = {"query_pre_attn_scalar": 8, "sliding_window": 4}
_AUDIO = _SIZES | {
    "vocab_size": 40,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
_ENCODER_DECODER = _TOKENS | {"d_model": 32, "decoder_start_token_id": 1}
_WHISPER = _ENCODER_DECODER | {
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 8,
    "max_target_positions": 32,
    "num_mel_bins": 8,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_T5 = _ENCODER_DECODER | {"d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4}
_IMAGE_TOKEN = 39
_LLAVA = {
    "text_config": _DECODER | {"model_type": "llama"},
    "vision_config": _VISION | {"model_type": "clip_vision_model"},
    "image_token_index": _IMAGE_TOKEN,
}
_QWEN_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_TOKENS = {
    "image_token_id": _IMAGE_TOKEN,
    "video_token_id": 38,
    "vision_start_token_id": 37,
    "vision_end_token_id": 36,
}
_QWEN2_5_VL = _QWEN_TOKENS | {
    "text_config": _DECODER | {"rope_parameters": _QWEN_ROPE},
    "vision_config": _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1, 3]},
}
_QWEN3_VL = _QWEN_TOKENS | {
    "text_config": _DECODER | {"rope_parameters": _QWEN_ROPE | {"mrope_interleaved": True}},
    "vision_config": _QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
}

_STAGES = {"hidden_sizes": [8, 12, 12, 20], "depths": [1, 1, 2, 1], "num_labels": 5}
_CONVNEXT = _STAGES | {"image_size": 64}
_RESNET = _STAGES | {"embedding_size": 6}
_REGNET = _RESNET | {"groups_width": 4}
_OUT = {"out_features": ["stage2", "stage4"]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
PYRAMID = {
    "image_size": 32,
    "num_encoder_blocks": 3,
    "depths": [1, 2, 1],
    "sr_ratios": [4, 2, 1],
    "hidden_sizes": [8, 16, 32],
    "num_attention_heads": [1, 2, 4],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "mlp_ratios": [2, 2, 2],
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}

# Transformers with one list of blocks of four times 32 channels, which `tests/golden/reference.py` computes anew.
PLAIN: dict[type, Row] = {
    tf.ViTForImageClassification: Row(tf.ViTConfig, _VISION),
    tf.DeiTModel: Row(tf.DeiTConfig, _VISION),
    tf.Dinov2Model: Row(tf.Dinov2Config, _DINOV2),
    tf.CLIPVisionModel: Row(tf.CLIPVisionConfig, _VISION),
    tf.SiglipVisionModel: Row(tf.SiglipVisionConfig, _VISION),
    tf.LlamaForCausalLM: Row(tf.LlamaConfig, _LLAMA),
    tf.MistralForCausalLM: Row(tf.MistralConfig, _MISTRAL),
    tf.Qwen2ForCausalLM: Row(tf.Qwen2Config, _LLAMA),
    tf.Qwen3ForCausalLM: Row(tf.Qwen3Config, _LLAMA),
    tf.Gemma3ForCausalLM: Row(tf.Gemma3TextConfig, _GEMMA3),
}
# All others with one list of blocks, or with one in the encoder and one in the decoder.
OTHERS: dict[type, Row] = {
    # encoders of text
    tf.BertForSequenceClassification: Row(tf.BertConfig, _ENCODER),
    tf.RobertaForSequenceClassification: Row(tf.RobertaConfig, _ENCODER),
    tf.ElectraForSequenceClassification: Row(tf.ElectraConfig, _ENCODER | {"embedding_size": 16}),
    tf.DistilBertForSequenceClassification: Row(
        tf.DistilBertConfig,
        _TOKENS | {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    ),
    tf.DebertaV2ForSequenceClassification: Row(tf.DebertaV2Config, _ENCODER | _DISENTANGLED),
    tf.ModernBertForSequenceClassification: Row(tf.ModernBertConfig, _ENCODER | _MODERN),
    # encoders of images and audio
    tf.BeitForImageClassification: Row(
        tf.BeitConfig,
        _VISION | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0},
    ),
    tf.Data2VecVisionForImageClassification: Row(
        tf.Data2VecVisionConfig,
        _VISION | {"layer_scale_init_value": 0.5, "drop_path_rate": 0.0},
    ),
    tf.DPTForSemanticSegmentation: Row(
        tf.DPTConfig,
        _VISION | {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8},
    ),
    tf.DINOv3ViTModel: Row(tf.DINOv3ViTConfig, _VISION | {"pos_embed_rescale": None}),
    tf.Wav2Vec2ForCTC: Row(tf.Wav2Vec2Config, _AUDIO),
    tf.HubertForCTC: Row(tf.HubertConfig, _AUDIO | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    # decoders
    tf.GPT2LMHeadModel: Row(tf.GPT2Config, _TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    tf.OPTForCausalLM: Row(tf.OPTConfig, _ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    tf.GPTNeoXForCausalLM: Row(tf.GPTNeoXConfig, _ENCODER),
    tf.FalconForCausalLM: Row(tf.FalconConfig, _ENCODER | {"multi_query": True}),
    tf.Phi3ForCausalLM: Row(tf.Phi3Config, _DECODER),
    tf.GemmaForCausalLM: Row(tf.GemmaConfig, _DECODER),
    tf.Gemma2ForCausalLM: Row(tf.Gemma2Config, _DECODER | _GEMMA2),
    tf.Olmo2ForCausalLM: Row(tf.Olmo2Config, _DECODER),
    tf.GraniteForCausalLM: Row(tf.GraniteConfig, _DECODER),
    tf.Cohere2ForCausalLM: Row(tf.Cohere2Config, _DECODER | {"sliding_window": 4}),
    tf.StableLmForCausalLM: Row(tf.StableLmConfig, _DECODER),
    tf.SmolLM3ForCausalLM: Row(tf.SmolLM3Config, _DECODER),
    tf.MixtralForCausalLM: Row(tf.MixtralConfig, _DECODER | {"num_local_experts": 4}),
    tf.Qwen2MoeForCausalLM: Row(tf.Qwen2MoeConfig, _EXPERTS | {"shared_expert_intermediate_size": 16}),
    tf.Qwen3MoeForCausalLM: Row(tf.Qwen3MoeConfig, _EXPERTS),
    # encoder and decoder
    tf.T5ForConditionalGeneration: Row(tf.T5Config, _T5),
    tf.WhisperForConditionalGeneration: Row(tf.WhisperConfig, _WHISPER),
    # images and text
    tf.LlavaForConditionalGeneration: Row(tf.LlavaConfig, _LLAVA),
    tf.Qwen2_5_VLForConditionalGeneration: Row(tf.Qwen2_5_VLConfig, _QWEN2_5_VL),
    tf.Qwen3VLForConditionalGeneration: Row(tf.Qwen3VLConfig, _QWEN3_VL),
}
CONVNETS: dict[type, Row] = {
    tf.ConvNextForImageClassification: Row(tf.ConvNextConfig, _CONVNEXT),
    tf.ConvNextV2ForImageClassification: Row(tf.ConvNextV2Config, _CONVNEXT),
    tf.ResNetForImageClassification: Row(tf.ResNetConfig, _RESNET),
    tf.RegNetForImageClassification: Row(tf.RegNetConfig, _REGNET),
}
# Transformers with stages of different sizes.
HIERARCHIES: dict[type, Row] = {
    tf.SwinForImageClassification: Row(tf.SwinConfig, SWIN),
    tf.Swinv2ForImageClassification: Row(tf.Swinv2Config, SWIN),
    tf.SegformerForSemanticSegmentation: Row(tf.SegformerConfig, PYRAMID | {"decoder_hidden_size": 16}),
    tf.PvtV2ForImageClassification: Row(tf.PvtV2Config, PYRAMID),
}
ZOO = PLAIN | OTHERS | CONVNETS | HIERARCHIES

# Further classes of these model types: other heads, none, or other layers inside of a stage.
HEADS: dict[type, Row] = {
    tf.ViTModel: Row(tf.ViTConfig, _VISION),
    tf.DeiTForImageClassification: Row(tf.DeiTConfig, _VISION),
    tf.DeiTForImageClassificationWithTeacher: Row(tf.DeiTConfig, _VISION),
    tf.Dinov2ForImageClassification: Row(tf.Dinov2Config, _DINOV2),
    tf.CLIPForImageClassification: Row(tf.CLIPConfig, _TOWERS),
    tf.SiglipForImageClassification: Row(tf.SiglipConfig, _TOWERS),
    tf.LlamaModel: Row(tf.LlamaConfig, _LLAMA),
    tf.LlamaForSequenceClassification: Row(tf.LlamaConfig, _LLAMA),
    tf.LlamaForTokenClassification: Row(tf.LlamaConfig, _LLAMA),
    tf.MistralModel: Row(tf.MistralConfig, _MISTRAL),
    tf.MistralForSequenceClassification: Row(tf.MistralConfig, _MISTRAL),
    tf.MistralForTokenClassification: Row(tf.MistralConfig, _MISTRAL),
    tf.Qwen2Model: Row(tf.Qwen2Config, _LLAMA),
    tf.Qwen2ForSequenceClassification: Row(tf.Qwen2Config, _LLAMA),
    tf.Qwen2ForTokenClassification: Row(tf.Qwen2Config, _LLAMA),
    tf.Qwen3Model: Row(tf.Qwen3Config, _LLAMA),
    tf.Qwen3ForSequenceClassification: Row(tf.Qwen3Config, _LLAMA),
    tf.Qwen3ForTokenClassification: Row(tf.Qwen3Config, _LLAMA),
    tf.Gemma3TextModel: Row(tf.Gemma3TextConfig, _GEMMA3),
    tf.Gemma3TextForSequenceClassification: Row(tf.Gemma3TextConfig, _GEMMA3),
    tf.ConvNextModel: Row(tf.ConvNextConfig, _CONVNEXT),
    tf.ConvNextBackbone: Row(tf.ConvNextConfig, _CONVNEXT | _OUT, {"normalize_features": False}),
    tf.ConvNextV2Backbone: Row(tf.ConvNextV2Config, _CONVNEXT | _OUT, {"normalize_features": False}),
    tf.ResNetModel: Row(tf.ResNetConfig, _RESNET | {"layer_type": "basic", "downsample_in_first_stage": True}),
    tf.ResNetBackbone: Row(tf.ResNetConfig, _RESNET | _OUT),
    tf.RegNetModel: Row(tf.RegNetConfig, _REGNET | {"layer_type": "x"}),
}
MODELS = ZOO | HEADS

# Vision-language models, and how to choose their vision towers.
VISION_TOWERS = {
    tf.LlavaForConditionalGeneration: r".*vision_tower.*v_proj",
    tf.Qwen2_5_VLForConditionalGeneration: r".*visual.*attn\.qkv",
    tf.Qwen3VLForConditionalGeneration: r".*visual.*attn\.qkv",
}
# One of each kind, for what does not depend on the model type.
VIT_AND_LLAMA = [tf.ViTForImageClassification, tf.LlamaForCausalLM]
CONVNEXT_AND_RESNET = [tf.ConvNextForImageClassification, tf.ResNetForImageClassification]
GENERATING = [cls for cls in ZOO if cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "Generation"))]
# Causal language models whose caches are of different kinds: of all tokens, of a window, and of both.
DECODERS = [tf.LlamaForCausalLM, tf.MistralForCausalLM, tf.Gemma3ForCausalLM]

# Options of a TopDownConfig that change which blocks run, or what the feedback is made of.
VARIANTS = {
    "full": {},
    "lite": {"r": 4},
    "early": {"feedback_from": 2},
    "late": {"feedback_to": 2},
    "middle": {"feedback_from": 3, "feedback_to": 1},
}
RANGES = {name: options for name, options in VARIANTS.items() if name != "lite"}
# One or two of each kind, which are tried with every variant. The others are tried with those that between them have
# everything that may depend on the model: the final norm and the first block in "full", blocks that only one of the
# passes runs in "middle".
REPRESENTATIVES = {
    *VIT_AND_LLAMA,
    *CONVNEXT_AND_RESNET,
    tf.BertForSequenceClassification,
    tf.GPT2LMHeadModel,
    tf.Gemma3ForCausalLM,
    tf.T5ForConditionalGeneration,
    tf.Qwen3VLForConditionalGeneration,
    tf.SwinForImageClassification,
    tf.SegformerForSemanticSegmentation,
}


def with_variants(
    models: Iterable[Any], variants: Iterable[str], representatives: Collection[Any] = REPRESENTATIVES
) -> list[tuple[Any, str]]:
    """Pairs to parametrise a test with: each model with some of these variants, the representatives with all."""
    pairs = itertools.product(models, variants)
    return [(model, variant) for model, variant in pairs if model in representatives or variant in ("full", "middle")]


def variant_of(model_class: type, variant: str) -> dict[str, Any]:
    """The options of a variant; blocks as fractions of the depth where encoder and decoder differ in it."""
    if model_class is not tf.T5ForConditionalGeneration:
        return VARIANTS[variant]
    return {name: value if name == "r" else value / NUM_BLOCKS for name, value in VARIANTS[variant].items()}


def readable(value: Any) -> str:
    """The id of a parameter of a test."""
    return value.__name__ if isinstance(value, type) else str(value)


def tiny_model(model_class: type, **options: Any) -> nn.Module:
    """A model in eval mode with random weights, always the same; `options` are added to those of its config."""
    return remade(lambda: _build(model_class, options), f"{model_class} {options}")


def _build(model_class: type, options: dict[str, Any]) -> nn.Module:
    seed(0)
    row = MODELS[model_class]
    model = model_class(row.config_class(**row.options | options))
    add_noise(*model.parameters())
    for name, buffer in model.named_buffers():  # of batch norms
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def add_noise(*parameters: nn.Parameter) -> None:
    """Add normal noise, so that no norm is the identity, no bias zero and no effect too small to see."""
    for parameter in parameters:
        parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.dtype))


def inputs_of(model: nn.Module, batch_size: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Random images, sounds or sentences without padding, always the same."""
    config = model.config
    if hasattr(config, "vision_config") and model.can_generate():
        return _image_and_text(model)
    generator = torch.Generator().manual_seed(2)
    sentences = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    if model.main_input_name == "input_ids":
        decoder_inputs = {"decoder_input_ids": sentences.flip(0)} if config.is_encoder_decoder else {}
        return {"input_ids": sentences} | decoder_inputs
    if model.main_input_name == "input_features":  # spectrograms
        spectrograms = torch.randn(batch_size, 8, 16, generator=generator)
        return {"input_features": spectrograms, "decoder_input_ids": sentences}
    if model.main_input_name == "input_values":  # sounds
        return {"input_values": torch.randn(batch_size, 80, generator=generator)}
    size = getattr(getattr(config, "vision_config", config), "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    return images(height, width, batch_size)


def images(height: int, width: int, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Noise, always the same."""
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(batch_size, 3, height, width, generator=generator)}


def _image_and_text(model: nn.Module) -> dict[str, torch.Tensor]:
    """A sentence with an image in it, as the processor of the model prepares it."""
    ids = torch.tensor([[1, 37, *[_IMAGE_TOKEN] * 4, 36, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "llava":
        return inputs | images(8, 8, batch_size=1)
    generator = torch.Generator().manual_seed(2)
    return inputs | {
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),  # patches
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == _IMAGE_TOKEN).int(),
    }
