"""Every supported model type: an exact start, feedback for the values only, gradients, caches, saving."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft.architectures import ARCHITECTURES

from .further_models import FURTHER_MODELS
from .models import (
    CACHE,
    MODELS,
    RANGES,
    adapted,
    add_noise,
    assert_same,
    gradients,
    inputs_of,
    loss_of,
    output_of,
    paths_of,
    tiny_model,
    turn_prompts,
)

# Their value projections compute queries and keys as well.
FUSED = [
    tf.GPT2LMHeadModel,
    tf.GPTNeoXForCausalLM,
    tf.FalconForCausalLM,
    tf.Phi3ForCausalLM,
    tf.ModernBertForSequenceClassification,
]
GENERATING = [cls for cls in FURTHER_MODELS if cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "Generation"))]
# Vision-language models, and how to choose their vision towers.
VISION_TOWERS = {
    tf.LlavaForConditionalGeneration: r".*vision_tower.*v_proj",
    tf.Qwen2_5_VLForConditionalGeneration: r".*visual.*attn\.qkv",
    tf.Qwen3VLForConditionalGeneration: r".*visual.*attn\.qkv",
}
LINEAR = (nn.Linear, tf.pytorch_utils.Conv1D)


def moved(model_class: type, **options: Any) -> PeftModel:
    """A model with an adapter whose effect is visible."""
    model = adapted(tiny_model(model_class), **options)
    turn(model)
    return model


def turn(model: PeftModel) -> None:
    """Put noise on the weights of the adapter, and turn each prompt to some feature."""
    torch.manual_seed(1)
    add_noise(*(parameter for name, parameter in model.named_parameters() if "topdown_" in name))
    turn_prompts(model, inputs_of(model))


def test_every_type_with_a_row_is_tried_here() -> None:
    rows = [(model_class, None) for model_class in (*MODELS, *FURTHER_MODELS)] + [*VISION_TOWERS.items()]
    adapters = [adapted(tiny_model(model_class), target_modules=names) for model_class, names in rows]
    assert {model.peft_config["default"].backbone_type for model in adapters} >= set(ARCHITECTURES)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("model_class", FURTHER_MODELS)
def test_starts_as_the_base_model(model_class: type, training: bool) -> None:
    base = without_randomness(tiny_model(model_class)).train(training)
    expected = output_of(base)
    model = adapted(base)
    assert torch.equal(output_of(model), expected)
    assert all(parameter.requires_grad == ("topdown_" in name) for name, parameter in model.named_parameters())


def without_randomness(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.config.layerdrop = 0.0
    return model


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", FURTHER_MODELS)
def test_values_see_the_feedback_and_queries_and_keys_do_not(model_class: type, variant: str) -> None:
    """In pass 2 what a value projection gets is what its neighbours with the same input get, plus td."""
    model = moved(model_class, **range_of(model_class, variant))
    feedback = {}
    for path in paths_of(model):
        path.register_forward_hook(lambda path, args, td: feedback.update({id(path): td}))
    calls: dict[nn.Module, list] = {}
    for module in model.modules():
        if isinstance(module, LINEAR):
            calls[module] = []
            module.register_forward_hook(partial(record_input, calls[module]))
    output_of(model)
    for path in paths_of(model):
        assert feedback[id(path)]
        for index, td in feedback[id(path)].items():
            value_projection = path.layers[str(index)].value_projection
            first, second = calls[value_projection][0], calls[value_projection][-1 - (model_class in FUSED)]
            assert second.shape == td.shape and td.abs().max() > 0.01
            inputs = [calls[value_projection][-1]] if model_class in FUSED else []
            neighbours = [m for m in calls if m is not value_projection and calls[m] and calls[m][0] is first]
            # Some project other things as well, of another shape (DeBERTa its relative positions).
            inputs += [[x for x in calls[m] if x.shape == td.shape][-1] for m in neighbours]
            assert inputs
            for hidden_states in inputs:
                torch.testing.assert_close(second, hidden_states + td)


def record_input(calls: list[torch.Tensor], module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    calls.append(args[0])


def range_of(model_class: type, variant: str) -> dict[str, Any]:
    """The blocks of the loop, as fractions where encoder and decoder differ in depth."""
    options = RANGES[variant]
    if model_class is tf.T5ForConditionalGeneration:
        return {name: value / 4 for name, value in options.items()}
    return options


@pytest.mark.parametrize(
    ("model_class", "options"),
    [(model_class, {}) for model_class in FUSED]
    + [
        (tf.FalconForCausalLM, {"multi_query": False}),
        (tf.FalconForCausalLM, {"new_decoder_architecture": True, "num_kv_heads": 2}),
        (tf.Phi3ForCausalLM, {"num_key_value_heads": 4}),
    ],
)
def test_fused_projections_change_the_values_only(
    model_class: type, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys that attention gets in pass 2 are those of h, its values are those of h + td."""
    attended = []
    attention = F.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended.append((query, key, value))
        return attention(query, key, value, *args, **kwargs)

    model = adapted(tiny_model(model_class, **options))
    turn(model)
    [path] = paths_of(model)
    value_projection = path.layers["0"].value_projection
    feedback, calls = {}, []
    path.register_forward_hook(lambda path, args, td: feedback.update(td))
    block = next(
        block for block in model.modules() if isinstance(block, nn.Module) and is_attention_of(block, value_projection)
    )
    block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    output_of(model, inputs_of(model) | ({"use_cache": False} if model.can_generate() else {}))
    found = attended[len(attended) // 2]  # the first block of pass 2
    args, kwargs = calls[1]
    with model.disable_adapter(), torch.no_grad():
        attended.clear()
        block(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        steered = hidden_states + feedback[0]
        block(*((steered, *args[1:]) if args else ()), **(kwargs if args else kwargs | {"hidden_states": steered}))
    plain, steered = attended
    for found_part, expected in zip(found, (plain[0], plain[1], steered[2]), strict=True):
        torch.testing.assert_close(found_part, expected)
    assert not torch.allclose(plain[2], steered[2], atol=1e-2)


def is_attention_of(module: nn.Module, value_projection: nn.Module) -> bool:
    return any(child is value_projection for child in module.children())


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", FURTHER_MODELS)
def test_gradients_reach_every_trained_part(model_class: type, variant: str) -> None:
    model = moved(model_class, **range_of(model_class, variant))
    loss_of(model).backward()
    found = gradients(model)
    assert found and all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", GENERATING)
def test_cached_generation_is_recomputation(model_class: type, variant: str) -> None:
    model = moved(model_class, **range_of(model_class, variant))
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"suppress_tokens": [36, 37, 38, 39]}  # with which the Qwen models would begin an image
    inputs = inputs_of(model, length=6)
    if model.config.is_encoder_decoder:
        inputs.pop("decoder_input_ids")
        options |= {"num_beams": 2}
    expected = model.generate(**inputs, **options, use_cache=False)
    found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
    assert not torch.allclose(base.logits[0], expected.logits[0], atol=1e-3)


@pytest.mark.parametrize("model_class", FURTHER_MODELS)
def test_saved_and_loaded(model_class: type, tmp_path: Path) -> None:
    model = moved(model_class)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class), tmp_path).eval()
    assert_same(output_of(loaded), output_of(model))
    assert not torch.allclose(output_of(model), output_of(tiny_model(model_class)), atol=1e-3)


