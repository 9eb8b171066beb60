"""The adapters that a forward runs with: one, several for all rows of the batch, or one for each row.

Pass 1 is the same for all of them. Each computes its feedback from it, and what pass 2 adds is the sum,

    v = W (h + sum of alpha_a * td_a over the adapters a) + b

where an adapter that is for some rows of the batch gives nothing to the others.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..config import TopDownConfig
from .batch_rows import BatchRows, repeats_of

if TYPE_CHECKING:
    from .gate import Tokens
    from .layers import FeedbackPath
    from .run import Run, SecondPass


class ActiveAdapter(NamedTuple):
    """An adapter in a forward.

    Args:
        name: its name.
        config: its config.
        feedback_from: its feedback starts from the output of the block below this one.
        feedback_to: its feedback ends at this block.
    """

    name: str
    config: TopDownConfig
    feedback_from: int
    feedback_to: int


class Rows(NamedTuple):
    """Some rows of a batch.

    Args:
        indices: which. Shape: [number of rows]
        batch_size: b.
        num_tokens: n.
    """

    indices: torch.Tensor
    batch_size: int
    num_tokens: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor. Shape: [b, ...] -> [number of rows, ...]"""
        return x[self.indices.to(x.device)]

    def put(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor for the whole batch in which these rows are `x`; the others are those of `into`, or zero.

        Args:
            x: Shape: [number of rows, ...]
            into: is changed, if it is of the same dtype. Shape: [b, ...]

        Returns:
            Shape: [b, ...]
        """
        into = x.new_zeros(self.batch_size, *x.shape[1:]) if into is None else into
        dtype = torch.promote_types(into.dtype, x.dtype)
        return into.to(dtype).index_copy_(0, self.indices.to(x.device), x.to(dtype))

    def among(self, others: torch.Tensor) -> tuple[torch.Tensor, "Rows"]:
        """What is left of them in a batch of other rows.

        Args:
            others: the rows of which that batch is made. Shape: [number of others]

        Returns:
            Which of these rows are there, and where. Shape of the first: [number of rows]
        """
        is_there = self.indices.unsqueeze(1) == others.to(self.indices.device)
        return is_there.any(1), self._replace(indices=is_there.any(0).nonzero().flatten(), batch_size=len(others))


class RowNames(NamedTuple):
    """The adapter of each row of a batch.

    Args:
        names: `None` for the base model.
        may_repeat: whether each may be for several rows that follow one another, as `generate` makes them of one.
        batch: the rows that the model was called with, `None` if they are not known.
    """

    names: tuple[str | None, ...]
    may_repeat: bool = False
    batch: BatchRows | None = None

    def of_batch(self, batch_size: int) -> list[str | None]:
        """One name for each of `batch_size` rows.

        Raises:
            ValueError: if there are more names or fewer, or if it is not known which of the rows each is for.
        """
        repeats = repeats_of(len(self.names), batch_size, self.may_repeat, self.batch)
        if repeats is None:
            raise ValueError(
                f"`adapter_names` has {len(self.names)} names and the batch has {batch_size} rows; expected one name "
                f"for each row.{'' if self.batch is None else self.batch.describe(batch_size)}"
            )
        return [name for name in self.names for _ in range(repeats)]

    def rows_of(self, adapter_name: str, features: torch.Tensor) -> Rows | None:
        """The rows of an adapter, `None` if these are all.

        Args:
            adapter_name: its name.
            features: of all rows. Shape: [b, n, d], of a map [b, h, w, d]

        Raises:
            ValueError: if there is not one name for each row.
        """
        batch_size, num_tokens = len(features), features[0, ..., 0].numel()
        indices = [row for row, name in enumerate(self.of_batch(batch_size)) if name == adapter_name]
        return None if len(indices) == batch_size else Rows(torch.tensor(indices), batch_size, num_tokens)


class PathInput(NamedTuple):
    """What the feedback path of an adapter starts from.

    Args:
        features: features of pass 1. Shape: [b, n, d]; of a map of tokens [b, h, w, d]
        compared: what the prompt is compared with, `None` for the features themselves. Shape: as the features
        tokens: what a gate has to know of the tokens besides their features.
    """

    features: torch.Tensor
    compared: torch.Tensor | None
    tokens: "Tokens | None"

    def of_rows(self, rows: Rows) -> "PathInput":
        """That of some rows of the batch."""
        compared = None if self.compared is None else rows.of(self.compared)
        return PathInput(rows.of(self.features), compared, None if self.tokens is None else self.tokens.of_rows(rows))


def compute_feedback(path: "FeedbackPath", run: "Run", inputs: Iterable[PathInput], skip_closed: bool) -> None:
    """Compute the feedback of all adapters of a forward, and what else they add in pass 2.

    Args:
        path: the feedback path of the backbone.
        run: gets it.
        inputs: one for each adapter.
        skip_closed: compute none for an adapter that changes no token, and find the rows that any of them changes.
    """
    current = path.state.current
    feedback: dict[int, torch.Tensor] = {}
    second_pass: list[SecondPass] = []
    opened: list[torch.Tensor] = []
    current.selected = {}
    for adapter, given in zip(run.adapters, inputs, strict=True):
        rows = None if current.row_names is None else current.row_names.rows_of(adapter.name, given.features)
        features, compared, tokens = given if rows is None else given.of_rows(rows)
        of_adapter = path(features, adapter.name, compared, run.input_sizes, skip_closed=skip_closed, tokens=tokens)
        add_feedback(feedback, of_adapter, rows)
        if adapter.config.pass2_target_modules is not None:
            added = path.in_second_pass(adapter.name)
            second_pass += [] if added is None else [added._replace(rows=rows)]
        if rows is not None:
            current.selected[adapter.name] = current.selected[adapter.name]._replace(rows=rows)
        if skip_closed:
            assert current.open_rows is not None
            opened.append(current.open_rows if rows is None else rows.put(current.open_rows))
    run.feedback, run.second_pass = feedback, tuple(second_pass)
    current.open_rows = torch.stack(opened).any(0) if skip_closed else None


def add_feedback(total: dict[int, torch.Tensor], feedback: Mapping[int, torch.Tensor], rows: Rows | None) -> None:
    """Add the feedback of one adapter to that of those before it.

    Args:
        total: by the index of the block; is changed. Shape of each: [b, n, d]
        feedback: of this adapter. Shape of each: [b, n, d], for some rows [number of rows, n, d]
        rows: the rows it is for, which have had none; `None` for all.
    """
    for index, td in feedback.items():
        if rows is not None:
            total[index] = rows.put(td, total.get(index))
        else:
            total[index] = total[index] + td if index in total else td


def check_together(adapters: Sequence[ActiveAdapter], training: bool) -> None:
    """Refuse several adapters of which the sum is not known.

    Raises:
        NotImplementedError: if one of several adds biases twice, or wants its variational loss.
    """
    for name, config, *_ in adapters:
        reason = (
            "adds the bias of the value projections once more (`double_value_bias=True`)"
            if config.double_value_bias
            else "is trained with a variational loss (`variational_weight`)"
            if training and config.variational_weight > 0
            else None
        )
        if reason is not None:
            raise NotImplementedError(
                f"The TOAST adapters {[adapter.name for adapter in adapters]} are active together, and {name!r} "
                f"{reason}, which TOAST supports for one adapter at a time. Activate it alone, with `set_adapter`."
            )
