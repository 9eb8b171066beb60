"""One key-value cache for two passes.

A `Cache` is a list of layers, one per block. For two passes it gets more of them at its end: the keys and values of
pass 1 for the blocks from `feedback_to` to `feedback_from - 1`. (The blocks below compute the same in both passes and
those above do not run in pass 1.) Everything that generation does to a cache - reorder, crop, repeat, reset, offload -
runs over its layers and so serves both passes. Where no row has had feedback yet they may share all layers, and the
cache is that of the base model (`shared_layers.py`). While some rows have had none, it may be that of the base model
and one layer more, with what pass 2 has of the others (`cache_of_open_rows.py`).

Sequence gates keep their running sums in layers of their own, behind these (`running_sum.py`).

In a decoder with cross-attention this is so for the cache of its self-attention. The keys and values of the encoder's
states are the same in both passes and kept once.
"""

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils import ModelOutput

from .cache_of_open_rows import OpenRows, can_be_taken_apart
from .running_sum import RunningSum, new_layer
from .shared_layers import Layer, recall_of

_ATTRIBUTE = "topdown_passes"
# What transformers has called the argument that is a cache; the new name since 5.24.
_NAMES = ("past_key_values", "cache")


def cache_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The parameter of a forward that takes a cache, told by its annotation and else by its name."""
    annotated = (name for name, parameter in parameters.items() if re.search(r"Cache\b", str(parameter.annotation)))
    return next(annotated, None) or next((name for name in _NAMES if name in parameters), None)


def cache_argument(kwargs: dict[str, Any], parameter: str | None) -> str | None:
    """The name under which a forward got its cache; if it got none, the one that it can be given under."""
    given = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    return [*given, *(name for name in _NAMES if name in kwargs), parameter][0]


def refuse_paged_cache(kwargs: dict[str, Any]) -> None:
    """Refuse continuous batching, where both passes would write to the same pages.

    Raises:
        NotImplementedError: if a paged cache is among the arguments of a forward.
    """
    if any(isinstance(value, PagedAttentionCache) for value in kwargs.values()):
        raise NotImplementedError(
            "TOAST does not run in continuous batching (`generate_batch`), whose paged cache is made for one pass. "
            "Use `generate`, or disable the adapter."
        )


def is_made_for_compiling(cache: Cache | None) -> bool:
    """Whether `generate` compiles forwards with this cache, if it runs on an accelerator."""
    own = _of_self_attention(cache)
    return own is not None and type(own) is not DynamicCache and own.is_compileable


class CacheOwner(NamedTuple):
    """Whom a cache is for.

    Args:
        adapter_name: the adapter, or all of them, for messages.
        identity: what tells each from others of that name: of another model, or deleted since. In a mixed batch those
            of each row, none for the base model; else of all rows.
        feedback_from: of its blocks, pass 1 runs those below.
        feedback_to: and both passes compute the same in those below this one.
    """

    adapter_name: str
    identity: tuple[tuple[str, ...], ...]
    feedback_from: int
    feedback_to: int


@dataclass
class Passes:
    """Kept on a cache that two passes use. It does not refer back to the cache, which is freed with its last user.

    Args:
        owner: the adapter that the cache is for.
        num_layers: number of layers that the cache has for one pass; the further ones are those of pass 1.
        first_pass: what pass 1 sees of the cache, `None` as long as rows share its layers in both passes.
        open_rows: until then the layer with what pass 2 has of other rows, `None` if there have been none.
        sums: the layers with the running sums of sequence gates, which are the cache's last.
    """

    owner: CacheOwner
    num_layers: int
    first_pass: Cache | None = None
    open_rows: OpenRows | None = None
    sums: list[Layer] = field(default_factory=list)


def refuse_two_pass_cache(kwargs: dict[str, Any]) -> None:
    """Refuse to continue a cache without the feedback it was filled with.

    Raises:
        ValueError: if a cache among the arguments of a forward holds keys and values of a forward with feedback.
    """
    for value in kwargs.values():
        cache = _of_self_attention(value)
        passes = getattr(cache, _ATTRIBUTE, None) if isinstance(cache, Cache) else None
        if passes is None:
            continue
        if not _is_empty(cache):
            raise ValueError(
                f"This cache was filled with the TOAST adapter {passes.owner.adapter_name!r} active, but no adapter "
                "is active now. Its keys and values do not fit the base model's; start with a new cache."
            )
        _forget_passes(cache, passes)


def update_of_one_pass(*args: Any, **kwargs: Any) -> None:
    """Stands in for `update` of a cache that two passes use, which see it through views.

    So a model that does not run twice, as the base model after `unload()`, does not continue the cache.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "This cache was filled with a TOAST adapter active, and this model runs without it. The keys and values do "
        "not fit; start with a new cache."
    )


