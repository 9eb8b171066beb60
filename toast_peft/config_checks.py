"""Checks the values of a `TopDownConfig`, which may come from a file that somebody has edited.

The type of each option is that of its annotation, read strictly: a bool is no number and a number is finite.
"""

import re
from collections.abc import Callable
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

TRAINABLE_PARTS = ("prompt", "transform", "linear1", "linear2")


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
