"""A config with few and narrow blocks of any config class of transformers."""

import dataclasses
import importlib
import inspect
from typing import Any

from transformers import (
    BertConfig,
    PreTrainedConfig,
    ResNetConfig,
    TimmBackboneConfig,
    TimmWrapperConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from .tiny_overrides import OVERRIDES

_VOCABULARY = 99
FIRST_SPECIAL = 60  # tokens from here on stand for images and the like

# Field of a config -> its value, in whichever config class has such a field.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "hidden_dim"], 32),
    **dict.fromkeys(["width", "text_hidden_size", "encoder_hidden_size", "vision_hidden_size", "d_inner_hid"], 32),
    **dict.fromkeys(["projection_dim", "out_hidden_size", "output_hidden_size", "embedding_size"], 32),
    **dict.fromkeys(["encoder_hidden_dim", "hidden_size_per_layer_input", "decoder_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"], 48),
    **dict.fromkeys(["ffn_hidden_size", "mlp_dim", "dim_feedforward", "encoder_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks"], 4),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["encoder_num_hidden_layers", "decoder_num_hidden_layers", "decoder_num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "encoder_num_attention_heads"], 4),
    **dict.fromkeys(["decoder_num_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels", "attention_head_dim", "attention_head_size"], 8),
    **dict.fromkeys(
        ["vocab_size", "text_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"], _VOCABULARY
    ),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"], 64),
    **dict.fromkeys(["max_source_positions", "num_mel_bins", "max_text_len"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_top_k", "n_group", "topk_group"], 2
    ),
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": 4, "attention_window": 4},
    **{
        "image_size": 32,
        "patch_size": 8,
        "rotary_dim": 4,
        "num_frames": 4,
        "tubelet_size": 2,
        "query_pre_attn_scalar": 8,
    },
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"num_queries": 6, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "num_conv_pos_embeddings": 8},
    **{"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embedding_groups": 2},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "attn_layer_indices": [1, 3], "context_size": 16},
    **{"partial_rotary_factor": 1.0, "num_kv_shared_layers": 0},
    **{"upsample_groups": 32, "feature_projection_input_dim": 64, "input_feat_per_channel": 64},
    **{"num_register_tokens": 2, "max_window_layers": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "mamba_n_groups": 1,
        "n_groups": 2,
    },
    **{
        "ssm_state_size": 4,
        "layerdrop": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "apply_spec_augment": False,
    },
}
_KEY_VALUE_HEADS = {"num_key_value_heads", "num_kv_heads", "n_kv_heads"}
_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"}
_ENCODERS = {"vision-encoder-decoder": ViTConfig, "speech-encoder-decoder": Wav2Vec2Config}
# Which of these sizes to set, from all to nearly none, until a model can be made and run.
TRIES = (
    SIZES,
    {
        name: size
        for name, size in SIZES.items()
        if "kernel" not in name and "heads" not in name and "conv" not in name
    },
    {name: size for name, size in SIZES.items() if name in _COUNTS or "vocab" in name or "experts" in name},
)


def tiny_config(
    config_class: type[PreTrainedConfig], sizes: dict[str, Any] = SIZES, wanted: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A config of the class with few and narrow blocks, also of the models inside of it.

    Args:
        config_class: the class.
        sizes: values of fields, in whichever config has them.
        wanted: more values for this one; for a config inside of it, a dict of them.
    """
    wanted = OVERRIDES.get(config_class.model_type, {}) | (wanted or {})
    names = {field.name for field in dataclasses.fields(config_class)}
    if hasattr(config_class, "from_encoder_decoder_configs"):
        encoder = _ENCODERS.get(config_class.model_type, BertConfig)
        return config_class.from_encoder_decoder_configs(tiny_config(encoder), tiny_config(BertConfig))
    try:
        default = config_class()
    except Exception:  # noqa: BLE001 - a default that its own checks do not let pass
        default = config_class(**wanted)
    if isinstance(get(default, "num_heads"), (list, tuple)):  # one number of heads for each stage
        sizes = {name: size for name, size in sizes.items() if size != SIZES["hidden_size"]}
    values = {name: size for name, size in sizes.items() if name in names and _fits(get(default, name), size)}
    if "num_attention_heads" in values:
        several = {
            name for name in _KEY_VALUE_HEADS & names if get(default, name) != get(default, "num_attention_heads")
        }
        values |= {name: 2 if name in several else 4 for name in _KEY_VALUE_HEADS & names}
    if "layer_types" in names and "num_hidden_layers" in values and get(default, "layer_types"):
        kinds = sorted(set(default.layer_types), key=lambda kind: kind == "full_attention")
        values["num_hidden_layers"] = 2 * len(kinds)
        values["layer_types"] = kinds * 2
    if "head_dim" in sizes and "rope_parameters" in names:
        values["rope_parameters"] = _small_rope(config_class, get(default, "rope_parameters"))
    specials = [name for name in names if name.endswith(("_token_id", "_token_index")) and _is_large(default, name)]
    values |= {name: FIRST_SPECIAL + index for index, name in enumerate(sorted(specials))}
    values |= {name: value for name, value in (("pad_token_id", 0), ("bos_token_id", 1)) if name in names}
    for name in {*config_class.sub_configs, "backbone_config"} & names:
        inner = get(default, name)
        if isinstance(inner, TimmBackboneConfig):
            values |= {name: _small_resnet(inner)} | (
                {"use_timm_backbone": False} if "use_timm_backbone" in names else {}
            )
        elif isinstance(inner, TimmWrapperConfig):
            values[name] = _small_vit()
        elif isinstance(inner, PreTrainedConfig):
            values[name] = tiny_config(type(inner), sizes, wanted.pop(name, None))
    return config_class(**values | wanted)


def get(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - a config with other values for each layer does not tell
        return None


def _small_rope(config_class: type[PreTrainedConfig], rope: Any) -> dict[str, Any] | None:
    """Rotary embeddings of heads of 8 channels, in sections where they are of several modalities."""
    try:
        modelling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:  # a config for the models of another type
        return rope
    if "mrope_section" not in inspect.getsource(modelling):
        return rope
    rope = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    return {
        key: value | {"mrope_section": [2, 1, 1]} if isinstance(value, dict) else value for key, value in rope.items()
    } | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}


def _small_resnet(backbone: PreTrainedConfig) -> ResNetConfig:
    indices = list(get(backbone, "out_indices") or [1, 2, 3, 4])
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1] * 4, out_indices=[i for i in indices if i < 5] or [4]
    )


def _small_vit() -> PreTrainedConfig:
    """A vision tower for a model whose own is of timm."""
    return tiny_config(ViTConfig, wanted={"model_args": {"embed_dim": 32}})


def _fits(default: Any, value: Any) -> bool:
    """Whether a field holds one number, and not one for each stage."""
    return default is None or isinstance(default, (list, tuple)) == isinstance(value, tuple)


def _is_large(config: PreTrainedConfig, name: str) -> bool:
    value = getattr(config, name)
    return isinstance(value, int) and value > 2
