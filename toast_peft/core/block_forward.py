"""Skips a block in a pass that does not need it, keeps what it gives, and gives it its feedback in pass 2."""

from typing import Any

import torch
from torch import nn

from .checkpoint import unwrap_checkpoint
from .layers import FeedbackPath
from .replaced_forward import ReplacedForward
from .run import Run


class BlockForward(ReplacedForward):
    """Forward of a block: skips it where a pass does not need it, and gives it its feedback in pass 2."""

    def __init__(self, module: nn.Module, index: int, path: FeedbackPath) -> None:
        super().__init__(module, path.state)
        self.index = index
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.state.current.run
        if run is None:
            self._check_that_no_feedback_is_missing()
            return self.original(*args, **kwargs)
        if run.first_pass:
            return self._first_pass(run, *args, **kwargs)
        if self.is_skipped(run):
            return run.outputs[self.index]
        return self._second_pass(run, *args, **kwargs)

    def is_skipped(self, run: Run) -> bool:
        """Whether the running pass does not need this block."""
        if run.first_pass:
            return self.index >= run.feedback_from and not run.complete
        return self.index < run.feedback_to and not run.repeat_lower_blocks

    def _check_that_no_feedback_is_missing(self) -> None:
        if self.path.active_adapter is not None:
            raise RuntimeError(
                f"Block {self.index} was called past the forward of the module that owns the blocks, so it would not "
                "get the feedback of the active adapter. Call the whole model, or disable the adapter to run single "
                "blocks. If the model itself does this, or hands its blocks to torch.utils.checkpoint, TOAST does not "
                "support it."
            )

    def _first_pass(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        if self.is_skipped(run):
            # Unchanged hidden states in the form a block of this model returns them.
            return run.last_output
        if self.index in run.outputs:  # it runs several times (ALBERT), and only the last output is kept
            run.repeat_lower_blocks = True
        output = self.original(*args, **kwargs)
        self.keep(run, output)
        return output

    def _second_pass(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        if run.reconstruction is not None and self.index in run.steered:
            raise NotImplementedError(
                f"`variational_weight` is set, but block {self.index} runs several times in a pass (as in ALBERT) and "
                "its `linear1` computes the input of a block that runs once; set it to 0."
            )
        output = self.original(*args, **kwargs)
        if self.index in run.feedback and self.index not in run.steered:
            raise NotImplementedError(
                f"Block {self.index}, a {type(self.module).__name__}, does not call the value projection that its "
                "feedback goes to, so the adapter would have no effect. TOAST does not support a model that uses "
                "the weight of this layer in another way; name another layer with `target_modules`."
            )
        if run.keeps_features:
            self.keep(run, output)
        self.reconstruct(run, args[0] if args else kwargs["hidden_states"], output)
        return output

    def note(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Keep what comes later needs of what the block has computed in the running pass. Shape: [b, n, d]"""
        if run.first_pass:
            self.keep(run, output)
        else:
            self.reconstruct(run, hidden_states, output)

    def keep(self, run: Run, output: Any) -> None:
        """Keep what pass 2 or the feedback path needs of what the block has computed in pass 1."""
        if self.index < run.feedback_from:
            run.last_output = output
        if max(self.index, 0) < run.kept_below:  # the stem of a ConvNet, -1, belongs to its stage 0
            run.outputs[self.index] = output

    def reconstruct(self, run: Run, hidden_states: torch.Tensor, output: Any) -> None:
        """Add this block's part to the variational loss, where that is wanted. Shape: [b, n, d]"""
        if run.reconstruction is not None and self.index in run.feedback:
            run.reconstruction.add(self.index, hidden_states, output)

    def remove(self) -> None:
        super().remove()
        unwrap_checkpoint(self.module)
