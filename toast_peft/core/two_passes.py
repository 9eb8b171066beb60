"""What makes a backbone run twice, put on it and taken away again as one."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from .backbone_forward import BackboneForward
from .block_forward import BlockForward
from .layers import FeedbackPath, feedback_paths
from .model_forward import ModelForward
from .output_feedback import OutputHook
from .second_pass_lora import SecondPassHook, SecondPassLora
from .stored_pass import Origin, StoredInput
from .value_projection import ValueColumns, ValueHooks

if TYPE_CHECKING:
    from .stack import Stack


class TwoPasses:
    """The replaced forwards and the hooks of one backbone.

    Args:
        stack: the backbone and its blocks.
        path: computes the feedback.
        model: the whole model, which returns the loss.
        value_columns: where the values are in the output of fused projections, `None` for those of values only.

    Attributes:
        last_variational_loss: the last one that became a part of a loss, without gradient, for logging. Shape: []
    """

    block_forward_class: ClassVar[type[BlockForward]] = BlockForward
    backbone_forward_class: ClassVar[Callable[..., BackboneForward]] = BackboneForward

    def __init__(
        self, stack: "Stack", path: FeedbackPath, model: nn.Module, value_columns: ValueColumns | None = None
    ) -> None:
        self.path = path
        self.value_columns = value_columns
        self.block_forwards = [
            self.block_forward_class(module, index, path) for index, module in self.numbered_modules(stack)
        ]
        self.backbone_forward = self.backbone_forward_class(stack, path, self.block_forwards)
        self.value_hooks: dict[int, ValueHooks] = {}
        self.second_pass_hooks: dict[str, SecondPassHook] = {}
        self.output_hook: OutputHook | None = None
        self.model_forward = self._forward_of(model)
        self.last_variational_loss: torch.Tensor | None = None
        self.stored_input: StoredInput | None = None

    def _forward_of(self, model: nn.Module) -> ModelForward:
        """The new forward of the model, which it may have already for another backbone in it."""
        for _, path in feedback_paths(model):
            found = path.passes.model_forward
            if found.module is model:
                found.paths.append(self.path)
                return found
        return ModelForward(model, self.path)

    def numbered_modules(self, stack: "Stack") -> Iterable[tuple[int, nn.Module]]:
        """The modules that a pass can skip."""
        return enumerate(stack.blocks)

    def steer(self, index: int, value_projection: nn.Module) -> None:
        """Let the value projection of a block receive feedback."""
        if index not in self.value_hooks:
            self.value_hooks[index] = ValueHooks(value_projection, self.path.state, index, self.value_columns)

    def add_in_second_pass(self, name: str, target: nn.Module, layer: SecondPassLora) -> None:
        """Let a linear layer add something to its output in pass 2."""
        if name not in self.second_pass_hooks:
            self.second_pass_hooks[name] = SecondPassHook(target, self.path.state, layer)

    def steer_output(self) -> None:
        """Let the output of the backbone receive feedback."""
        if self.output_hook is None:
            assert self.backbone_forward.final_norm is not None  # the config has been checked
            self.output_hook = OutputHook(self.backbone_forward.final_norm, self.path.state)

    def accept_stored(self, model: nn.Module, origin: Origin) -> None:
        """Let a model take what pass 1 has computed as one more input.

        Raises:
            ValueError: if it already takes that of another pass 1, or another model around the backbone takes it.
        """
        accepted = self.stored_input
        if accepted is None:
            self.stored_input = StoredInput(model, self.path.state, origin)
        elif (accepted.module, accepted.origin) != (model, origin):
            raise ValueError(
                f"The model takes the stored features of {type(accepted.module).__name__} with {accepted.origin}, and "
                f"now those of {type(model).__name__} with {origin} were stored; expected the same. Load the model "
                "anew for these."
            )

    def remove(self) -> None:
        """Leave the modules as they were."""
        if self.stored_input is not None:  # it may be in front of the backbone's
            self.stored_input.remove()
        self.model_forward.paths.remove(self.path)
        if not self.model_forward.paths:
            self.model_forward.remove()
        for forward in (self.backbone_forward, *self.block_forwards):
            forward.remove()
        for hooks in (*self.value_hooks.values(), *self.second_pass_hooks.values()):
            hooks.remove()
        if self.output_hook is not None:
            self.output_hook.remove()
