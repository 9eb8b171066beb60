"""`skip_closed_rows` with a key-value cache: pass 2 for the rows of a batch that have had feedback.

`test_shared_cache.py` has what both passes share as long as no row has had any.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from toast_peft.core.cache_of_open_rows import can_be_taken_apart
from toast_peft.core.layers import hidden_states_of

from ..helpers import CACHE, compiles_copies, output_of, paths_of, steered
from ..zoo import DECODERS, GENERATING, NUM_BLOCKS, RANGES, inputs_of, tiny_model
from .test_gate import gated
from .test_pass2_lora import LORA
from .test_several_adapters import activate, with_adapters
from .test_shared_cache import DECODING, EAGER, NEVER, assert_equal_to_rounding, assert_same_numbers, generate
from .test_shared_cache import two_models as models_of


@contextmanager
def opened(model: nn.Module, is_open: Callable[[torch.Tensor], torch.Tensor], name: str = "default") -> Iterator[None]:
    """Select tokens where something is told of the mask of each forward. Shape of both: [b, n]"""

    def select(module: nn.Module, args: tuple, mask: torch.Tensor) -> torch.Tensor:
        return (mask + 0.1) * is_open(mask[..., 0]).to(mask.dtype).unsqueeze(-1)

    selection = paths_of(model)[-1].selection
    selects = selection.topdown_gate if name in selection.topdown_gate else selection.topdown_prompt
    handle = selects[name].register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def in_forward(first: Iterable[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each row in one forward only; rows are counted anew where there are more of them (beams)."""
    numbers, forwards = torch.tensor(list(first)), iter(range(NEVER))

    def is_open(mask: torch.Tensor) -> torch.Tensor:
        now = numbers.repeat(-(-len(mask) // len(numbers)))[: len(mask)] == next(forwards)
        return now.unsqueeze(1).expand_as(mask)

    return is_open


@contextmanager
def rows_of_each_run(model: nn.Module) -> Iterator[list[int]]:
    """The number of rows with which the last block is run, each time."""
    rows: list[int] = []
    block = paths_of(model)[-1].passes.block_forwards[-1].module
    handle = block.register_forward_hook(lambda module, args, output: rows.append(len(hidden_states_of(output))))
    try:
        yield rows
    finally:
        handle.remove()


def open_rows_of(cache: Cache) -> list[int] | None:
    """The rows of which the cache has another pass 2; `None` if that has layers for all rows."""
    passes = cache.topdown_passes
    if passes.first_pass is not None:
        return None
    return [] if passes.open_rows is None else passes.open_rows.rows.tolist()


def prompts(model: nn.Module, batch_size: int, length: int = 6) -> dict[str, torch.Tensor]:
    ids = inputs_of(model, batch_size=batch_size, length=length)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --------------------------------------------------------------------------------------- everything in any order


class Conversation:
    """Rows of tokens that grow, are reordered, cropped and so on, some tokens of them with feedback.

    Args:
        model: an adapted model.
        seed: of what happens to the rows.
        crops: whether transformers can crop its cache, which it cannot where a window is full.
    """

    def __init__(self, model: PeftModel, seed: int, crops: bool) -> None:
        self.model, self.crops = model, crops
        self.cache = DynamicCache(config=model.config)
        self.random = torch.Generator().manual_seed(seed)
        self.ids = torch.empty(6, 0, dtype=torch.long)
        self.is_open = torch.empty(6, 0, dtype=torch.bool)
        self.has_opened = torch.zeros(6, dtype=torch.bool)

    def integer(self, *limits: int) -> int:
        return int(torch.randint(*limits, (), generator=self.random))

    def grow(self) -> torch.Tensor:
        """A few more tokens, most of them without feedback; their logits. Shape: [b, n, vocab]"""
        shape = len(self.ids), self.integer(1, 4)
        self.ids = torch.cat(
            [self.ids, torch.randint(self.model.config.vocab_size, shape, generator=self.random)], dim=1
        )
        is_open = torch.rand(shape, generator=self.random) < 0.04
        self.is_open, self.has_opened = torch.cat([self.is_open, is_open], dim=1), self.has_opened | is_open.any(1)
        with opened(self.model, lambda mask: is_open):
            return output_of(self.model, {"input_ids": self.ids[:, -shape[1] :], CACHE: self.cache})

    def change(self) -> None:
        """What generation may do to a cache, or nothing."""
        size, what = len(self.ids), self.integer(6)
        if what == 0:
            rows = torch.randint(size, (size,), generator=self.random)
            self.cache.reorder_cache(rows)
        elif what == 1:
            rows = torch.randperm(size, generator=self.random)[: self.integer(min(size, 2), size + 1)]
            self.cache.batch_select_indices(rows)
        elif what == 2 and size < 4:
            rows = torch.arange(size).repeat_interleave(3)
            self.cache.batch_repeat_interleave(3)
        else:
            rows = torch.arange(size)
        self.ids, self.is_open, self.has_opened = self.ids[rows], self.is_open[rows], self.has_opened[rows]
        if what == 3 and self.crops:
            number = self.integer(1, min(4, self.ids.shape[1] + 1))
            self.cache.crop(-number)
            self.ids, self.is_open = self.ids[:, :-number], self.is_open[:, :-number]
            self.has_opened &= self.ids.shape[1] > 0  # an empty cache starts anew
        if what == 4:
            self.cache = copy.deepcopy(self.cache)

    def recomputed(self) -> torch.Tensor:
        """The logits of all tokens, without a cache. Shape: [b, n, vocab]"""
        with opened(self.model, lambda mask: self.is_open):
            return output_of(self.model, {"input_ids": self.ids, "use_cache": False})


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [*DECODERS, tf.GPT2LMHeadModel])
def test_cached_is_recomputed_whatever_happens_to_the_rows(model_class: type, variant: str, seed: int) -> None:
    model, twice = models_of(model_class, variant)
    conversation = Conversation(model, seed, crops=model_class in (tf.LlamaForCausalLM, tf.GPT2LMHeadModel))
    found: list[list[int] | None] = []
    for _ in range(12):
        logits = conversation.grow()
        conversation.model = twice
        assert_equal_to_rounding(logits, conversation.recomputed()[:, -logits.shape[1] :])
        conversation.model = model
        rows = open_rows_of(conversation.cache)
        assert rows is None or rows == conversation.has_opened.nonzero().flatten().tolist()
        found.append(rows)
        conversation.change()
    assert any(found)  # some rows, and not all


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("decoding", [name for name in DECODING if "static" not in name])
@pytest.mark.parametrize("model_class", DECODERS)
def test_generation_is_as_without_the_option(model_class: type, decoding: str, variant: str) -> None:
    results = []
    for model in models_of(model_class, variant, **EAGER if decoding == "recorded" else {}):
        with opened(model, in_forward([0, NEVER, NEVER, 3])):
            results.append(generate(model, **prompts(model, 4), **DECODING[decoding]))
    assert_same_numbers(*results)
    rows = open_rows_of(results[0][CACHE])
    assert (rows is None) == (decoding == "recorded") or decoding == "beam"  # attentions are; beams of other rows


@pytest.mark.parametrize("model_class", [cls for cls in GENERATING if "ConditionalGeneration" not in cls.__name__])
def test_every_decoder_runs_some_rows(model_class: type) -> None:
    results, rows = [], []
    for model in models_of(model_class, "full", experts_implementation="eager"):  # of others in double
        with opened(model, in_forward([NEVER, 2, 0, NEVER])), rows_of_each_run(model) as of_model:
            results.append(generate(model, **prompts(model, 4), max_new_tokens=5))
            rows.append(of_model)
    assert_same_numbers(*results)
    assert rows == [[4, 1, 4, 1, 4, 2, 4, 2, 4, 2], [4] * 10]


@pytest.mark.parametrize(("gate", "stricter"), [("token", 0.2), ("sequence", 0.55)])
@pytest.mark.parametrize("decoding", ["greedy", "beam", "sampling"])
@pytest.mark.parametrize("options", [{}, {"r": 3, "feedback_to_output": True}, LORA], ids=["", "output", "lora"])
def test_gates(gate: str, stricter: float, decoding: str, options: dict[str, Any]) -> None:
    results = []
    for skips in (True, False):
        model = gated(tf.LlamaForCausalLM, gate=gate, skip_closed_rows=skips, **options)
        paths_of(model)[0].selection.topdown_gate["default"].threshold.data += stricter
        results.append(generate(model, **prompts(model, 6), max_new_tokens=10, **DECODING[decoding]))
    assert_same_numbers(*results)
    assert open_rows_of(results[0][CACHE])  # some rows, and not all


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", DECODERS)
def test_closed_rows_are_those_of_the_base_model(model_class: type, variant: str) -> None:
    """Bit for bit, in the same batch: pass 1 is the forward of the base model."""
    base = tiny_model(model_class).requires_grad_(False)
    expected = generate(base, **prompts(base, 5))
    model = steered(tiny_model(model_class), skip_closed_rows=True, **RANGES[variant])
    with opened(model, in_forward([NEVER, 2, NEVER, 0, NEVER])):
        found = generate(model, **prompts(model, 5))
    assert open_rows_of(found[CACHE]) == [1, 3]
    logits, expected_logits = torch.stack(found.logits), torch.stack(expected.logits)
    for row in (0, 2, 4):
        assert torch.equal(found.sequences[row], expected.sequences[row])
        assert torch.equal(logits[:, row], expected_logits[:, row])
    assert torch.equal(logits[:2, 1], expected_logits[:2, 1])  # until it opens
    assert not torch.allclose(logits[2, 1], expected_logits[2, 1], atol=1e-4)
    assert not torch.allclose(logits[0, 3], expected_logits[0, 3], atol=1e-4)


# ------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("model_class", DECODERS)
def test_each_step_runs_pass_2_of_the_open_rows(model_class: type) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=True)
    first = [NEVER] * 8
    first[3], first[6] = 1, 3
    with opened(model, in_forward(first)), rows_of_each_run(model) as rows:
        cache = generate(model, **prompts(model, 8), max_new_tokens=5)[CACHE]
    assert rows == [8, 8, 1, 8, 1, 8, 2, 8, 2]
    layers = cache.topdown_passes.open_rows.layers
    assert [len(layer.keys) for layer in cache.layers[:NUM_BLOCKS]] == [8] * NUM_BLOCKS
    assert [len(tensor) for layer in layers for tensor in (layer.keys, layer.values)] == [2] * 2 * NUM_BLOCKS
    assert [layer.get_seq_length() for layer in layers] == [cache.get_seq_length()] * NUM_BLOCKS


