"""Checks the values of a `TopDownConfig`, which may come from a file that somebody has edited.

The type of each option is that of its annotation, read strictly: a bool is no number and a number is finite.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

TRAINABLE_PARTS = ("prompt", "transform", "linear1", "linear2", "pass2", "output")
# The first weights by which feedback, or what else pass 2 adds, is more than zero.
_LAST_PARTS = ("linear2", "pass2", "output")
_ABOUT_PRETRAINED = ("pretrained_revision", "pretrained_subfolder", "share_pretrained_feedback")


def _any(value: Any) -> bool:
    return True


def _not_negative(value: float) -> bool:
    return value >= 0


def _positive(value: float | list[int]) -> bool:
    return all(number > 0 for number in (value if isinstance(value, (list, tuple, set)) else [value]))


def _are_names(value: str | list[str]) -> bool:
    """Whether a string is a regular expression; the names in a list can be any."""
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error:
        return False
    return True


def _are_parts(value: str | list[str]) -> bool:
    parts = {value} if isinstance(value, str) else set(value)
    return bool(parts) and parts <= set(TRAINABLE_PARTS)


def _are_token_indices(value: list[int] | dict[str, list[int]]) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(index >= 0 for indices in lists for index in indices)


_BLOCK = ("a block index or a fraction of the depth", _not_negative)
_NAMES = ("a list of module names, or a valid regular expression as a string", _are_names)
_SWITCH = ("True or False", _any)
_TEXT = ("a string", _any)
# What is expected of an option in words, and what a value must fulfil besides being None or of the right type.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("0 (full feedback layers) or a positive rank (Lite)", _not_negative),
    "lora_alpha": ("a positive number", _positive),
    "lora_dropout": ("a probability in [0, 1)", lambda value: 0 <= value < 1),
    "transform_r": ("0 (a full matrix) or a positive rank", _not_negative),
    "feedback_from": _BLOCK,
    "feedback_to": _BLOCK,
    "trainable_parts": (f"at least one of {list(TRAINABLE_PARTS)}", _are_parts),
    "init_weights": _SWITCH,
    "init_prompt": ("'features' or 'random'", _any),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": ("a block index or a list of them", _any),
    "modules_to_save": ("a list of module names, for example ['classifier']", _any),
    "trainable_token_indices": ("a list of token indices, or a dict with one for each embedding", _are_token_indices),
    "normalize_features": ("True, False or None", _any),
    "double_value_bias": _SWITCH,
    "skip_closed_rows": _SWITCH,
    "gate": ("'sequence', 'token' or None", _any),
    "gate_is_causal": ("a dict with True or False for each list of blocks", _any),
    "gate_report": ("a dict of numbers", _any),
    "feedback_scale": ("a finite number; 1.0 is the feedback as it was trained, 0.0 none", _any),
    "pass2_target_modules": ("'all-linear', a list of module names, or a valid regular expression", _are_names),
    "pass2_r": ("a positive rank, or 0 for biases only", _not_negative),
    "pass2_lora_alpha": ("a positive number", _positive),
    "pass2_lora_dropout": ("a probability in [0, 1)", lambda value: 0 <= value < 1),
    "feedback_to_output": _SWITCH,
    "pass2_bias": ("'none' or 'all'", _any),
    "variational_weight": ("0 or a positive number", _not_negative),
    "variational_ignore_padding": _SWITCH,
    "pretrained_feedback": ("the path of a saved adapter or its id on the Hub, as a string", _any),
    "pretrained_revision": _TEXT,
    "pretrained_subfolder": _TEXT,
    "share_pretrained_feedback": _SWITCH,
    "base_feedback": _TEXT,
    "base_feedback_revision": _TEXT,
    "base_feedback_subfolder": _TEXT,
    "base_feedback_sha256": _TEXT,
    "backbone_type": ("a model type, as a string", _any),
    "num_blocks": ("the number of blocks of the model, or a list with that of each stack", _positive),
    "hidden_size": ("the hidden size of the model", _positive),
    "inference_mode": _SWITCH,
}


def check_values(config: Any, names: list[str]) -> None:
    """Check options of a config; numbers of other libraries become those of Python, which can be saved as JSON.

    Args:
        config: a dataclass.
        names: the options to check.

    Raises:
        ValueError: for the first value that is not of its type or makes no sense.
    """
    annotations = get_type_hints(type(config))
    for name in names:
        value, annotation = getattr(config, name), annotations[name]
        expected, holds = _EXPECTED.get(name, (f"a value of the type {annotation}", _any))
        if not is_of_type(value, annotation) or not (value is None or holds(value)):
            raise ValueError(f"`{name}` is {value!r}; expected {expected}.")
        if isinstance(value, Real) and not isinstance(value, (bool, int, float)):
            setattr(config, name, int(value) if isinstance(value, Integral) else float(value))


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type that an annotation says; a tuple or a set counts as a list."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(is_of_type(value, part) for part in parts)
    if origin is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(is_of_type(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(value, value)]
        return isinstance(value, dict) and all(is_of_type(k, parts[0]) and is_of_type(v, parts[1]) for k, v in pairs)
    if annotation in (int, float):
        return isinstance(value, Integral if annotation is int else Real) and _is_number(value)
    return isinstance(value, annotation)


def _is_number(value: Any) -> bool:
    """Neither a bool nor NaN, infinite or too large for float32."""
    return not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max


def parts_of(config: Any) -> list[str]:
    """The parts that an adapter has, of those that can be trained."""
    there = {"pass2": config.pass2_target_modules is not None, "output": config.feedback_to_output}
    return [part for part in TRAINABLE_PARTS if there.get(part, True)]


def check_combinations(config: Any) -> None:
    """Check options that are right by themselves, and may not fit each other.

    Raises:
        ValueError: for the first that do not.
    """
    _check_range(config)
    _check_pretrained(config)
    _check_second_pass(config)
    if config.skip_closed_rows and config.double_value_bias:
        raise ValueError(
            "`skip_closed_rows=True` cannot be used with `double_value_bias=True`, by which pass 2 differs from "
            "pass 1 also where the feedback is zero; set one of them to False."
        )
    if config.gate is not None and config.double_value_bias:
        raise ValueError(
            f"`gate={config.gate!r}` cannot be used with `double_value_bias=True`, by which pass 2 differs from "
            "pass 1 also where the gate is closed; set `gate=None` or `double_value_bias=False`."
        )
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError(
            "`layers_to_transform` cannot be used when `target_modules` is a regular expression; "
            "select the blocks in the expression."
        )


def warn_of_no_effect(config: Any) -> None:
    """Warn of options of a new adapter that change nothing, or by which it never learns anything."""
    defaults = {option.name: option.default for option in fields(config)}
    conditions = {
        "`r=0` trains full matrices; give a rank, for example `r=8`": (config.r == 0, ("lora_alpha", "lora_dropout")),
        "there are no `pass2_target_modules`": (
            config.pass2_target_modules is None,
            ("pass2_r", "pass2_lora_alpha", "pass2_lora_dropout"),
        ),
        "`variational_weight` is 0": (config.variational_weight == 0, ("variational_ignore_padding",)),
    }
    for reason, (holds, names) in conditions.items():
        for name in names:
            if holds and getattr(config, name) != defaults[name]:
                warnings.warn(f"`{name}={getattr(config, name)!r}` has no effect: {reason}.", stacklevel=5)
    starts_at_zero = config.r > 0 or config.init_weights
    if starts_at_zero and config.pretrained_feedback is None and not set(_LAST_PARTS) & set(config.trainable_parts):
        warnings.warn(
            f"`trainable_parts={config.trainable_parts}` leaves out 'linear2', which starts at zero, so that there is "
            "never any feedback; add it, unless its weights come from elsewhere.",
            stacklevel=5,
        )


def _check_pretrained(config: Any) -> None:
    for name in _ABOUT_PRETRAINED:
        if getattr(config, name) and config.pretrained_feedback is None:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` is about `pretrained_feedback`, which is not given; name the "
                "adapter to start from there."
            )
    for name in ("share_pretrained_feedback", "base_feedback"):
        if getattr(config, name) and config.r == 0:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` needs fixed matrices, but with `r=0` they are trained; "
                "expected a positive rank (Lite)."
            )


def _check_range(config: Any) -> None:
    for name in ("feedback_from", "feedback_to"):
        value = getattr(config, name)
        if isinstance(value, float) and value > 1:
            raise ValueError(
                f"`{name}` is {value!r}; as a float it is a fraction of the depth, between 0.0 and 1.0. "
                f"Give a block index as an int."
            )


def _check_second_pass(config: Any) -> None:
    has_targets = config.pass2_target_modules is not None
    if has_targets and not config.pass2_target_modules:
        raise ValueError("`pass2_target_modules` is empty; name linear layers of the blocks, or leave it out.")
    if config.pass2_bias != "none" and not has_targets:
        raise ValueError(
            f"`pass2_bias={config.pass2_bias!r}` is about `pass2_target_modules`, which is not given; name the linear "
            "layers that get a bias there."
        )
    if has_targets and config.pass2_r == 0 and config.pass2_bias == "none":
        raise ValueError(
            "`pass2_r=0` and `pass2_bias='none'` add nothing to `pass2_target_modules`; give a rank, or "
            "`pass2_bias='all'` for biases only."
        )
    missing = [part for part in config.trainable_parts if part not in parts_of(config)]
    if missing:
        option = {"pass2": "pass2_target_modules", "output": "feedback_to_output"}[missing[0]]
        raise ValueError(
            f"`trainable_parts` has {missing[0]!r}, which this adapter does not have; leave it out, or choose it with "
            f"`{option}`."
        )
