"""The one running state: what is going on in the forward of a backbone, in which two passes run."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .open_rows import rows_of

if TYPE_CHECKING:
    from .joint_pass import JointPass
    from .prompt_input import GivenPrompt
    from .stored_pass import StoredPass
    from .variational_loss import Reconstruction


class SecondPass(NamedTuple):
    """What pass 2 adds besides the feedback.

    Args:
        adapter_name: whose LoRA of pass 2 adds something.
        gate: how far the gate is open for each token, `None` without one. Shape: [b, n, 1]
        scale: the strength of the adapter.
    """

    adapter_name: str
    gate: torch.Tensor | None
    scale: float

    def of_rows(self, rows: torch.Tensor, batch_size: int) -> "SecondPass":
        """That of some rows of the batch."""
        return self._replace(gate=rows_of(self.gate, rows, batch_size))


@dataclass
class Run:
    """State of one forward of the backbone.

    Args:
        feedback_from: blocks from here on are skipped in pass 1, unless `complete`.
        feedback_to: blocks below are skipped in pass 2, unless `repeat_lower_blocks`.
        double_bias: whether the bias of a value projection is added once more (official ViT).
        repeat_lower_blocks: run the blocks below `feedback_to` in pass 2 as well, so that something recorded inside of
            them (attentions) is there.
        without_dropout: pass 1 runs without dropout, as something in the model is random.
        first_pass: which pass is running.
        complete: pass 1 runs all blocks, as without feedback its output is that of the model.
        outputs: what the blocks below `feedback_to` returned in pass 1.
        last_output: what the last block below `feedback_from` returned in pass 1.
        feedback: for each block index what its value projection adds in pass 2.
        of_values: whether that is added to the values, and not to the input that they are computed from.
        reconstruction: compares inputs of blocks with what `linear1` makes of their outputs, if that is wanted.
        input_sizes: where feedback is a map, for each block or stage the height and width of its input.
        inputs: in a ConvNet, for each stage its input in pass 2, without the feedback.
        steered: the blocks whose value projection has been called in pass 2.
        kept_below: the outputs of the blocks below are kept in pass 1; those below `feedback_to` by default.
        keeps_features: keep the features in pass 2 as well, whose first rows are of pass 1.
        second_pass: what pass 2 adds besides the feedback; `None` in pass 1, and where that is nothing.
    """

    feedback_from: int
    feedback_to: int
    double_bias: bool
    repeat_lower_blocks: bool
    without_dropout: bool = False
    first_pass: bool = True
    complete: bool = False
    outputs: dict[int, Any] = field(default_factory=dict)
    last_output: Any = None
    feedback: dict[int, torch.Tensor] = field(default_factory=dict)
    of_values: bool = False
    reconstruction: "Reconstruction | None" = None
    input_sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    steered: list[int] = field(default_factory=list)
    kept_below: int = 0
    keeps_features: bool = False
    second_pass: SecondPass | None = None

    def __post_init__(self) -> None:
        self.kept_below = max(self.kept_below, self.feedback_to)

    def part(self, indices: Iterable[int]) -> "Run":
        """What some blocks need to run again, without the tensors of the others."""
        indices = list(indices)
        kept, feedback = ({i: values[i] for i in indices if i in values} for values in (self.outputs, self.feedback))
        return replace(self, outputs=kept, feedback=feedback, reconstruction=None, inputs={})

    def without_feedback(self) -> "Run":
        """Pass 2 of closed rows: the blocks that pass 1 has run return their outputs again."""
        return replace(self, feedback={}, feedback_to=self.feedback_from, second_pass=None)

    def of_rows(self, rows: torch.Tensor, batch_size: int) -> "Run":
        """Pass 2 of some rows of the batch."""
        feedback = {index: rows_of(td, rows, batch_size) for index, td in self.feedback.items()}
        outputs = {index: rows_of(output, rows, batch_size) for index, output in self.outputs.items()}
        second_pass = None if self.second_pass is None else self.second_pass.of_rows(rows, batch_size)
        return replace(self, feedback=feedback, outputs=outputs, steered=[], inputs={}, second_pass=second_pass)


# A forward without feedback.
SINGLE_PASS = Run(0, 0, double_bias=False, repeat_lower_blocks=True, first_pass=False)


class Current:
    """What is going on in one thread.

    Attributes:
        run: the state of the running forward, `None` outside of one.
        variational_loss: that of the last forward in training, until it is added to a loss.
        mask: of the last forward with feedback, how much of each token was selected. Shape: [b, n, 1], or [b, h, w, 1]
        opened: of that forward, where the adapter may change something, if rows may be skipped. Shape: as the mask
        gate: of that forward, how far the gate was open, a factor of the mask; `None` without one. Shape: as the mask
        attention_mask: what that forward was called with.
        stored: what pass 1 of the next forward has computed already, `None` if it has to run.
        joint: the two passes of the next forward if they run side by side, `None` if one after the other.
        prompt: what the features are compared with instead of the learned prompt, `None` if that is not replaced.
        without_second_pass: whether only what pass 1 computes is wanted, so that the output may be that of pass 1.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.variational_loss: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.opened: torch.Tensor | None = None
        self.gate: torch.Tensor | None = None
        self.attention_mask: Any = None
        self.stored: StoredPass | None = None
        self.joint: JointPass | None = None
        self.prompt: GivenPrompt | None = None
        self.without_second_pass = False


class ThreadState(threading.local):
    """The running state of a backbone, each thread its own; copies start empty."""

    def __init__(self) -> None:
        # In an object of its own: torch.compile loses what is stored on a threading.local when a graph breaks.
        self.current = Current()

    def __deepcopy__(self, memo: dict) -> "ThreadState":
        return ThreadState()

    def __reduce__(self) -> tuple:
        return ThreadState, ()
