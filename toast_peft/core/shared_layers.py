"""One set of keys and values for both passes, as long as no row of the batch has had feedback.

Without feedback pass 2 computes what pass 1 has computed, so that the cache is that of the base model. At the first
feedback the passes part: the layers, which pass 1 has just extended, are those of pass 1 from then on, and pass 2 gets
copies of what they were *before*, where it can of the rows with feedback alone (`cache_of_open_rows.py`).

What has to be kept for that while pass 1 runs is little: of layers to which tokens are only added, how long they were;
of those with a sliding window, the window.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

Layer = Any  # of a cache: of keys and values, of a state, or none; what it is depends on the version


def recall_of(layers: Iterable[Layer]) -> Callable[[], list[Layer]]:
    """What gives copies of layers as they are now, also when a forward has extended them since.

    What it gives and the layers themselves may both be extended from then on.
    """
    recalls = [_recall_of(layer) for layer in layers]
    return lambda: [recall() for recall in recalls]


def _recall_of(layer: Layer) -> Callable[[], Layer]:
    # Of exactly these classes, as others may hold more.
    if type(layer) is DynamicLayer:
        return partial(_shortened, layer, layer.get_seq_length())
    if type(layer) is StaticLayer:
        return partial(_set_back, layer, layer.cumulative_length.clone())
    return partial(_same, _copy_of(layer))


def _same(layer: Layer) -> Layer:
    return layer


def _shortened(layer: DynamicLayer, length: int) -> DynamicLayer:
    """Without the tokens that were added. Shape of keys and values: [b, heads, n, d] -> [b, heads, length, d]"""
    before = copy.copy(layer)
    if layer.keys is not None and layer.values is not None:
        before.keys, before.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    return before


def _set_back(layer: StaticLayer, length: torch.Tensor) -> StaticLayer:
    """What lies behind the length is overwritten by the tokens that come next."""
    before = _copy_of(layer)
    before.cumulative_length.copy_(length)
    return before


def _copy_of(layer: Layer) -> Layer:
    """A copy that shares only the tensors that are not written into."""
    # A dynamic layer puts new keys and values in the place of the old ones. Of a state it has a dict.
    is_dynamic = isinstance(layer, DynamicLayer)
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if not isinstance(value, torch.Tensor):
            setattr(copied, name, copy.deepcopy(value))
        elif not is_dynamic:
            # A deep copy keeps its mark as a static address, and cannot be traced.
            setattr(copied, name, value.clone() if torch.compiler.is_compiling() else copy.deepcopy(value))
    return copied
