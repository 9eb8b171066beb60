"""A tiny random model of any model type of transformers, made from its config class, and inputs that it takes."""

import contextlib
import copy
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, PreTrainedConfig, ResNetConfig, TimmBackboneConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_VOCABULARY = 99
_FIRST_SPECIAL = 60  # tokens from here on stand for images and the like
_NUM_TOKENS = 9

# Field of a config -> its value, in whichever config class has such a field.
_SIZES: dict[str, Any] = {
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
# Which of these sizes to set, from all to nearly none, until a model can be made and run.
_TRIES = (
    _SIZES,
    {
        name: size
        for name, size in _SIZES.items()
        if "kernel" not in name and "heads" not in name and "conv" not in name
    },
    {name: size for name, size in _SIZES.items() if name in _COUNTS or "vocab" in name or "experts" in name},
)
_MOST_PARAMETERS = 40_000_000
# What cannot be made smaller by the names of its fields alone.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 64}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "emu3": {"vocabulary_map": {"<image>": 64}},
    **dict.fromkeys(
        ["depth_anything", "prompt_depth_anything", "tipsv2_dpt"],
        {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8},
    ),
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
}


def tiny_config(config_class: type[PreTrainedConfig], sizes: dict[str, Any] = _SIZES) -> PreTrainedConfig:
    """A config of the class with few and narrow blocks, also of the models inside of it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    if hasattr(config_class, "from_encoder_decoder_configs"):
        return config_class.from_encoder_decoder_configs(tiny_config(BertConfig), tiny_config(BertConfig))
    default = config_class()
    if isinstance(_get(default, "num_heads"), (list, tuple)):  # one number of heads for each stage
        sizes = {name: size for name, size in sizes.items() if size != _SIZES["hidden_size"]}
    values = {name: size for name, size in sizes.items() if name in names and _fits(_get(default, name), size)}
    if "num_attention_heads" in values:
        several = {
            name for name in _KEY_VALUE_HEADS & names if _get(default, name) != _get(default, "num_attention_heads")
        }
        values |= {name: 2 if name in several else 4 for name in _KEY_VALUE_HEADS & names}
    if "layer_types" in names and "num_hidden_layers" in values and _get(default, "layer_types"):
        kinds = sorted(set(default.layer_types), key=lambda kind: kind == "full_attention")
        values["num_hidden_layers"] = 2 * len(kinds)
        values["layer_types"] = kinds * 2
    if "head_dim" in sizes and "rope_parameters" in names:
        values["rope_parameters"] = _small_rope(config_class, _get(default, "rope_parameters"))
    specials = [name for name in names if name.endswith(("_token_id", "_token_index")) and _is_large(default, name)]
    values |= {name: _FIRST_SPECIAL + index for index, name in enumerate(sorted(specials))}
    values |= {name: value for name, value in (("pad_token_id", 0), ("bos_token_id", 1)) if name in names}
    for name in {*config_class.sub_configs, "backbone_config"} & names:
        inner = _get(default, name)
        if isinstance(inner, TimmBackboneConfig):
            values |= {name: _small_resnet(inner)} | (
                {"use_timm_backbone": False} if "use_timm_backbone" in names else {}
            )
        elif isinstance(inner, PreTrainedConfig):
            values[name] = tiny_config(type(inner), sizes)
    return config_class(**values | _OVERRIDES.get(config_class.model_type, {}))


def _get(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - a config with other values for each layer does not tell
        return None


def _small_rope(config_class: type[PreTrainedConfig], rope: Any) -> dict[str, Any] | None:
    """Rotary embeddings of heads of 8 channels, in sections where they are of several modalities."""
    modelling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    if "mrope_section" not in inspect.getsource(modelling):
        return rope
    rope = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    return {
        key: value | {"mrope_section": [2, 1, 1]} if isinstance(value, dict) else value for key, value in rope.items()
    } | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}


def _small_resnet(backbone: PreTrainedConfig) -> ResNetConfig:
    indices = list(_get(backbone, "out_indices") or [1, 2, 3, 4])
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1] * 4, out_indices=[i for i in indices if i < 5] or [4]
    )


def _fits(default: Any, value: Any) -> bool:
    """Whether a field holds one number, and not one for each stage."""
    return default is None or isinstance(default, (list, tuple)) == isinstance(value, tuple)


def _is_large(config: PreTrainedConfig, name: str) -> bool:
    value = getattr(config, name)
    return isinstance(value, int) and value > 2


def auto_mapping_of(model_type: str) -> str | None:
    """The mapping of the class that generates with this type, else of the bare model, else of one with a head."""
    generating = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")
    names = [f"MODEL_FOR_{head}_MAPPING" for head in generating] + ["MODEL_MAPPING"]
    names += [name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING")]
    return next((name for name in names if model_type in getattr(modeling_auto, name)._model_mapping), None)


def model_class_of(model_type: str) -> type[nn.Module]:
    found = getattr(modeling_auto, auto_mapping_of(model_type))[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, (list, tuple)) else found


def tiny_model(model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model in eval mode with random weights, always the same, and inputs that it runs with.

    Raises:
        RuntimeError: if none can be made of this type.
    """
    errors = []
    for sizes in _TRIES:
        try:
            model = _model(model_type, sizes)
            return model, _inputs_of(model)
        except Exception as error:  # noqa: BLE001 - whatever the model says to sizes that it cannot have
            errors.append(f"{type(error).__name__}: {error}")
    raise RuntimeError(" | ".join(errors))


