"""Gradient checkpointing with feedback."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .dropout import dropout_off
from .run import SINGLE_PASS, Run, ThreadState

if TYPE_CHECKING:
    from .block_forward import BlockForward


_FUNCTION = "_gradient_checkpointing_func"  # what transformers calls it on each module that it may checkpoint


class CheckpointWithFeedback:
    """A gradient checkpointing function that hands the feedback to the checkpointed call as tensor arguments.

    The blocks run again in the backward pass, when the forward is over and perhaps another one has begun. As an
    argument the feedback is there again, and it gets its gradient also from reentrant checkpointing.

    Args:
        checkpoint: the function that transformers has set.
        state: has the running forward.
        blocks: the block that a checkpointed call runs, or all of a stage where the model checkpoints stages.
    """

    def __init__(self, checkpoint: Callable, state: ThreadState, *blocks: "BlockForward") -> None:
        self.checkpoint = checkpoint
        self.state = state
        self.blocks = blocks

    def __call__(self, function: Callable, *args: Any) -> Any:
        run = self.state.current.run or SINGLE_PASS
        if not torch.is_grad_enabled():  # pass 1 of a frozen model: nothing to recompute
            return function(*args)
        if all(block.is_skipped(run) for block in self.blocks):
            return function(*args)
        again = run.part([block.index for block in self.blocks])
        # Reentrant checkpointing computes gradients of what is inside only if an argument wants one.
        given = [*again.feedback.values(), *self.trained_inside(again)]
        call = functools.partial(self.run, function, again, len(given))
        with self.compiled_call(run) if torch.compiler.is_compiling() else nullcontext():
            output = self.checkpoint(call, *given, *args)
        self.note(run, args[0], output)
        return output

    @contextmanager
    def compiled_call(self, run: Run) -> Iterator[None]:
        """Change before a compiled call what the call changes itself elsewhere, as it may not while it is traced."""
        run.steered.extend(run.feedback)
        with self.without_dropout(run):
            yield

    def without_dropout(self, run: Run) -> AbstractContextManager[None]:
        """Pass 1 of these blocks runs without dropout, also when it runs again."""
        off = run.first_pass and run.without_dropout
        return dropout_off(*(block.module for block in self.blocks)) if off else nullcontext()

    def trained_inside(self, run: Run) -> list[nn.Parameter]:
        """The parameters of the adapter that the blocks use themselves, which are those of LoRA of pass 2."""
        return [
            parameter
            for added in run.second_pass
            for block in self.blocks
            for layer in block.path.second_pass_layers(added.adapter_name, block.index)
            for parameter in layer.trained(added.adapter_name)
        ]

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Note the output with its graph, which the inside of a reentrant checkpoint has not. Shape: [b, n, d]"""
        [block] = self.blocks
        block.note(run, hidden_states, output)

    def run(self, function: Callable, run: Run, number: int, *args: Any) -> Any:
        """The checkpointed call, in the forward and again in the backward pass, where it may be another thread."""
        if torch.compiler.is_compiling():  # traced in the running forward, and not run again from here
            return function(*args[number:])
        feedback = dict(zip(run.feedback, args[:number], strict=False))
        previous, self.state.current.run = self.state.current.run, replace(run, feedback=feedback)
        try:
            with self.without_dropout(run):
                return function(*args[number:])
        finally:
            self.state.current.run = previous


def wrap_checkpoint(module: nn.Module, wrapper: type, state: ThreadState, *blocks: "BlockForward") -> None:
    """Put a `wrapper` around the module's gradient checkpointing function, if it has one."""
    checkpoint = getattr(module, _FUNCTION, None)
    if checkpoint is not None and not isinstance(checkpoint, wrapper):
        setattr(module, _FUNCTION, wrapper(checkpoint, state, *blocks))


def unwrap_checkpoint(module: nn.Module) -> None:
    """Put back what `wrap_checkpoint` has wrapped."""
    checkpoint = getattr(module, _FUNCTION, None)
    if isinstance(checkpoint, CheckpointWithFeedback):
        setattr(module, _FUNCTION, checkpoint.checkpoint)
