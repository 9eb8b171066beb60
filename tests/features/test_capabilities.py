"""What PEFT offers for LoRA and not for TOAST: each is refused in a sentence, and PEFT knows that it is missing."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK, hotswap_adapter

from toast_peft import TopDownConfig, TopDownModel
from toast_peft.core import layers
from toast_peft.core.layers import FeedbackLayer
from toast_peft.core.topdown_layer import TopDownLayer

from ..helpers import output_of, paths_of, steered
from ..zoo import tiny_model


def scale(model: PeftModel) -> None:
    with rescale_adapter_scale(model, 0.5):
        output_of(model)


REFUSED: dict[str, tuple[Callable[[PeftModel], object], type[Exception], str]] = {
    "add_weighted_adapter": (
        lambda model: model.add_weighted_adapter(["default"], [1.0], "merged"),
        NotImplementedError,
        "cannot be combined by `add_weighted_adapter`.* `set_adapter`, or train one",
    ),
    "merge_and_unload": (lambda model: model.merge_and_unload(), NotImplementedError, "use `unload\\(\\)`"),
    "merge_adapter": (lambda model: model.merge_adapter(), NotImplementedError, "use `unload\\(\\)`"),
    "rescale_adapter_scale": (scale, ValueError, "only supported for models with `LoraLayer`s"),
    "convert_to_lora": (lambda model: convert_to_lora(model, rank=4), TypeError, "do not support LoRA conversion"),
    "another method": (
        lambda model: model.add_adapter("lora", LoraConfig(target_modules=["q_proj"])),
        ValueError,
        "Cannot combine adapters with different peft types",
    ),
    "mixed model": (
        lambda model: get_peft_model(tiny_model(tf.LlamaModel), TopDownConfig(), mixed=True),
        ValueError,
        "'TOPDOWN' is not compatible with the `PeftMixedModel`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_function_for_lora_is_refused_with_a_sentence(name: str) -> None:
    call, error, sentence = REFUSED[name]
    model = steered(tiny_model(tf.LlamaForCausalLM))
    expected = output_of(model)
    with pytest.raises(error, match=sentence):
        call(model)
    assert torch.equal(output_of(model), expected) and list(model.peft_config) == ["default"]


def test_hotswap_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    expected = output_of(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but TOPDOWN was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(output_of(model), expected)


def test_delta_weight_of_a_lora_layer_is_refused_with_a_sentence() -> None:
    [path] = paths_of(steered(tiny_model(tf.ViTModel)))
    for layer in (path.selection, *path.layers.values()):
        with pytest.raises(NotImplementedError, match="has no delta weight"):
            layer.get_delta_weight("default")


# What PEFT's scripts/generate_method_capabilities.py goes by in its table of what each method can do.


def test_peft_does_not_take_the_method_for_mergeable() -> None:
    """It takes a method for mergeable whose layers override `merge`, if it cannot try it on a single linear layer."""
    classes = [
        value for value in vars(layers).values() if isinstance(value, type) and issubclass(value, BaseTunerLayer)
    ]
    assert TopDownModel.tuner_layer_cls is TopDownLayer and FeedbackLayer in classes
    assert all(layer.merge is BaseTunerLayer.merge for layer in classes)


def test_merging_leaves_the_feedback_alone() -> None:
    """LoRA on the same model calls it on every layer of any method."""
    model = steered(tiny_model(tf.ViTModel))
    expected = output_of(model)
    for layer in model.modules():
        if isinstance(layer, TopDownLayer):
            layer.merge(safe_merge=True, adapter_names=["default"])
            layer.unmerge()
    assert torch.equal(output_of(model), expected) and model.get_model_status().merged_adapters == []


def test_peft_does_not_list_what_is_missing() -> None:
    assert not hasattr(TopDownLayer, "_mixed_batch_forward")
    assert not steered(tiny_model(tf.ViTModel)).supports_lora_conversion()
    assert TopDownConfig().peft_type not in CONFIG_KEYS_TO_CHECK
    # A method that begins with `raise` is read as a missing one.
    source = ast.parse(textwrap.dedent(inspect.getsource(TopDownModel.add_weighted_adapter))).body[0]
    assert isinstance(source.body[1], ast.Raise)
