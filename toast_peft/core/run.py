"""The one running state: what is going on in the forward of a backbone, in which two passes run."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .active_adapters import ActiveAdapter, RowNames, Rows
from .open_rows import rows_of

if TYPE_CHECKING:
    from .joint_pass import JointPass
    from .prompt_input import GivenPrompt
    from .stored_pass import StoredPass
    from .variational_loss import Reconstruction


class SecondPass(NamedTuple):
    """What an adapter adds in pass 2 besides its feedback.

    Args:
        adapter_name: whose LoRA of pass 2 adds something.
        gate: how far the gate is open for each token, `None` without one. Shape: [b, n, 1], for some rows
            [number of rows, n, 1]
        scale: the strength of the adapter.
        rows: the rows of the batch that it is for, `None` for all.
    """

    adapter_name: str
    gate: torch.Tensor | None
    scale: float
    rows: Rows | None = None

    def of_rows(self, rows: torch.Tensor, batch_size: int) -> "SecondPass":
        """That of some rows of the batch."""
        if self.rows is None:
            return self._replace(gate=rows_of(self.gate, rows, batch_size))
        is_left, left = self.rows.among(rows)
        return self._replace(gate=None if self.gate is None else self.gate[is_left.to(self.gate.device)], rows=left)


class Selected(NamedTuple):
    """What an adapter selected in the last forward, for whoever wants to look at it.

    Args:
        mask: how much of each token, the gate included. Shape: [b, n, 1], of a map [b, h, w, 1]
        gate: how far the gate was open, a factor of the mask; `None` without one. Shape: as the mask
        rows: the rows of the batch that these are, `None` for all.
    """

    mask: torch.Tensor | None
    gate: torch.Tensor | None
    rows: Rows | None = None


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
        adapters: those that it runs with.
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
        second_pass: what adapters add in pass 2 besides the feedback; none in pass 1.
    """

    feedback_from: int
    feedback_to: int
    double_bias: bool
    repeat_lower_blocks: bool
    without_dropout: bool = False
    adapters: tuple[ActiveAdapter, ...] = ()
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
    second_pass: tuple[SecondPass, ...] = ()

    def __post_init__(self) -> None:
        self.kept_below = max(self.kept_below, self.feedback_to)

    def output_below(self, index: int) -> Any:
        """What the last block below one has returned in pass 1."""
        return (
            self.last_output
            if index == self.feedback_from
            else self.outputs[max(i for i in self.outputs if i < index)]
        )

    def part(self, indices: Iterable[int]) -> "Run":
        """What some blocks need to run again, without the tensors of the others."""
        indices = list(indices)
        kept, feedback = ({i: values[i] for i in indices if i in values} for values in (self.outputs, self.feedback))
        return replace(self, outputs=kept, feedback=feedback, reconstruction=None, inputs={})

    def without_feedback(self) -> "Run":
        """Pass 2 of closed rows: the blocks that pass 1 has run return their outputs again."""
        return replace(self, feedback={}, feedback_to=self.feedback_from, second_pass=())

    def of_rows(self, rows: torch.Tensor, batch_size: int) -> "Run":
        """Pass 2 of some rows of the batch."""
        feedback = {index: rows_of(td, rows, batch_size) for index, td in self.feedback.items()}
        outputs = {index: rows_of(output, rows, batch_size) for index, output in self.outputs.items()}
        second_pass = tuple(added.of_rows(rows, batch_size) for added in self.second_pass)
        return replace(self, feedback=feedback, outputs=outputs, steered=[], inputs={}, second_pass=second_pass)


def run_of(
    adapters: tuple[ActiveAdapter, ...], repeat_lower_blocks: bool, without_dropout: bool, of_values: bool
) -> Run:
    """The run of some adapters: pass 1 up to where the highest feedback starts, pass 2 from where the lowest ends."""
    starts, ends = zip(*[(adapter.feedback_from, adapter.feedback_to) for adapter in adapters], strict=True)
    return Run(
        max(starts),
        min(ends),
        adapters[0].config.double_value_bias,  # of the only one
        repeat_lower_blocks,
        without_dropout,
        adapters,
        of_values=of_values,
        kept_below=max(starts) if min(starts) < max(starts) else 0,
    )


# A forward without feedback.
SINGLE_PASS = Run(0, 0, double_bias=False, repeat_lower_blocks=True, first_pass=False)


class Current:
    """What is going on in one thread.

    Attributes:
        run: the state of the running forward, `None` outside of one.
        variational_loss: that of the last forward in training, until it is added to a loss.
        model_runs: whether a forward of the whole model is running, which takes the variational loss when it ends.
        selected: of the last forward with feedback, what was selected, by the names of the adapters.
        open_rows: in which rows of the batch any of them may change something, if rows may be skipped; while the
            adapters are run through, the rows of the last one. Shape: [b]
        attention_mask: what that forward was called with.
        stored: what pass 1 of the next forward has computed already, `None` if it has to run.
        joint: the two passes of the next forward if they run side by side, `None` if one after the other.
        row_names: the adapter of each row of the batch in a mixed batch, else `None`.
        prompt: what the features are compared with instead of the learned prompt, `None` if that is not replaced.
        without_second_pass: whether only what pass 1 computes is wanted, so that the output may be that of pass 1.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.variational_loss: torch.Tensor | None = None
        self.model_runs = False
        self.selected: dict[str, Selected] = {}
        self.open_rows: torch.Tensor | None = None
        self.attention_mask: Any = None
        self.stored: StoredPass | None = None
        self.joint: JointPass | None = None
        self.row_names: RowNames | None = None
        self.prompt: GivenPrompt | None = None
        self.without_second_pass = False

    @property
    def mask(self) -> torch.Tensor | None:
        """Of the last forward with one adapter, how much of each token was selected. Shape: [b, n, 1], [b, h, w, 1]"""
        return self._only_selected().mask

    @property
    def gate(self) -> torch.Tensor | None:
        """Of that forward, how far the gate was open; `None` without one. Shape: as the mask"""
        return self._only_selected().gate

    def _only_selected(self) -> Selected:
        [selected] = self.selected.values() if len(self.selected) == 1 else [Selected(None, None)]
        return selected


class ThreadState(threading.local):
    """The running state of a backbone, each thread its own; copies start empty."""

    def __init__(self) -> None:
        # In an object of its own: torch.compile loses what is stored on a threading.local when a graph breaks.
        self.current = Current()

    def __deepcopy__(self, memo: dict) -> "ThreadState":
        return ThreadState()

    def __reduce__(self) -> tuple:
        return ThreadState, ()