@pytest.mark.parametrize(
    ("variant", "num_open", "rows"),
    [
        ("full", 7, [8, 7]),
        ("full", 8, [8, 8]),
        ("early", 3, [8, 3]),
        ("early", 4, [8, 8]),  # pass 1 of half of the blocks, and pass 2 of all rows, are as much
        ("late", 7, [8, 7]),
        ("middle", 5, [8, 5]),
        ("middle", 6, [8, 8]),
    ],
)
def test_all_rows_run_twice_where_that_is_not_more(variant: str, num_open: int, rows: list[int]) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True, **RANGES[variant])
    with opened(model, in_forward([0] * num_open + [NEVER] * (8 - num_open))), rows_of_each_run(model) as found:
        cache = DynamicCache(config=model.config)
        output_of(model, prompts(model, 8) | {CACHE: cache})
    assert found == rows
    assert open_rows_of(cache) == (None if rows == [8, 8] else list(range(num_open)))


def test_the_last_row_that_opens_gives_pass_2_layers_of_its_own() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    with opened(model, in_forward([0, 2, 1])):
        cache = generate(model, **prompts(model, 3))[CACHE]
    assert open_rows_of(cache) is None
    assert [len(layer.keys) for layer in cache.layers] == [3] * 2 * NUM_BLOCKS


