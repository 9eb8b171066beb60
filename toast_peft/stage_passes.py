"""Runs a ConvNet twice.

    image --> pass 1, stem, stages 0 .. feedback_from - 1 --> features --> feedback path --> td of every stage
    image --> pass 2, stem and stages from feedback_to on, each with td added to its input --> output

As in `passes.py`, with stages for blocks. The stem belongs to stage 0: the feedback of that stage is added to the
image, and where pass 2 does not need stage 0 it does not run the stem either.

Batch norms in training mode update their running statistics once in a forward, in the last pass that they run in, so
with zero feedback exactly as those of the base model do. Both passes normalise with the statistics of the batch then.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import TopDownConfig
from .convolutional_feedback import ConvolutionalFeedbackPath
from .dropout import has_dropout
from .passes import BackboneForward, BlockForward, TwoPasses
from .run import Run, ThreadState
from .stage_stack import StageStack
from .value_projection import ValueColumns

_STEM = -1  # its index; the stages count from 0


class StageForward(BlockForward):
    """Forward of a stage or the stem: skips it where a pass does not need it, and adds its feedback in pass 2."""

    def __init__(self, module: nn.Module, state: ThreadState, index: int, path: ConvolutionalFeedbackPath) -> None:
        super().__init__(module, state, index, path)
        self.node = max(index, 0)
        self.receives_feedback = index != 0  # that of stage 0 has been added to the image

    def is_skipped(self, run: Run) -> bool:
        """Whether the running pass does not need this stage."""
        if run.first_pass:
            return self.node >= run.feedback_from
        return self.node < run.feedback_to and not run.repeat_lower_blocks

    def _first_pass(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        node = self.path.nodes[self.node]
        if self.is_skipped(run):
            # The layers that follow expect the stage's channels; what they make of them is not used.
            return hidden_states.new_zeros(len(hidden_states), node.out_channels, 1, 1)
        if self.receives_feedback:
            self._check_channels(hidden_states, node.in_channels)
            run.input_sizes[self.node] = tuple(hidden_states.shape[-2:])
        runs_again = self.node >= run.feedback_to or run.repeat_lower_blocks
        with running_statistics_kept(self.module) if runs_again else nullcontext():
            output = self.original(hidden_states)
        run.keep(self.index, output)
        return output

    def _second_pass(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.receives_feedback:
            run.inputs[self.node] = hidden_states
        if self.receives_feedback and self.node in run.feedback:
            td = run.feedback[self.node]
            hidden_states = hidden_states + td.to(device=hidden_states.device, dtype=hidden_states.dtype)
        output = self.original(hidden_states)
        if self.index != _STEM:
            self.reconstruct(run, run.inputs[self.node], output)
        return output

    def _check_channels(self, hidden_states: torch.Tensor, expected: int) -> None:
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"The input of stage {self.node} has {hidden_states.shape[1]} channels, but the feedback for it has "
                f"{expected}, as many as its first convolution takes."
            )


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalise with the batch but leave their running statistics alone."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    norms = [norm for norm in norms if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class ConvolutionalBackboneForward(BackboneForward):
    """Forward of the backbone of a ConvNet: pass 1, feedback, pass 2."""

    def _feedback(self, run: Run, config: TopDownConfig, adapter_name: str) -> dict[int, torch.Tensor]:
        # Contiguous, or torch chooses the kernel of the transform by what requires a gradient.
        features = run.features.movedim(1, -1).contiguous()
        normalize = self.normalize_features if config.normalize_features is None else config.normalize_features
        # The final norm has the channels of the last stage.
        fits = run.feedback_from == len(self.blocks)
        compared = self.final_norm(features) if normalize and fits else features
        return self.path(features, adapter_name, compared, run.input_sizes)

    def _new_run(self, config: TopDownConfig, kwargs: dict[str, Any]) -> Run:
        is_random = has_dropout(self.module)  # nothing is recorded inside of a stage
        return Run(*config.feedback_range(len(self.blocks)), False, is_random, is_random)


class TwoPassesOverStages(TwoPasses):
    """The replaced forwards of one ConvNet.

    Args:
        stack: the backbone, its stem and its stages.
        path: computes the feedback.
    """

    block_forward_class = StageForward
    backbone_forward_class = ConvolutionalBackboneForward

    def numbered_modules(self, stack: StageStack) -> Iterable[tuple[int, nn.Module]]:
        """The modules that a pass can skip, the stem with them."""
        return [(_STEM, stack.stem), *enumerate(stack.blocks)]

    def add_value_projection(self, index: int, value_projection: nn.Module, columns: ValueColumns | None) -> None:
        """Nothing: the stages add the feedback themselves."""