class TwoPassCache:
    """What pass 1 and pass 2 of one forward see of a cache.

    Args:
        cache: the caller's cache; a new one is made if `None`.
        name: the argument of the backbone's forward that it is.
        model_config: the transformers config of the backbone.
        num_blocks: number of blocks of the model.
        owner: the active adapter.
        has_cross_attention: whether the blocks attend to an encoder's states as well.
        may_share: whether the passes go on sharing the layers of rows that have had no feedback.
        num_sums: number of running sums that sequence gates keep in the cache.

    Attributes:
        in_first_pass: the argument with the `Cache` that pass 1 reads and writes.
        in_second_pass: the argument with the `Cache` that pass 2 reads and writes.
        running_sums: those of sequence gates.

    Raises:
        ValueError: if the cache was filled without feedback or with that of another adapter, or before the adapter got
            its gate.
    """

    def __init__(
        self,
        cache: Cache | None,
        name: str,
        model_config: Any,
        num_blocks: int,
        owner: CacheOwner,
        has_cross_attention: bool = False,
        may_share: bool = False,
        num_sums: int = 0,
    ) -> None:
        self.name = name
        self.cache = _new_cache(model_config, has_cross_attention) if cache is None else cache
        self.own = own = _of_self_attention(self.cache)
        passes = getattr(own, _ATTRIBUTE, None)
        if passes is None or passes.owner != owner or (may_share and _is_empty(own)):
            passes = _first_use(own, num_blocks, owner)
        self.passes: Passes = passes
        self.running_sums = [RunningSum(layer) for layer in _layers_of_sums(own, passes, num_sums)]
        if passes.first_pass is None:
            layers = own.layers[: passes.num_layers]
            self.recall = recall_of(layers)
            self._show_second_pass(layers)
            self.in_first_pass = self.in_second_pass
            if not may_share:
                self.part()
        else:
            self._show_second_pass(_layers_of_second_pass(own, passes))
            self.in_first_pass = {name: self._with_cross_attention(passes.first_pass)}

    @property
    def is_shared(self) -> bool:
        """Whether both passes share the layers of the cache for rows that have had no feedback."""
        return self.passes.first_pass is None

    def part(self) -> None:
        """Give pass 2 layers of its own: as they were before this forward, in which pass 1 may have extended them."""
        passes, before = self.passes, self.recall()
        _, _, feedback_from, feedback_to = passes.owner
        layers, lower, upper = self.own.layers[: passes.num_layers], before[:feedback_to], before[feedback_to:]
        if passes.open_rows is not None:
            upper, passes.open_rows = passes.open_rows.with_closed_rows(upper), None
        of_loop = layers[feedback_to:feedback_from]
        self.own.layers = layers[:feedback_to] + upper + of_loop + passes.sums
        passes.first_pass = _view(self.own, layers[:feedback_to] + of_loop)
        self.in_first_pass = {self.name: self._with_cross_attention(passes.first_pass)}
        self._show_second_pass(lower + upper)

    def rows_with_feedback(self, is_open: torch.Tensor) -> torch.Tensor:
        """The rows that have feedback now or have had some before. Shape: [b] -> [number of rows]"""
        open_rows = self.passes.open_rows
        return is_open.nonzero().flatten() if open_rows is None else open_rows.joined_by(is_open)

    def saves_by_rows(self, num_open: int, batch_size: int) -> bool:
        """Whether pass 2 can run for the open rows alone, and this is less work, pass 1 of all blocks included."""
        owner, num_layers = self.passes.owner, self.passes.num_layers
        saved = (batch_size - num_open) * (num_layers - owner.feedback_to)
        # Of a model that leaves early there are fewer layers.
        more = batch_size * max(num_layers - owner.feedback_from, 0)
        return saved > more and can_be_taken_apart(self.cache, self.own.layers[:num_layers])

    def in_second_pass_of(self, rows: torch.Tensor, batch_size: int) -> dict[str, Cache]:
        """The argument with the `Cache` that pass 2 of some rows reads and writes. Shape: [number of rows]"""
        passes, before = self.passes, self.recall()
        if passes.open_rows is None:
            passes.open_rows = OpenRows()
            self.own.layers.append(passes.open_rows)
        feedback_to = passes.owner.feedback_to
        passes.open_rows.admit(rows, batch_size, before[feedback_to:])
        # Of the blocks below, which do not run, only the length counts.
        return {self.name: _view(self.own, before[:feedback_to] + passes.open_rows.layers)}

    def _show_second_pass(self, layers: list[Layer]) -> None:
        self.second_pass = self._with_cross_attention(_view(self.own, layers))
        self.in_second_pass = {self.name: self.second_pass}

    def _with_cross_attention(self, view: Cache) -> Cache:
        if not isinstance(self.cache, EncoderDecoderCache):
            return view
        both = copy.copy(self.cache)  # shares the keys and values of the encoder's states, and which are there
        both.self_attention_cache = view  # type: ignore[assignment]  # annotated as the class that is made by default
        return both

    def restore(self, output: Any) -> Any:
        """The output of pass 2 with the caller's cache in place of what pass 2 saw of it."""
        if not isinstance(output, ModelOutput):
            return tuple(self._callers(item) for item in output)
        for name, item in list(output.items()):
            if isinstance(item, Cache):
                output[name] = self._callers(item)
        return output

    def _callers(self, item: Any) -> Any:
        if item is self.second_pass:
            return self.cache
        if isinstance(item, EncoderDecoderCache) and item.self_attention_cache is self.second_pass:
            # The model has added a cache for its cross-attention.
            item.self_attention_cache = self.cache  # type: ignore[assignment]  # annotated as the default class
        return item


