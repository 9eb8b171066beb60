"""Generation with a cache gives what recomputation gives, and a cache is not used with what it was not filled with."""

import copy
import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from transformers import DynamicCache, StaticCache

from ..helpers import CACHE, adapted, assert_same_generation, output_of, steer, steered
from ..zoo import DECODERS, RANGES, VARIANTS, inputs_of, readable, tiny_model, with_variants

DECODING = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def generate(model: PeftModel, **options: Any) -> Any:
    """Six new tokens and their logits, as a tuple of tensors or of caches."""
    defaults = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    return model.generate(**inputs_of(model, length=6) | defaults | options)


@pytest.mark.parametrize(
    ("model_class", "decoding", "variant"),
    [(cls, "greedy", variant) for cls, variant in with_variants(DECODERS, VARIANTS)]
    + [(cls, decoding, "middle") for cls in DECODERS for decoding in DECODING if decoding != "greedy"],
)
def test_default_cache_gives_what_recomputation_gives(model_class: type, decoding: str, variant: str) -> None:
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM", **VARIANTS[variant])
    expected = generate(model, use_cache=False, **DECODING[decoding])
    assert_same_generation(generate(model, **DECODING[decoding]), expected)
    with model.disable_adapter():
        base = generate(model, **DECODING[decoding])
    assert not torch.allclose(base.logits[0], expected.logits[0], atol=1e-2)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_left_padding(model_class: type, variant: str) -> None:
    """A padded sentence continues as it does alone."""
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM", **RANGES[variant])
    ids = inputs_of(model, length=6)["input_ids"]
    ids[0, :3] = 0
    padded = generate(model, input_ids=ids, attention_mask=(ids != 0).long())
    alone = generate(model, input_ids=ids[:1, 3:], attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert torch.equal(padded.sequences[:1, 6:], alone.sequences[:, 3:])
    torch.testing.assert_close(torch.stack(padded.logits)[:, :1], torch.stack(alone.logits), rtol=1e-4, atol=1e-4)
    without_cache = generate(model, input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False)
    assert_same_generation(padded, without_cache)


@pytest.mark.parametrize(
    ("model_class", "variant", "options"),
    [(*pair, {"cache_implementation": "static"}) for pair in with_variants(DECODERS, RANGES)]
    + list(
        product(
            DECODERS,
            ["middle"],
            [{"cache_implementation": "dynamic"}, {"prefill_chunk_size": 4}, {CACHE: DynamicCache}],
        )
    ),
    ids=readable,
)
def test_kinds_of_caches(model_class: type, variant: str, options: dict[str, Any]) -> None:
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM", **RANGES[variant])
    expected = generate(model, use_cache=False)
    made = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    assert_same_generation(generate(model, **made), expected)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.Qwen3ForCausalLM])
def test_assisted_decoding_crops_the_cache(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM", **RANGES[variant])
    ids = inputs_of(model, batch_size=1, length=6)["input_ids"].repeat(1, 3)  # something to look up
    expected = generate(model, input_ids=ids, use_cache=False)
    assert_same_generation(generate(model, input_ids=ids, prompt_lookup_num_tokens=3), expected)


# ---------------------------------------------------------------------------------------------- continuing a cache


@pytest.mark.parametrize(
    ("model_class", "variant", "recorded"),
    [(*pair, {}) for pair in with_variants(DECODERS, RANGES)]
    + [(cls, "middle", {"output_attentions": True, "output_hidden_states": True}) for cls in DECODERS],
    ids=readable,
)
def test_continues_a_returned_cache(model_class: type, variant: str, recorded: dict[str, bool]) -> None:
    model = steered(tiny_model(model_class, attn_implementation="eager"), **RANGES[variant])
    ids = inputs_of(model, length=12)["input_ids"]
    expected = output_of(model, {"input_ids": ids, "use_cache": False})
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split([6, 4, 1, 1], dim=1):
            output = model(input_ids=part, **{CACHE: cache}, use_cache=True, **recorded)
            cache = output[CACHE]
            parts.append(output.logits)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_tuple_output_holds_the_callers_cache(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant])
    cache = DynamicCache(config=model.config)
    output = model(**inputs_of(model), **{CACHE: cache}, use_cache=True, return_dict=False)
    assert output[1] is cache
    assert model(**inputs_of(model), **{CACHE: cache})[CACHE] is cache


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_generate_continues_a_returned_cache(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM", **RANGES[variant])
    first = generate(model, max_new_tokens=4)
    so_far = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    continued = generate(model, **so_far, **{CACHE: first[CACHE]}, max_new_tokens=4)
    assert torch.equal(continued.sequences, generate(model, max_new_tokens=8, use_cache=False).sequences)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_copied_prefix_cache_is_reused(model_class: type, variant: str) -> None:
    """One cache of a common prefix, deep-copied for each continuation as the transformers documentation does."""
    model = steered(tiny_model(model_class), **RANGES[variant])
    ids = inputs_of(model, length=12)["input_ids"]
    expected = output_of(model, {"input_ids": ids, "use_cache": False})[:, 6:]
    with torch.no_grad():
        prefix = model(input_ids=ids[:, :6], use_cache=True)[CACHE]
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            output = model(input_ids=ids[:, 6:], **{CACHE: cache})
            torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
            assert (prefix.get_seq_length(), cache.get_seq_length()) == (6, 12)


@pytest.mark.parametrize("variant", RANGES)
def test_static_cache_is_used_again_after_reset(variant: str) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **RANGES[variant])
    cache = StaticCache(config=model.config, max_cache_len=16)
    expected = output_of(model, inputs_of(model) | {"use_cache": False})
    for _ in range(2):
        output = output_of(model, inputs_of(model) | {CACHE: cache})
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        cache.reset()


