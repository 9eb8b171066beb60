"""`TopDownConfig`: its defaults, what it refuses, and the blocks that a range means."""

from dataclasses import fields
from typing import Any

import pytest
from peft import PeftType

from toast_peft import TopDownConfig
from toast_peft.config import TRAINABLE_PARTS


def test_defaults() -> None:
    config = TopDownConfig(peft_type="ignored")
    assert config.peft_type is PeftType.TOPDOWN
    assert (config.r, config.init_weights, config.double_value_bias) == (0, True, False)
    assert config.trainable_parts == list(TRAINABLE_PARTS) == ["prompt", "transform", "linear1", "linear2"]
    assert config.feedback_range(12) == (12, 0)


def test_every_option_has_a_help() -> None:
    own = [field for field in fields(TopDownConfig) if field.name in TopDownConfig.__annotations__]
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
