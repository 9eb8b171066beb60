"""The swap test: how much does the feedback depend on the input?

In pass 2 of an input the feedback is computed from the features of another one, or of the mean of the batch. If the
model does as well with these, its feedback is a bias that has been learned, and not attention to what is there.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..core.gate import Tokens
from ..core.layers import FeedbackPath, feedback_paths

Other = Literal["next", "mean"]


@contextmanager
def swapped_features(model: nn.Module, other: Other = "next") -> Iterator[None]:
    """In it, each row of a batch gets the feedback of other features than its own. Pass 2 is of the row itself.

    Compare with the model as it is, and with `rescaled_feedback(0.0)`, where there is none.

    Args:
        model: has the adapter, as a PEFT model or injected directly.
        other: "next" for the features of the next row of the batch, of the first for the last one; "mean" for the mean
            of all rows, token by token.

    Raises:
        ValueError: if no adapter is active, or `other` is another word; from the model, if the batch has one row only.
        NotImplementedError: from the model, if a key-value cache holds what a gate has seen of the row itself.

    Example:

    ```py
    >>> with toast_peft.swapped_features(model):
    ...     model(**batch).logits.argmax(-1) == batch["labels"]
    ```
    """
    if other not in get_args(Other):
        raise ValueError(f"`other` is {other!r}; expected 'next' or 'mean'.")
    paths = [path for _, path in feedback_paths(model) if path.active_adapters]
    if not paths:
        raise ValueError("No TOAST adapter is active, so there is no feedback; expected one. Enable an adapter first.")
    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(path.register_forward_pre_hook(partial(_swap, other), with_kwargs=True))
        yield


def _swap(
    other: Other, path: FeedbackPath, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook on a feedback path: other features, and what is known of their tokens."""
    features, adapter_name, *others = args
    tokens: Tokens | None = kwargs.get("tokens")
    if len(features) < 2:
        raise ValueError(
            f"The adapter {adapter_name!r} is for one row of the batch; expected at least two, as each gets the "
            "features of others."
        )
    if tokens is not None and tokens.sums is not None:
        raise NotImplementedError(
            "`swapped_features` was used with a key-value cache, in which a gate keeps what it has seen of the row "
            "itself; set `use_cache=False`."
        )
    swap = partial(_next, rows=len(features)) if other == "next" else _mean
    compared, *sizes = others or [None]
    if tokens is not None and other == "next":
        kwargs = kwargs | {"tokens": Tokens(*map(swap, tokens))}
    return (swap(features), adapter_name, swap(compared), *sizes), kwargs


def _next(x: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Shape: [b, ...]"""
    return x.roll(-1, 0) if x is not None and len(x) == rows else x


def _mean(x: torch.Tensor | None) -> torch.Tensor | None:
    """Shape: [b, ...]"""
    return None if x is None else x.mean(0, keepdim=True).expand_as(x)
