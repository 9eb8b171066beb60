"""What TOAST relies on in transformers and in a model is there, or it says so in a sentence."""

import inspect
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import cache_utils
from transformers.generation import continuous_batching
from transformers.modeling_layers import GradientCheckpointingLayer

from toast_peft.core.cache import cache_parameter

from ..helpers import adapted
from ..zoo import VOCAB_SIZE, tiny_model

# ------------------------------------------------------------------------------------- a block list that is not called


class Block(nn.Module):
    """A block with values only."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.values(x)


class WeightUsedDirectly(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.linear(x, self.values.weight, self.values.bias)


class Stack(nn.Module):
    def __init__(self, block_class: type, calls_blocks: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block_class() for _ in range(2))
        self.calls_blocks = calls_blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.calls_blocks else x + block.values(x)
        return x


def test_blocks_that_the_model_does_not_call_are_an_error() -> None:
    base, x = Stack(Block, calls_blocks=False), torch.randn(1, 3, 8)
    expected = base(x)
    model = adapted(base, target_modules=["values"])
    with pytest.raises(NotImplementedError, match="No block of 'blocks' was called by the forward of Stack"):
        model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_value_projection_that_its_block_does_not_call_is_an_error() -> None:
    model = adapted(Stack(WeightUsedDirectly), target_modules=["values"])
    with pytest.raises(NotImplementedError, match="Block 0, a WeightUsedDirectly, does not call the value projection"):
        model(torch.randn(1, 3, 8))


# ----------------------------------------------------------------------------------------------- names of transformers

# Of each the attributes that TOAST reads or calls.
NAMES: list[tuple[Any, tuple[str, ...]]] = [
    (tf.Cache, ("get_seq_length", "update", "reset", "reorder_cache", "batch_repeat_interleave", "crop")),
    (tf.DynamicCache(), ("layers", "layer_class_to_replicate")),
    (cache_utils.EncoderDecoderCache, ("get_seq_length",)),
    (tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache()), ("self_attention_cache", "is_updated")),
    (cache_utils, ("CacheLayerMixin", "StaticLayer", "DynamicLayer")),
    (continuous_batching, ("PagedAttentionCache",)),
    (GradientCheckpointingLayer, ("gradient_checkpointing",)),
    (tf.utils, ("ModelOutput",)),
    (
        tf.GenerationMixin,
        ("generate", "generate_batch", "prepare_inputs_for_generation", "_valid_auto_compile_criteria"),
    ),
    (tf.PreTrainedModel, ("get_compiled_call",)),
]


@pytest.mark.parametrize(("owner", "names"), NAMES, ids=lambda value: getattr(value, "__name__", None))
def test_names_that_toast_relies_on_are_there(owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"transformers {tf.__version__} has no {missing} on {owner}; toast_peft/cache.py relies on it."


DECODERS = [
    tf.LlamaModel,
    tf.MistralModel,
    tf.Gemma3TextModel,
    tf.Qwen3Model,
    tf.GPT2Model,
    tf.OPTModel,
    tf.FalconModel,
    tf.GPTNeoXModel,
    tf.T5Model,
    tf.BertModel,
    tf.models.whisper.modeling_whisper.WhisperDecoder,
]


@pytest.mark.parametrize("model_class", DECODERS)
def test_parameter_that_takes_a_cache_is_recognised(model_class: type) -> None:
    parameters = inspect.signature(model_class.forward).parameters
    found = cache_parameter(parameters)
    assert found in parameters, (
        f"transformers {tf.__version__}: no parameter of {model_class.__name__}.forward is recognised as the one that "
        f"takes a cache, of {list(parameters)}; see cache_parameter in toast_peft/cache.py."
    )


def test_vision_models_take_no_cache() -> None:
    for model_class in (tf.ViTModel, tf.SwinModel, tf.ResNetModel):
        assert cache_parameter(inspect.signature(model_class.forward).parameters) is None


def test_enabled_checkpointing_is_found_on_the_blocks() -> None:
    model = tiny_model(tf.LlamaModel)
    model.gradient_checkpointing_enable()
    for block in model.layers:
        assert isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing
        assert hasattr(block, "_gradient_checkpointing_func"), (
            f"transformers {tf.__version__} has renamed the checkpointing function; see toast_peft/checkpointing.py."
        )


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generate_hands_the_backbone_a_cache_that_is_recognised(implementation: str) -> None:
    """The path that `generate` takes, with a model that notes what it gets."""
    model = tiny_model(tf.LlamaForCausalLM)
    found = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append([name for name, value in kwargs.items() if isinstance(value, tf.Cache)])

    with model.model.register_forward_pre_hook(note, with_kwargs=True):
        ids = torch.arange(3, 9).unsqueeze(0) % VOCAB_SIZE
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, cache_implementation=implementation)
    parameter = cache_parameter(inspect.signature(type(model.model).forward).parameters)
    assert found == [[parameter]] * 3, (
        f"transformers {tf.__version__} gives a backbone its cache as {found}, recognised was {parameter!r}; see "
        "toast_peft/cache.py."
    )
