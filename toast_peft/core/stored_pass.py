"""What pass 1 has computed, given to a model instead of being computed again.

With fixed inputs it is the same in every epoch. `toast_peft/stored_features.py` stores it and has the batches.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from .replaced_forward import ReplacedForward
from .run import ThreadState

STORED_INPUT = "topdown_features"  # the argument of the model's forward


class Origin(NamedTuple):
    """What pass 1 is, of all that an adapter can choose.

    Args:
        feedback_from: the features are those after block `feedback_from - 1`.
        feedback_to: and the hidden states those after block `feedback_to - 1`.
        normalize_features: whether the features have passed the final norm.
    """

    feedback_from: int
    feedback_to: int
    normalize_features: bool


class StoredPass(NamedTuple):
    """All of pass 1 that comes later needs, for one batch.

    Args:
        origin: how it was computed.
        features: what the feedback starts from. Shape: [b, n, d]
        hidden_states: what block `feedback_to - 1` has returned; `None` if pass 2 has to run the blocks below
            `feedback_to` again. Shape: [b, n, d]
    """

    origin: Origin
    features: torch.Tensor
    hidden_states: torch.Tensor | None

    def check(self, origin: Origin) -> None:
        """Refuse what is not of the running adapter.

        Raises:
            ValueError: if its pass 1 is another one.
        """
        if origin != self.origin:
            raise ValueError(
                f"`{STORED_INPUT}` was stored for an adapter with {_named(self.origin)}, and the active one has "
                f"{_named(origin)}; expected the same. Activate the adapter that it was stored for, or leave it out."
            )


def _named(origin: Origin) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in origin._asdict().items())


class StoredInput(ReplacedForward):
    """Forward of a model with one more argument, `topdown_features`, which it hands to its backbone.

    Args:
        module: the model.
        state: that of its backbone.
        origin: how everything that it will be given was computed.
    """

    def __init__(self, module: nn.Module, state: ThreadState, origin: Origin) -> None:
        super().__init__(module, state)
        self.origin = origin

    @property
    def __signature__(self) -> inspect.Signature:
        return self.signature_with(STORED_INPUT)

    def __call__(self, *args: Any, topdown_features: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: the other arguments.
            topdown_features: the features and, if they are stored, the hidden states; `None` to run pass 1.
                Shape: [b, n, 1 or 2, d]
            kwargs: the other arguments.
        """
        if topdown_features is None:
            return self.original(*args, **kwargs)
        current = self.state.current
        outer, current.stored = current.stored, self.stored_pass(topdown_features)
        try:
            return self.original(*args, **kwargs)
        finally:
            current.stored = outer

    def stored_pass(self, stored: torch.Tensor) -> StoredPass:
        """What is given as that argument. Shape: [b, n, 1 or 2, d]"""
        if stored.dim() != 4 or stored.shape[2] not in (1, 2):
            raise ValueError(
                f"`{STORED_INPUT}` has the shape {list(stored.shape)}; expected [rows, tokens, 1 or 2, channels], as "
                "the `collate` of `toast_peft.store_features` makes it."
            )
        features, *hidden_states = (x.contiguous() for x in stored.unbind(2))
        return StoredPass(self.origin, features, hidden_states[0] if hidden_states else None)
