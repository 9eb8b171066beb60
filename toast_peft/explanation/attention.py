"""What is read from attentions: rollout, what a query looks at, what a token receives, and how far a scale goes.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Sinks = Literal["clip", "keep"]
CLIPPED_AT = 0.95


def attention_rollout(attentions: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each input token is in each output token, if attention were all that moves something.

    Formula: the product over the blocks, the last one on the left, of `(A + 1) / 2`, with `A` the mean of the heads
    and `1` the identity, which stands for the residual connection.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, https://arxiv.org/abs/2005.00928

    Args:
        attentions: of each block from the first on. Shape of each: [b, heads, n, n]

    Returns:
        Each row sums to 1. Shape: [b, n, n]
    """
    rollout = np.eye(attentions[0].shape[-1], dtype=np.float32)
    for attention in attentions:
        mixed = (attention.mean(1) + np.eye(attention.shape[-1], dtype=np.float32)) / 2
        rollout = mixed / mixed.sum(-1, keepdims=True) @ rollout
    return rollout


class View(NamedTuple):
    """Which attention to look at, as `Explanation.plot` is told.

    Args:
        block: its index; -1 is the last.
        head: `None` for the mean of all.
        query: the token that attends, `None` for the one by default.
        sinks: see [`scale_limit`].
        rollout: the rollout from the first block to this one instead.
    """

    block: int = -1
    head: int | None = None
    query: int | None = None
    sinks: Sinks = "clip"
    rollout: bool = False

    @property
    def name(self) -> str:
        """What the values are."""
        return "rollout" if self.rollout else "attention"

    def matrix(self, attentions: Sequence[np.ndarray]) -> np.ndarray:
        """One matrix of all attentions of a pass.

        Args:
            attentions: of each block. Shape of each: [b, heads, n, n]

        Returns:
            Queries in rows. Shape: [b, n, n]

        Raises:
            ValueError: if there is no such block or head, or a head of a rollout was asked for.
        """
        if not self.rollout:
            return self.of_block(attentions)
        if self.head is not None:
            raise ValueError(
                f"`head={self.head}` and `rollout=True`: a rollout is of the mean of all heads; leave out one."
            )
        return attention_rollout(attentions[: self._index(len(attentions)) + 1])

    def of_block(self, attentions: Sequence[np.ndarray]) -> np.ndarray:
        """That of the block, of one head or the mean of all.

        Args:
            attentions: of each block. Shape of each: [b, heads, ...]

        Returns:
            Shape: [b, ...]

        Raises:
            ValueError: if there is no such block or head.
        """
        block, head = self.block, self.head
        of_heads = attentions[self._index(len(attentions))]
        if head is None:
            return of_heads.mean(1)
        if not 0 <= head < of_heads.shape[1]:
            raise ValueError(f"`head={head}`, but block {block} has {of_heads.shape[1]} heads; take one from 0 on.")
        return of_heads[:, head]

    def _index(self, count: int) -> int:
        if not -count <= self.block < count:
            raise ValueError(f"`block={self.block}`, but there are {count} blocks; take one from 0 on, or -1.")
        return self.block % count


def of_class_token(matrix: np.ndarray, num_patches: int) -> np.ndarray:
    """What the class token attends to; without one, what all patches attend to on average.

    Args:
        matrix: queries in rows. Shape: [b, n, n]
        num_patches: the last tokens. The first one is the class token if there are others than patches.

    Returns:
        Shape: [b, n]
    """
    return matrix[:, 0] if matrix.shape[-1] > num_patches else matrix.mean(1)


def scale_limit(values: np.ndarray, sinks: Sinks) -> float:
    """Where the scale of colours ends.

    Some models put most attention on a few tokens that say nothing, *sinks* (https://arxiv.org/abs/2309.17453,
    https://arxiv.org/abs/2309.16588), beside which all others look the same.

    Args:
        values: all that share the scale; without sign.
        sinks: "keep" ends it at the largest value, "clip" at their 95 % quantile. The values stay what they are.

    Raises:
        ValueError: if `sinks` is something else.
    """
    if sinks not in get_args(Sinks):
        raise ValueError(f"`sinks={sinks!r}`, expected one of {list(get_args(Sinks))}.")
    largest = float(values.max())
    limit = float(np.quantile(values, CLIPPED_AT)) if sinks == "clip" else largest
    return limit or largest or 1.0  # most may be zero, or all
