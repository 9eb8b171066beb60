"""The strength of the feedback: all of it times one number, as the scale of a LoRA."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from toast_peft import TopDownConfig, draft_with_first_pass, explain, store_features
from toast_peft.commands.saved import describe

from ..helpers import (
    CACHE,
    adapted,
    assert_same,
    assert_same_gradients,
    compiles_copies,
    counted_block_calls,
    feedback_of,
    gradients,
    leaves_untouched,
    loss_of,
    output_of,
    paths_of,
    steer,
    steered,
)
from ..zoo import NUM_BLOCKS, VIT_AND_LLAMA, inputs_of, tiny_model

VIT = tf.ViTForImageClassification
LLAMA = tf.LlamaForCausalLM
T5 = tf.T5ForConditionalGeneration
# Each family, fused projections, and an encoder with a decoder.
FAMILIES = [VIT, LLAMA, tf.GPT2LMHeadModel, T5, tf.ConvNextForImageClassification, tf.SwinForImageClassification]
FAMILIES += [tf.ResNetForImageClassification, tf.SegformerForSemanticSegmentation]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lite": {"r": 4},
    "official lite": {"r": 4, "init_weights": False},
    "early": {"feedback_from": 2},
    "late": {"feedback_to": 2},
    "double bias": {"double_value_bias": True},
}


def inputs_for(model: nn.Module) -> dict[str, Any]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}


def exact(model_class: type, **options: Any) -> PeftModel:
    base = tiny_model(model_class).double()
    return steered(base, inputs_for(base), **options)


def output_at(model: PeftModel, alpha: float) -> torch.Tensor:
    with model.rescaled_feedback(alpha):
        return output_of(model, inputs_for(model))


def scales_of(model: nn.Module, name: str = "default") -> list[float]:
    return [path.selection.topdown_feedback_scale[name] for path in paths_of(model)]


@torch.no_grad()
def scale_weights(model: nn.Module, alpha: float) -> None:
    """Multiply what makes the feedback of a block, which is linear."""
    for name, parameter in model.named_parameters():
        if ".topdown_linear2." in name or ".topdown_linear2_B." in name:
            parameter.mul_(alpha)


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("model_class", FAMILIES)
def test_feedback_of_every_block_is_multiplied(model_class: type) -> None:
    model = exact(model_class)
    plain, inputs = output_of(model, inputs_for(model)), inputs_for(model)
    found = feedback_of(model, inputs)
    model.set_feedback_scale(0.3)
    masks = [path.state.current.mask for path in paths_of(model)]
    weaker = feedback_of(model, inputs)
    if model_class is not T5:  # the features of its decoder depend on its encoder
        assert all(torch.equal(m, path.state.current.mask) for m, path in zip(masks, paths_of(model), strict=True))
        for index, td in found[0].items():
            assert_same(weaker[0][index], 0.3 * td)
    output = output_of(model, inputs)
    assert not torch.allclose(output, plain)
    model.set_feedback_scale(1.0)
    scale_weights(model, 0.3)
    assert_same(output, output_of(model, inputs))


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("fuses", [False, True], ids=["", "fused"])
def test_is_that_of_multiplied_weights(variant: str, fuses: bool) -> None:
    models = [exact(VIT, **OPTIONS[variant]) for _ in range(2)]
    scale_weights(models[1], -0.7)
    expected = output_of(models[1], inputs_for(models[1]))
    if fuses:
        models[0].fuse_feedback()
    plain = output_of(models[0], inputs_for(models[0]))
    models[0].set_feedback_scale(-0.7)
    assert_same(output_of(models[0], inputs_for(models[0])), expected)
    models[0].set_feedback_scale(1)
    assert torch.equal(output_of(models[0], inputs_for(models[0])), plain)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_are_those_of_the_scaled_function(model_class: type, checkpointing: bool | None) -> None:
    results = []
    for scales in (True, False):
        model = exact(model_class, r=4).train()
        inputs = inputs_for(model) | ({"use_cache": False} if model_class is LLAMA else {})
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if scales:
            model.set_feedback_scale(0.6)
            loss_of(model, inputs).backward()
            results.append(gradients(model))
        else:
            scale_weights(model, 0.6)
            loss_of(model, inputs).backward()
            results.append({n: (0.6 if "linear2_B" in n else 1) * g for n, g in gradients(model).items()})
    assert_same_gradients(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = exact(LLAMA)
    model.set_feedback_scale(0.3)
    expected = output_of(model)
    found = output_of(model.to(dtype))
    assert found.dtype == dtype
    assert_same(found, expected.to(dtype))


# ------------------------------------------------------------------------------------------------------- one and zero


@pytest.mark.parametrize("model_class", FAMILIES)
@pytest.mark.parametrize("grads", [False, True], ids=["inference", "with gradients"])
def test_at_0_it_is_the_base_model_and_at_1_what_it_was_bit_for_bit(model_class: type, grads: bool) -> None:
    base = tiny_model(model_class)
    inputs = inputs_of(base)
    expected = output_of(base, inputs)
    model = steered(base)
    plain = output_of(model, inputs)
    model.set_feedback_scale(0)
    if grads:
        found = model(**inputs)[0]
        found.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    else:
        found = output_of(model, inputs)
    assert torch.equal(found, expected)
    model.set_feedback_scale(1)
    assert torch.equal(output_of(model, inputs), plain) and not torch.allclose(plain, expected)


@pytest.mark.parametrize("fuses", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("options", [{}, {"skip_closed_rows": True}, {"skip_closed_rows": True, "feedback_to": 2}])
def test_at_0_it_is_the_base_model_with_skipped_rows_and_fused(options: dict[str, Any], fuses: bool) -> None:
    base = tiny_model(VIT)
    expected = output_of(base)
    model = steered(base, **options)
    if fuses:
        model.fuse_feedback()
    assert torch.equal(output_at(model, 0.0), expected)
    assert output_of(model) is not None and paths_of(model)[0].state.current.mask.any()


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_at_0_it_costs_one_forward_where_rows_are_skipped(model_class: type) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=True)
    with counted_block_calls(model) as calls:
        output_at(model, 0.0)
        assert calls == dict.fromkeys(range(NUM_BLOCKS), 1)
        output_of(model)
    assert calls == dict.fromkeys(range(NUM_BLOCKS), 3)


def test_bias_of_the_official_vit_stays_at_0() -> None:
    model = exact(VIT, double_value_bias=True)
    found = [output_at(model, alpha) for alpha in (0.0, 1e-9)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)
    with model.disable_adapter():
        assert not torch.allclose(output_of(model, inputs_for(model)), found[0])


def test_explanation_shows_the_feedback_that_is_given() -> None:
    model = steered(tiny_model(tf.SwinForImageClassification))
    plain = explain(model, inputs_of(model))
    with model.rescaled_feedback(0.5):
        half = explain(model, inputs_of(model))
    model.set_feedback_scale(0)
    none = explain(model, inputs_of(model))
    for index, norm in plain.feedback_norm.items():
        assert abs(half.feedback_norm[index] - 0.5 * norm).max() < 1e-4 * norm.max()
        assert not none.feedback_norm[index].any()
    assert (plain.mask == half.mask).all() and (plain.mask == none.mask).all()


# -------------------------------------------------------------------------------------------------- whose and how long


def test_each_adapter_has_its_own() -> None:
    model = steered(tiny_model(VIT))
    model.add_adapter("other", TopDownConfig(feedback_scale=0.25))
    steer(model, "other")
    plain = output_of(model)
    model.set_feedback_scale(0.5, "other")
    assert torch.equal(output_of(model), plain)
    model.set_feedback_scale(2.0)
    assert (scales_of(model), scales_of(model, "other")) == ([2.0], [0.5])
    with model.rescaled_feedback(0.5):
        assert (scales_of(model), scales_of(model, "other")) == ([1.0], [0.25])
    model.delete_adapter("other")
    assert paths_of(model)[0].selection.topdown_feedback_scale == {"default": 2.0}
    model.add_adapter("other", TopDownConfig())
    assert scales_of(model, "other") == [1.0]
    get_peft_model(model.get_base_model(), TopDownConfig())  # another one of the same name
    assert scales_of(model) == [1.0]


def test_encoder_and_decoder_have_the_same() -> None:
    model = steered(tiny_model(T5))
    model.set_feedback_scale(0.5)
    assert scales_of(model) == [0.5, 0.5]
    with model.rescaled_feedback(0.5):
        assert scales_of(model) == [0.25, 0.25]


def test_blocks_multiply_and_end_also_after_an_exception() -> None:
    model = steered(tiny_model(VIT))
    model.set_feedback_scale(0.7)
    plain = output_of(model)
    with pytest.raises(KeyError), model.rescaled_feedback(0.5):
        with model.rescaled_feedback(0.5):
            assert scales_of(model) == [0.7 * 0.5 * 0.5]
        assert scales_of(model) == [0.7 * 0.5]
        raise KeyError
    assert scales_of(model) == [0.7] and torch.equal(output_of(model), plain)


def test_adapters_may_come_and_go_in_a_block() -> None:
    model = steered(tiny_model(VIT))
    model.add_adapter("gone", TopDownConfig())
    with model.rescaled_feedback(0.5):
        model.delete_adapter("gone")
        model.add_adapter("new", TopDownConfig(feedback_scale=0.9))
    assert paths_of(model)[0].selection.topdown_feedback_scale == {"default": 1.0, "new": 0.9}


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_have_their_own(copied: str) -> None:
    model = steered(tiny_model(VIT))
    model.set_feedback_scale(0.4)
    expected = output_of(model)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.load(io.BytesIO(pickle.dumps(model)))
    model.set_feedback_scale(0.9)
    assert scales_of(other) == [0.4] and torch.equal(output_of(other), expected)


def test_unload_and_a_failed_injection_leave_nothing() -> None:
    base = tiny_model(VIT)
    expected = output_of(base)
    model = steered(base)
    model.set_feedback_scale(0.5)
    with leaves_untouched(model), pytest.raises(ValueError, match="feedback_from"):
        model.add_adapter("wrong", TopDownConfig(feedback_from=99))
    assert torch.equal(output_of(model.unload()), expected)


# ----------------------------------------------------------------------------------------------------------- as PEFT


def test_methods_of_a_lora_layer_do_what_they_do_for_lora() -> None:
    lora = get_peft_model(tiny_model(LLAMA), LoraConfig(target_modules=["v_proj"], r=4, lora_alpha=4))
    model = steered(tiny_model(LLAMA))
    steps: list[tuple[str, tuple]] = [("set_scale", ("default", 0.5)), ("scale_layer", (0.6,))]
    steps += [("scale_layer", (1,)), ("unscale_layer", (0.5,)), ("unscale_layer", (None,)), ("scale_layer", (0.1,))]
    steps += [("set_scale", ("not there", 0.2)), ("set_scale", ("default", 1.0))]
    for name, arguments in steps:
        for of_both in (lora, model):
            for layer in of_both.modules():
                if isinstance(layer, BaseTunerLayer):
                    getattr(layer, name)(*arguments)
        expected = {layer.scaling["default"] for layer in lora.modules() if hasattr(layer, "lora_A")}
        assert set(scales_of(model)) == expected, name
    with pytest.raises(ValueError, match="call `unscale_layer"):
        paths_of(model)[0].selection.unscale_layer(0)


def test_they_count_from_the_config() -> None:
    model = steered(tiny_model(VIT), feedback_scale=0.8)
    selection = paths_of(model)[0].selection
    selection.set_scale("default", 0.5)
    assert scales_of(model) == [0.4]
    selection.unscale_layer()
    assert scales_of(model) == [0.8]


def test_without_a_peft_model_it_is_that_of_the_layers() -> None:
    model = inject_adapter_in_model(TopDownConfig(init_weights=False), tiny_model(VIT))
    base = output_of(tiny_model(VIT))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("default", 0.0)
    assert torch.equal(output_of(model), base)


def test_multiplier_of_peft_is_for_the_lora_beside_it() -> None:
    lora = get_peft_model(tiny_model(LLAMA), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = steered(lora.get_base_model())
    plain = output_of(model)
    with rescale_adapter_scale(model, 0.5):
        assert scales_of(model) == [1.0] and not torch.equal(output_of(model), plain)
    assert torch.equal(output_of(model), plain)


# ----------------------------------------------------------------------------------------------------- other features


def test_stored_features_and_drafts_are_scaled(tmp_path: Path) -> None:
    model = steered(tiny_model(VIT)).train()
    stored = store_features(model, [{"pixel_values": x} for x in inputs_of(model)["pixel_values"]], tmp_path)
    batch = stored.collate([stored[i] for i in range(2)])
    with model.rescaled_feedback(0.5):
        assert_same(output_of(model, batch), output_of(model))
    model = exact(LLAMA, task_type="CAUSAL_LM")
    inputs, options = inputs_of(model, batch_size=1), {"max_new_tokens": 12, "do_sample": False}
    found = {}
    for alpha in (0.0, 0.5, 1.0, 3.0):
        model.set_feedback_scale(alpha)
        found[alpha] = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, custom_generate=draft_with_first_pass), found[alpha])
    assert not torch.equal(found[0.0], found[1.0]) or not torch.equal(found[1.0], found[3.0])


@pytest.mark.parametrize("skips", [False, True], ids=["", "skip_closed_rows"])
def test_what_is_in_a_cache_stays_as_it_was_made(skips: bool) -> None:
    model = exact(LLAMA, skip_closed_rows=skips)
    ids = inputs_of(model)["input_ids"]

    def last(alphas: tuple[float, float]) -> torch.Tensor:
        cache = tf.DynamicCache(config=model.config)
        for alpha, part in zip(alphas, (ids[:, :5], ids[:, 5:]), strict=True):
            model.set_feedback_scale(alpha)
            output = output_of(model, {"input_ids": part, CACHE: cache})
        return output

    for alpha in (0.0, 0.5):
        model.set_feedback_scale(alpha)
        assert_same(last((alpha, alpha)), output_of(model, {"input_ids": ids, "use_cache": False})[:, 5:])
    changed = last((0.0, 1.0))
    model.set_feedback_scale(1.0)
    assert not torch.allclose(changed, output_of(model, {"input_ids": ids, "use_cache": False})[:, 5:])
    with model.disable_adapter():
        cache = tf.DynamicCache(config=model.config)
        prefix = output_of(model, {"input_ids": ids, "use_cache": False})
    model.set_feedback_scale(0.0)
    assert torch.equal(output_of(model, {"input_ids": ids, CACHE: cache}), prefix)


@pytest.mark.slow
@pytest.mark.skipif(not compiles_copies(), reason="this version of torch cannot trace the cache")
def test_compiled_model_follows() -> None:
    torch.compiler.reset()
    model = steered(tiny_model(VIT, num_hidden_layers=1))
    expected = {alpha: output_at(model, alpha) for alpha in (1.0, 0.5, 0.25)}
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step, (alpha, output) in enumerate(expected.items()):
        model.set_feedback_scale(alpha)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            assert_same(output_of(run, inputs_of(model)), output)


# ------------------------------------------------------------------------------------------------------------- saving


def test_saved_only_on_request(tmp_path: Path) -> None:
    model = steered(tiny_model(VIT))
    model.set_feedback_scale(0.5)
    half = output_of(model)
    model.save_pretrained(tmp_path / "default")
    assert scales_of(PeftModel.from_pretrained(tiny_model(VIT), tmp_path / "default")) == [1.0]
    assert "scale" not in describe(str(tmp_path / "default")).options
    model.peft_config["default"].feedback_scale = 0.5
    model.save_pretrained(tmp_path / "asked")
    loaded = PeftModel.from_pretrained(tiny_model(VIT), tmp_path / "asked")
    assert scales_of(loaded) == [0.5] and torch.equal(output_of(loaded), half)
    assert "feedback_scale=0.5" in describe(str(tmp_path / "asked")).options
    assert "feedback_scale=0.5" in (tmp_path / "asked" / "README.md").read_text()
    loaded.set_feedback_scale(0.9)
    assert loaded.peft_config["default"].feedback_scale == 0.5
    with pytest.raises(ValueError, match="with `feedback_scale=1.0`; pass `feedback_scale=0.5`"):
        adapted(tiny_model(VIT), pretrained_feedback=str(tmp_path / "asked"))


def test_config_says_what_a_new_adapter_starts_with() -> None:
    model = adapted(tiny_model(T5), feedback_scale=0.7)
    assert scales_of(model) == [0.7, 0.7]


# ------------------------------------------------------------------------------------------------- what does not fit

WRONG = [float("nan"), float("inf"), -float("inf"), "0.5", None, True, 10**400, [0.5]]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:8])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    model = steered(tiny_model(T5))
    [selection, _] = [path.selection for path in paths_of(model)]
    model.set_feedback_scale(0.3)
    calls = [model.set_feedback_scale, selection.scale_layer, lambda alpha: selection.set_scale("default", alpha)]
    for call in [*calls, *([selection.unscale_layer] if value is not None else [])]:
        with pytest.raises(ValueError, match="scale of the feedback is .*; expected a finite number. Give 1.0"):
            call(value)
    with pytest.raises(ValueError, match="expected a finite number"), model.rescaled_feedback(value):
        pass
    assert scales_of(model) == [0.3, 0.3]
    with pytest.raises(ValueError, match="`feedback_scale` is .*; expected a finite number"):
        TopDownConfig(feedback_scale=value if value is not None else [])


def test_product_that_is_too_large_is_refused() -> None:
    model = steered(tiny_model(VIT), feedback_scale=1e20)
    with pytest.raises(ValueError, match=r"is 1e\+40"), model.rescaled_feedback(1e20):
        pass
    assert scales_of(model) == [1e20]


def test_adapter_that_is_not_there_is_refused() -> None:
    model = steered(tiny_model(VIT))
    with pytest.raises(ValueError, match=r"for the adapter 'other'; expected one of \['default'\]"):
        model.set_feedback_scale(0.5, "other")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"for the adapter None; expected one of \[\]"):
        model.set_feedback_scale(0.5)
