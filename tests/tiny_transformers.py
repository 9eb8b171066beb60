"""A tiny random model of any model type of transformers, made from its config class, and inputs that it takes."""

import contextlib
import functools

import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .kept_models import remade, seed
from .tiny_configs import SIZES, TRIES, tiny_config
from .tiny_inputs import inputs_of

_MOST_PARAMETERS = 40_000_000
# Their class that generates text is made from the config of a part.
_MAPPINGS = dict.fromkeys(["musicgen", "musicgen_melody"], "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING")


def auto_mapping_of(model_type: str) -> str | None:
    """The mapping of the class that generates with this type, else of the bare model, else of one with a head."""
    if model_type in _MAPPINGS:
        return _MAPPINGS[model_type]
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
    for sizes in TRIES:
        try:
            model = remade(functools.partial(_model, model_type, sizes), f"{model_type} {TRIES.index(sizes)}")
            return model, inputs_of(model)
        except Exception as error:  # noqa: BLE001 - whatever the model says to sizes that it cannot have
            errors.append(f"{type(error).__name__}: {error}")
    raise RuntimeError(" | ".join(errors))


def model_that_may_not_run(model_type: str) -> nn.Module:
    """A tiny model for which inputs need not be known, or else the one of the default config, without weights."""
    for sizes in TRIES:
        with contextlib.suppress(Exception):
            return _model(model_type, sizes)
    with torch.device("meta"):
        return model_class_of(model_type)(CONFIG_MAPPING[model_type]())


@functools.cache
def _number_of_parameters(model_type: str, number_of_try: int) -> int:
    with torch.device("meta"):
        model = model_class_of(model_type)(tiny_config(CONFIG_MAPPING[model_type], TRIES[number_of_try]))
    return sum(parameter.numel() for parameter in model.parameters())


def _model(model_type: str, sizes: dict) -> nn.Module:
    seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], sizes)
    if sizes is not SIZES and (size := _number_of_parameters(model_type, TRIES.index(sizes))) > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    model = model_class_of(model_type)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model.eval()
