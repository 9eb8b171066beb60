"""Finds the linear layers that get LoRA in pass 2: in the blocks that run in it, those from `feedback_to` on."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import TopDownConfig
from ..core.stack import Stack
from ..core.value_projection import input_size, output_size
from .lookup import about_patterns, join_names
from .structure import is_cross_attention

ALL_LINEAR = "all-linear"  # what PEFT calls it
AnyStack = TypeVar("AnyStack", bound=Stack)


def with_second_pass_targets(model: nn.Module, stacks: Sequence[AnyStack], config: TopDownConfig) -> list[AnyStack]:
    """The stacks with the linear layers that get LoRA in pass 2. Touches nothing.

    Args:
        model: the model to adapt.
        stacks: all stacks that run twice.
        config: its `pass2_target_modules` counts.

    Raises:
        ValueError: if a name matches no linear layer of the blocks that run in pass 2, or a regular expression
            something else.
    """
    wanted = config.pass2_target_modules
    if wanted is None:
        return list(stacks)
    of_stacks = [dict(_linear_layers(stack, config)) for stack in stacks]
    possible = {name for layers in of_stacks for name in layers}
    if wanted != ALL_LINEAR:
        _check_matches(model, wanted, possible)
    chosen = {name for name in possible if wanted == ALL_LINEAR or _matches(wanted, name)}
    return [
        replace(stack, second_pass={key: name for name, key in layers.items() if name in chosen})
        for stack, layers in zip(stacks, of_stacks, strict=True)
    ]


def _linear_layers(stack: Stack, config: TopDownConfig) -> Iterator[tuple[str, str]]:
    """Full names of the linear layers in the blocks that run in pass 2, and their names in the feedback path."""
    _, last = config.feedback_range(len(stack.blocks))
    for index, block in list(enumerate(stack.blocks))[last:]:
        for name in _linear_layers_in(block):
            # Their inputs are the states of an encoder: not of these tokens, and in a cache once for both passes.
            if not is_cross_attention(name):
                # PEFT takes the ends of names for `modules_to_save`, so it must not end as the layer does.
                yield join_names(stack.blocks_name, str(index), name), f"{index}-{name.replace('.', '-')}-pass2"


def _linear_layers_in(module: nn.Module, name: str = "") -> Iterator[str]:
    """Names of the linear layers in a module, of what another method has wrapped those of the wrappers."""
    if name and _is_linear(module):
        yield name
    elif not isinstance(
        module, nn.MultiheadAttention
    ):  # which takes the weights of its layers, and does not call them
        for child_name, child in module.named_children():
            yield from _linear_layers_in(child, join_names(name, child_name))


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    base = base.original_module if isinstance(base, AuxiliaryTrainingWrapper) else base  # `modules_to_save`
    # Quantised layers of other packages tell their sizes as nn.Linear does.
    has_sizes = min(input_size(base), output_size(base)) > 0
    return isinstance(base, (nn.Linear, Conv1D)) or (has_sizes and not list(base.children()))


def _matches(wanted: list[str] | str, name: str) -> bool:
    """As `target_modules` of PEFT: a regular expression for the whole name, or how names end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)


def _check_matches(model: nn.Module, wanted: list[str] | str, possible: set[str]) -> None:
    # A list says how names end, which may be those of other blocks and towers as well.
    parts = [wanted] if isinstance(wanted, str) else [[end] for end in sorted(wanted)]
    names = [name for name, _ in model.named_modules() if name and not _is_inside(name, possible)]
    for part in parts:
        matched = [name for name in names if _matches(part, name)]
        inside = possible.intersection(matched)
        outside = [name for name in matched if name not in possible]
        if not inside or (isinstance(part, str) and outside):
            found = f"matches {outside[0]}, which is none" if outside else "matches no module"
            shown = part if isinstance(part, str) else part[0]
            raise ValueError(
                f"`pass2_target_modules` has {shown!r}, which {found}; expected linear layers of the blocks that run "
                f"in pass 2, from `feedback_to` on and not of cross-attention, such as {min(possible)}."
                + ("" if matched else about_patterns(part))
            )


def _is_inside(name: str, possible: set[str]) -> bool:
    """Whether a module is a part of an adapter, or of a linear layer that another method has wrapped."""
    parents = name.split(".")
    return "feedback_path" in parents or any(".".join(parents[:end]) in possible for end in range(1, len(parents)))
