"""The forward of the whole model: takes a prompt as one more input, and gives the variational loss with its own loss.

Below it, somewhere in the model, are the backbones that run twice.

Notation used for tensor shapes:
    - b: batch size
    - d: hidden size
"""

import inspect
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from .batch_rows import note_rows, sees_images_of_texts
from .layers import FeedbackPath
from .prompt_input import PROMPT_INPUT, GivenPrompt, given_prompt, path_for, repeated_rows
from .replaced_forward import ReplacedForward
from .variational_loss import forget_variational_loss, with_variational_loss


class ModelForward(ReplacedForward):
    """Forward of a model with one more argument, `topdown_prompt`; its `generate`, if it has one, takes it as well.

    It is on the model, and not a part of a PEFT model's forward: that one is not called without a task type.

    Args:
        module: the model.
        path: that of a backbone in it.

    Attributes:
        paths: those of all its backbones.
    """

    def __init__(self, module: nn.Module, path: FeedbackPath) -> None:
        super().__init__(module, path.state)
        self.paths = [path]
        self.generate = PromptedGenerate(module, self) if hasattr(type(module), "generate") else None

    @property
    def __signature__(self) -> inspect.Signature:
        return self.signature_with(PROMPT_INPUT)

    def __call__(self, *args: Any, topdown_prompt: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: the other arguments.
            topdown_prompt: what to compare the features with; `None` for the learned prompt. Shape: [d] or [b, d]
            kwargs: the other arguments.
        """
        if args and args[0] is self.module:  # accelerate's `unwrap_model(keep_fp32_wrapper=False)` binds it once more
            args = args[1:]
        if self.module.training:
            self._expect_losses()
        for path in self.paths:
            current = path.state.current
            if current.row_names is not None or current.prompt is not None:
                note_rows(path, self.module, args, kwargs)
        if topdown_prompt is None:
            output = self.original(*args, **kwargs)
        else:
            output = self._prompted(topdown_prompt, *args, **kwargs)
        for path in self.paths:
            current = path.state.current
            current.model_runs = False
            if current.variational_loss is not None:
                output = with_variational_loss(output, path, self.module, kwargs)
        return output

    def _expect_losses(self) -> None:
        """Begin with those of this forward; a reference model or an evaluation in between is none."""
        for path in self.paths:
            if path.active_adapters:
                forget_variational_loss(path.state.current)
                path.state.current.model_runs = True

    def _prompted(self, topdown_prompt: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        path = path_for(self.paths, topdown_prompt)
        current = path.state.current
        # Not `given_prompt`, as torch.compile has only begun to trace generators.
        outer, current.prompt = current.prompt, GivenPrompt(topdown_prompt)
        try:
            note_rows(path, self.module, args, kwargs)
            return self.original(*args, **kwargs)
        finally:
            current.prompt = outer

    def remove(self) -> None:
        super().remove()
        if self.generate is not None:
            self.generate.remove()


class PromptedGenerate(ReplacedForward):
    """`generate` of a model with one more argument, `topdown_prompt`.

    It stays out of the arguments that `generate` hands on to the forwards, of which it repeats the rows of tensors, be
    it one prompt for all, and of which some models keep only those that they know.

    Args:
        module: the model.
        model_forward: its forward.
    """

    method: ClassVar[str] = "generate"

    def __init__(self, module: nn.Module, model_forward: ModelForward) -> None:
        super().__init__(module, model_forward.state)
        self.model_forward = model_forward

    @property
    def __signature__(self) -> inspect.Signature:
        return self.signature_with(PROMPT_INPUT)

    def __call__(self, *args: Any, topdown_prompt: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate. Arguments as those of the forward and of `generate`."""
        paths = self.model_forward.paths
        with nullcontext() if topdown_prompt is None else given_prompt(paths, topdown_prompt), repeated_rows(paths):
            for path in paths:
                if sees_images_of_texts(path, self.module):  # `generate` may run it before the model
                    note_rows(path, self.module, args, kwargs)
            return self.original(*args, **kwargs)