def _new_cache(model_config: Any, has_cross_attention: bool) -> Cache:
    """What transformers makes when it is asked to use a cache and gets none."""
    cache = DynamicCache(config=model_config)
    if not has_cross_attention and not getattr(model_config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=model_config))


def _of_self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _layers_of_second_pass(cache: Cache, passes: Passes) -> list[Layer]:
    # Pass 2 takes its positions and masks from the first layers, and must count from where pass 1 began. So it sees
    # the blocks below `feedback_to`, which it skips, as they are before pass 1 extends them.
    lower = [_snapshot(layer) for layer in cache.layers[: passes.owner.feedback_to]]
    return lower + cache.layers[passes.owner.feedback_to : passes.num_layers]


def _first_use(cache: Cache, num_blocks: int, owner: CacheOwner) -> Passes:
    """Prepare an empty cache for two passes."""
    passes = getattr(cache, _ATTRIBUTE, None)
    if not _is_empty(cache):
        raise ValueError(
            f"This cache was filled {_by_whom(passes, owner)}; its keys and values do not fit the adapter "
            f"{owner.adapter_name!r} with feedback from block {owner.feedback_from} to {owner.feedback_to}. Start "
            "with a new cache."
        )
    if passes is not None:  # a cache that was reset
        _forget_passes(cache, passes)
    # Otherwise it has all layers it wants: fewer than the blocks if the model leaves early (`assistant_early_exit`).
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_blocks:
            cache.layers.append(cache.layer_class_to_replicate())
    setattr(cache, _ATTRIBUTE, Passes(owner, len(cache.layers)))
    # On the instance, so that a model which does not run twice calls it.
    cache.update = update_of_one_pass  # type: ignore[method-assign, assignment]
    return getattr(cache, _ATTRIBUTE)


def _layers_of_sums(cache: Cache, passes: Passes, number: int) -> list[Layer]:
    """The layers of a cache for the running sums of sequence gates, made if the cache is empty."""
    if len(passes.sums) < number:
        if not _is_empty(cache):
            raise ValueError(
                f"This cache was filled before the TOAST adapter {passes.owner.adapter_name!r} got its gate, which "
                "has to know all tokens. Start with a new cache."
            )
        new = [new_layer(cache.layers[: passes.num_layers]) for _ in range(number - len(passes.sums))]
        passes.sums += new
        cache.layers += new
    return passes.sums[:number]


def _by_whom(passes: Passes | None, owner: CacheOwner) -> str:
    if passes is None:
        return "without feedback"
    by = f"by the TOAST adapter {passes.owner.adapter_name!r}"
    if passes.owner.adapter_name != owner.adapter_name:
        return by
    before, now = ({name for row in whose.identity for name in row} for whose in (passes.owner, owner))
    return (
        f"{by} for other rows" if before == now else f"{by} of another model, or before it was deleted and added again"
    )


def _forget_passes(cache: Cache, passes: Passes) -> None:
    """Make a cache that two passes used the plain one that it was."""
    del cache.layers[passes.num_layers :]
    delattr(cache, _ATTRIBUTE)
    del cache.update


def _is_empty(cache: Cache) -> bool:
    return int(cache.get_seq_length()) == 0


def _view(cache: Cache, layers: list[Layer]) -> Cache:
    view = copy.copy(cache)
    for name in (_ATTRIBUTE, "update"):
        view.__dict__.pop(name, None)
    view.layers = layers
    return view


def _snapshot(layer: Layer) -> Layer:
    """The layer with its counters as they are now, sharing keys and values."""
    snapshot = copy.copy(layer)
    counter = getattr(layer, "cumulative_length", None)
    if isinstance(counter, torch.Tensor):
        snapshot.cumulative_length = counter.clone()
    return snapshot
