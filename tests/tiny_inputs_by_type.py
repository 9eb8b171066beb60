"""Inputs of tiny models of transformers that the names of the parameters of their forward do not tell."""

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]


def _ids(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(3, 40, shape, generator=generator)


def _image_in_text(token: str, qformer: bool = False, frames: int = 0) -> Callable[[Any, torch.Generator], Inputs]:
    """Sentences with the tokens that the queries of an image, or of each frame of a video, take the place of."""

    def inputs(config: Any, generator: torch.Generator) -> Inputs:
        count = config.num_query_tokens * (frames or 1)
        ids = _ids(generator, 2, count + 5)
        ids[:, 1 : count + 1] = getattr(config, token)
        shape = (2, frames, 3, 32, 32) if frames else (2, 3, 32, 32)
        question = {"qformer_input_ids": _ids(generator, 2, 4)} if qformer else {}
        return {"input_ids": ids, "pixel_values": torch.randn(shape, generator=generator), **question}

    return inputs


def _kosmos2(config: Any, generator: torch.Generator) -> Inputs:
    of_image = torch.zeros(2, 9, dtype=torch.bool)
    of_image[:, 1:5] = True
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": _ids(generator, 2, 9), "image_embeds_position_mask": of_image}


def _series(config: Any, generator: torch.Generator) -> Inputs:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(2, past, generator=generator),
        "past_time_features": torch.randn(2, past, 1, generator=generator),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length, generator=generator),
        "future_time_features": torch.randn(2, config.prediction_length, 1, generator=generator),
    }


def _masked_sound(length: int) -> Callable[[Any, torch.Generator], Inputs]:
    return lambda config, generator: {
        "input_features": torch.randn(2, config.num_mel_bins, length, generator=generator),
        "input_features_mask": torch.ones(2, length, dtype=torch.long),
    }


def _patches(width: int, **more: Any) -> Callable[[Any, torch.Generator], Inputs]:
    """An image of 4 x 4 patches."""

    def inputs(config: Any, generator: torch.Generator) -> Inputs:
        return {
            "pixel_values": torch.randn(16, width, generator=generator),
            "grid_thw": torch.tensor([[1, 4, 4]]),
            **more,
        }

    return inputs


