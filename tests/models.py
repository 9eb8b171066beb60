"""Tiny models of every supported type with random weights, and TOAST adapters on them whose effect is visible."""

import copy
import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.core.layers import FeedbackPath

from .further_models import FURTHER_MODELS, images_and_text

NUM_BLOCKS = 4
HIDDEN_SIZE = 32
VOCAB_SIZE = 40

_VISION = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
_DINOV2 = {name: value for name, value in _VISION.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
_TOWERS = {
    "vision_config": _VISION,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB_SIZE},
}
_TEXT = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "classifier_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that generation runs to the asked length
}
_LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
# The windows are shorter than the test sentences.
_MISTRAL = _TEXT | {"sliding_window": 4}
_GEMMA3 = _TEXT | {"sliding_window": 4, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 8}

# Model class -> its config class, and the options of the config.
MODELS: dict[type, tuple[type, dict[str, Any]]] = {
    tf.ViTModel: (tf.ViTConfig, _VISION),
    tf.ViTForImageClassification: (tf.ViTConfig, _VISION),
    tf.DeiTModel: (tf.DeiTConfig, _VISION),
    tf.DeiTForImageClassification: (tf.DeiTConfig, _VISION),
    tf.DeiTForImageClassificationWithTeacher: (tf.DeiTConfig, _VISION),
    tf.Dinov2Model: (tf.Dinov2Config, _DINOV2),
    tf.Dinov2ForImageClassification: (tf.Dinov2Config, _DINOV2),
    tf.CLIPVisionModel: (tf.CLIPVisionConfig, _VISION),
    tf.CLIPForImageClassification: (tf.CLIPConfig, _TOWERS),
    tf.SiglipVisionModel: (tf.SiglipVisionConfig, _VISION),
    tf.SiglipForImageClassification: (tf.SiglipConfig, _TOWERS),
    tf.LlamaModel: (tf.LlamaConfig, _TEXT),
    tf.LlamaForCausalLM: (tf.LlamaConfig, _TEXT),
    tf.LlamaForSequenceClassification: (tf.LlamaConfig, _TEXT),
    tf.LlamaForTokenClassification: (tf.LlamaConfig, _TEXT),
    tf.MistralModel: (tf.MistralConfig, _MISTRAL),
    tf.MistralForCausalLM: (tf.MistralConfig, _MISTRAL),
    tf.MistralForSequenceClassification: (tf.MistralConfig, _MISTRAL),
    tf.MistralForTokenClassification: (tf.MistralConfig, _MISTRAL),
    tf.Qwen2Model: (tf.Qwen2Config, _TEXT),
    tf.Qwen2ForCausalLM: (tf.Qwen2Config, _TEXT),
    tf.Qwen2ForSequenceClassification: (tf.Qwen2Config, _TEXT),
    tf.Qwen2ForTokenClassification: (tf.Qwen2Config, _TEXT),
    tf.Qwen3Model: (tf.Qwen3Config, _TEXT),
    tf.Qwen3ForCausalLM: (tf.Qwen3Config, _TEXT),
    tf.Qwen3ForSequenceClassification: (tf.Qwen3Config, _TEXT),
    tf.Qwen3ForTokenClassification: (tf.Qwen3Config, _TEXT),
    tf.Gemma3TextModel: (tf.Gemma3TextConfig, _GEMMA3),
    tf.Gemma3ForCausalLM: (tf.Gemma3TextConfig, _GEMMA3),
    tf.Gemma3TextForSequenceClassification: (tf.Gemma3TextConfig, _GEMMA3),
}
_VISION_NORMS = ("layernorm", "post_layernorm")
_VALUE_PROJECTIONS = ("v_proj", ".value")
# Neither a layer of the feedback path nor one of a segmentation decoder.
_BLOCK = r"(^|(?<!path)(?<!stage)\.)layers?\.\d+$"
DECODERS = [cls for cls in MODELS if cls.__name__.endswith("ForCausalLM")]
# What transformers calls the argument and the output that is a cache; "past_key_values" before 5.24.
CACHE = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(tf.LlamaModel.forward).parameters
)
# One of each kind, for what does not depend on the model type.
VIT_AND_LLAMA = [tf.ViTForImageClassification, tf.LlamaForCausalLM]
# One class of each model type with its own stack of blocks.
BACKBONES = [cls for cls in MODELS if cls.__name__.endswith("Model")]

# Options of a TopDownConfig that change which blocks run, or what the feedback is made of.
VARIANTS = {
    "full": {},
    "lite": {"r": 4},
    "early": {"feedback_from": 2},
    "late": {"feedback_to": 2},
    "middle": {"feedback_from": 3, "feedback_to": 1},
}
RANGES = {name: options for name, options in VARIANTS.items() if name != "lite"}


def tiny_model(model_class: type, **options: Any) -> nn.Module:
    """A model in eval mode with random weights, always the same; `options` are added to those of its config."""
    torch.manual_seed(0)
    config_class, defaults = (MODELS | FURTHER_MODELS)[model_class]
    model = model_class(config_class(**defaults | options))
    add_noise(*model.parameters())
    return model.eval()


@torch.no_grad()
def add_noise(*parameters: nn.Parameter) -> None:
    """Add normal noise, so that no norm is the identity, no bias zero and no effect too small to see."""
    for parameter in parameters:
        parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.dtype))


def refusal_of_transformers() -> str:
    """What transformers' own `add_adapter` says to a LoRA; empty if it takes one."""
    try:
        tiny_model(tf.LlamaForCausalLM).add_adapter(LoraConfig(target_modules=["v_proj"]))
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """The model with a TOAST adapter as users make it."""
    training = model.training
    return get_peft_model(model, TopDownConfig(**options)).train(training)


