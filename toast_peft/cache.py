"""One key-value cache for two passes.

A `Cache` is a list of layers, one per block. For two passes it gets more of them at its end: the keys and values of
pass 1 for the blocks from `feedback_to` to `feedback_from - 1`. (The blocks below compute the same in both passes and
those above do not run in pass 1.) Everything that generation does to a cache - reorder, crop, repeat, reset, offload -
runs over its layers and so serves both passes.

In a decoder with cross-attention this is so for the cache of its self-attention. The keys and values of the encoder's
states are the same in both passes and kept once.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.utils import ModelOutput

_ATTRIBUTE = "topdown_passes"


@dataclass
class Passes:
    """Kept on a cache that two passes use. It does not refer back to the cache, which is freed with its last user.

    Args:
        key: adapter name, `feedback_from` and `feedback_to` that the cache is for.
        num_blocks: number of blocks of the model; the cache's further layers are those of pass 1.
        first_pass: what pass 1 sees of the cache.
    """

    key: tuple[str, int, int]
    num_blocks: int
    first_pass: Cache


def refuse_two_pass_cache(cache: Cache | None) -> None:
    """Refuse to continue a cache without the feedback it was filled with.

    Raises:
        ValueError: if `cache` holds keys and values of a forward with feedback.
    """
    cache = _of_self_attention(cache)
    passes = getattr(cache, _ATTRIBUTE, None)
    if passes is None:
        return
    if _length(cache) > 0:
        raise ValueError(
            f"This cache was filled with the TOAST adapter {passes.key[0]!r} active, but no adapter is active now. "
            "Its keys and values do not fit the base model's; start with a new cache."
        )
    del cache.layers[passes.num_blocks :]
    delattr(cache, _ATTRIBUTE)


class TwoPassCache:
    """What pass 1 and pass 2 of one forward see of a cache.

    Args:
        cache: the caller's cache; a new one is made if `None`.
        model_config: the transformers config of the backbone.
        num_blocks: number of blocks of the model.
        key: adapter name, `feedback_from` and `feedback_to`.
        has_cross_attention: whether the blocks attend to an encoder's states as well.

    Attributes:
        first_pass: a `Cache` that pass 1 reads and writes.
        second_pass: a `Cache` that pass 2 reads and writes.

    Raises:
        ValueError: if the cache was filled without feedback or with that of another adapter.
    """

    def __init__(
        self,
        cache: Cache | None,
        model_config: Any,
        num_blocks: int,
        key: tuple[str, int, int],
        has_cross_attention: bool = False,
    ) -> None:
        self.cache = _new_cache(model_config, has_cross_attention) if cache is None else cache
        own = _of_self_attention(self.cache)
        passes = getattr(own, _ATTRIBUTE, None)
        if passes is None or passes.key != key:
            passes = _first_use(own, num_blocks, key)
        self.first_pass = self._with_cross_attention(passes.first_pass)
        self.second_pass = self.cache
        if key[2] > 0:
            self.second_pass = self._with_cross_attention(_second_pass(own, num_blocks, feedback_to=key[2]))

    def _with_cross_attention(self, view: Cache) -> Cache:
        if not isinstance(self.cache, EncoderDecoderCache):
            return view
        both = copy.copy(self.cache)  # shares the keys and values of the encoder's states, and which are there
        both.self_attention_cache = view
        return both

    def restore(self, output: Any) -> Any:
        """The output of pass 2 with the caller's cache in place of what pass 2 saw of it."""
        if self.second_pass is self.cache:
            return output
        if isinstance(output, ModelOutput):
            output.past_key_values = self.cache
            return output
        return tuple(self.cache if item is self.second_pass else item for item in output)


def _new_cache(model_config: Any, has_cross_attention: bool) -> Cache:
    """What transformers makes when it is asked to use a cache and gets none."""
    cache = DynamicCache(config=model_config)
    if not has_cross_attention and not getattr(model_config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=model_config))


def _of_self_attention(cache: Cache | None) -> Cache | None:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _second_pass(cache: Cache, num_blocks: int, feedback_to: int) -> Cache:
    # Pass 2 takes its positions and masks from the first layers, and must count from where pass 1 began. So it sees
    # the blocks below `feedback_to`, which it skips, as they are before pass 1 extends them.
    lower = [_snapshot(layer) for layer in cache.layers[:feedback_to]]
    return _view(cache, lower + cache.layers[feedback_to:num_blocks])


def _first_use(cache: Cache, num_blocks: int, key: tuple[str, int, int]) -> Passes:
    """Prepare an empty cache for two passes."""
    if _length(cache) > 0:
        passes = getattr(cache, _ATTRIBUTE, None)
        filled = "without feedback" if passes is None else f"by the TOAST adapter {passes.key[0]!r}"
        raise ValueError(
            f"This cache was filled {filled}; its keys and values do not fit the adapter {key[0]!r} with feedback "
            f"from block {key[1]} to {key[2]}. Start with a new cache."
        )
    refuse_two_pass_cache(cache)  # forgets what a cache that was reset was prepared for
    while len(cache.layers) < num_blocks:
        cache.layers.append(cache.layer_class_to_replicate())
    _, feedback_from, feedback_to = key
    cache.layers.extend(copy.deepcopy(layer) for layer in cache.layers[feedback_to:feedback_from])
    first_pass = _view(cache, cache.layers[:feedback_to] + cache.layers[num_blocks:])
    setattr(cache, _ATTRIBUTE, Passes(key, num_blocks, first_pass))
    return getattr(cache, _ATTRIBUTE)


def _length(cache: Cache) -> int:
    return int(cache.get_seq_length())


def _view(cache: Cache, layers: list[CacheLayerMixin]) -> Cache:
    view = copy.copy(cache)
    view.__dict__.pop(_ATTRIBUTE, None)
    view.layers = layers
    return view


def _snapshot(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The layer with its counters as they are now, sharing keys and values."""
    snapshot = copy.copy(layer)
    counter = getattr(layer, "cumulative_length", None)
    if isinstance(counter, torch.Tensor):
        snapshot.cumulative_length = counter.clone()
    return snapshot
