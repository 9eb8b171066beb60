"""From what pass 1 has computed to all that pass 2 adds, for every adapter of a forward.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .active_adapters import Rows, add_feedback
from .gate import Tokens
from .run import Run, SecondPass

if TYPE_CHECKING:
    from .layers import FeedbackPath


class PathInput(NamedTuple):
    """What the feedback path of an adapter starts from.

    Args:
        features: features of pass 1. Shape: [b, n, d]; of a map of tokens [b, h, w, d]
        compared: what the prompt is compared with, `None` for the features themselves. Shape: as the features
        tokens: what a gate has to know of the tokens besides their features.
    """

    features: torch.Tensor
    compared: torch.Tensor | None
    tokens: Tokens | None

    def of_rows(self, rows: Rows) -> "PathInput":
        """That of some rows of the batch."""
        compared = None if self.compared is None else rows.of(self.compared)
        return PathInput(rows.of(self.features), compared, None if self.tokens is None else self.tokens.of_rows(rows))


def compute_feedback(path: "FeedbackPath", run: Run, inputs: Iterable[PathInput], skip_closed: bool) -> None:
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