def _siglip2(config: Any, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(2, 16, 192, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _decision_transformer(config: Any, generator: torch.Generator) -> Inputs:
    return {
        "states": torch.randn(2, 5, config.state_dim, generator=generator),
        "actions": torch.randn(2, 5, config.act_dim, generator=generator),
        "rewards": torch.randn(2, 5, 1, generator=generator),
        "returns_to_go": torch.randn(2, 5, 1, generator=generator),
        "timesteps": torch.arange(5).expand(2, 5),
    }


def _timesfm(config: Any, generator: torch.Generator) -> Inputs:
    values = torch.randn(2, 4 * config.patch_length, generator=generator)
    return {"past_values": values, "past_values_padding": torch.zeros_like(values, dtype=torch.long)}


def _pair_of_images(config: Any, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(1, 2, 3, 64, 64, generator=generator)}


def _seggpt(config: Any, generator: torch.Generator) -> Inputs:
    height, width = config.image_size
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(1, 3, height // 2, width, generator=generator) for name in names}


def _sound(*shape: int, name: str = "input_values") -> Callable[[Any, torch.Generator], Inputs]:
    return lambda config, generator: {name: torch.randn(shape, generator=generator)}


# Model type -> inputs, given the config and random numbers.
INPUTS: dict[str, Callable[[Any, torch.Generator], Inputs]] = {
    "audioflamingo3_encoder": _masked_sound(128),
    "autoformer": _series,
    "blip-2": _image_in_text("image_token_id"),
    "clap": lambda config, generator: {
        "input_ids": _ids(generator, 2, 9),
        "input_features": torch.randn(2, 1, 1024, config.audio_config.num_mel_bins, generator=generator),
    },
    "decision_transformer": _decision_transformer,
    "efficientloftr": _pair_of_images,
    "gemma3n_audio": lambda config, generator: {
        "audio_mel": torch.randn(2, 64, config.input_feat_size, generator=generator),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    },
    "granite_speech5_encoder": lambda config, generator: {
        "input_features": torch.randn(2, 32, 4 * config.num_mel_bins, generator=generator),
        "attention_mask": torch.ones(2, 32, dtype=torch.long),
    },
    "informer": _series,
    "inkling2_vision": lambda config, generator: {
        "pixel_values": torch.randn(4, 16, 16, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    },
    "instructblip": _image_in_text("image_token_id", qformer=True),
    "instructblipvideo": _image_in_text("video_token_id", qformer=True, frames=2),
    "jev": lambda config, generator: {
        "input_ids": _ids(generator, 1, 9),
        "marks": torch.tensor([[4, 9]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 0]]),
    },
    "kimi_k25_vision": lambda config, generator: {
        "pixel_values": torch.randn(16, 3, 8, 8, generator=generator),
        "grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "kosmos-2": _kosmos2,
    "lightglue": _pair_of_images,
    "mask2former": _sound(1, 3, 128, 128, name="pixel_values"),
    "mimi_decoder": _sound(2, 32, 9, name="latents"),
    **dict.fromkeys(
        ["minicpm_ocr_vision", "minicpmv4_7_vision"],
        lambda config, generator: {
            "pixel_values": torch.randn(1, 3, 8, 128, generator=generator),
            "target_sizes": torch.tensor([[4, 4]]),
        },
    ),
    "moonshine": lambda config, generator: {
        "input_values": torch.randn(2, 8000, generator=generator),
        "decoder_input_ids": _ids(generator, 2, 9),
    },
    "muse_glimmer_assistant": lambda config, generator: {
        "noise_embeds": torch.randn(2, 5, 32, generator=generator),
        "context_hidden_states": torch.randn(2, 9, 32 * len(config.target_layer_ids), generator=generator),
    },
    "muse_glimmer_vision": _patches(384),
    "muse_spark_vision": _patches(384),
    **dict.fromkeys(
        ["musicgen", "musicgen_melody"],
        lambda config, generator: {
            "input_ids": _ids(generator, 2, 9),
            "decoder_input_ids": _ids(generator, 2 * config.decoder.num_codebooks, 5),
        },
    ),
    "omdet-turbo": lambda config, generator: {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
        "classes_input_ids": _ids(generator, 2, 5),
        "classes_attention_mask": torch.ones(2, 5, dtype=torch.long),
        "tasks_input_ids": _ids(generator, 1, 5),
        "tasks_attention_mask": torch.ones(1, 5, dtype=torch.long),
        "classes_structure": torch.tensor([2]),
    },
    "oneformer": lambda config, generator: {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
        "task_inputs": _ids(generator, 1, config.task_seq_len),
    },
    "pe_audio_encoder": _sound(2, 1, 8000),
    "perceiver": _sound(2, 9, 32, name="inputs"),
    "pocket_tts_audio_tokenizer_decoder": _sound(2, 32, 9, name="latents"),
    "qwen3_asr_encoder": _masked_sound(200),
    "seggpt": _seggpt,
    "siglip2_vision_model": _siglip2,
    "superglue": _pair_of_images,
    "time_series_transformer": _series,
    "timesfm": lambda config, generator: _timesfm(config, generator) | {"freq": torch.zeros(2, 1, dtype=torch.long)},
    "timesfm2_5": _timesfm,
    "tvp": lambda config, generator: {
        "input_ids": _ids(generator, 1, 9),
        "pixel_values": torch.randn(1, config.num_frames, 3, 128, 128, generator=generator),
    },
    "video_llama_3_vision": _patches(192, merge_sizes=torch.tensor([2])),
    "voxtral_realtime": lambda config, generator: {
        "input_ids": _ids(generator, 2, 8),
        "input_features": torch.randn(2, 64, 64, generator=generator),
    },
    "xcodec": _sound(2, 1, 3200),
    "xmod": lambda config, generator: {
        "input_ids": _ids(generator, 2, 9),
        "lang_ids": torch.zeros(2, dtype=torch.long),
    },
}
