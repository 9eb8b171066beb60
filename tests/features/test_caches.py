"""Kinds of caches and decoding beyond the defaults, what a cache holds, and what is refused."""

import copy
import functools
import inspect
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StaticCache, cache_utils
from transformers.generation import CompileConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils import ModelOutput

from toast_peft.core.cache import cache_parameter

from ..helpers import CACHE, assert_same_generation, compiles_copies, output_of, steered
from ..zoo import DECODERS, NUM_BLOCKS, RANGES, VARIANTS, inputs_of, tiny_model, with_variants

PROMPT_LENGTH = 6


def decoder(model_class: type, variant: str) -> PeftModel:
    return steered(tiny_model(model_class), task_type="CAUSAL_LM", **VARIANTS[variant])


def generate(model: PeftModel | PreTrainedModel, **options: Any) -> Any:
    """Eight new tokens, and their logits."""
    inputs = {} if "inputs_embeds" in options else inputs_of(model, length=PROMPT_LENGTH)
    options = {"max_new_tokens": 8, "do_sample": False} | options
    return model.generate(**inputs | options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES, [tf.LlamaForCausalLM]))
def test_prompts_as_embeddings(model_class: type, variant: str) -> None:
    model = decoder(model_class, variant)
    ids = inputs_of(model, length=PROMPT_LENGTH)["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    expected = generate(model, use_cache=False)
    found = generate(model, inputs_embeds=embeddings, attention_mask=torch.ones_like(ids))
    assert torch.equal(found.sequences, expected.sequences[:, PROMPT_LENGTH:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(DECODERS, RANGES, [tf.LlamaForCausalLM]))
def test_base_model_drafts(model_class: type, variant: str) -> None:
    """Assisted decoding: the base model proposes tokens, the adapted model accepts or rolls back both passes."""
    model = decoder(model_class, variant)
    ids = {"input_ids": inputs_of(model, batch_size=1, length=PROMPT_LENGTH)["input_ids"]}
    expected = generate(model, **ids, use_cache=False)
    assert_same_generation(generate(model, **ids, assistant_model=tiny_model(model_class)), expected)


COMPILED = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(backend="aot_eager", mode="default", fullgraph=True),
}


@pytest.fixture
def compiles_static_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers compile, which it does by itself on accelerators only; skips where it cannot."""
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *args, **kwargs: True)
    if not base_model_compiles():
        pytest.skip(f"transformers {tf.__version__} with torch {torch.__version__} does not compile the base model")
    if not compiles_copies():
        pytest.skip(f"torch {torch.__version__} breaks the graph at a copy.copy, by which the passes see the cache")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@functools.cache
def base_model_compiles() -> bool:
    try:
        generate(tiny_model(tf.LlamaForCausalLM, num_hidden_layers=1), max_new_tokens=2, **COMPILED)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.slow
@pytest.mark.usefixtures("compiles_static_caches")
@pytest.mark.parametrize(
    ("model_class", "size", "options"),
    [
        (tf.LlamaForCausalLM, {"num_hidden_layers": 2}, {}),
        # Blocks with either cache, of which the first runs in pass 1 only and the last in pass 2 only.
        (
            tf.Gemma3ForCausalLM,
            {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            {"feedback_from": 2, "feedback_to": 1},
        ),
    ],
    ids=["full", "middle"],
)
def test_compiled_decoding_with_a_static_cache(
    model_class: type, size: dict[str, Any], options: dict[str, int]
) -> None:
    model = steered(tiny_model(model_class, **size), task_type="CAUSAL_LM", **options)
    with torch.compiler.set_stance("force_eager"):
        expected = generate(model, use_cache=False)
    assert_same_generation(generate(model, **COMPILED), expected)
    # One graph; a sliding window that fills up is a second one, also without TOAST.
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or [])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + sliding
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="a quantised cache without another package needs Python 3.11"
)
@pytest.mark.parametrize("variant", RANGES)
def test_quantized_cache(variant: str) -> None:
    """It loses precision: in two passes no more than of the order of what one pass loses."""
    model = decoder(tf.LlamaForCausalLM, variant)
    error = error_of_quantized_cache(model)
    with model.disable_adapter():
        assert 0 < error < 5 * error_of_quantized_cache(model)


def error_of_quantized_cache(model: PeftModel) -> float:
    """Relative error of the logits of the first step that reads the cache."""
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    exact, found = (generate(model, max_new_tokens=2, **o).logits[1] for o in ({}, options))
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("variant", RANGES)
def test_cache_holds_what_it_needs_once(variant: str, reorder: bool) -> None:
    """Keys and values of pass 2 for every block, of pass 1 for the blocks of the loop, and nothing else."""
    model = decoder(tf.LlamaForCausalLM, variant)
    with torch.no_grad():
        cache = model(**inputs_of(model), use_cache=True)[CACHE]
        if reorder:
            cache.reorder_cache(torch.tensor([1, 0]))
            cache = model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache})[CACHE]
    options = RANGES[variant]
    blocks = NUM_BLOCKS + options.get("feedback_from", NUM_BLOCKS) - options.get("feedback_to", 0)
    config = model.config
    batch_size, length = 2, cache.get_seq_length()
    of_a_block = 2 * batch_size * length * config.num_key_value_heads * config.head_dim * 4  # bytes, float32
    tensors = {id(tensor): tensor for layer in all_layers(cache) for tensor in (layer.keys, layer.values)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    assert sum(storage.nbytes() for storage in storages.values()) == blocks * of_a_block


def all_layers(cache: DynamicCache) -> list:
    return [*cache.layers, *cache.topdown_passes.first_pass.layers]


def test_static_cache_holds_what_it_needs_once() -> None:
    model = decoder(tf.LlamaForCausalLM, "middle")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(**inputs_of(model), **{CACHE: cache})
        model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache})
    storages = {layer.keys.untyped_storage().data_ptr() for layer in all_layers(cache)}
    assert len(storages) == NUM_BLOCKS + 3 - 1


def test_continuous_batching_is_refused() -> None:
    """A paged cache is told by its type, whatever the argument is called."""
    model = decoder(tf.LlamaForCausalLM, "full").get_base_model()
    for name in ("cache", "pages"):
        with pytest.raises(NotImplementedError, match="continuous batching"):
            model(**inputs_of(model), **{name: PagedAttentionCache.__new__(PagedAttentionCache)})


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("variant", RANGES)
def test_early_exit_drafts(variant: str, layers: int) -> None:
    """Assisted decoding in which the first blocks of the model itself propose the tokens."""
    model = decoder(tf.LlamaForCausalLM, variant)
    ids = {"input_ids": inputs_of(model, batch_size=1, length=PROMPT_LENGTH)["input_ids"]}
    expected = generate(model, **ids, use_cache=False)
    assert_same_generation(generate(model, **ids, assistant_early_exit=layers), expected)


# ---------------------------------------------------------------------- where a cache is in the arguments and outputs


class RenamedLlama(tf.LlamaModel):
    """As after another rename by transformers."""

    def forward(self, input_ids: torch.Tensor, key_values: "Cache | None" = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **{CACHE: key_values}, **kwargs)
        return RenamedOutput(last_hidden_state=output.last_hidden_state, key_values=output.get(CACHE))


@dataclass
class RenamedOutput(ModelOutput):
    last_hidden_state: torch.Tensor | None = None
    key_values: Cache | None = None


@pytest.mark.parametrize("variant", RANGES)
def test_cache_is_found_under_any_name(variant: str) -> None:
    base = tiny_model(tf.LlamaModel)
    base.__class__ = RenamedLlama
    model = steered(base, **RANGES[variant])
    ids = inputs_of(model)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False)[0]
        first = model(input_ids=ids[:, :6], use_cache=True)  # made by TOAST
        given = DynamicCache(config=model.config)
        assert model(input_ids=ids[:, :6], key_values=given, use_cache=True).key_values is given
        for cache in (first.key_values, given):
            rest = model(input_ids=ids[:, 6:], key_values=cache, use_cache=True)
            torch.testing.assert_close(rest[0], expected[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "annotation", [Cache, DynamicCache | None, "Cache", "Optional[Cache]", "tuple | Cache | None"]
)
def test_parameter_that_takes_a_cache_is_told_by_its_annotation(annotation: Any) -> None:
    def forward(input_ids: torch.Tensor, cached: bool, states: annotation = None) -> None: ...

    assert cache_parameter(inspect.signature(forward).parameters) == "states"


# --------------------------------------------------------------------------------- a cache of another model or adapter


def filled(model: PeftModel) -> Cache:
    with torch.no_grad():
        return model(**inputs_of(model), use_cache=True)[CACHE]


def run_on(model: torch.nn.Module, cache: Cache) -> torch.Tensor:
    return output_of(model, inputs_of(model) | {CACHE: cache})


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.Gemma3ForCausalLM])
def test_unloaded_model_refuses_the_cache(model_class: type, variant: str, copied: bool) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant])
    cache = filled(model)
    cache = copy.deepcopy(cache) if copied else cache
    base = model.unload()
    with pytest.raises(ValueError, match="filled with a TOAST adapter"):
        run_on(base, cache)
    assert torch.equal(output_of(base), output_of(tiny_model(model_class)))


@pytest.mark.parametrize("other", ["plain", "adapted", "copy"])
def test_another_model_refuses_the_cache(other: str) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    cache = filled(model)
    others = {
        "plain": lambda: tiny_model(tf.LlamaForCausalLM),
        "adapted": lambda: steered(tiny_model(tf.LlamaForCausalLM)),
        "copy": lambda: copy.deepcopy(model),
    }
    with pytest.raises(ValueError, match="This cache was filled"):
        run_on(others[other](), cache)
    run_on(model, cache)


def test_adapter_that_was_deleted_and_added_again_refuses_the_cache() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    cache = filled(model)
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="deleted and added again"):
        run_on(model, cache)


def test_cache_that_was_reset_and_released_by_disabling_serves_the_base_model_after_unload() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    cache = StaticCache(config=model.config, max_cache_len=16)
    run_on(model, cache)
    cache.reset()
    with model.disable_adapter():
        run_on(model, cache)
    cache.reset()
    torch.testing.assert_close(run_on(model.unload(), cache), output_of(tiny_model(tf.LlamaForCausalLM)))


def test_cache_is_pickled_with_what_it_is_for() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    cache = filled(model)
    copied = pickle.loads(pickle.dumps(cache))
    torch.testing.assert_close(run_on(model, copied), run_on(model, cache))
    with pytest.raises(ValueError, match="filled with a TOAST adapter"):
        run_on(tiny_model(tf.LlamaForCausalLM), pickle.loads(pickle.dumps(cache)))
