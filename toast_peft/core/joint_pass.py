"""Both passes side by side: one forward of the backbone whose rows are of pass 1 and of pass 2.

Pass 2 of a token needs only the features of pass 1 of that token and of those before it, so pass 1 of the next token
can run beside it, if that token can be guessed (`drafting.py`).

Notation used for tensor shapes:
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .gate import Tokens, steps_of, tokens_for
from .run import SecondPass


class JointPass:
    """What one such forward is given and gives. The rows of pass 1 come first, those of pass 2 after them.

    Args:
        num_first_rows: number of rows of pass 1.
        features: what pass 1 of earlier forwards has given for the tokens of the other rows; `None` if there are no
            other rows. Shape: [rows of pass 2, n, d]
        sums_before: for a sequence gate, the sum over the tokens before these; `None` if there are none, and then an
            attention mask says what is padding. Shape: [rows of pass 2, 1, d]

    Attributes:
        next_features: after the forward, the features of the rows of pass 1. Shape: [rows of pass 1, n, d]
        sums: after the forward, for a sequence gate the sums up to each token. Shape: [rows of pass 2, n, d]
    """

    def __init__(
        self, num_first_rows: int, features: torch.Tensor | None, sums_before: torch.Tensor | None = None
    ) -> None:
        self.num_first_rows = num_first_rows
        self.features = features
        self.sums_before = sums_before
        self.next_features: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None

    def features_of_rows(self) -> torch.Tensor | None:
        """The features of all rows: zero in pass 1, so that its feedback is. Shape: [rows, n, d]"""
        return None if self.features is None else self._with_first_rows(self.features)

    def tokens_of_rows(self, features: torch.Tensor, kwargs: Mapping[str, Any]) -> Tokens:
        """What a sequence gate has to know of the tokens of all rows.

        Args:
            features: of all rows. Shape: [rows, n, d]
            kwargs: the arguments of the backbone.
        """
        own = tokens_for("sequence", kwargs, features).own if self.sums_before is None else None
        sums = steps_of(features, own).cumsum(1)
        if self.sums_before is not None:
            sums = sums + self._with_first_rows(self.sums_before)
        self.sums = sums[self.num_first_rows :]
        return Tokens(own, sums=sums)

    def in_second_rows(self, added: SecondPass, features: torch.Tensor) -> SecondPass:
        """What pass 2 adds besides the feedback, as under a gate that is closed in the rows of pass 1.

        Args:
            added: what it adds.
            features: of all rows. Shape: [rows, n, d]
        """
        if self.num_first_rows == 0:
            return added
        gate = torch.ones_like(features[..., :1]) if added.gate is None else added.gate
        return added._replace(gate=self._with_first_rows(gate[self.num_first_rows :]))

    def _with_first_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Zero for the rows of pass 1. Shape: [rows of pass 2, n, ...] -> [rows, n, ...]"""
        return F.pad(x, (0, 0, 0, 0, self.num_first_rows, 0))
