"""The running sum of a sequence gate in a key-value cache.

It is one more layer of the cache, whose keys are the sums after each token and whose values have no channels. So
everything that generation does to a cache - reorder, crop, repeat, reset, offload - is done to it as well.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

Layer = Any  # of a cache


def new_layer(layers: Iterable[Layer]) -> Layer:
    """A layer for the sums, of fixed size in a cache of such layers.

    Raises:
        NotImplementedError: if only layers with a sliding window have a fixed size, so that the length is not known.
    """
    fixed = [layer for layer in layers if isinstance(layer, StaticLayer)]
    if not fixed:
        return DynamicLayer()
    sizes = [layer.max_cache_len for layer in fixed if not layer.is_sliding]
    if not sizes:
        raise NotImplementedError(
            "A sequence gate needs to know how long a static cache may get, and all layers of this one keep a sliding "
            "window only. Generate with a dynamic cache, which is the default."
        )
    return StaticLayer(max(sizes))


class RunningSum:
    """The sum over the tokens that are in a cache.

    Args:
        layer: the layer of the cache that has it.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @property
    def length(self) -> int | torch.Tensor:
        """Number of tokens in the cache."""
        return self.layer.get_seq_length()

    def extend(self, steps: torch.Tensor) -> torch.Tensor:
        """Add tokens to it.

        Args:
            steps: what each of them adds. Shape: [b, n, d]

        Returns:
            The sums after each of them. Shape: [b, n, d]
        """
        sums = steps.cumsum(1) + self._last(steps)
        keys = sums.unsqueeze(1)  # one head
        self.layer.update(keys, keys[..., :0])
        return sums

    def _last(self, steps: torch.Tensor) -> torch.Tensor:
        """The sum so far. Shape: [b, 1, d]"""
        length = self.length
        if isinstance(length, torch.Tensor):  # that of a static layer, which compiled code may not look at
            last = self.layer.keys[:, 0].index_select(1, (length - 1).clamp(min=0).view(1))
            return torch.where(length > 0, last, 0)
        return steps.new_zeros(()) if length == 0 else self.layer.keys[:, 0, -1:]
