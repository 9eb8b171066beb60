"""Finds what the two passes run over in a model: blocks, stages of a ConvNet or of a hierarchical transformer."""

from torch import nn

from .architectures import CONVOLUTIONAL_ARCHITECTURES, HIERARCHICAL_ARCHITECTURES
from .block_stack import BlockStack, find_block_stacks, known_backbones, model_type_of
from .config import TopDownConfig
from .hierarchical_stack import make_hierarchical_stack
from .stage_stack import make_stage_stack

_WITH_STAGES = (
    (CONVOLUTIONAL_ARCHITECTURES, make_stage_stack),
    (HIERARCHICAL_ARCHITECTURES, make_hierarchical_stack),
)


def find_stacks(model: nn.Module, config: TopDownConfig) -> list[BlockStack]:
    """Find what the two passes run over. Touches nothing.

    Args:
        model: the model to adapt.
        config: says which part of it is in the feedback loop.

    Returns:
        One [`StageStack`] for a ConvNet, one [`HierarchicalStack`] for a hierarchical transformer; for others what
        [`find_block_stacks`] finds.

    Raises:
        ValueError: if there is none, if it is not clear which of several is meant, or if `config` does not fit.
    """
    for architectures, make_stack in _WITH_STAGES:
        known = known_backbones(model, architectures)
        # Inside of another model, a detector for example, `target_modules` may be about that one's attention.
        if known and (config.target_modules is None or model_type_of(model) in architectures):
            several = sorted([*known, *known_backbones(model)])
            if len(several) > 1:
                raise ValueError(
                    f"{type(model).__name__} has several backbones: {several}. Choose a transformer with a list of "
                    "blocks by `target_modules`, or adapt the module that holds the other before it becomes a part of "
                    "this model."
                )
            [(backbone_name, architecture)] = known.items()
            return [make_stack(model, backbone_name, architecture, config)]
    return find_block_stacks(model, config)
