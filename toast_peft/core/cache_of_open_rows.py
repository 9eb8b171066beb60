"""Keys and values of pass 2 for the rows of a batch that have had feedback, while others have had none.

A row without feedback so far has the same keys and values in both passes, so that those of pass 1 do for it. When it
gets some it is given copies of them, and its passes part.

These layers with fewer rows than the batch are kept in one more layer of the cache, behind the others. So everything
that generation does to a cache - reorder, crop, repeat, select, reset - is done to them as well, and there it is known
which rows they are.

Notation used for tensor shapes:
    - b: batch size
    - k: number of rows that have had feedback
    - n: number of tokens
    - d: channels of a head
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

Layer = Any  # of a cache


def can_be_taken_apart(cache: Cache, layers: Sequence[Layer]) -> bool:
    """Whether rows of these layers of a cache can be taken apart: of the default one, as others may hold more."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in plain for layer in layers)


class OpenRows(DynamicLayer):
    """A layer of a cache that has the layers of pass 2 for some rows of the batch, at first for none.

    Attributes:
        layers: of the blocks that run in pass 2. Shape of keys and values: [k, heads, n, d]
        rows: which of the batch they are for, in order. Shape: [k]
        num_rows: b.
    """

    supports_early_init = False  # it has no keys and values of its own

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.layers: list[Layer] = []
        self.rows = torch.empty(0, dtype=torch.long)
        self.num_rows = 0

    def joined_by(self, is_open: torch.Tensor) -> torch.Tensor:
        """Its rows and those that have feedback now. Shape: [b] -> [number of both]"""
        return is_open.index_fill(0, self.rows.to(is_open.device), True).nonzero().flatten()

    def admit(self, rows: torch.Tensor, num_rows: int, first_pass: Sequence[Layer]) -> None:
        """Let rows in that have had no feedback.

        Args:
            rows: these and the ones that are there, in order. Shape: [k]
            num_rows: b.
            first_pass: layers of pass 1. Shape of keys and values: [b, heads, n, d]
        """
        if len(rows) > len(self.rows):
            self.layers = [_selected(layer, rows) for layer in self.with_closed_rows(first_pass)]
            self.rows, self.num_rows = rows, num_rows

    def with_closed_rows(self, first_pass: Sequence[Layer]) -> list[Layer]:
        """The layers of pass 2 for all rows of the batch. Shape of keys and values: [b, heads, n, d]"""
        layers = self.layers or [None] * len(first_pass)
        return [
            closed if layer is None else _with(closed, layer, self.rows)
            for closed, layer in zip(first_pass, layers, strict=True)
        ]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Of which row each row of the batch goes on. Shape: [b]"""
        self._choose(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch. Shape: [new b], or a mask of shape [b]"""
        if self.layers:
            self._choose(torch.arange(self.num_rows, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._choose(torch.arange(self.num_rows).repeat_interleave(repeats))

    def _choose(self, chosen: torch.Tensor) -> None:
        """A batch of other rows, some perhaps several times. Shape: [new b]"""
        is_there = chosen.unsqueeze(1) == self.rows.to(chosen.device)
        if not is_there.any():
            self._forget()
            return
        self.rows, positions = is_there.nonzero().unbind(1)
        self.num_rows = len(chosen)
        self.layers = [_selected(layer, positions) for layer in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens."""
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what has left a sliding window until the next crop."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Start anew."""
        self._forget()


def _selected(layer: Layer, rows: torch.Tensor) -> Layer:
    """A copy with some rows. Shape of keys and values: [b, heads, n, d] -> [k, heads, n, d]"""
    selected = copy.copy(layer)
    if layer.keys is not None:
        rows = rows.to(layer.keys.device)
        selected.keys, selected.values = layer.keys[rows], layer.values[rows]
    return selected


def _with(layer: Layer, of_rows: Layer, rows: torch.Tensor) -> Layer:
    """A copy with some rows replaced. Shape of keys and values: [b, heads, n, d], [k, heads, n, d] -> [b, ...]"""
    replaced = copy.copy(layer)
    rows = rows.to(layer.keys.device)
    replaced.keys = layer.keys.index_copy(0, rows, of_rows.keys)
    replaced.values = layer.values.index_copy(0, rows, of_rows.values)
    return replaced