def test_rows_that_are_left_may_all_be_closed() -> None:
    """The others are gone, and so are their layers of pass 2, which are no longer extended."""
    results = []
    for model in models_of(tf.LlamaForCausalLM, "full"):
        ids = prompts(model, 3, length=9)["input_ids"]
        cache = DynamicCache(config=model.config)
        with opened(model, in_forward([0, NEVER, NEVER])):
            output_of(model, {"input_ids": ids[:, :5], CACHE: cache})
        cache.batch_select_indices(torch.tensor([0, 1, 2]))
        cache.batch_select_indices(torch.tensor([False, True, True]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        with opened(model, in_forward([NEVER, 1])):
            parts = [output_of(model, {"input_ids": part, CACHE: cache}) for part in ids[1:, 5:].split(2, dim=1)]
        results.append(torch.cat(parts, dim=1))
    assert_equal_to_rounding(*results)


def test_cache_that_was_reset_starts_anew() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    cache = DynamicCache(config=model.config)
    inputs = prompts(model, 3) | {CACHE: cache}
    outputs = []
    for first in ([0, NEVER, NEVER], [NEVER, NEVER, 0], [0, NEVER, NEVER]):
        with opened(model, in_forward(first)):
            outputs.append(output_of(model, inputs))
        assert open_rows_of(cache) == [first.index(0)]
        cache.reset()
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("crop", [-1, -2])
def test_window_that_keeps_what_has_left_it_until_a_crop(crop: int) -> None:
    """As assisted decoding asks a cache to, here of several rows."""
    results = []
    for model in models_of(tf.MistralForCausalLM, "full"):
        ids, cache = prompts(model, 3, length=12)["input_ids"], DynamicCache(config=model.config)
        with opened(model, in_forward([NEVER, 0, NEVER])):
            output_of(model, {"input_ids": ids[:, :6], CACHE: cache})
            cache.activate_past_recording()
            output_of(model, {"input_ids": ids[:, 6:9], CACHE: cache})
            cache.crop(crop)
            results.append(output_of(model, {"input_ids": ids[:, 9:], CACHE: cache}))
    assert_equal_to_rounding(*results)


def test_caches_that_hold_more_are_not_taken_apart() -> None:
    config = tiny_model(tf.LlamaForCausalLM).config
    plain, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=9)
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True
    state = DynamicCache(config=config)
    state.layers[1] = LinearAttentionLayer()
    both = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    assert can_be_taken_apart(plain, plain.layers)
    for cache in (static, offloaded, state):
        assert not can_be_taken_apart(cache, cache.layers)
    assert not can_be_taken_apart(both, both.self_attention_cache.layers)


def test_decoder_with_cross_attention_runs_all_rows() -> None:
    results = []
    for model in models_of(tf.T5ForConditionalGeneration, "full"):
        with opened(model, in_forward([NEVER, 1])):
            results.append(generate(model))
    assert_same_numbers(*results)
    assert open_rows_of(results[0][CACHE].self_attention_cache) is None


# ----------------------------------------------------------------------------------------- masks and other arguments


def run_steps(model: nn.Module, steps: Iterable[dict[str, Any]], first: Iterable[int]) -> tuple[torch.Tensor, Any]:
    """Logits of the tokens of some forwards that continue a cache, and the open rows after each."""
    cache, logits, rows = DynamicCache(config=model.config), [], []
    with opened(model, in_forward(first)):
        for step in steps:
            logits.append(output_of(model, step | {CACHE: cache}))
            rows.append(open_rows_of(cache))
    return torch.cat(logits, dim=1), rows


def causal_mask(is_own: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """To be added to the attention. Shape: [b, m] -> [b, 1, n, m], of the last n tokens"""
    length = is_own.shape[1]
    sees = torch.ones(length, length).tril().bool() & is_own.unsqueeze(1) | torch.eye(length).bool()
    return torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e9)[:, None, -num_tokens:]


@pytest.mark.parametrize("dimensions", [2, 4])
@pytest.mark.parametrize("variant", RANGES)
def test_masks_and_positions_of_rows(variant: str, dimensions: int) -> None:
    results = []
    for model in models_of(tf.LlamaForCausalLM, variant):
        ids, is_own = prompts(model, 5, length=10)["input_ids"], torch.ones(5, 10).bool()
        for row, padding in enumerate([0, 3, 1, 2, 0]):
            is_own[row, :padding] = False
        positions = (is_own.cumsum(1) - 1).clamp(min=0)
        steps = []
        for begin, end in ((0, 6), (6, 7), (7, 9), (9, 10)):
            mask = is_own[:, :end].long() if dimensions == 2 else causal_mask(is_own[:, :end], end - begin)
            part = slice(begin, end)
            steps.append({"input_ids": ids[:, part], "position_ids": positions[:, part], "attention_mask": mask})
        results.append(run_steps(model, steps, [NEVER, 1, NEVER, NEVER, 2]))
    own = is_own.unsqueeze(-1)
    assert_equal_to_rounding(*[logits * own for logits, _ in results])
    if variant != "early":
        assert results[0][1] == [[], [1], [1, 4], [1, 4]]


@pytest.mark.parametrize("variant", RANGES)
def test_what_cannot_be_cut_into_rows_runs_twice_as_a_whole_from_then_on(variant: str) -> None:
    """Here a mask that all rows share, in the third forward."""
    results = []
    for model in models_of(tf.LlamaForCausalLM, variant):
        parts = prompts(model, 5, length=10)["input_ids"].split([6, 1, 2, 1], dim=1)
        steps: list[dict[str, Any]] = [{"input_ids": part} for part in parts]
        steps[2]["attention_mask"] = causal_mask(torch.ones(1, 9).bool(), 2)
        results.append(run_steps(model, steps, [NEVER, 1, NEVER, NEVER, 3]))
    assert_equal_to_rounding(results[0][0], results[1][0])
    assert results[0][1] == [[], [1], None, None]


@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("how", ["gradients", "training", "option"])
def test_where_both_passes_have_to_run_all_rows_do(variant: str, how: str) -> None:
    results = []
    for model in models_of(tf.LlamaForCausalLM, variant):
        ids, cache = prompts(model, 4, length=9)["input_ids"], DynamicCache(config=model.config)
        with opened(model, in_forward([NEVER, 0, NEVER, 1])):
            output_of(model, {"input_ids": ids[:, :6], CACHE: cache})
            model.train(how == "training")
            model.peft_config["default"].skip_closed_rows &= how != "option"
            with torch.set_grad_enabled(how == "gradients"):
                results.append([model(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits.detach() for i in (6, 7)])
            assert open_rows_of(cache) is None
    for found, expected in zip(*results, strict=True):
        assert_equal_to_rounding(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(not compiles_copies(), reason="this torch breaks the graph at a copy.copy")
def test_compiled_forward_runs_all_rows() -> None:
    """Which cannot look whether there is feedback."""
    results = []
    for model in models_of(tf.LlamaForCausalLM, "middle"):
        ids, cache = prompts(model, 4, length=9)["input_ids"], DynamicCache(config=model.config)
        with opened(model, in_forward([NEVER, 0, NEVER, NEVER])):
            output_of(model, {"input_ids": ids[:, :6], CACHE: cache})
        torch._dynamo.reset()
        shares = model.peft_config["default"].skip_closed_rows
        run = torch.compile(model, backend="eager", fullgraph=True) if shares else model
        with torch.no_grad():
            results.append(torch.cat([run(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits for i in (6, 7)]))
        assert open_rows_of(cache) is None
    assert_equal_to_rounding(*results)


# ----------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("names", [None, ["one", None, "two", "two", "one", None]], ids=["all at once", "mixed batch"])
@pytest.mark.parametrize("options", [{}, LORA], ids=["", "lora"])
@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_rows_that_any_adapter_changes(decoding: str, options: dict[str, Any], names: list[str | None] | None) -> None:
    results = []
    for skips in (True, False):
        of_each = {"skip_closed_rows": skips, "gate": "token", **options}
        model = with_adapters(tf.LlamaForCausalLM, {"one": of_each, "two": {**of_each, "r": 3, "feedback_to": 1}})
        activate(model, *(["one"] if names else ["one", "two"]))
        of_rows = {"adapter_names": names} if names else {}
        one, two = (in_forward(first + [NEVER] * (4 - 2 * bool(names))) for first in ([1, NEVER], [NEVER, 2]))
        with opened(model, one, "one"), opened(model, two, "two"):
            results.append(generate(model, **prompts(model, 6), **of_rows, **DECODING[decoding]))
    assert_same_numbers(*results)
    rows = open_rows_of(results[0][CACHE])
    assert rows == ([0, 3] if names else [0, 1]) or (decoding == "beam" and rows)