def model_that_may_not_run(model_type: str) -> nn.Module:
    """A tiny model for which inputs need not be known, or else the one of the default config, without weights."""
    for sizes in _TRIES:
        with contextlib.suppress(Exception):
            return _model(model_type, sizes)
    with torch.device("meta"):
        return model_class_of(model_type)(CONFIG_MAPPING[model_type]())


def _model(model_type: str, sizes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], sizes)
    if sizes is not _SIZES:
        with torch.device("meta"):
            size = sum(
                parameter.numel() for parameter in model_class_of(model_type)(copy.deepcopy(config)).parameters()
            )
        if size > _MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters")
    model = model_class_of(model_type)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def _inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    errors = []
    for inputs in _candidates(model):
        try:
            with torch.no_grad():
                output = first_tensor(model(**inputs))
            if not output.isfinite().all():
                raise ValueError("its output is not finite")
            return inputs
        except Exception as error:  # noqa: BLE001 - whatever the model says to inputs that it does not take
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:100])
    raise ValueError("; ".join(dict.fromkeys(errors)) or "no inputs are known")


def first_tensor(output: Any) -> torch.Tensor:
    """The first floating tensor of an output, the logits or the last hidden states."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
            return value
        if isinstance(value, (tuple, list)):
            with contextlib.suppress(StopIteration):
                return first_tensor(value)
    raise StopIteration


def _candidates(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that a model may take, by the names of the parameters of its forward."""
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(2)
    width = _get(model.config, "hidden_size") or 32
    ids = torch.randint(3, _FIRST_SPECIAL - 20, (2, _NUM_TOKENS), generator=generator)
    boxes = torch.tensor([1, 2, 3, 4]).expand(2, _NUM_TOKENS, 4)
    states = torch.randn(2, _NUM_TOKENS, width if isinstance(width, int) else 32, generator=generator)
    of_text = {"input_ids": ids, "decoder_input_ids": ids.flip(0), "bbox": boxes}
    of_text = {name: value for name, value in of_text.items() if name in parameters}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in of_text and main == "input_ids":
        yield of_text
    for inputs in _of_other_kinds(model, parameters, generator):
        yield inputs
        yield inputs | of_text
        if "attention_mask" in parameters:
            value = next(iter(inputs.values()))
            yield inputs | {"attention_mask": torch.ones(value.shape[:2], dtype=torch.long)}
    for name in ("query_embeds", "inputs_embeds", "hidden_states", "encoder_hidden_states"):
        if name in parameters:
            yield {name: states} | ({"encoder_hidden_states": states} if "encoder_hidden_states" in parameters else {})


def _of_other_kinds(
    model: nn.Module, parameters: Any, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Images, videos and sounds."""
    vision = next((part for part in (_get(model.config, "vision_config"), model.config) if part is not None), None)
    if "grid_thw" in parameters:
        size = (_get(vision, "patch_size") or 8) ** 2 * 3
        for frames in (_get(vision, "temporal_patch_size") or 1, 1):
            patches = torch.randn(16, size * frames, generator=generator)
            name = "hidden_states" if "hidden_states" in parameters else "pixel_values"
            yield {name: patches, "grid_thw": torch.tensor([[1, 4, 4]])}
    size = _get(vision, "image_size") or 32
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = _get(vision, "num_channels") or 3
    frames = _get(vision, "num_frames") or 4
    for shape in ((channels, *size), (frames, channels, *size), (channels, 64, 64), (channels, 224, 224), (1, *size)):
        for name in ("pixel_values", "pixel_values_videos"):
            if name in parameters and all(isinstance(part, int) for part in shape):
                yield {name: torch.randn(2, *shape, generator=generator)}
    mels = _get(model.config, "num_mel_bins") or 64
    for shape in ((mels, 64), (64, mels), (mels, 128), (128, mels), (400,), (1, 400), (1024, mels)):
        for name in ("input_features", "input_values", "audio_values"):
            if name in parameters and isinstance(mels, int):
                yield {name: torch.randn(2, *shape, generator=generator)}
