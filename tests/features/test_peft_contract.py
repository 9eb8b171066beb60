"""What PEFT and transformers expect of a method: registration, saving, several adapters, injection, removal."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from toast_peft import TopDownConfig, TopDownModel
from toast_peft.registration import register

from ..helpers import (
    adapted,
    assert_same,
    counted_block_calls,
    output_of,
    steer,
    steered,
    takes_adapters,
    trained_everywhere,
)
from ..zoo import MODELS, NUM_BLOCKS, RANGES, VARIANTS, VIT_AND_LLAMA, tiny_model, with_variants

SAVED_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if "topdown_" in key and f".{name}" in key}


# ---------------------------------------------------------------------------------------------------- registration


def test_registered_under_its_fixed_names() -> None:
    assert PeftType("TOPDOWN") is PeftType.TOPDOWN is PeftType["TOPDOWN"]
    assert PeftType.TOPDOWN.value == "TOPDOWN" == str(PeftType.TOPDOWN.name)
    assert PeftType.TOPDOWN in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TOPDOWN] is TopDownConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TOPDOWN] is TopDownModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TOPDOWN] == TopDownModel.prefix == "topdown_"


def test_registering_again_changes_nothing() -> None:
    members = list(PeftType)
    register(TopDownConfig, TopDownModel)
    assert list(PeftType) == members
    test_registered_under_its_fixed_names()


def test_the_base_model_has_no_name_with_the_prefix() -> None:
    for model_class in MODELS:
        assert not [name for name, _ in tiny_model(model_class).named_parameters() if "topdown_" in name]


# --------------------------------------------------------------------------------------------------- what is trained


PARTS = {"prompt": "topdown_prompt.", "transform": "topdown_transform.", "linear1": "_linear1", "linear2": "_linear2"}
SWITCHES = {
    "nothing": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("default"),
    "disable and enable": lambda model: output_with_adapter_disabled(model),
    "enable_adapter_layers": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "add another adapter": lambda model: (model.add_adapter("other", TopDownConfig()), model.set_adapter("default")),
    "switch there and back": lambda model: (
        model.add_adapter("other", TopDownConfig()),
        model.set_adapter("other"),
        model.set_adapter("default"),
    ),
    "delete another adapter": lambda model: (
        model.add_adapter("other", TopDownConfig()),
        model.set_adapter("other"),
        model.delete_adapter("other"),
    ),
    "requires_grad": lambda model: model.set_requires_grad("default", True),
}


def output_with_adapter_disabled(model: PeftModel) -> torch.Tensor:
    with model.disable_adapter():
        return output_of(model)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("parts", [["prompt"], ["transform", "linear2"], ["prompt", "linear1", "linear2"]], ids=str)
def test_trainable_parts_freezes_the_others(parts: list[str], r: int, switch: str) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), r=r, init_weights=False, trainable_parts=parts)
    SWITCHES[switch](model)
    for name, parameter in adapter_parameters(model).items():
        fixed_by_rank = r > 0 and "linear" in name and "_A" not in name and "_B" not in name
        part = next(part for part, marker in PARTS.items() if marker in name)
        assert parameter.requires_grad == (part in parts and not fixed_by_rank), name
    assert not any(p.requires_grad for name, p in model.named_parameters() if "topdown_" not in name)


# --------------------------------------------------------------------------------------------------- several adapters


def with_two(model_class: type, first: dict[str, Any], second: dict[str, Any]) -> PeftModel:
    model = steered(tiny_model(model_class), **first)
    model.add_adapter("other", TopDownConfig(**second))
    steer(model, "other")
    return model


@pytest.mark.parametrize(
    ("model_class", "first", "second"),
    [(tf.LlamaForCausalLM, first, second) for first in RANGES for second in ("early", "late")]
    + [(tf.ViTForImageClassification, "full", "late"), (tf.ViTForImageClassification, "middle", "early")],
)
def test_adapters_of_different_ranges(model_class: type, first: str, second: str, tmp_path: Path) -> None:
    """Each of two adapters does what it does alone."""
    model = with_two(model_class, RANGES[first], RANGES[second])
    model.save_pretrained(tmp_path)
    for name, variant in (("default", first), ("other", second), ("default", first)):
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        alone = PeftModel.from_pretrained(tiny_model(model_class), folder)
        assert_same(output_of(model), output_of(alone))
        with counted_block_calls(model) as calls:
            output_of(model)
        options = RANGES[variant]
        assert calls.total() == options.get("feedback_from", NUM_BLOCKS) + NUM_BLOCKS - options.get("feedback_to", 0)


def test_adding_an_adapter_leaves_the_active_one() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    expected = output_of(model)
    model.add_adapter("other", TopDownConfig(r=4))
    assert model.active_adapter == "default" and torch.equal(output_of(model), expected)
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "other").values())
    model.set_adapter("other")
    assert all(p.requires_grad for p in adapter_parameters(model, "other").values())
    assert not any(p.requires_grad for p in adapter_parameters(model).values())


def test_loading_a_second_adapter(tmp_path: Path) -> None:
    other = steered(tiny_model(tf.ViTModel), r=4, feedback_to=2)
    other.save_pretrained(tmp_path)
    model = steered(tiny_model(tf.ViTModel))
    expected = output_of(model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(output_of(model), expected)
    model.set_adapter("other")
    assert_same(output_of(model), output_of(other))


@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("deleted", ["default", "other"])
@pytest.mark.parametrize("second", ["early", "late"])
def test_deleting_an_adapter(active: str, deleted: str, second: str) -> None:
    """If it was the active one, the one that is left becomes active."""
    model = with_two(tf.LlamaForCausalLM, {}, RANGES[second])
    left = "other" if deleted == "default" else "default"
    model.set_adapter(left)
    expected = output_of(model)
    model.set_adapter(active)
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [left] and not adapter_parameters(model, deleted)
    assert model.active_adapters == [left]
    assert torch.equal(output_of(model), expected)
    assert model.get_model_status().available_adapters == [left]


def test_after_deleting_one_of_three_all_layers_agree_which_is_active() -> None:
    """Each layer has others left, as these are of different blocks."""
    model = with_two(tf.LlamaForCausalLM, {}, RANGES["early"])
    model.add_adapter("third", TopDownConfig(**RANGES["late"]))
    model.delete_adapter("default")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(model, model.active_adapter).keys()


def test_deleting_all_adapters_gives_the_base_model() -> None:
    model = with_two(tf.ViTModel, {}, {"r": 4})
    for name in ("default", "other"):
        model.delete_adapter(name)
    base = model.base_model.model  # PeftModel itself does not run without an adapter, of whatever method
    assert_same(output_of(base), output_of(tiny_model(tf.ViTModel)))
    assert not any("topdown_" in name for name, _ in model.named_parameters())


def test_a_peft_model_takes_one_name() -> None:
    """As with LoRA; several are activated by its tuner (`test_several_adapters.py`)."""
    model = with_two(tf.LlamaForCausalLM, {}, {})
    expected = output_of(model)
    with pytest.raises((ValueError, TypeError)):
        model.set_adapter(["default", "other"])
    assert model.active_adapter == "default" and torch.equal(output_of(model), expected)
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"] and not torch.allclose(output_of(model), expected)
    assert all(p.requires_grad for name in model.active_adapters for p in adapter_parameters(model, name).values())


def test_status() -> None:
    model = with_two(tf.LlamaForCausalLM, {"trainable_parts": ["prompt"]}, {"feedback_from": 2})
    status = model.get_model_status()
    assert status.adapter_model_type == "TopDownModel"
    assert status.peft_types == {"default": "TOPDOWN", "other": "TOPDOWN"}
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.available_adapters == ["default", "other"]
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.num_adapter_layers == NUM_BLOCKS + 1
    assert status.trainable_params == 32
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert len(layers) == NUM_BLOCKS + 1
    [top] = [layer for name, layer in layers.items() if name.endswith("layers.3")]
    assert top.available_adapters == ["default"]
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_parameter_counts(capsys: pytest.CaptureFixture) -> None:
    model = adapted(tiny_model(tf.ViTModel))
    model.print_trainable_parameters()
    trainable = 32 + 32 * 32 + NUM_BLOCKS * 2 * 32 * 32
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- without get_peft_model


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_inject_adapter_in_model(model_class: type) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    model = inject_adapter_in_model(TopDownConfig(), base)
    assert model is base and torch.equal(output_of(model), expected)
    wrapped = steered(tiny_model(model_class))
    set_peft_model_state_dict(model, get_peft_model_state_dict(wrapped))
    assert_same(output_of(model), output_of(wrapped))


@takes_adapters
@pytest.mark.parametrize(("model_class", "variant"), with_variants(VIT_AND_LLAMA, VARIANTS, [tf.LlamaForCausalLM]))
def test_adapters_of_transformers(model_class: type, variant: str, tmp_path: Path) -> None:
    """`add_adapter`, `save_pretrained`, `load_adapter`, switching and deleting on the transformers model itself."""
    wrapped = steered(tiny_model(model_class), **VARIANTS[variant])
    base = tiny_model(model_class)
    expected = output_of(base)
    base.add_adapter(TopDownConfig(**VARIANTS[variant]), "mine")
    assert torch.equal(output_of(base), expected)
    set_peft_model_state_dict(base, get_peft_model_state_dict(wrapped), adapter_name="mine")
    assert_same(output_of(base), output_of(wrapped))
    base.save_pretrained(tmp_path)
    assert SAVED_FILES - {"README.md"} <= set(os.listdir(tmp_path))
    base.disable_adapters()
    assert torch.equal(output_of(base), expected)
    base.enable_adapters()
    assert_same(output_of(base), output_of(wrapped))
    loaded = tiny_model(model_class)
    loaded.load_adapter(str(tmp_path))
    assert_same(output_of(loaded.eval()), output_of(wrapped))
    base.delete_adapter("mine")
    assert torch.equal(output_of(base), expected)


@takes_adapters
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_adapter_saved_by_peft_is_loaded_by_transformers(model_class: type, tmp_path: Path) -> None:
    base = tiny_model(model_class)
    base.save_pretrained(tmp_path / "base")
    model = steered(model_class.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = model_class.from_pretrained(tmp_path / "adapter").eval()
    assert_same(output_of(loaded), output_of(model))


# ------------------------------------------------------------------------------------------------- unload and merge


def forwards_on_instances(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_unload_of_a_copy_leaves_the_original(model_class: type, copy_of: Callable) -> None:
    base = tiny_model(model_class)
    of_base, hooks = output_of(base), hooks_on(base)
    model = steered(base)
    expected = output_of(model)
    unloaded = copy_of(model).unload()
    assert torch.equal(output_of(unloaded), of_base)
    assert forwards_on_instances(unloaded) == [] and hooks_on(unloaded) == hooks
    assert torch.equal(output_of(model), expected)


def test_unload_keeps_a_trained_head() -> None:
    base = tiny_model(tf.ViTForImageClassification)
    keys = list(base.state_dict())
    model = trained_everywhere(tf.ViTForImageClassification, modules_to_save=["classifier"])
    head = model.base_model.model.classifier.modules_to_save["default"].weight.clone()
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == keys and torch.equal(unloaded.classifier.weight, head)


TWICE = {
    "same options": ({}, {}),
    "lite": ({}, {"r": 2}),
    "other blocks": ({"feedback_from": 2}, {"feedback_to": 2}),
    "no head": ({"modules_to_save": ["lm_head"]}, {}),
    "head": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "r": 2}),
    "tokens": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [4]}),
    "no tokens": ({"trainable_token_indices": [3, 5]}, {}),
}


@pytest.mark.parametrize("other", [False, True], ids=["", "with another adapter"])
@pytest.mark.parametrize("options", TWICE)
def test_base_model_is_adapted_twice_without_unload(options: str, other: bool, tmp_path: Path) -> None:
    """As when a cell of a notebook is run again: the new adapter takes the place of the old one entirely."""
    first, second = TWICE[options]
    tied = {"tie_word_embeddings": "tokens" in options}
    base = tiny_model(tf.LlamaForCausalLM, **tied)
    expected, keys = output_of(base), list(base.state_dict())
    model = trained_everywhere(base, **first)
    if other:
        model.add_adapter("other", TopDownConfig(r=3))
    with pytest.warns(UserWarning, match="PEFT for a second time"):
        again = adapted(base, **second)
    fresh = adapted(tiny_model(tf.LlamaForCausalLM, **tied), **second)
    assert torch.equal(output_of(again), expected) and again.active_adapters == ["default"]
    assert {n: p.requires_grad for n, p in again.named_parameters() if ".other." not in n} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }
    again.save_pretrained(tmp_path, selected_adapters=["default"])
    steer(again)
    again.load_adapter(tmp_path, "default")
    assert torch.equal(output_of(again), expected)
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(fresh).keys()
    unloaded = again.unload()
    assert list(unloaded.state_dict()) == keys and torch.equal(output_of(unloaded), expected)
    assert forwards_on_instances(base) == []


@pytest.mark.parametrize("before", [True, False], ids=["hooks before", "hooks after"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_with_hooks_of_accelerate(model_class: type, before: bool) -> None:
    """accelerate replaces the forward of every module of a model that is spread over devices or offloaded."""
    base = tiny_model(model_class)
    expected_of_base = output_of(base)
    expected = output_of(steered(tiny_model(model_class)))
    if before:
        for module in base.modules():
            add_hook_to_module(module, ModelHook())
    model = steered(base)
    if not before:
        for module in model.modules():
            add_hook_to_module(module, ModelHook())
    assert torch.equal(output_of(model), expected)
    unloaded = model.unload()
    assert torch.equal(output_of(unloaded), expected_of_base)
    remove_hook_from_module(unloaded, recurse=True)
    assert torch.equal(output_of(unloaded), expected_of_base)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_unloaded_model_is_adapted_again(model_class: type) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    again = adapted(steered(base).unload())
    assert torch.equal(output_of(again), expected)
    assert len(adapter_parameters(again)) == 2 + 2 * NUM_BLOCKS


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.merge_and_unload(safe_merge=True),
    ],
    ids=["merge_and_unload", "merge_adapter", "safe_merge"],
)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_merge_is_refused_before_anything_is_touched(model_class: type, merge: Any) -> None:
    model = trained_everywhere(model_class)
    expected = output_of(model)
    with pytest.raises(NotImplementedError, match="unload"):
        merge(model)
    assert torch.equal(output_of(model), expected)
    assert model.get_model_status().merged_adapters == []


def test_get_peft_model_of_a_config_from_a_dict() -> None:
    config = TopDownConfig(r=2).to_dict()
    model = get_peft_model(tiny_model(tf.ViTModel), PeftConfig.from_peft_type(**config))
    assert model.peft_config["default"].r == 2
