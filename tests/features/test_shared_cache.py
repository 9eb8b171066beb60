"""`skip_closed_rows` with a key-value cache: one pass and one set of keys and values until there is feedback."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import StaticLayer

from ..families.test_transformers import HYBRIDS
from ..helpers import CACHE, adapted, compiles_copies, counted_block_calls, output_of, paths_of, steer, steered
from ..zoo import DECODERS, NUM_BLOCKS, RANGES, add_noise, inputs_of, tiny_model, variant_of

NEVER = 10**6
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static beam": {"cache_implementation": "static", "num_beams": 2},
    "chunks": {"prefill_chunk_size": 4},
    "recorded": {"output_hidden_states": True, "output_attentions": True},
}

# All are tried with blocks that run in one pass only, and one of them also without.
ON_DECODERS = [(tf.LlamaForCausalLM, "full"), *((cls, "middle") for cls in DECODERS)]
EAGER = {"attn_implementation": "eager"}  # in which attentions can be recorded


@contextmanager
def open_from(model: nn.Module, first: int, rows: slice = slice(None)) -> Iterator[None]:
    """Close the mask of the decoder in its first forwards, and later of the other rows."""
    prompt = paths_of(model)[-1].selection.topdown_prompt["default"]
    forwards = iter(range(NEVER))

    def close(module: nn.Module, args: tuple, mask: torch.Tensor) -> torch.Tensor:
        is_open = torch.zeros_like(mask)
        is_open[rows] = next(forwards) >= first
        return mask * is_open

    handle = prompt.register_forward_hook(close)
    try:
        yield
    finally:
        handle.remove()


def two_models(model_class: type, variant: str, **options: Any) -> list[PeftModel]:
    """One that skips pass 2 where there is no feedback, and one that does not, in double precision."""
    models = []
    for skips in (True, False):
        base = tiny_model(model_class, **options).double()
        inputs = {name: in_double(value) for name, value in inputs_of(base).items()}
        models.append(steered(base, inputs, skip_closed_rows=skips, **variant_of(model_class, variant)))
    return models


def in_double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def generate(model: nn.Module, **options: Any) -> Any:
    """Six new tokens and their logits."""
    inputs = {name: in_double(value) for name, value in inputs_of(model, length=6).items()}
    inputs.pop("decoder_input_ids", None)
    defaults = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    return model.generate(**inputs | defaults | options)


def assert_equal_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def assert_same_numbers(found: Any, expected: Any) -> None:
    """The same tokens and, but for rounding, the same logits and whatever else was recorded."""
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("logits", "hidden_states", "attentions"):
        for of_step, expected_of_step in zip(found.get(name) or (), expected.get(name) or (), strict=True):
            pair = [x if isinstance(x, tuple) else (x,) for x in (of_step, expected_of_step)]
            for tensor, expected_tensor in zip(*pair, strict=True):
                assert_equal_to_rounding(tensor, expected_tensor)


def self_attention(cache: Cache) -> Cache:
    return getattr(cache, "self_attention_cache", cache)


# ------------------------------------------------------------------------------------------------- without feedback


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize(("model_class", "variant"), ON_DECODERS)
def test_closed_generation_is_that_of_the_base_model(model_class: type, variant: str, decoding: str) -> None:
    """Bit for bit, with as many calls of each block and as many layers in the cache."""
    options = EAGER if decoding == "recorded" else {}
    base = tiny_model(model_class, **options).requires_grad_(False)  # as it is below an adapter
    model = steered(tiny_model(model_class, **options), skip_closed_rows=True, **RANGES[variant])
    with counted_block_calls(base) as expected_calls:
        expected = generate(base, **DECODING[decoding])
    with counted_block_calls(model) as calls, open_from(model, NEVER):
        found = generate(model, **DECODING[decoding])
    assert calls == expected_calls
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    for layer, expected_layer in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys) and torch.equal(layer.values, expected_layer.values)


@pytest.mark.parametrize("cache_class", [None, DynamicCache, StaticCache])
@pytest.mark.parametrize("return_dict", [True, False])
def test_output_has_the_callers_cache(cache_class: type | None, return_dict: bool) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    options = {"max_cache_len": 32} if cache_class is StaticCache else {}
    cache = cache_class and cache_class(config=model.config, **options)
    with torch.no_grad(), open_from(model, 1):
        for _ in range(2):  # the passes part in the second one
            output = model(**inputs_of(model), **{CACHE: cache}, use_cache=True, return_dict=return_dict)
            found = output[CACHE] if return_dict else output[1]
            assert found is cache or cache is None
            cache = found
    assert len(cache.layers) == 2 * NUM_BLOCKS


# ------------------------------------------------------------------------------------------- the first feedback comes


@pytest.mark.parametrize(
    ("model_class", "variant", "decoding", "first"),
    [(*pair, decoding, 3) for pair in ON_DECODERS for decoding in DECODING]
    + [(tf.LlamaForCausalLM, "middle", decoding, 0) for decoding in DECODING]
    + [(cls, "full", "greedy", 0) for cls in DECODERS],
)
def test_generation_that_opens_is_as_without_the_option(
    model_class: type, variant: str, decoding: str, first: int
) -> None:
    results = []
    for model in two_models(model_class, variant, **EAGER if decoding == "recorded" else {}):
        with open_from(model, first, slice(1, None)):
            results.append(generate(model, **DECODING[decoding]))
    assert_same_numbers(*results)
    assert [len(result[CACHE].layers) > NUM_BLOCKS for result in results] == [True, True]


@pytest.mark.parametrize("first", [0, 3, NEVER])
@pytest.mark.parametrize(
    ("model_class", "variant", "decoding"),
    [
        (tf.T5ForConditionalGeneration, "full", "greedy"),
        (tf.T5ForConditionalGeneration, "middle", "greedy"),
        (tf.T5ForConditionalGeneration, "middle", "beam"),
        (tf.T5ForConditionalGeneration, "middle", "static"),
        (tf.WhisperForConditionalGeneration, "full", "greedy"),
        (tf.WhisperForConditionalGeneration, "middle", "static"),
    ],
)
def test_decoder_with_cross_attention(model_class: type, variant: str, decoding: str, first: int) -> None:
    results = []
    for model in two_models(model_class, variant):
        with open_from(model, first):
            results.append(generate(model, **DECODING[decoding]))
    assert_same_numbers(*results)
    cache = results[0][CACHE]
    assert isinstance(cache, tf.EncoderDecoderCache)
    if model_class is tf.T5ForConditionalGeneration:  # Whisper gives back a copy of some layers
        has_parted = len(cache.self_attention_cache.layers) > len(cache.cross_attention_cache.layers)
        assert has_parted == (first < NEVER)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("variant", ["full", "late"])
@pytest.mark.parametrize("model_class", HYBRIDS)
def test_states_of_other_kinds(model_class: type, variant: str, first: int) -> None:
    """Of convolutions and linear attention. They are written into in place: pass 2 needs those of before the step."""
    results = []
    for skips in (True, False):
        torch.manual_seed(0)
        base = model_class(HYBRIDS[model_class]).eval().double()
        base.set_experts_implementation("eager")  # the other one has no double precision
        add_noise(*base.parameters())
        model = steered(base, skip_closed_rows=skips, target_modules=["v_proj"], **RANGES[variant])
        with open_from(model, first):
            results.append(generate(model))
    assert_same_numbers(*results)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.MistralForCausalLM])
def test_assisted_decoding_crops_the_cache(model_class: type, variant: str, first: int) -> None:
    results = []
    for model in two_models(model_class, variant):
        ids = inputs_of(model, batch_size=1, length=6)["input_ids"].repeat(1, 3)
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(model_class).double()}):
            with open_from(model, first):
                results.append(generate(model, input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    assert_same_numbers(results[0], results[2])
    assert_same_numbers(results[1], results[3])


@pytest.mark.parametrize("first", [0, 2, NEVER])
@pytest.mark.parametrize("variant", ["full", "middle"])
def test_left_padding(variant: str, first: int) -> None:
    results = []
    for model in two_models(tf.LlamaForCausalLM, variant):
        ids = inputs_of(model, length=6)["input_ids"]
        ids[0, :3] = 0
        with open_from(model, first):
            results.append(generate(model, input_ids=ids, attention_mask=(ids != 0).long()))
    assert_same_numbers(*results)


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="a quantised cache without another package needs Python 3.11"
)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_quantized_cache(first: int) -> None:
    results = []
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for model in two_models(tf.LlamaForCausalLM, "middle"):
        with open_from(model, first):
            results.append(generate(model, **options))
    assert_same_numbers(*results)


# ---------------------------------------------------------------------------------------------- a cache of the caller


def run_parts(model: nn.Module, sizes: list[int], cache: Cache | None, between: Callable) -> torch.Tensor:
    """Logits of a sentence that is given in parts. Shape: [2, n, vocab]"""
    parts = []
    with torch.no_grad():
        for part in inputs_of(model, length=sum(sizes))["input_ids"].split(sizes, dim=1):
            output = model(input_ids=part, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            parts.append(output.logits)
            between(cache)
    return torch.cat(parts, dim=1)


BETWEEN: dict[str, Callable] = {
    "nothing": lambda cache: None,
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 3]))),
    "crop": lambda cache: cache.crop(-1),
}


STATIC_CROP = ["crop"] if hasattr(StaticLayer, "crop") else []  # not in older versions
# What transformers can do with which cache: it crops no full window, and selects no rows of a static cache.
CONTINUED = [
    *((tf.LlamaForCausalLM, "dynamic", between) for between in BETWEEN),
    *((tf.LlamaForCausalLM, "static", between) for between in ("nothing", "reorder", *STATIC_CROP)),
    *((tf.Gemma3ForCausalLM, "dynamic", between) for between in ("nothing", "reorder", "select")),
    *((tf.Gemma3ForCausalLM, "static", between) for between in ("nothing", "reorder")),
]


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize(
    ("model_class", "kind", "between", "variant"),
    [
        (*row, variant)
        for row in CONTINUED
        for variant in RANGES
        if variant == "middle" or (row[0] is tf.LlamaForCausalLM and row[2] == "nothing")
    ],
)
def test_continued_cache(model_class: type, variant: str, kind: str, between: str, first: int) -> None:
    results = []
    for model in two_models(model_class, variant):
        cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
        with open_from(model, first):
            results.append(run_parts(model, [5, 4, 2, 1], cache, BETWEEN[between]))
    assert_equal_to_rounding(*results)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("model_class", DECODERS)
def test_copies_of_a_prefix_part_by_themselves(model_class: type, kind: str) -> None:
    results = []
    for model in two_models(model_class, "middle"):
        ids = inputs_of(model, length=9)["input_ids"]
        cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
        with torch.no_grad():
            with open_from(model, NEVER):
                prefix = model(input_ids=ids[:, :6], **{CACHE: cache}, use_cache=True)[CACHE]
            continued = copy.deepcopy(prefix)
            opened = model(input_ids=ids[:, 6:], **{CACHE: continued}).logits
            with open_from(model, NEVER):
                closed = model(input_ids=ids[:, 6:], **{CACHE: prefix}).logits
        results.append(torch.stack([opened, closed]))
    assert_equal_to_rounding(*results)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_that_was_reset_is_shared_again(kind: str) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache()
    for _ in range(2):
        opened = output_of(model, inputs_of(model) | {CACHE: cache})
        assert len(cache.layers) == 2 * NUM_BLOCKS
        cache.reset()
        with open_from(model, NEVER):
            closed = output_of(model, inputs_of(model) | {CACHE: cache})
        assert len(cache.layers) == NUM_BLOCKS
        cache.reset()
    assert torch.equal(opened, output_of(model, inputs_of(model)))
    torch.testing.assert_close(closed, output_of(tiny_model(tf.LlamaForCausalLM)))


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("how", ["gradients", "training", "option"])
def test_cache_parts_where_both_passes_have_to_run(variant: str, how: str) -> None:
    """Pass 2 has its own layers before pass 1 begins, also if it then gets no feedback."""
    results = []
    for model in two_models(tf.LlamaForCausalLM, variant):
        ids = inputs_of(model, length=9)["input_ids"]
        with torch.no_grad(), open_from(model, NEVER):
            cache = model(input_ids=ids[:, :6], use_cache=True)[CACHE]
        model.train(how == "training")
        if how == "option":
            model.peft_config["default"].skip_closed_rows = False
        with torch.set_grad_enabled(how == "gradients"), open_from(model, 1):
            results.append([model(input_ids=ids[:, 6:7], **{CACHE: cache}).logits.detach()])
            assert len(cache.layers) > NUM_BLOCKS
            results[-1].append(model(input_ids=ids[:, 7:], **{CACHE: cache}).logits.detach())
    for found, expected in zip(*results, strict=True):
        assert_equal_to_rounding(found, expected)


def test_cache_filled_without_feedback_is_refused_elsewhere() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    model.add_adapter("other", adapted(tiny_model(tf.LlamaForCausalLM)).peft_config["default"])
    steer(model, "other")
    with torch.no_grad(), open_from(model, NEVER):
        inputs = inputs_of(model) | {CACHE: model(**inputs_of(model), use_cache=True)[CACHE]}
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' active, but no adapter is active"):
        output_of(model, inputs)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="filled by the TOAST adapter 'default'"):
        output_of(model, inputs)
    with pytest.raises(ValueError, match="filled with a TOAST adapter"):
        output_of(tiny_model(tf.LlamaForCausalLM), inputs)
    model.set_adapter("default")
    output_of(model, inputs)


def test_static_cache_is_not_shared_where_generate_compiles() -> None:
    """On accelerators, the forwards after the first one; all devices but the CPU are taken for one."""
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True).to("meta")
    cache = StaticCache(config=model.config, max_cache_len=16)
    output_of(model, {"input_ids": torch.ones(2, 9, dtype=torch.long, device="meta"), CACHE: cache})
    assert len(cache.layers) == 2 * NUM_BLOCKS


@pytest.mark.slow
@pytest.mark.skipif(not compiles_copies(), reason="this torch breaks the graph at a copy.copy")
def test_shared_cache_parts_in_a_compiled_forward() -> None:
    """Which cannot look whether there is feedback."""
    results = []
    for model in two_models(tf.LlamaForCausalLM, "middle"):
        ids = inputs_of(model, length=9)["input_ids"]
        with torch.no_grad():
            with open_from(model, NEVER):
                cache = model(input_ids=ids[:, :6], use_cache=True)[CACHE]
            torch._dynamo.reset()
            shares = model.peft_config["default"].skip_closed_rows
            run = torch.compile(model, backend="eager", fullgraph=True) if shares else model
            results.append(torch.cat([run(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits for i in (6, 7)]))
    assert_equal_to_rounding(*results)