@pytest.mark.parametrize("model_class", FURTHER_MODELS)
def test_gradient_checkpointing(model_class: type) -> None:
    """Of the model types that have it, and which of their blocks is the model's own decision."""
    if not model_class.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support"):
            moved(model_class).gradient_checkpointing_enable()
        return
    plain = without_randomness(moved(model_class)).train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (plain, model):
        loss_of(m).backward()
    for name, gradient in gradients(plain).items():
        assert_same(model.get_parameter(name).grad, gradient)


# ------------------------------------------------------------------------------------------------- single types


def test_router_loss_is_counted_once() -> None:
    model = moved(tf.MixtralForCausalLM)
    inputs = inputs_of(model) | {"output_router_logits": True}
    output = model(**inputs, labels=inputs["input_ids"])
    assert len(output.router_logits) == 4 and all(len(logits) == 18 for logits in output.router_logits)
    plain = model(**inputs_of(model), labels=inputs["input_ids"], output_router_logits=False)
    torch.testing.assert_close(output.loss, plain.loss + model.config.router_aux_loss_coef * output.aux_loss)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.Wav2Vec2ForCTC, tf.HubertForCTC])
def test_layer_drop(model_class: type, variant: str) -> None:
    """Whichever blocks the model leaves out in which pass, the forward goes through and can be trained."""
    model = moved(model_class, **RANGES[variant]).train()
    model.config.layerdrop = 0.5
    for seed in range(10):
        torch.manual_seed(seed)
        loss = loss_of(model)
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()


