"""`pass2_target_modules`: which linear layers get LoRA of pass 2, and what is refused."""

from typing import Any

import pytest
import torch
import transformers as tf

from toast_peft import TopDownConfig

from ..helpers import adapted, assert_same, leaves_untouched, paths_of
from ..zoo import tiny_model
from .test_pass2_lora import LORA, both


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (["q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        (r".*layers\.[23]\..*(q|k)_proj", ["q_proj", "k_proj"]),
    ],
)
def test_targets_are_in_the_blocks_that_run_in_pass_2(targets: Any, names: list[str]) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), feedback_to=2, feedback_from=3, pass2_target_modules=targets)
    found = {(int(name[0]), name.split("-")[-2]) for name in paths_of(model)[0].second_pass}
    assert found == {(index, name) for index in (2, 3) for name in names}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "c_attn"], "has 'c_attn', which matches no module"),
        (["lm_head"], "has 'lm_head', which matches lm_head, which is none; expected linear layers of the blocks"),
        (["model.layers.0.self_attn.q_proj"], "which matches model.layers.0.self_attn.q_proj, which is none"),
        (r".*q_proj", "which matches model.layers.0.self_attn.q_proj, which is none"),
        (["input_layernorm"], "which matches model.layers.0.input_layernorm, which is none"),
        (["self_attn"], "which matches model.layers.0.self_attn, which is none"),
    ],
)
def test_other_targets_are_refused(targets: Any, message: str) -> None:
    base = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        adapted(base, feedback_to=2, pass2_target_modules=targets)


@pytest.mark.parametrize("model_class", [tf.ConvNextForImageClassification, tf.SwinForImageClassification])
def test_models_with_stages_are_refused(model_class: type) -> None:
    with pytest.raises(ValueError, match="`pass2_target_modules` is not for .*a ConvNet or a hierarchical"):
        adapted(tiny_model(model_class), **LORA)


def test_modules_to_save_that_are_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="`modules_to_save` names 'fc1', .* PEFT would copy it"):
        adapted(tiny_model(tf.ViTForImageClassification), modules_to_save=["fc1"], **LORA)


def test_gate_for_other_tokens_than_those_of_a_target_is_refused() -> None:
    model = both(tf.LlamaForCausalLM)
    layer = next(iter(paths_of(model)[0].second_pass.values()))
    x, gate = torch.zeros(2, 9, 32).double(), torch.ones(2, 9, 1).double()
    assert_same(layer(x.flatten(0, 1), "default", gate), layer(x, "default", gate).flatten(0, 1))
    with pytest.raises(ValueError, match=r"takes an input of shape \[1, 9, 32\], and the gate is for .* \[2, 9\]"):
        layer(x[:1], "default", gate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pass2_target_modules": []}, "`pass2_target_modules` is empty"),
        ({"pass2_target_modules": "("}, "`pass2_target_modules` is .*; expected 'all-linear', a list of module names"),
        ({"pass2_bias": "all"}, "`pass2_bias='all'` is about `pass2_target_modules`"),
        ({"pass2_bias": "lora_only"}, "`pass2_bias` is 'lora_only'; expected 'none' or 'all'"),
        ({"pass2_r": -1}, "`pass2_r` is -1; expected a positive rank, or 0 for biases only"),
        ({"pass2_r": 0, "pass2_target_modules": "all-linear"}, "`pass2_r=0` and `pass2_bias='none'` add nothing"),
        ({"pass2_lora_alpha": 0}, "`pass2_lora_alpha` is 0"),
        ({"pass2_lora_dropout": 1}, "`pass2_lora_dropout` is 1"),
        ({"trainable_parts": ["pass2"]}, "`trainable_parts` has 'pass2', which this adapter does not have"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopDownConfig(**options)


def test_is_trained_by_default_if_there_are_targets() -> None:
    assert "pass2" not in TopDownConfig().trainable_parts
    assert TopDownConfig(**LORA).trainable_parts == ["prompt", "transform", "linear1", "linear2", "pass2"]
