"""What only some transformers have: fused projections, experts, two stacks, a vision tower, states of another kind."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from ..helpers import CACHE, adapted, gradients, loss_of, output_of, paths_of, steer, steered
from ..zoo import OTHERS, RANGES, VISION_TOWERS, add_noise, inputs_of, tiny_model, with_variants

# Their value projections compute queries and keys as well.
FUSED = [
    tf.GPT2LMHeadModel,
    tf.GPTNeoXForCausalLM,
    tf.FalconForCausalLM,
    tf.Phi3ForCausalLM,
    tf.ModernBertForSequenceClassification,
]
# Vision-language models, and how to choose their vision towers.


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

    model = steered(tiny_model(model_class, **options))
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
        with_td = hidden_states + feedback[0]
        block(*((with_td, *args[1:]) if args else ()), **(kwargs if args else kwargs | {"hidden_states": with_td}))
    plain, with_td = attended
    for found_part, expected in zip(found, (plain[0], plain[1], with_td[2]), strict=True):
        torch.testing.assert_close(found_part, expected)
    assert not torch.allclose(plain[2], with_td[2], atol=1e-2)


@pytest.mark.parametrize("model_class", [tf.GPT2LMHeadModel, tf.GPTNeoXForCausalLM])
def test_double_bias_of_a_fused_projection_is_that_of_the_values(model_class: type) -> None:
    """`v = W h + b + W td + b`; queries and keys have their bias once."""
    outputs = []
    for double in (False, True):
        model = steered(tiny_model(model_class), double_value_bias=double)
        [path] = paths_of(model)
        projection, found = path.layers["0"].value_projection, []
        projection.register_forward_hook(lambda module, args, output, found=found: found.append(output))
        output_of(model)
        outputs.append(found[-1])
    plain = outputs[0]
    parts = 4 if model_class is tf.GPTNeoXForCausalLM else 1  # heads, each with queries, keys and values
    bias = projection.bias.unflatten(0, (parts, 3, -1)).clone()
    bias[:, :2] = 0
    torch.testing.assert_close(outputs[1], plain + bias.flatten())


@pytest.mark.parametrize("double_value_bias", [False, True])
@pytest.mark.parametrize("model_class", FUSED)
def test_plain_fused_projection_computes_what_running_it_again_does(
    model_class: type, double_value_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows of values are enough, unless something else hangs on it."""
    losses, found, calls = [], [], []
    for is_watched in (False, True):
        model = steered(tiny_model(model_class).double(), double_value_bias=double_value_bias)
        [path] = paths_of(model)
        projection = path.layers["0"].value_projection
        if is_watched:
            for layer in path.layers.values():
                layer.value_projection.register_forward_hook(lambda module, args, output: None)
        with monkeypatch.context() as patch:
            called = patch_calls(patch, projection)
            losses.append(loss_of(model))
        losses[-1].backward()
        found.append(gradients(model))
        calls.append(len(called))
    assert calls == [2, 3 + double_value_bias]  # pass 1, pass 2; again on h + td, and for the bias on zeros
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def patch_calls(patch: pytest.MonkeyPatch, module: nn.Module) -> list[nn.Module]:
    """Notes the calls of a module without hanging anything on it."""
    called, forward = [], type(module).forward

    def note(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        called.extend([self] * (self is module))
        return forward(self, *args)

    patch.setattr(type(module), "forward", note)
    return called


def is_attention_of(module: nn.Module, value_projection: nn.Module) -> bool:
    return any(child is value_projection for child in module.children())


# ------------------------------------------------------------------------------------------------- single types


def test_router_loss_is_counted_once() -> None:
    model = steered(tiny_model(tf.MixtralForCausalLM))
    inputs = inputs_of(model) | {"output_router_logits": True}
    output = model(**inputs, labels=inputs["input_ids"])
    assert len(output.router_logits) == 4 and all(len(logits) == 18 for logits in output.router_logits)
    plain = model(**inputs_of(model), labels=inputs["input_ids"], output_router_logits=False)
    torch.testing.assert_close(output.loss, plain.loss + model.config.router_aux_loss_coef * output.aux_loss)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.Wav2Vec2ForCTC, tf.HubertForCTC])