def test_encoder_and_decoder_have_a_feedback_path_each() -> None:
    model = moved(tf.T5ForConditionalGeneration)
    assert [len(path.layers) for path in paths_of(model)] == [4, 3]
    assert model.peft_config["default"].num_blocks == [4, 3]
    only_decoder = adapted(tiny_model(tf.T5ForConditionalGeneration), target_modules=r"decoder\..*SelfAttention\.v")
    assert [len(path.layers) for path in paths_of(only_decoder)] == [3]


@pytest.mark.parametrize("model_class", VISION_TOWERS)
def test_vision_tower_by_option(model_class: type) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    assert torch.equal(output_of(adapted(base, target_modules=VISION_TOWERS[model_class])), expected)
    model = moved(model_class, target_modules=VISION_TOWERS[model_class])
    assert not torch.allclose(output_of(model), expected, atol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".visual." in name or ".vision_tower." in name for name in trained)
    language_model = moved(model_class)
    trained = [name for name, parameter in language_model.named_parameters() if parameter.requires_grad]
    assert all(".language_model." in name for name in trained)


_HYBRID = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
_HYBRID |= {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "num_key_value_heads": 2}
_LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
_LINEAR |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 8}
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
# Convolutions, state space models and linear attention in the other blocks, whose states are a part of the cache.
HYBRIDS = {
    tf.Lfm2ForCausalLM: tf.Lfm2Config(**_HYBRID, layer_types=["conv", "full_attention"] * 2),
    tf.JambaForCausalLM: tf.JambaConfig(
        **_HYBRID | _MAMBA, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1
    ),
    tf.Qwen3NextForCausalLM: tf.Qwen3NextConfig(
        **_HYBRID | _LINEAR,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", HYBRIDS)
def test_hybrid_gets_feedback_where_it_has_value_projections(model_class: type, variant: str) -> None:
    torch.manual_seed(0)
    base = model_class(HYBRIDS[model_class])
    add_noise(*base.parameters())
    expected = output_of(base.eval())
    model = adapted(base, target_modules=["v_proj"], **RANGES[variant])
    assert torch.equal(output_of(model), expected)
    turn(model)
    [path] = paths_of(model)
    assert set(path.layers) <= {"1", "3"} and not torch.allclose(output_of(model), expected, atol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, recomputed = (model.generate(**inputs_of(model), use_cache=cache, **options) for cache in (True, False))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(recomputed.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.RobertaForCausalLM, tf.GPT2LMHeadModel])
def test_decoder_with_cross_attention_of_its_own(model_class: type, variant: str) -> None:
    """As in an encoder-decoder of two models: the keys and values of the encoder's states are cached too."""
    config_class, options = next(
        row for cls, row in FURTHER_MODELS.items() if cls.__name__[:4] == model_class.__name__[:4]
    )
    torch.manual_seed(0)
    base = model_class(config_class(**options, is_decoder=True, add_cross_attention=True)).eval()
    model = adapted(base, **RANGES[variant])
    turn(model)
    ids, states = inputs_of(model)["input_ids"], torch.randn(2, 3, 32)
    with torch.no_grad():
        whole = model(input_ids=ids, encoder_hidden_states=states, use_cache=False).logits
        first = model(input_ids=ids[:, :6], encoder_hidden_states=states)
        cache = first[CACHE]
        rest = model(input_ids=ids[:, 6:], encoder_hidden_states=states, **{CACHE: cache}).logits
    assert isinstance(cache, tf.EncoderDecoderCache) and all(cache.is_updated.values())
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