@pytest.mark.parametrize("variant", RANGES)
def test_reset_cache_serves_another_adapter_and_the_base_model(variant: str) -> None:
    model = two_adapters(tf.LlamaForCausalLM, RANGES[variant])
    cache = StaticCache(config=model.config, max_cache_len=16)
    inputs = inputs_of(model)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        expected = output_of(model, inputs | {"use_cache": False})
        output = output_of(model, inputs | {CACHE: cache})
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        cache.reset()
    expected = output_of(tiny_model(tf.LlamaForCausalLM))
    with model.disable_adapter():
        output = output_of(model, inputs | {CACHE: cache})
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_caches_of_two_conversations_alternate() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    ids = inputs_of(model, length=8)["input_ids"]
    expected = output_of(model, {"input_ids": ids, "use_cache": False})
    caches: list = [None, None]
    for column in range(8):
        for row in (0, 1):
            with torch.no_grad():
                output = model(input_ids=ids[row : row + 1, column : column + 1], **{CACHE: caches[row]})
            caches[row] = output[CACHE]
            torch.testing.assert_close(output.logits[0, 0], expected[row, column], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_cache_is_freed_with_its_output(variant: str, training: bool) -> None:
    """Not only when the garbage collector comes by: a cache is large, and a training step has one as well."""
    model = steered(tiny_model(tf.LlamaForCausalLM), **RANGES[variant]).train(training)
    gc.disable()
    try:
        cache = weakref.ref(model(**inputs_of(model))[CACHE])
        assert cache() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ refused caches


def step(model: PeftModel, cache: Any = None) -> Any:
    with torch.no_grad():
        return model(**inputs_of(model), **{CACHE: cache}, use_cache=True)[CACHE]


def two_adapters(model_class: type, other_range: dict[str, Any]) -> PeftModel:
    model = steered(tiny_model(model_class))
    model.add_adapter("other", adapted(tiny_model(model_class), **other_range).peft_config["default"])
    steer(model, "other")
    return model


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_cache_of_the_base_model_is_refused(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant])
    with model.disable_adapter():
        cache = step(model)
    with pytest.raises(ValueError, match="filled without feedback"):
        step(model, cache)
    with model.disable_adapter():
        assert step(model, cache).get_seq_length() == 18


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES))
def test_cache_is_refused_when_the_adapter_is_disabled(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant])
    cache = step(model)
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' active, but no adapter is active"):
        step(model, cache)
    assert step(model, cache).get_seq_length() == 18


@pytest.mark.parametrize("variant", RANGES)
def test_cache_of_another_adapter_is_refused(variant: str) -> None:
    model = two_adapters(tf.LlamaForCausalLM, RANGES[variant])
    cache = step(model)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="filled by the TOAST adapter 'default'"):
        step(model, cache)
    model.set_adapter("default")
    assert step(model, cache).get_seq_length() == 18


@pytest.mark.parametrize("variant", RANGES)
def test_switching_adapters_between_generations(variant: str) -> None:
    model = two_adapters(tf.LlamaForCausalLM, RANGES[variant])
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_same_generation(generate(model), generate(model, use_cache=False))