def test_layer_drop(model_class: type, variant: str) -> None:
    """Whichever blocks the model leaves out in which pass, the forward goes through and can be trained."""
    model = steered(tiny_model(model_class), **RANGES[variant]).train()
    model.config.layerdrop = 0.5
    for seed in range(10):
        torch.manual_seed(seed)
        loss = loss_of(model)
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()


def test_encoder_and_decoder_have_a_feedback_path_each() -> None:
    model = steered(tiny_model(tf.T5ForConditionalGeneration))
    assert [len(path.layers) for path in paths_of(model)] == [4, 3]
    assert model.peft_config["default"].num_blocks == [4, 3]
    only_decoder = adapted(tiny_model(tf.T5ForConditionalGeneration), target_modules=r"decoder\..*SelfAttention\.v")
    assert [len(path.layers) for path in paths_of(only_decoder)] == [3]


@pytest.mark.parametrize("model_class", VISION_TOWERS)
def test_vision_tower_by_option(model_class: type) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    assert torch.equal(output_of(adapted(base, target_modules=VISION_TOWERS[model_class])), expected)
    model = steered(tiny_model(model_class), target_modules=VISION_TOWERS[model_class])
    assert not torch.allclose(output_of(model), expected, atol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".visual." in name or ".vision_tower." in name for name in trained)
    language_model = steered(tiny_model(model_class))
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


@pytest.mark.parametrize(("model_class", "variant"), with_variants(HYBRIDS, RANGES))
def test_hybrid_gets_feedback_where_it_has_value_projections(model_class: type, variant: str) -> None:
    torch.manual_seed(0)
    base = model_class(HYBRIDS[model_class])
    add_noise(*base.parameters())
    expected = output_of(base.eval())
    model = adapted(base, target_modules=["v_proj"], **RANGES[variant])
    assert torch.equal(output_of(model), expected)
    steer(model)
    [path] = paths_of(model)
    assert set(path.layers) <= {"1", "3"} and not torch.allclose(output_of(model), expected, atol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, recomputed = (model.generate(**inputs_of(model), use_cache=cache, **options) for cache in (True, False))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(recomputed.logits), rtol=1e-4, atol=1e-4)


def with_cross_attention(model_class: type) -> nn.Module:
    row = next(row for cls, row in OTHERS.items() if cls.__name__[:4] == model_class.__name__[:4])
    torch.manual_seed(0)
    return model_class(row.config_class(**row.options, is_decoder=True, add_cross_attention=True)).eval()


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.RobertaForCausalLM, tf.GPT2LMHeadModel])
def test_decoder_with_cross_attention_of_its_own(model_class: type, variant: str) -> None:
    """As in an encoder-decoder of two models: the keys and values of the encoder's states are cached too."""
    base = with_cross_attention(model_class)
    model = adapted(base, **RANGES[variant])
    steer(model)
    ids, states = inputs_of(model)["input_ids"], torch.randn(2, 3, 32)
    with torch.no_grad():
        whole = model(input_ids=ids, encoder_hidden_states=states, use_cache=False).logits
        first = model(input_ids=ids[:, :6], encoder_hidden_states=states)
        cache = first[CACHE]
        rest = model(input_ids=ids[:, 6:], encoder_hidden_states=states, **{CACHE: cache}).logits
    assert isinstance(cache, tf.EncoderDecoderCache) and all(cache.is_updated.values())
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_cache_that_the_model_adds_one_for_its_cross_attention_to_stays_the_callers() -> None:
    model = adapted(with_cross_attention(tf.GPT2LMHeadModel))
    cache = tf.DynamicCache(config=model.config)
    found = model(**inputs_of(model), encoder_hidden_states=torch.randn(2, 3, 32), **{CACHE: cache})[CACHE]
    assert isinstance(found, tf.EncoderDecoderCache) and found.self_attention_cache is cache
