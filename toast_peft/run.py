"""The state of one forward of a backbone, in which two passes run."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .feedback import hidden_states_of
from .variational_loss import Reconstruction


@dataclass
class Run:
    """State of one forward of the backbone.

    Args:
        feedback_from: blocks from here on are skipped in pass 1.
        feedback_to: blocks below are skipped in pass 2, unless `repeat_lower_blocks`.
        double_bias: whether the bias of a value projection is added once more (official ViT).
        repeat_lower_blocks: run the blocks below `feedback_to` in pass 2 as well, so that something recorded inside of
            them (attentions) is there.
        without_dropout: pass 1 runs without dropout, as something in the model is random.
        first_pass: which pass is running.
        outputs: what the blocks below `feedback_to` returned in pass 1.
        last_output: what the last block that ran in pass 1 returned.
        feedback: for each block index what its value projection adds in pass 2.
        reconstruction: compares inputs of blocks with what `linear1` makes of their outputs, if that is wanted.
        input_sizes: where feedback is a map, for each block or stage the height and width of its input.
        inputs: in a ConvNet, for each stage its input in pass 2, without the feedback.
        steered: the blocks whose value projection has been called in pass 2.
    """

    feedback_from: int
    feedback_to: int
    double_bias: bool
    repeat_lower_blocks: bool
    without_dropout: bool = False
    first_pass: bool = True
    outputs: dict[int, Any] = field(default_factory=dict)
    last_output: Any = None
    feedback: dict[int, torch.Tensor] = field(default_factory=dict)
    reconstruction: Reconstruction | None = None
    input_sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    steered: list[int] = field(default_factory=list)

    @property
    def features(self) -> torch.Tensor:
        """Hidden states after block `feedback_from - 1`. Shape: [b, n, d]"""
        return hidden_states_of(self.last_output)

    def keep(self, index: int, output: Any) -> None:
        """Keep what pass 2 or the feedback path needs of what a block computed in pass 1."""
        self.last_output = output
        if max(index, 0) < self.feedback_to:  # the stem of a ConvNet, -1, belongs to its stage 0
            self.outputs[index] = output

    def part(self, indices: Iterable[int]) -> "Run":
        """What some blocks need to run again, without the tensors of the others."""
        indices = list(indices)
        kept, feedback = ({i: values[i] for i in indices if i in values} for values in (self.outputs, self.feedback))
        return replace(self, outputs=kept, feedback=feedback, reconstruction=None, inputs={})

    def in_form_of_blocks(self, hidden_states: torch.Tensor) -> Any:
        """Hidden states as a block of this model returns them."""
        return (hidden_states, *self.last_output[1:]) if isinstance(self.last_output, tuple) else hidden_states


# A forward without feedback.
SINGLE_PASS = Run(0, 0, double_bias=False, repeat_lower_blocks=True, first_pass=False)


class Slots:
    """What `ThreadState` holds for one thread."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.variational_loss: torch.Tensor | None = None


class ThreadState(threading.local):
    """The running forward, each thread its own; copies start empty.

    `variational_loss` is that of the last forward in training, until it is added to a loss.
    """

    def __init__(self) -> None:
        # In an object of their own: torch.compile loses what is stored on a threading.local when a graph breaks.
        self.slots = Slots()

    @property
    def run(self) -> Run | None:
        """The state of the running forward."""
        return self.slots.run

    @run.setter
    def run(self, run: Run | None) -> None:
        self.slots.run = run

    @property
    def variational_loss(self) -> torch.Tensor | None:
        """The variational loss that nobody has taken yet."""
        return self.slots.variational_loss

    @variational_loss.setter
    def variational_loss(self, loss: torch.Tensor | None) -> None:
        self.slots.variational_loss = loss

    def __deepcopy__(self, memo: dict) -> "ThreadState":
        return ThreadState()

    def __reduce__(self) -> tuple:
        return ThreadState, ()
