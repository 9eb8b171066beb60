"""Feedback to the output: the last hidden states of pass 2 are `final_norm(h) + W z_L`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from toast_peft import TopDownConfig, explain, store_features
from toast_peft.commands.saved import describe

from ..golden.reference import ReferenceModel
from ..helpers import (
    adapted,
    assert_same,
    assert_same_gradients,
    feedback_of,
    gradients,
    leaves_untouched,
    loss_of,
    output_of,
    parts_in,
    paths_of,
    steered,
)
from ..zoo import NUM_BLOCKS, VARIANTS, VIT_AND_LLAMA, add_noise, inputs_of, tiny_model
from .test_gate import closed, gate_of, gated, inputs_for
from .test_pass2_adapters import hooks_on
from .test_shared_cache import BETWEEN, assert_equal_to_rounding, assert_same_numbers, generate, run_parts

MODELS = [*VIT_AND_LLAMA, tf.GPT2LMHeadModel]
OPTIONS: dict[str, Any] = {"feedback_to_output": True}
NORMS = ("layernorm", "norm", "ln_f")


def with_output(model_class: type, variant: str = "full", **options: Any) -> PeftModel:
    return gated(model_class, **OPTIONS | VARIANTS[variant] | options)


def final_norm_of(model: nn.Module) -> nn.Module:
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] in NORMS and name.count(".") == 1)


def selected(model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
    """`z_L` of the active adapter, with its gate. Shape: [b, n, d]"""
    found: list[torch.Tensor] = []
    with paths_of(model)[0].selection.register_forward_hook(lambda selection, args, z: found.append(z)):
        output_of(model, inputs)
    return found[0]


def matrix_of(model: PeftModel) -> torch.Tensor:
    """`W`, from the weights of the adapter. Shape: [d, d]"""
    weights = {name.partition("topdown_output")[2][:2]: p for name, p in model.named_parameters() if "_output" in name}
    return weights[".d"] if ".d" in weights else 2 * weights["_B"] @ weights["_A"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", MODELS)
def test_output_is_that_of_the_formula(model_class: type, variant: str) -> None:
    """That of the same adapter without it, and `W z_L` after the final norm."""
    model = with_output(model_class, variant)
    inputs = inputs_for(model)
    found, z = output_of(model, inputs), selected(model, inputs)
    assert (gate_of(model) == 0).any() and z.any()
    plain = gated(model_class, **VARIANTS[variant])
    plain.load_state_dict(model.state_dict(), strict=False)
    [path] = paths_of(plain)

    def add(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return None if path.state.current.run.first_pass else output + z @ matrix_of(model).T

    with final_norm_of(plain.get_base_model()).register_forward_hook(add):
        assert_same(found, output_of(plain, inputs))


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("model_class", MODELS)
def test_start_is_the_base_model(model_class: type, r: int) -> None:
    expected = output_of(tiny_model(model_class))
    model = adapted(tiny_model(model_class), r=r, **OPTIONS)
    assert torch.equal(output_of(model), expected)
    add_noise(*(p for name, p in model.named_parameters() if "topdown_output" in name))
    assert not torch.allclose(output_of(model), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("variant", ["full", "early", "late"])
@pytest.mark.parametrize("model_class", MODELS)
def test_closed_gate_gives_the_output_of_the_base_model(model_class: type, variant: str, skips: bool) -> None:
    base = tiny_model(model_class)
    options = OPTIONS | VARIANTS[variant]
    model = steered(tiny_model(model_class), gate="sequence", skip_closed_rows=skips, **options)
    inputs = inputs_for(base)
    with closed(model):
        assert torch.equal(output_of(model, inputs), output_of(base, inputs))
    assert not torch.allclose(output_of(model, inputs), output_of(base, inputs), atol=1e-4)


@pytest.mark.parametrize("variant", ["full", "late"])
def test_closed_rows_are_skipped(variant: str) -> None:
    model = with_output(tf.ViTForImageClassification, variant, skip_closed_rows=True)
    inputs = inputs_for(model)
    found = output_of(model, inputs)
    assert sorted((gate_of(model) > 0).flatten(1).any(1).tolist()) == [False, True]
    model.peft_config["default"].skip_closed_rows = False
    assert_same(found, output_of(model, inputs))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients(model_class: type, checkpointing: bool | None) -> None:
    base = tiny_model(model_class).requires_grad_(False)
    inputs = inputs_of(base)
    model = steered(copy.deepcopy(base), **OPTIONS, trainable_parts=["output", "linear2"]).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    z = selected(model, inputs)
    loss_of(model, inputs).backward()
    found = gradients(model)
    assert any("topdown_output" in name for name in found)
    model.zero_grad()
    calls: list[int] = []

    def add(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return output + z @ matrix_of(model).T if len(calls) == 2 else None

    with (
        base.register_forward_pre_hook(lambda *_: calls.append(1)),
        final_norm_of(base).register_forward_hook(add),
    ):
        loss_of(ReferenceModel(base, model), inputs).backward()
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.GPT2LMHeadModel])
def test_cached_is_recomputed(model_class: type, variant: str, skips: bool) -> None:
    model = with_output(model_class, variant, skip_closed_rows=skips)
    ids = inputs_of(model, length=12)["input_ids"]
    expected = output_of(model, {"input_ids": ids, "use_cache": False})
    assert_equal_to_rounding(run_parts(model, [5, 4, 2, 1], None, BETWEEN["nothing"]), expected)


def test_generation_of_an_encoder_decoder() -> None:
    model = gated(tf.T5ForConditionalGeneration, **OPTIONS)
    assert_same_numbers(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("variant", ["full", "lite"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_beside_it(model_class: type, variant: str) -> None:
    model = with_output(model_class, variant)
    before = output_of(model, inputs_for(model))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fuse_feedback()
    assert_same(output_of(model, inputs_for(model)), before)


def test_stored_features_stay_valid(tmp_path: Path) -> None:
    model = with_output(tf.LlamaForCausalLM)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in inputs_of(model)["input_ids"]]
    stored = store_features(model, rows, tmp_path, dtype=torch.float64)
    batch = stored.collate([stored[0], stored[1]])
    plain = {name: value for name, value in batch.items() if name != "topdown_features"} | {"use_cache": False}
    assert_same(output_of(model, plain | {"topdown_features": batch["topdown_features"]}), output_of(model, plain))


def test_explanation_is_about_the_blocks() -> None:
    model = with_output(tf.ViTForImageClassification)
    explanation = explain(model, inputs_for(model))
    assert len(feedback_of(model, inputs_for(model))[0]) == NUM_BLOCKS + 1
    assert len(explanation.feedback_norm) == NUM_BLOCKS


@pytest.mark.parametrize("model_class", MODELS)
def test_unload_leaves_the_model_untouched(model_class: type) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    unloaded = steered(base, **OPTIONS).unload()
    assert hooks_on(unloaded) == {} and not any("feedback_path" in name for name in unloaded.state_dict())
    assert torch.equal(output_of(unloaded), expected)


@pytest.mark.parametrize("variant", ["full", "lite"])
def test_copies_saved_and_further_adapters(variant: str, tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **OPTIONS, **VARIANTS[variant])
    expected = output_of(model)
    copied = copy.deepcopy(model)
    add_noise(*(p for name, p in model.named_parameters() if "topdown_output" in name))
    assert torch.equal(output_of(copied), expected) and not torch.equal(output_of(model), expected)
    copied.save_pretrained(tmp_path)
    assert ({"output"} if variant == "full" else {"output_A", "output_B"}) <= parts_in(tmp_path)
    assert describe(str(tmp_path)).parameters["output"] == (32 * 32 if variant == "full" else 2 * 4 * 32)
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), tmp_path).eval()
    assert torch.equal(output_of(loaded), expected)
    loaded.add_adapter("plain", TopDownConfig())
    loaded.add_adapter("new", TopDownConfig(pretrained_feedback=str(tmp_path), **OPTIONS))
    new = [p for name, p in loaded.named_parameters() if "topdown_output.new." in name]
    assert len(new) == 1 and not new[0].any()
    loaded.set_adapter("plain")
    assert torch.equal(output_of(loaded), output_of(tiny_model(tf.LlamaForCausalLM)))
    loaded.delete_adapter("plain")
    loaded.set_adapter("default")
    assert torch.equal(output_of(loaded), expected)


def test_final_norm_that_is_trained_along() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification).double(), **OPTIONS, modules_to_save=["vit.layernorm"])
    expected = steered(tiny_model(tf.ViTForImageClassification).double(), **OPTIONS)
    for m in (model, expected):
        m.double()
    model.load_state_dict(expected.state_dict(), strict=False)
    inputs = inputs_for(expected)
    assert_same(output_of(model, inputs), output_of(expected, inputs))


def test_models_without_a_known_final_norm_are_refused() -> None:
    base = tiny_model(tf.BertForSequenceClassification)
    with leaves_untouched(base), pytest.raises(ValueError, match="adds to what the final norm gives, but 'bert' has"):
        adapted(base, **OPTIONS)
    with pytest.raises(ValueError, match="`feedback_to_output` is not for ConvNext"):
        adapted(tiny_model(tf.ConvNextForImageClassification), **OPTIONS)


def test_final_norm_of_something_else_is_refused() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **OPTIONS)
    hook = paths_of(model)[0].passes.output_hook
    run = paths_of(model)[0].passes.backbone_forward._new_run(["default"], {})
    run.feedback = {-2: torch.zeros(2, 9, 32)}
    hook.state.current.run = run
    with pytest.raises(ValueError, match=r"the shape \[2, 9, 32\] and the output of the final norm \[2, 32\]"):
        hook.add(hook.module, (), torch.zeros(2, 32))


def test_is_trained_by_default_if_it_is_there() -> None:
    assert TopDownConfig(**OPTIONS).trainable_parts == ["prompt", "transform", "linear1", "linear2", "output"]
    with pytest.raises(ValueError, match="`trainable_parts` has 'output', .* choose it with `feedback_to_output`"):
        TopDownConfig(trainable_parts=["output"])
