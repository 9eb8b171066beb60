"""Hierarchical transformers (Swin, SegFormer, ...), whose stages halve height and width and widen the channels.

Beyond the paper. The feedback is a map of tokens. Within a stage it is the path of `core/feedback.py`. Where it goes
down into the next stage, `linear1` undoes what leads up from there: as patch merging makes one token of four, it makes
four of one. The value projections do not see the tokens as they lie in the image: Swin cuts them into windows,
SegFormer and PVT shrink the map before. The feedback goes through the same.

Notation used for tensor shapes:
    - b: batch size
    - h, w, d: height, width and channels of a block's input
    - h', w', d': those of what comes from the block above
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..config import TopDownConfig
from ..core.active_adapters import ActiveAdapter
from ..core.backbone_forward import BackboneForward
from ..core.block_forward import BlockForward
from ..core.checkpoint import CheckpointWithFeedback, unwrap_checkpoint, wrap_checkpoint
from ..core.layers import FeedbackLayer, FeedbackPath
from ..core.run import Run
from ..core.stack import Stack
from ..core.two_passes import TwoPasses
from ..core.value_projection import ValueHooks, input_size
from .lookup import blocks_at, find_submodule, join_names, model_type_of


@dataclass(frozen=True)
class HierarchicalArchitecture:
    """Names inside the backbone of a hierarchical transformer (`SwinModel`, `SegformerModel`, ...).

    Args:
        stages: path from the backbone to the `nn.ModuleList` of stages.
        blocks: path from a stage to its `nn.ModuleList` of blocks.
        value_projection: path from a block to the linear layer that computes the attention's values.
        final_norm: path from the backbone to the norm that follows the last block, `None` if there is none.
        arrangement: what the value projections see of the map of tokens: its windows, or the map made smaller.
        normalize_features: as in `Architecture`; only features of the last stage fit the norm.
    """

    stages: str
    blocks: str
    value_projection: str
    final_norm: str | None
    arrangement: Literal["windows", "shrunk"]
    normalize_features: bool = False

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether a module of this model type has the layers that the row names; other versions may have others."""
        stages = find_submodule(backbone, self.stages)
        lists = [find_submodule(stage, self.blocks) for stage in stages] if isinstance(stages, nn.ModuleList) else []
        blocks = [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]
        return bool(blocks) and all(find_submodule(block, self.value_projection) is not None for block in blocks)


HIERARCHIES = {
    "pvt_v2": HierarchicalArchitecture("encoder.layers", "blocks", "attention.value", None, "shrunk"),
    "segformer": HierarchicalArchitecture("stages", "blocks", "attention.v_proj", None, "shrunk"),
    "swin": HierarchicalArchitecture(
        "encoder.layers", "blocks", "attention.v_proj", "layernorm", "windows", normalize_features=True
    ),
    "swinv2": HierarchicalArchitecture(
        "encoder.layers", "blocks", "attention.self.value", "layernorm", "windows", normalize_features=True
    ),
}


@dataclass(kw_only=True)
class HierarchicalStack(Stack):
    """The blocks of a hierarchical transformer through all its stages.

    Args:
        block_names: the full names of the blocks in the model.
        stage_names: paths from the backbone to the stages.
        stages: the stage of each block.
        hidden_sizes: the number of channels of each block.
        value_projections: for each block that receives feedback its value projection.
        arrangement: how the tokens that its value projections see lie in the image.
    """

    block_names: list[str]
    stage_names: list[str]
    stages: list[int]
    hidden_sizes: list[int]
    value_projections: dict[int, nn.Module]
    arrangement: Literal["windows", "shrunk"]

    @property
    def hidden_size(self) -> int:
        """Number of channels of the features that the feedback starts from."""
        return self.hidden_sizes[max(self.value_projections)]

    @property
    def adapted_names(self) -> list[str]:
        """Full names of the modules that get another forward or hooks, and so must stay what they are."""
        return [*self.names, *self.block_names]

    def _new_feedback_path(self) -> FeedbackPath:
        return HierarchicalFeedbackPath(self)

    def _new_passes(self, path: FeedbackPath, model: nn.Module) -> TwoPasses:
        return TwoPassesOverHierarchy(self, path, model)


