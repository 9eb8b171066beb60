"""Finds the blocks of a hierarchical transformer (Swin, SegFormer, ...) through all its stages."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .architectures import HierarchicalArchitecture
from .block_stack import BlockStack, join_names, model_type_of
from .config import TopDownConfig
from .value_projection import input_size


@dataclass(kw_only=True)
class HierarchicalStack(BlockStack):
    """The part of a hierarchical transformer that the two passes run over; its blocks are those of all stages.

    Args:
        block_names: the full names of the blocks in the model.
        stage_names: paths from the backbone to the stages.
        stages: the stage of each block.
        hidden_sizes: the number of channels of each block.
        arrangement: how the tokens that its value projections see lie in the image.
    """

    block_names: list[str]
    stage_names: list[str]
    stages: list[int]
    hidden_sizes: list[int]
    arrangement: Literal["windows", "shrunk"]

    @property
    def hidden_size(self) -> int:
        """Number of channels of the features that the feedback starts from."""
        return self.hidden_sizes[max(self.value_projections)]

    @property
    def adapted_names(self) -> list[str]:
        """Full names of the modules that get another forward or hooks, and so must stay what they are."""
        return [*self.names, *self.block_names]


def make_hierarchical_stack(
    model: nn.Module, backbone_name: str, architecture: HierarchicalArchitecture, config: TopDownConfig
) -> HierarchicalStack:
    """The blocks of the hierarchical transformer `backbone_name`.

    Raises:
        ValueError: if `config` does not fit.
    """
    backbone = model.get_submodule(backbone_name)
    stage_names = [f"{architecture.stages}.{i}" for i in range(len(backbone.get_submodule(architecture.stages)))]
    blocks = {
        f"{stage_name}.{architecture.blocks}.{index}": stage
        for stage, stage_name in enumerate(stage_names)
        for index in range(len(backbone.get_submodule(f"{stage_name}.{architecture.blocks}")))
    }
    block_names = [join_names(backbone_name, name) for name in blocks]
    projections = [model.get_submodule(f"{name}.{architecture.value_projection}") for name in block_names]
    stages = list(blocks.values())
    first, last = config.feedback_range(len(blocks))
    _check_config(config, architecture, starts_in_last_stage=stages[first - 1] == stages[-1])
    return HierarchicalStack(
        backbone=backbone,
        blocks=[model.get_submodule(name) for name in block_names],
        blocks_name=join_names(backbone_name, architecture.stages),
        final_norm=architecture.final_norm,
        normalize_features=architecture.normalize_features,
        model_type=model_type_of(backbone),
        has_cache=False,
        value_columns=None,
        value_projections={index: projections[index] for index in range(last, first)},
        names={f"{block_names[index]}.{architecture.value_projection}": index for index in range(last, first)},
        block_names=block_names,
        stage_names=stage_names,
        stages=stages,
        hidden_sizes=[input_size(layer) for layer in projections],
        arrangement=architecture.arrangement,
    )


def _check_config(config: TopDownConfig, architecture: HierarchicalArchitecture, starts_in_last_stage: bool) -> None:
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` cannot be used with a hierarchical transformer, whose feedback "
                "goes through all blocks in between. Its value projections are found by the model type; choose among "
                "its blocks with `feedback_from` and `feedback_to`, which count through all stages."
            )
    if config.variational_weight > 0:
        raise ValueError(
            f"`variational_weight={config.variational_weight}` cannot be used with a hierarchical transformer, whose "
            "`linear1` between two stages does not take the output of its block."
        )
    if config.normalize_features and architecture.final_norm is not None and not starts_in_last_stage:
        raise ValueError(
            f"`normalize_features=True`, but the final norm fits the output of the last stage and the feedback starts "
            f"from another one (`feedback_from={config.feedback_from}`); leave it at None or False."
        )
