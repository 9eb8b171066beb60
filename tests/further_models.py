"""Tiny models of the supported types that `tests/test_architectures.py` goes over: a row for each."""

from typing import Any

import torch
import transformers as tf
from torch import nn

_TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
_ENCODER = _SIZES | _TOKENS | {"max_position_embeddings": 64}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = _DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = _SIZES | {"image_size": 8, "patch_size": 4}
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

# Model class -> its config class, and the options of the config.
FURTHER_MODELS: dict[type, tuple[type, dict[str, Any]]] = {
    # encoders of text
    tf.BertForSequenceClassification: (tf.BertConfig, _ENCODER),
    tf.RobertaForSequenceClassification: (tf.RobertaConfig, _ENCODER),
    tf.ElectraForSequenceClassification: (tf.ElectraConfig, _ENCODER | {"embedding_size": 16}),
    tf.DistilBertForSequenceClassification: (
        tf.DistilBertConfig,
        _TOKENS | {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    ),
    tf.DebertaV2ForSequenceClassification: (tf.DebertaV2Config, _ENCODER | _DISENTANGLED),
    tf.ModernBertForSequenceClassification: (tf.ModernBertConfig, _ENCODER | _MODERN),
    # encoders of images and audio
    tf.BeitForImageClassification: (
        tf.BeitConfig,
        _VISION | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0},
    ),
    tf.Data2VecVisionForImageClassification: (
        tf.Data2VecVisionConfig,
        _VISION | {"layer_scale_init_value": 0.5, "drop_path_rate": 0.0},
    ),
    tf.DPTForSemanticSegmentation: (
        tf.DPTConfig,
        _VISION | {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8},
    ),
    tf.DINOv3ViTModel: (tf.DINOv3ViTConfig, _VISION | {"pos_embed_rescale": None}),
    tf.Wav2Vec2ForCTC: (tf.Wav2Vec2Config, _AUDIO),
    tf.HubertForCTC: (tf.HubertConfig, _AUDIO | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    # decoders
    tf.GPT2LMHeadModel: (tf.GPT2Config, _TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    tf.OPTForCausalLM: (tf.OPTConfig, _ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    tf.GPTNeoXForCausalLM: (tf.GPTNeoXConfig, _ENCODER),
    tf.FalconForCausalLM: (tf.FalconConfig, _ENCODER | {"multi_query": True}),
    tf.Phi3ForCausalLM: (tf.Phi3Config, _DECODER),
    tf.GemmaForCausalLM: (tf.GemmaConfig, _DECODER),
    tf.Gemma2ForCausalLM: (tf.Gemma2Config, _DECODER | _GEMMA2),
    tf.Olmo2ForCausalLM: (tf.Olmo2Config, _DECODER),
    tf.GraniteForCausalLM: (tf.GraniteConfig, _DECODER),
    tf.Cohere2ForCausalLM: (tf.Cohere2Config, _DECODER | {"sliding_window": 4}),
    tf.StableLmForCausalLM: (tf.StableLmConfig, _DECODER),
    tf.SmolLM3ForCausalLM: (tf.SmolLM3Config, _DECODER),
    tf.MixtralForCausalLM: (tf.MixtralConfig, _DECODER | {"num_local_experts": 4}),
    tf.Qwen2MoeForCausalLM: (tf.Qwen2MoeConfig, _EXPERTS | {"shared_expert_intermediate_size": 16}),
    tf.Qwen3MoeForCausalLM: (tf.Qwen3MoeConfig, _EXPERTS),
    # encoder and decoder
    tf.T5ForConditionalGeneration: (tf.T5Config, _T5),
    tf.WhisperForConditionalGeneration: (tf.WhisperConfig, _WHISPER),
    # images and text
    tf.LlavaForConditionalGeneration: (tf.LlavaConfig, _LLAVA),
    tf.Qwen2_5_VLForConditionalGeneration: (tf.Qwen2_5_VLConfig, _QWEN2_5_VL),
    tf.Qwen3VLForConditionalGeneration: (tf.Qwen3VLConfig, _QWEN3_VL),
}


def images_and_text(model: nn.Module) -> dict[str, torch.Tensor]:
    """A sentence with an image in it, as the processor of the model prepares it."""
    ids = torch.tensor([[1, 37, *[_IMAGE_TOKEN] * 4, 36, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(2)
    if model.config.model_type == "llava":
        return inputs | {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    of_image = (ids == _IMAGE_TOKEN).int()
    return inputs | {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": of_image,
    }
