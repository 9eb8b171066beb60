"""`TopDownConfig`: its defaults, what it refuses, and the blocks that a range means."""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from peft import PeftConfig, PeftType, get_peft_model

from toast_peft import TopDownConfig
from toast_peft.config import TRAINABLE_PARTS

from ..zoo import tiny_model

OWN = TopDownConfig.__annotations__


def test_defaults() -> None:
    config = TopDownConfig(peft_type="ignored")
    assert config.peft_type is PeftType.TOPDOWN
    assert (config.r, config.init_weights, config.double_value_bias) == (0, True, False)
    assert config.trainable_parts == list(TRAINABLE_PARTS)[:4] == ["prompt", "transform", "linear1", "linear2"]
    assert config.feedback_range(12) == (12, 0)


def test_every_option_has_a_help() -> None:
    own = [field for field in fields(TopDownConfig) if field.name in OWN]
    assert {"r", "feedback_from", "feedback_to", "trainable_parts", "init_weights"} <= {field.name for field in own}
    assert [field.name for field in own if len(field.metadata.get("help", "")) < 20] == []
    assert [field.name for field in own if f"{field.name}" not in TopDownConfig.__doc__] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "`r` is -1"),
        ({"r": 2.0}, "`r` is 2.0"),
        ({"r": True}, "`r` is True"),
        ({"r": None}, "`r` is None"),
        ({"r": "4"}, "`r` is '4'"),
        ({"lora_dropout": 1.5}, "`lora_dropout` is 1.5"),
        ({"lora_dropout": -0.1}, "`lora_dropout` is -0.1"),
        ({"trainable_parts": []}, "at least one of"),
        ({"trainable_parts": ["prompt", "linear3"]}, "linear3"),
        ({"trainable_parts": "promt"}, "promt"),
        ({"feedback_from": -1}, "`feedback_from` is -1"),
        ({"feedback_from": True}, "`feedback_from` is True"),
        ({"feedback_from": "last"}, "`feedback_from` is 'last'"),
        ({"feedback_from": 1.5}, "`feedback_from` is 1.5; as a float it is a fraction"),
        ({"feedback_to": 6.0}, "`feedback_to` is 6.0; as a float it is a fraction"),
        ({"feedback_to": -0.5}, "`feedback_to` is -0.5"),
        ({"feedback_to": None}, "`feedback_to` is None"),
        ({"lora_dropout": "0.1"}, "`lora_dropout` is '0.1'"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` is nan; expected a positive number"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"lora_alpha": -1.0}, "`lora_alpha` is -1.0"),
        ({"lora_alpha": 10**400}, "`lora_alpha` is 1000"),
        ({"lora_alpha": "8"}, "`lora_alpha` is '8'"),
        ({"lora_alpha": True}, "`lora_alpha` is True"),
        ({"feedback_from": float("nan")}, "`feedback_from` is nan"),
        ({"feedback_to": [1]}, r"`feedback_to` is \[1\]"),
        ({"trainable_parts": 5}, "`trainable_parts` is 5; expected at least one of"),
        ({"trainable_parts": [["prompt"]]}, "`trainable_parts` is"),
        ({"init_weights": "no"}, "`init_weights` is 'no'; expected True or False"),
        ({"init_weights": None}, "`init_weights` is None"),
        ({"init_weights": 1}, "`init_weights` is 1"),
        ({"normalize_features": "no"}, "`normalize_features` is 'no'; expected True, False or None"),
        ({"double_value_bias": "False"}, "`double_value_bias` is 'False'"),
        ({"variational_ignore_padding": "yes"}, "`variational_ignore_padding` is 'yes'"),
        ({"inference_mode": "False"}, "`inference_mode` is 'False'"),
        ({"variational_weight": "x"}, "`variational_weight` is 'x'"),
        ({"variational_weight": -1}, "`variational_weight` is -1"),
        ({"variational_weight": float("nan")}, "`variational_weight` is nan"),
        ({"layers_to_transform": "1"}, "`layers_to_transform` is '1'; expected a block index or a list"),
        ({"layers_to_transform": ["1"]}, r"`layers_to_transform` is \['1'\]"),
        ({"layers_to_transform": [True]}, r"`layers_to_transform` is \[True\]"),
        ({"layers_to_transform": 1.0}, "`layers_to_transform` is 1.0"),
        ({"target_modules": "("}, r"`target_modules` is '\('; expected .* a valid regular expression"),
        ({"target_modules": 3}, "`target_modules` is 3"),
        ({"target_modules": [3]}, r"`target_modules` is \[3\]"),
        ({"target_modules": {"v_proj": 1}}, "`target_modules` is {'v_proj': 1}"),
        ({"exclude_modules": "*"}, r"`exclude_modules` is '\*'"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` is 'lm_head'; expected a list of module names"),
        ({"modules_to_save": [None]}, r"`modules_to_save` is \[None\]"),
        ({"trainable_token_indices": [-1]}, r"`trainable_token_indices` is \[-1\]"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "`trainable_token_indices` is {'embed_tokens'"),
        ({"trainable_token_indices": {"embed_tokens": 1}}, "`trainable_token_indices` is {'embed_tokens'"),
        ({"trainable_token_indices": 1}, "`trainable_token_indices` is 1"),
        ({"pretrained_feedback": 1}, "`pretrained_feedback` is 1; expected the path"),
        ({"backbone_type": ["vit"]}, "`backbone_type` is"),
        ({"num_blocks": "4"}, "`num_blocks` is '4'"),
        ({"num_blocks": [4, 0]}, r"`num_blocks` is \[4, 0\]"),
        ({"num_blocks": -4}, "`num_blocks` is -4"),
        ({"hidden_size": 32.0}, "`hidden_size` is 32.0"),
        ({"init_prompt": "zeros"}, "`init_prompt` is 'zeros'; expected 'features' or 'random'"),
        ({"init_prompt": None}, "`init_prompt` is None"),
        ({"target_modules": r".*v_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
    ],
    ids=str,
)
def test_senseless_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopDownConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 16}, "`lora_alpha=16` has no effect: `r=0` trains full matrices; give a rank"),
        ({"lora_dropout": 0.1}, "`lora_dropout=0.1` has no effect: `r=0`"),
        ({"r": 4, "pass2_r": 16}, "`pass2_r=16` has no effect: there are no `pass2_target_modules`"),
        ({"pass2_lora_alpha": 16}, "`pass2_lora_alpha=16` has no effect"),
        ({"pass2_lora_dropout": 0.1}, "`pass2_lora_dropout=0.1` has no effect"),
        ({"variational_ignore_padding": True}, "has no effect: `variational_weight` is 0"),
        ({"trainable_parts": ["prompt", "transform", "linear1"]}, "leaves out 'linear2', which starts at zero"),
        ({"trainable_parts": "prompt", "r": 4, "init_weights": False}, "leaves out 'linear2', which starts at zero"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_warned_of_in_new_adapters(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        config = TopDownConfig(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopDownConfig(**config.to_dict() | {"num_blocks": 4})  # as it is saved with an adapter


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16, "pass2_target_modules": "all-linear", "pass2_r": 4},
        {"trainable_parts": ["prompt"], "init_weights": False},
        {"trainable_parts": ["prompt"], "pretrained_feedback": "somewhere"},
        {"trainable_parts": ["prompt", "linear2"]},
        {"trainable_parts": ["prompt", "output"], "feedback_to_output": True},
    ],
    ids=str,
)
def test_what_has_an_effect_is_not_warned_of(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopDownConfig(**options)


@pytest.mark.parametrize("name", [field.name for field in fields(TopDownConfig) if field.name in OWN])
def test_no_option_takes_just_anything(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is <object.*; expected"):
        TopDownConfig(**{name: object()})


def test_edited_file_is_checked(tmp_path: Path) -> None:
    TopDownConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": "8"}))
    with pytest.raises(ValueError, match="`lora_alpha` is '8'; expected a positive number"):
        PeftConfig.from_pretrained(tmp_path)


def test_numbers_of_numpy_and_other_collections_are_taken(tmp_path: Path) -> None:
    """As Python's own, so that they can be saved."""
    options = {"target_modules": ("v_proj",), "layers_to_transform": (0, 1), "modules_to_save": {"classifier"}}
    config = TopDownConfig(r=np.int64(4), lora_alpha=np.float32(2), feedback_from=np.float64(0.5), **options)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.lora_alpha, loaded.feedback_from) == (4, 2.0, 0.5)
    assert loaded.target_modules == {"v_proj"} and loaded.layers_to_transform == [0, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (12, 0)),
        ({"feedback_from": 6}, (6, 0)),
        ({"feedback_to": 6}, (12, 6)),
        ({"feedback_from": 0.5, "feedback_to": 0.25}, (6, 3)),
        ({"feedback_from": 1.0, "feedback_to": 0.0}, (12, 0)),
        ({"feedback_from": 1}, (1, 0)),
    ],
    ids=str,
)
def test_range_in_a_model_of_12_blocks(options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert TopDownConfig(**options).feedback_range(12) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"feedback_from": 13},
        {"feedback_from": 0},
        {"feedback_to": 12},
        {"feedback_from": 4, "feedback_to": 4},
        {"feedback_from": 0.25, "feedback_to": 0.5},
        {"feedback_to": 1.0},
    ],
    ids=str,
)
def test_empty_or_too_long_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not fit a model with 12 blocks"):
        TopDownConfig(**options).feedback_range(12)


@pytest.mark.parametrize("parts", [("linear2", "prompt"), {"prompt", "linear2"}, ["prompt", "linear2", "prompt"]])
def test_trainable_parts_in_one_order(parts: Any) -> None:
    assert TopDownConfig(trainable_parts=parts).trainable_parts == ["prompt", "linear2"]


def test_one_part_as_a_string() -> None:
    assert TopDownConfig(trainable_parts="prompt").trainable_parts == ["prompt"]


def test_recipe_for_images() -> None:
    """Options are added to it, or are others than those that it sets."""
    model = get_peft_model(tiny_model(tf.ViTForImageClassification), TopDownConfig.for_images(pass2_r=4))
    trained = {name.split("topdown_")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{layer}_{factor}" for layer in ("linear1", "linear2") for factor in "AB"}
    assert trained == {"prompt", "transform", "pass2_A", "pass2_B", "pass2_bias"} | factors
    assert {len(p) for name, p in model.named_parameters() if "pass2_A" in name} == {4}
