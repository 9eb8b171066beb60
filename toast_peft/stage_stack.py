"""Finds the stem and the stages of a ConvNet, and what shape of feedback each of them receives."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .architectures import ConvolutionalArchitecture
from .block_stack import BlockStack, find_submodule, join_names, model_type_of
from .config import TopDownConfig


@dataclass
class StageShape:
    """A stage as a link of the feedback path; the first one together with the stem.

    Args:
        convolution: one of its convolutions, whose device and dtype new parameters take.
        in_channels: channels of its input, to which the feedback is added. Of the first one these are the image's.
        out_channels: channels of its output.
        stride: how many times smaller its output is than its input, in height and width.
    """

    convolution: nn.Conv2d
    in_channels: int
    out_channels: int
    stride: int


@dataclass(kw_only=True)
class StageStack(BlockStack):
    """The part of a ConvNet that the two passes run over; its blocks are the stages.

    `names` are those of the modules whose input the feedback is added to: the stem for stage 0, else the stage itself.

    Args:
        stem: the layers between the image and the first stage.
        stem_name: its full name in the model.
        nodes: one for each stage.
        feedback_from: the feedback starts from the output of stage `feedback_from - 1`.
    """

    stem: nn.Module
    stem_name: str
    nodes: list[StageShape]
    feedback_from: int

    @property
    def hidden_size(self) -> int:
        """Number of channels of the features that the feedback starts from."""
        return self.nodes[self.feedback_from - 1].out_channels

    @property
    def adapted_names(self) -> list[str]:
        """Full names of the modules that get another forward, and so must stay what they are."""
        return [*super().adapted_names, self.stem_name]


def make_stage_stack(
    model: nn.Module, backbone_name: str, architecture: ConvolutionalArchitecture, config: TopDownConfig
) -> StageStack:
    """The stages of the ConvNet `backbone_name`.

    Raises:
        ValueError: if `config` does not fit.
    """
    backbone = model.get_submodule(backbone_name)
    stages, stem = backbone.get_submodule(architecture.stages), backbone.get_submodule(architecture.stem)
    stages_name, stem_name = (
        join_names(backbone_name, architecture.stages),
        join_names(backbone_name, architecture.stem),
    )
    _check_config(config)
    first, last = config.feedback_range(len(stages))
    names = {f"{stages_name}.{index}" if index > 0 else stem_name: index for index in range(last, first)}
    return StageStack(
        backbone=backbone,
        blocks=stages,
        blocks_name=stages_name,
        final_norm=_final_norm(backbone, architecture, config),
        normalize_features=architecture.final_norm is not None,
        model_type=model_type_of(backbone),
        has_cache=False,
        value_columns=None,
        value_projections={},
        names=names,
        stem=stem,
        stem_name=stem_name,
        nodes=[_node(stage, stem if index == 0 else None) for index, stage in enumerate(stages)],
        feedback_from=first,
    )


def _check_config(config: TopDownConfig) -> None:
    given = [
        name
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "double_value_bias")
        if getattr(config, name) not in (None, False)
    ]
    if given:
        raise ValueError(
            f"`{given[0]}={getattr(config, given[0])!r}` is about the value projections of a transformer; a ConvNet "
            "has none. Its stages are found by the model type; choose among them with `feedback_from` and "
            "`feedback_to`, which count stages."
        )


def _final_norm(backbone: nn.Module, architecture: ConvolutionalArchitecture, config: TopDownConfig) -> str | None:
    """The path of the final norm, after which the features are compared with the prompt."""
    num_stages = len(backbone.get_submodule(architecture.stages))
    first, _ = config.feedback_range(num_stages)
    if config.normalize_features and first < num_stages:
        raise ValueError(
            f"`normalize_features=True`, but the final norm fits the output of the last stage, {num_stages - 1}, and "
            f"the feedback starts from stage {first - 1}; leave it at None or False."
        )
    if architecture.final_norm is None or find_submodule(backbone, architecture.final_norm) is not None:
        return architecture.final_norm
    if config.normalize_features is not False and first == num_stages:
        raise ValueError(
            f"{type(backbone).__name__} has no final norm {architecture.final_norm!r}, after which the features of a "
            f"{model_type_of(backbone)!r} are compared with the prompt. Pass normalize_features=False to compare them "
            "as they are."
        )
    return None


def _node(stage: nn.Module, stem: nn.Module | None) -> StageShape:
    of_stage = list(_convolutions_and_poolings(stage))
    of_stem = [] if stem is None else list(_convolutions_and_poolings(stem))
    convolutions = [layer for layer in of_stem + of_stage if isinstance(layer, nn.Conv2d)]
    return StageShape(
        convolution=convolutions[0],
        in_channels=convolutions[0].in_channels,
        out_channels=convolutions[-1].out_channels,
        # A stage makes its input smaller once, a residual branch and its shortcut both; the stem with every layer.
        stride=math.prod(map(_stride, of_stem)) * max(map(_stride, of_stage)),
    )


def _convolutions_and_poolings(module: nn.Module) -> Iterator[nn.Module]:
    """In the order of the module's definition, without what other methods have added."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        yield module
    for child in module.children():
        yield from _convolutions_and_poolings(child)


def _stride(layer: nn.Module) -> int:
    return max(layer.stride) if isinstance(layer.stride, tuple) else layer.stride
