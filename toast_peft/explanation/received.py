"""Attention of hierarchical transformers, put back on the map: how much of it each place receives.

Their blocks do not attend from all tokens to all. In Swin a token sees those of its window, which every second block
shifts; in SegFormer and PVT all tokens see patches of them. What is the same in all: each key is at a place of the
map and is seen by some queries. So what is kept is the mean attention to each key, over the queries that share a
window with it, without windows over all. Queries at the padding that fills up windows count as attending to nothing.

Notation used for tensor shapes:
    - b: batch size
    - h, w: height and width of the map of tokens that a block gets
    - h', w': those of its keys
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.layers import FeedbackPath
from ..families.hierarchies import TwoPassesOverHierarchy, in_windows, map_size, reduction_ratio


@contextmanager
def recorded_attention(path: FeedbackPath) -> Iterator[dict[int, torch.Tensor]]:
    """In it, what the places of a map receive in each block that runs; of one that runs in both passes, in the last.

    Yields:
        By the indices of the blocks; nothing for others than hierarchical transformers, and for attention that is not
        returned or has no key for each patch. Shape of each: [b, heads, h', w']
    """
    received: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        if isinstance(path.passes, TwoPassesOverHierarchy):
            for block in path.passes.block_forwards:
                recorder = _Recorder(block.module, block.index, path.passes.arrangement is in_windows, received)
                for hook in recorder.hooks():
                    hooks.enter_context(hook)
        yield received


class _Recorder:
    """Hooks on a block and its attention."""

    def __init__(self, block: nn.Module, index: int, has_windows: bool, received: dict[int, torch.Tensor]) -> None:
        self.block, self.index, self.has_windows, self.received = block, index, has_windows, received
        self.size = (0, 0)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Put them there."""
        attention = self.block.get_submodule("attention")
        yield self.block.register_forward_pre_hook(self.note_size)
        yield attention.register_forward_pre_hook(self.ask, with_kwargs=True)
        yield attention.register_forward_hook(self.keep)

    def note_size(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """The block gets a map of this size."""
        self.size = map_size(args[1:])

    def ask(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Swin V2 and PVT return attention if they are asked."""
        asked = {"output_attentions": True} if "output_attentions" in signature(attention.forward).parameters else {}
        return args, kwargs | asked

    def keep(self, attention: nn.Module, args: tuple, output: tuple[Any, ...]) -> None:
        """Put what each key receives back on the map."""
        if len(output) < 2 or output[1] is None:  # it is not eager
            return
        weights = output[1].detach().float()
        if self.has_windows:
            self.received[self.index] = received_in_windows(self.block, weights, self.size)
            return
        ratio = reduction_ratio(self.block)
        keys = self.size[0] // ratio, self.size[1] // ratio
        if weights.shape[-1] == keys[0] * keys[1]:  # linear attention of PVT pools to a fixed number
            self.received[self.index] = weights.mean(2).unflatten(-1, keys)


def received_in_windows(block: Any, attention: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What each token receives from the queries of its window, with the windows put together again.

    It is the sum over the queries, divided by the tokens of a window. So evenly spread attention is the same
    everywhere, also where the shift leaves parts of a window that do not see each other.

    Args:
        block: has the `window_size` and `shift_size` of this forward.
        attention: queries before keys. Shape: [b * windows, heads, window_size ** 2, window_size ** 2]
        size: h and w.

    Returns:
        Shape: [b, heads, h, w]
    """
    num_places = size[0] * size[1]
    # Where each token of each window lies on the map, cut as the hidden states are; 0 at the padding.
    places = torch.arange(1, num_places + 1, device=attention.device).view(1, *size, 1)
    places = in_windows(block, places, attention).squeeze(-1)  # windows, tokens of a window
    queries = (places > 0).to(attention.dtype) / places.shape[1]
    of_windows = torch.einsum("bwhqk,wq->bhwk", attention.unflatten(0, (-1, len(places))), queries)
    received = of_windows.new_zeros(*of_windows.shape[:2], 1 + num_places)
    received[..., places.flatten()] = of_windows.flatten(2)
    return received[..., 1:].unflatten(-1, size)