def make_hierarchical_stack(
    model: nn.Module, backbone_name: str, architecture: HierarchicalArchitecture, config: TopDownConfig
) -> HierarchicalStack:
    """The blocks of the hierarchical transformer `backbone_name`.

    Raises:
        ValueError: if `config` does not fit.
    """
    backbone = model.get_submodule(backbone_name)
    stage_names = [f"{architecture.stages}.{i}" for i in range(len(blocks_at(backbone, architecture.stages)))]
    blocks = {
        f"{stage_name}.{architecture.blocks}.{index}": stage
        for stage, stage_name in enumerate(stage_names)
        for index in range(len(blocks_at(backbone, f"{stage_name}.{architecture.blocks}")))
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


_MERGED = 2  # tokens in height and in width that become one in the next stage


class HierarchicalFeedbackLayer(FeedbackLayer):
    """One block's share of the feedback path.

    Args:
        value_projection: the layer whose device and dtype new parameters take.
        in_features: d'.
        from_next_stage: whether the block above is of the next stage. Then `linear1` has four times as many outputs,
            and `init_weights=True` starts it with channel `i` to channel `i mod d` of all four tokens, scaled such
            that the variance stays.
    """

    def __init__(self, value_projection: nn.Module, in_features: int, from_next_stage: bool) -> None:
        super().__init__(value_projection, in_features, input_size(value_projection))
        self.num_tokens = _MERGED**2 if from_next_stage else 1

    def _new_linear1(self, in_features: int) -> nn.Module:
        return self._new_linear(in_features, self.num_tokens * self.out_features)

    def init_identity(self, linear1: torch.Tensor) -> None:
        """Set the weight of `linear1` to its start. Shape: [d, d'], from the next stage [4 d, d']"""
        channels = torch.arange(self.in_features)
        linear1.zero_()
        for token in range(self.num_tokens):
            linear1[token * self.out_features + channels % self.out_features, channels] = self._identity_scale

    def _identity(self, z: torch.Tensor) -> torch.Tensor:
        """What `init_identity` sets `linear1` to, without weights."""
        return self._fold_channels(z).repeat(1, 1, 1, self.num_tokens)

    def _arrange(self, z: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """The output of `linear1` as a map of the size of the block's input, of which it may have a row too many.

        Args:
            z: Shape: [b, h', w', d], from the next stage [b, h', w', 4 d]
            size: h and w. If they are odd, what is too much at the bottom and on the right is cut off.

        Raises:
            RuntimeError: if the stage above is not about half as high and wide.
        """
        if self.num_tokens > 1:
            z = _unmerge(z)
        missing = [wanted - found for wanted, found in zip(size, z.shape[1:3], strict=True)]
        if max(map(abs, missing)) >= _MERGED:
            raise RuntimeError(
                f"Feedback for {list(z.shape[1:3])} tokens has to be added to {list(size)}. TOAST supports stages "
                "that halve height and width."
            )
        return F.pad(z, (0, 0, 0, missing[1], 0, missing[0])) if any(missing) else z


def _unmerge(z: torch.Tensor) -> torch.Tensor:
    """Shape: [b, h', w', 4 d] -> [b, 2 h', 2 w', d]"""
    z = z.unflatten(-1, (_MERGED, _MERGED, -1))  # b, h', w', rows, columns, d
    return z.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class HierarchicalFeedbackPath(FeedbackPath):
    """Feature selection and the chain of feedback layers through several stages.

    Args:
        stack: the blocks of all stages.
    """

    keeps_shape = False

    def __init__(self, stack: HierarchicalStack) -> None:
        super().__init__(stack.value_projections[max(stack.value_projections)])
        self.hidden_sizes = stack.hidden_sizes
        self.stages = stack.stages

    def _layer_name(self, index: int, config: TopDownConfig) -> str:
        """The first layer of a chain starts from the output of its own block, so it is one of its own there."""
        above = index + 1
        is_start = above == config.feedback_range(len(self.stages))[0] < len(self.stages)
        return f"{index}_start" if is_start else str(index)

    def _new_layer(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        source = min(index + 1, config.feedback_range(len(self.stages))[0] - 1)
        from_next_stage = self.stages[source] > self.stages[index]
        return HierarchicalFeedbackLayer(value_projection, self.hidden_sizes[source], from_next_stage)

    def layers_of(self, adapter_name: str) -> list[tuple[int, FeedbackLayer]]:
        """The chain of an adapter, from the top down: indices of blocks with their layers."""
        config = self.selection.topdown_config[adapter_name]
        first, last = config.feedback_range(len(self.stages))
        indices = range(first - 1, last - 1, -1)
        return [(index, self.layer(self._layer_name(index, config))) for index in indices]


def in_windows(block: Any, td: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Cut feedback into windows as `SwinLayer.forward` cuts the hidden states, shifted in every second block.

    Args:
        block: has the `window_size` and `shift_size`, which it has set to the image of this forward.
        td: feedback. Shape: [b, h, w, d]
        hidden_states: what it will be added to. Shape: [b * windows, window_size ** 2, d]

    Returns:
        The feedback in the shape of `hidden_states`.
    """
    size, shift = int(block.window_size), int(block.shift_size)
    height, width = td.shape[1:3]
    td = F.pad(td, (0, 0, 0, -width % size, 0, -height % size))
    if shift > 0:
        td = torch.roll(td, shifts=(-shift, -shift), dims=(1, 2))
    windows = td.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return windows.flatten(3, 4).flatten(0, 2)


def shrunk(block: Any, td: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Average feedback over the patches that SegFormer and PVT make one key and value of.

    Args:
        block: its attention has the size of the patches.
        td: feedback. Shape: [b, h, w, d]
        hidden_states: what it will be added to. Shape: [b, n', d]

    Returns:
        The feedback in the shape of `hidden_states`.

    Raises:
        NotImplementedError: if there is not one value for each patch.
    """
    ratio = reduction_ratio(block)
    patches = F.avg_pool2d(td.movedim(-1, 1), ratio).flatten(2).transpose(1, 2)
    if patches.shape[1] != hidden_states.shape[1]:
        raise NotImplementedError(
            f"The attention has {hidden_states.shape[1]} values for {td.shape[1]} x {td.shape[2]} tokens, not one for "
            f"each {ratio} x {ratio} of them. TOAST does not support it (linear attention of PVT, for example)."
        )
    return patches


def reduction_ratio(block: Any) -> int:
    """How many tokens in height and in width one key and value of SegFormer and PVT is made of."""
    names = ("sequence_reduction_ratio", "spatial_reduction_ratio")
    return next(getattr(block.attention, name) for name in names if hasattr(block.attention, name))


ARRANGEMENTS = {"windows": in_windows, "shrunk": shrunk}


def map_size(args: tuple[Any, ...]) -> tuple[int, int]:
    """Height and width of the map that a block gets, from its arguments after the hidden states."""
    height, width = args[0] if isinstance(args[0], (tuple, list)) else args[:2]
    return height, width


class HierarchicalBlockForward(BlockForward):
    """Forward of a block: notes its size in pass 1, and hands its own input on where pass 1 does not need it."""

    def _first_pass(self, run: Run, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_skipped(run):
            is_tuple = isinstance(run.last_output, tuple)  # as the blocks of this model return hidden states
            return (hidden_states, *run.last_output[1:]) if is_tuple else hidden_states
        run.input_sizes[self.index] = map_size(args)
        return super()._first_pass(run, hidden_states, *args, **kwargs)


class StageCheckpoint(CheckpointWithFeedback):
    """A gradient checkpointing function of a whole stage."""

    def __call__(self, function: Callable, *args: Any) -> Any:
        run = self.state.current.run
        if torch.is_grad_enabled() and run is not None and run.first_pass and not self.blocks[0].is_skipped(run):
            # The features would come from inside of a checkpoint.
            raise NotImplementedError(
                "TOAST does not support gradient checkpointing of whole stages when something before the feedback is "
                "trained as well. Switch gradient checkpointing off."
            )
        return super().__call__(function, *args)

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Nothing: what a stage returns is not the output of a block. Shape: [b, n, d]"""


class HierarchicalBackboneForward(BackboneForward):
    """Forward of the backbone: pass 1, feedback, pass 2."""

    def __init__(self, stack: HierarchicalStack, path: FeedbackPath, block_forwards: list[BlockForward]) -> None:
        super().__init__(stack, path, block_forwards)
        self.stage_of_blocks = stack.stages
        # Each stage with its blocks.
        self.stages = [
            (stack.backbone.get_submodule(name), [b for b in block_forwards if stack.stages[b.index] == number])
            for number, name in enumerate(stack.stage_names)
        ]

    def wrap_checkpoints(self) -> None:
        super().wrap_checkpoints()
        for stage, blocks in self.stages:
            wrap_checkpoint(stage, StageCheckpoint, self.state, *blocks)

    def _features(self, run: Run, adapter: ActiveAdapter) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features as a map of tokens. Shape: [b, h, w, d]"""
        features, compared = super()._features(run, adapter)
        return features.unflatten(1, run.input_sizes[adapter.feedback_from - 1]), compared

    def _normalizes(self, adapter: ActiveAdapter) -> bool:
        # The final norm has the channels of the last stage.
        in_last_stage = self.stage_of_blocks[adapter.feedback_from - 1] == self.stage_of_blocks[-1]
        return in_last_stage and super()._normalizes(adapter)

    def remove(self) -> None:
        super().remove()
        for stage, _ in self.stages:
            unwrap_checkpoint(stage)


class TwoPassesOverHierarchy(TwoPasses):
    """The replaced forwards and the hooks of one hierarchical transformer.

    Args:
        stack: the backbone and the blocks of all its stages.
        path: computes the feedback.
    """

    block_forward_class = HierarchicalBlockForward
    backbone_forward_class = HierarchicalBackboneForward

    def __init__(self, stack: HierarchicalStack, path: FeedbackPath, model: nn.Module) -> None:
        super().__init__(stack, path, model)
        self.arrangement = ARRANGEMENTS[stack.arrangement]

    def steer(self, index: int, value_projection: nn.Module) -> None:
        """Let the value projection of a block receive feedback."""
        if index not in self.value_hooks:
            arrange = functools.partial(self.arrangement, self.block_forwards[index].module)
            self.value_hooks[index] = ValueHooks(value_projection, self.path.state, index, arrange=arrange)
