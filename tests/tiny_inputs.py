"""Inputs that a tiny model of transformers takes, by the names of the parameters of its forward."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .tiny_configs import FIRST_SPECIAL, get
from .tiny_inputs_by_type import INPUTS

_NUM_TOKENS = 9


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
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
    if model.config.model_type in INPUTS:
        yield INPUTS[model.config.model_type](model.config, generator)
        return
    width = get(model.config, "hidden_size") or 32
    ids = torch.randint(3, FIRST_SPECIAL - 20, (2, _NUM_TOKENS), generator=generator)
    boxes = torch.tensor([1, 2, 3, 4]).expand(2, _NUM_TOKENS, 4)
    states = torch.randn(2, _NUM_TOKENS, width if isinstance(width, int) else 32, generator=generator)
    of_text = {"input_ids": ids, "decoder_input_ids": ids.flip(0), "bbox": boxes}
    of_text = {name: value for name, value in of_text.items() if name in parameters}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in of_text and (main == "input_ids" or main not in parameters):
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
    vision = next((part for part in (get(model.config, "vision_config"), model.config) if part is not None), None)
    if "grid_thw" in parameters:
        size = (get(vision, "patch_size") or 8) ** 2 * 3
        for frames in (get(vision, "temporal_patch_size") or 1, 1):
            patches = torch.randn(16, size * frames, generator=generator)
            name = "hidden_states" if "hidden_states" in parameters else "pixel_values"
            yield {name: patches, "grid_thw": torch.tensor([[1, 4, 4]])}
    size = get(vision, "image_size") or 32
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = get(vision, "num_channels") or 3
    frames = get(vision, "num_frames") or 4
    for shape in ((channels, *size), (frames, channels, *size), (channels, 64, 64), (channels, 224, 224), (1, *size)):
        for name in ("pixel_values", "pixel_values_videos"):
            if name in parameters and all(isinstance(part, int) for part in shape):
                yield {name: torch.randn(2, *shape, generator=generator)}
    mels = get(model.config, "num_mel_bins") or 64
    for shape in ((mels, 64), (64, mels), (mels, 128), (128, mels), (400,), (1, 400), (1024, mels)):
        for name in ("input_features", "input_values", "audio_values"):
            if name in parameters and isinstance(mels, int):
                yield {name: torch.randn(2, *shape, generator=generator)}
