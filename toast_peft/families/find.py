"""Finds what the two passes run over in a model, by the family that it is of."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..config import TopDownConfig
from ..core.stack import Stack
from .convnets import CONVNETS, make_convnet_stack
from .hierarchies import HIERARCHIES, make_hierarchical_stack
from .lookup import Row, known_backbones, model_type_of
from .model_types import ARCHITECTURES
from .second_pass_targets import with_second_pass_targets
from .transformers import find_transformer_stacks

_WITH_STAGES: tuple[tuple[Mapping[str, Row], Callable[..., Stack]], ...] = (
    (CONVNETS, make_convnet_stack),
    (HIERARCHIES, make_hierarchical_stack),
)


def find_stacks(model: nn.Module, config: TopDownConfig) -> Sequence[Stack]:
    """Find what the two passes run over. Touches nothing.

    Args:
        model: the model to adapt.
        config: says which part of it is in the feedback loop.

    Returns:
        One [`ConvNetStack`] for a ConvNet, one [`HierarchicalStack`] for a hierarchical transformer; for others what
        [`find_transformer_stacks`] finds, with the linear layers of pass 2.

    Raises:
        ValueError: if there is none, if it is not clear which of several is meant, or if `config` does not fit.
    """
    for table, make_stack in _WITH_STAGES:
        known = known_backbones(model, table)
        # Inside of another model, a detector for example, `target_modules` may be about that one's attention.
        if known and (config.target_modules is None or model_type_of(model) in table):
            several = sorted([*known, *known_backbones(model, ARCHITECTURES)])
            if len(several) > 1:
                raise ValueError(
                    f"{type(model).__name__} has several backbones: {several}. Choose a transformer with a list of "
                    "blocks by `target_modules`, or adapt the module that holds the other before it becomes a part of "
                    "this model."
                )
            for name in ("pass2_target_modules", "feedback_to_output"):
                if getattr(config, name):
                    raise ValueError(
                        f"`{name}` is not for {type(model).__name__}, a ConvNet or a hierarchical transformer; leave "
                        "it out (instead of `for_images()` take `TopDownConfig(r=8)`)."
                    )
            [(backbone_name, architecture)] = known.items()
            return [make_stack(model, backbone_name, architecture, config)]
    stacks = find_transformer_stacks(model, config)
    without_norm = [stack.model_type for stack in stacks if stack.final_norm is None]
    if config.feedback_to_output and without_norm:
        raise ValueError(
            f"`feedback_to_output=True` adds to what the final norm gives, but {without_norm[0]!r} has none or it is "
            "not known; leave it out."
        )
    return with_second_pass_targets(model, stacks, config)
