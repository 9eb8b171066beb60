"""Both passes side by side: one forward of the backbone whose rows are of pass 1 and of pass 2.

Pass 2 of a token needs only the features of pass 1 of that token and of those before it, so pass 1 of the next token
can run beside it, if that token can be guessed (`drafting.py`).

Notation used for tensor shapes:
    - n: number of tokens
    - d: hidden size
"""

import torch
from torch.nn import functional as F


class JointPass:
    """What one such forward is given and gives. The rows of pass 1 come first, those of pass 2 after them.

    Args:
        num_first_rows: number of rows of pass 1.
        features: what pass 1 of earlier forwards has given for the tokens of the other rows; `None` if there are no
            other rows. Shape: [rows of pass 2, n, d]

    Attributes:
        next_features: after the forward, the features of the rows of pass 1. Shape: [rows of pass 1, n, d]
    """

    def __init__(self, num_first_rows: int, features: torch.Tensor | None) -> None:
        self.num_first_rows = num_first_rows
        self.features = features
        self.next_features: torch.Tensor | None = None

    def features_of_rows(self) -> torch.Tensor | None:
        """The features of all rows: zero in pass 1, so that its feedback is. Shape: [rows, n, d]"""
        return None if self.features is None else F.pad(self.features, (0, 0, 0, 0, self.num_first_rows, 0))