def steered(model: nn.Module, **options: Any) -> PeftModel:
    """The model with a TOAST adapter that has been moved away from its start, always to the same place."""
    torch.manual_seed(1)
    model = adapted(model, **options)
    move_adapter(model)
    return model


@torch.no_grad()
def move_adapter(model: PeftModel, name: str = "default") -> None:
    """Change the weights of an adapter by noise; turn its prompt to some features, or its mask might be zero."""
    first = model.peft_config[name].feedback_from or NUM_BLOCKS
    features = features_of(model, inputs_of(model), first)
    for key, parameter in model.named_parameters():
        if f"topdown_prompt.{name}" in key:
            parameter.copy_(features[0, -1])
        elif "topdown_" in key and f".{name}" in key:
            add_noise(parameter)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is made of: modules, attributes, hooks, flags, adapters, and a copy of all weights."""
    state = {
        f"{name}: {key}": _content(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    return {"modules": state, "requires_grad": requires_grad, "weights": weights}


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _content(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [_content(entry) for entry in value]
    return value if isinstance(value, (str, int, float, set)) else id(value)


def assert_state_is(model: nn.Module, before: dict[str, Any]) -> None:
    """Everything is as it was when `state_of` was called, down to the last bit."""
    now = state_of(model)
    for part in ("modules", "requires_grad"):
        assert now[part].keys() == before[part].keys()
        assert [key for key in before[part] if now[part][key] != before[part][key]] == []
    weights = now["weights"]
    assert list(weights) == list(before["weights"])
    for name, (dtype, tensor) in before["weights"].items():
        assert weights[name][0] == dtype and torch.equal(weights[name][1], tensor), name


def paths_of(model: nn.Module) -> list[FeedbackPath]:
    """The feedback paths, from the input to the output."""
    return [module for module in model.modules() if isinstance(module, FeedbackPath)]


def turn_prompts(model: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Turn the prompt of each path to one of its features, so that no mask is zero."""

    @torch.no_grad()
    def turn(path: FeedbackPath, args: tuple) -> None:
        path.selection.topdown_prompt["default"].weight.copy_(args[0].flatten(1, -2)[0, -1])

    for path in paths_of(model):  # one after the other, as a decoder's features depend on its encoder
        with path.register_forward_pre_hook(turn):
            output_of(model, inputs)


def trained_everywhere(model: type | nn.Module, **options: Any) -> PeftModel:
    """`steered`, and other trained modules changed as well."""
    model = steered(tiny_model(model) if isinstance(model, type) else model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or "trainable_tokens" in name:
                parameter.add_(0.1)
    return model


def inputs_of(model: nn.Module, batch_size: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Random images, sounds or sentences without padding, always the same."""
    if hasattr(model.config, "vision_config") and model.can_generate():
        return images_and_text(model)
    generator = torch.Generator().manual_seed(2)
    sentences = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    if model.main_input_name == "input_ids":
        decoder_inputs = {"decoder_input_ids": sentences.flip(0)} if model.config.is_encoder_decoder else {}
        return {"input_ids": sentences} | decoder_inputs
    if model.main_input_name == "input_features":  # spectrograms
        spectrograms = torch.randn(batch_size, 8, 16, generator=generator)
        return {"input_features": spectrograms, "decoder_input_ids": sentences}
    shape = (3, 8, 8) if model.main_input_name == "pixel_values" else (80,)
    return {model.main_input_name: torch.randn(batch_size, *shape, generator=generator)}


def output_of(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits, or the last hidden states of a bare backbone, without a graph."""
    with torch.no_grad():
        return model(**inputs or inputs_of(model))[0]


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A smooth loss that every output element has a part in."""
    output = model(**inputs or inputs_of(model))[0]
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().tanh() + output.square().mean()


@functools.cache
def compiles_copies() -> bool:
    """Whether torch.compile can trace `copy.copy`, by which the two passes see a cache; older versions cannot."""
    try:
        torch.compile(lambda cache: copy.copy(cache).layers, fullgraph=True, backend="eager")(tf.DynamicCache())
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, relative to the largest entry.

    For tensors computed from other memory, or where other parameters require a gradient: torch may choose another
    kernel then. `torch.equal` is for the same weights and inputs only.
    """
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[expected.dtype]
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * largest)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients of all trainable parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks, from the input to the output."""
    return [module for name, module in model.named_modules() if re.search(_BLOCK, name)]


def value_projections_of(model: nn.Module) -> list[nn.Module]:
    """The value projection of each block."""
    return [
        next(m for name, m in block.named_modules() if name.endswith(_VALUE_PROJECTIONS)) for block in blocks_of(model)
    ]


def features_of(model: nn.Module, inputs: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """Hidden states after block `first - 1`, in ViT-like models after the final norm as well."""
    outputs = []
    with blocks_of(model)[first - 1].register_forward_hook(lambda module, args, output: outputs.append(output)):
        model(**inputs)
    features = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if model.main_input_name != "pixel_values":
        return features
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] in _VISION_NORMS)(features)


@contextmanager
def counted_block_calls(model: nn.Module) -> Iterator[Counter]:
    """How often each block really ran: counts the calls of its MLP, which a skipped block does not make."""
    calls: Counter = Counter()
    handles = [
        block.mlp.register_forward_hook(lambda *_, index=index: calls.update([index]))
        for index, block in enumerate(blocks_of(model))
    ]
    yield calls
    for handle in handles:
        handle.remove()


# For tests of transformers' `add_adapter` and `load_adapter`: some of its releases want a PEFT that is not out yet.
_REFUSAL = refusal_of_transformers()
takes_adapters = pytest.mark.skipif(_REFUSAL != "", reason=f"transformers refuses any adapter, LoRA alike: {_REFUSAL}")
