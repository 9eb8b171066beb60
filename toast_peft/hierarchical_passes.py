"""Runs a hierarchical transformer twice, as `passes.py` does, with feedback that is a map of tokens.

Its value projections do not see the tokens as they lie in the image: Swin cuts them into windows, SegFormer and PVT
shrink the map before. The feedback goes through the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .checkpointing import CheckpointWithFeedback, unwrap_checkpoint, wrap_checkpoint
from .config import TopDownConfig
from .hierarchical_feedback import HierarchicalFeedbackPath
from .hierarchical_stack import HierarchicalStack
from .passes import BackboneForward, BlockForward, TwoPasses
from .run import Run, ThreadState
from .value_projection import ValueColumns, ValueHooks


def in_windows(block: nn.Module, td: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
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


def shrunk(block: nn.Module, td: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
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
    attention = block.attention
    names = ("sequence_reduction_ratio", "spatial_reduction_ratio")  # of SegFormer and PVT
    ratio = next(getattr(attention, name) for name in names if hasattr(attention, name))
    patches = F.avg_pool2d(td.movedim(-1, 1), ratio).flatten(2).transpose(1, 2)
    if patches.shape[1] != hidden_states.shape[1]:
        raise NotImplementedError(
            f"The attention has {hidden_states.shape[1]} values for {td.shape[1]} x {td.shape[2]} tokens, not one for "
            f"each {ratio} x {ratio} of them. TOAST does not support it (linear attention of PVT, for example)."
        )
    return patches


ARRANGEMENTS = {"windows": in_windows, "shrunk": shrunk}


class HierarchicalBlockForward(BlockForward):
    """Forward of a block: notes its size in pass 1, and hands its own input on where pass 1 does not need it."""

    def _first_pass(self, run: Run, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_skipped(run):
            return run.in_form_of_blocks(hidden_states)
        run.input_sizes[self.index] = tuple(args[0] if isinstance(args[0], (tuple, list)) else args[:2])
        return super()._first_pass(run, hidden_states, *args, **kwargs)


class StageCheckpoint(CheckpointWithFeedback):
    """A gradient checkpointing function of a whole stage."""

    def __call__(self, function: Callable, *args: Any) -> Any:
        run = self.state.run
        if torch.is_grad_enabled() and run is not None and run.first_pass and not self.blocks[0].is_skipped(run):
            # The features would come from inside of a checkpoint.
            raise NotImplementedError(
                "TOAST does not support gradient checkpointing of whole stages when something before the feedback is "
                "trained as well. Switch gradient checkpointing off."
            )
        return super().__call__(function, *args)

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Nothing: what a stage returns is not the output of a block."""


class HierarchicalBackboneForward(BackboneForward):
    """Forward of the backbone: pass 1, feedback, pass 2."""

    def __init__(
        self,
        stack: HierarchicalStack,
        path: HierarchicalFeedbackPath,
        state: ThreadState,
        block_forwards: list[BlockForward],
    ) -> None:
        super().__init__(stack, path, state, block_forwards)
        # Each stage with its blocks.
        self.stages = [
            (stack.backbone.get_submodule(name), [b for b in block_forwards if stack.stages[b.index] == number])
            for number, name in enumerate(stack.stage_names)
        ]

    def wrap_checkpoints(self) -> None:
        super().wrap_checkpoints()
        for stage, blocks in self.stages:
            wrap_checkpoint(stage, StageCheckpoint, self.state, *blocks)

    def _feedback(self, run: Run, config: TopDownConfig, adapter_name: str) -> dict[int, torch.Tensor]:
        return self.path(self._features(run, config), adapter_name, run.input_sizes)

    def _features(self, run: Run, config: TopDownConfig) -> torch.Tensor:
        # The final norm has the channels of the last stage.
        in_last_stage = self.path.stages[run.feedback_from - 1] == self.path.stages[-1]
        return super()._features(run, config) if in_last_stage else run.features

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

    def __init__(self, stack: HierarchicalStack, path: HierarchicalFeedbackPath) -> None:
        super().__init__(stack, path)
        self.arrangement = ARRANGEMENTS[stack.arrangement]

    def add_value_projection(self, index: int, value_projection: nn.Module, columns: ValueColumns | None) -> None:
        """Let the value projection of a block receive feedback."""
        if index not in self.value_hooks:
            arrange = functools.partial(self.arrangement, self.block_forwards[index].module)
            self.value_hooks[index] = ValueHooks(value_projection, columns, self.state, index, arrange)
