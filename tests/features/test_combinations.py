"""Capabilities that meet: each works by itself elsewhere, here what one makes of another."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from toast_peft import (
    FeedbackCallback,
    TopDownConfig,
    draft_with_first_pass,
    explain,
    feedback_statistics,
    fit_gate,
    initialize_feedback,
    swapped_features,
)

from ..helpers import CACHE, adapted, add_noise, assert_same, output_of, paths_of, steer, steered
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model
from .test_gate_fitting import OTHER, REFERENCE, TARGET
from .test_trainer import new_model, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
T5 = tf.T5ForConditionalGeneration
ONE_STACK = {name: {"r": 4, "target_modules": rf"{name}\..*SelfAttention\.v"} for name in ("encoder", "decoder")}


def reloaded(model: PeftModel, name: str, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    base = tiny_model(type(model.get_base_model()))
    return PeftModel.from_pretrained(base, folder / name, adapter_name=name).eval()


# ------------------------------------------------------------------------------------------------ one config for two


def test_two_adapters_that_are_made_of_one_config_have_their_own(tmp_path: Path) -> None:
    config = TopDownConfig(r=4)
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    fit_gate(model, TARGET, REFERENCE, "a", gate="token")
    assert model.peft_config["a"].gate == "token" and model.peft_config["a"].gate_report
    assert model.peft_config["a"] is config  # as with LoRA
    assert model.peft_config["b"].gate is None and model.peft_config["b"].gate_report is None
    steer(model, "b")
    model.set_adapter("b")
    assert_same(output_of(reloaded(model, "b", tmp_path), inputs_of(model)), output_of(model, inputs_of(model)))


def test_a_config_with_a_gate_serves_another_model_as_well() -> None:
    config = TopDownConfig(r=4, gate="sequence")
    first = get_peft_model(tiny_model(tf.LlamaForCausalLM), config)
    fit_gate(first, TARGET, OTHER)
    second = get_peft_model(tiny_model(tf.LlamaForCausalLM), config)
    assert second.peft_config["default"].gate_report is None


def test_a_pretrained_feedback_for_a_task_whose_head_peft_adds(tmp_path: Path) -> None:
    steered(tiny_model(tf.LlamaForTokenClassification)).save_pretrained(tmp_path / "pretrained")
    config = TopDownConfig(r=4, task_type="TOKEN_CLS", pretrained_feedback=str(tmp_path / "pretrained"))
    for folder in ("first", "second"):  # the same object serves twice
        model = get_peft_model(tiny_model(tf.LlamaForTokenClassification), config).eval()
        with torch.no_grad():
            model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
        model.save_pretrained(tmp_path / folder)
        loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForTokenClassification), tmp_path / folder).eval()
        assert_same(output_of(loaded), output_of(model))


# ------------------------------------------------------------------------------------ what pass 2 adds beside feedback


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj"]], ids=str)
def test_lora_of_pass_2_on_what_another_adapter_trains_as_a_whole(targets: Any, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model(tf.LlamaForCausalLM), TopDownConfig(r=4, modules_to_save=["up_proj"]), adapter_name="whole"
    ).eval()
    model.add_adapter("lora", TopDownConfig(r=4, pass2_target_modules=targets))
    names = list(paths_of(model)[0].second_pass)
    assert "0-mlp-up_proj-pass2" in names and not any("modules_to_save" in name for name in names)
    steer(model, "lora")
    model.set_adapter("lora")
    assert_same(output_of(reloaded(model, "lora", tmp_path), inputs_of(model)), output_of(model, inputs_of(model)))


def test_what_is_trained_as_a_whole_after_lora_of_pass_2(tmp_path: Path) -> None:
    options = {"r": 4, "pass2_target_modules": "all-linear"}
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), TopDownConfig(**options), adapter_name="lora").eval()
    model.add_adapter("whole", TopDownConfig(r=4, modules_to_save=["up_proj"]))
    for name in ("lora", "whole"):
        steer(model, name)
        model.set_adapter(name)
        found = output_of(reloaded(model, name, tmp_path), inputs_of(model))
        assert_same(found, output_of(model, inputs_of(model)))


@pytest.mark.parametrize("first", [TopDownConfig, LoraConfig])
@pytest.mark.parametrize("options", [{"feedback_to_output": True}, {"normalize_features": True}], ids=str)
def test_a_final_norm_that_another_adapter_trains_is_found(first: type, options: dict[str, Any]) -> None:
    base = tiny_model(tf.LlamaForCausalLM)
    targets = {"target_modules": ["q_proj"]} if first is LoraConfig else {}
    inject_adapter_in_model(first(r=4, modules_to_save=["model.norm"], **targets), base, "first")
    model = adapted(base, r=4, **options)
    assert paths_of(model)[0].passes.backbone_forward.final_norm_name == "norm"


@pytest.mark.parametrize("parts", [["pass2"], None], ids=str)
def test_a_closed_prompt_is_warned_of_where_feedback_is_trained(parts: list[str] | None, tmp_path: Path) -> None:
    model = new_model(tf.LlamaForCausalLM, r=4, pass2_target_modules="all-linear", trainable_parts=parts)
    with torch.no_grad():
        for path in paths_of(model):
            path.selection.topdown_prompt["default"].weight.zero_()
    trainer = trainer_for(model, tmp_path, max_steps=2, logging_steps=1, eval_strategy="no", save_strategy="no")
    trainer.add_callback(FeedbackCallback(trainer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any("has turned away" in str(warning.message) for warning in caught) == (parts is None)


# --------------------------------------------------------------------------------------- adapters of different stacks


def test_adapters_of_different_stacks_are_prepared_one_by_one() -> None:
    model = get_peft_model(tiny_model(T5), TopDownConfig(**ONE_STACK["encoder"]), adapter_name="encoder").eval()
    model.add_adapter("decoder", TopDownConfig(**ONE_STACK["decoder"]))
    add_noise(*(parameter for name, parameter in model.named_parameters() if "topdown_linear2" in name))
    inputs = inputs_of(model)
    for name in ("decoder", "encoder"):
        model.set_adapter(name)
        initialize_feedback(model, [inputs], name)
        expected = output_of(model, inputs)
        model.fuse_feedback()
        assert_same(output_of(model, inputs), expected)
        model.unfuse_feedback()
        other = {**inputs, "input_ids": inputs["input_ids"].flip(1), "decoder_input_ids": inputs["input_ids"]}
        fit_gate(model, [inputs], [other], name, gate="token")
    assert model.peft_config["encoder"].gate == model.peft_config["decoder"].gate == "token"


def test_statistics_are_of_the_stacks_with_an_active_adapter() -> None:
    model = get_peft_model(tiny_model(T5), TopDownConfig(r=4), adapter_name="both").eval()
    model.add_adapter("decoder", TopDownConfig(**ONE_STACK["decoder"]))
    output_of(model, inputs_of(model))
    assert any(name.startswith("encoder_") for name in feedback_statistics(model))
    model.set_adapter("decoder")
    output_of(model, inputs_of(model))
    statistics = feedback_statistics(model)
    assert statistics and not any(name.startswith("encoder_") for name in statistics)


# -------------------------------------------------------------------------------------------------------- explanations


def test_attention_is_explained_of_rows_that_may_be_skipped() -> None:
    model = steered(tiny_model(tf.SwinForImageClassification), skip_closed_rows=True, gate="sequence")
    inputs = inputs_of(model, batch_size=4)
    sides = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(2, 4), slice(0, 2))]
    fit_gate(model, *([side] for side in sides), quantile=1.0)
    found = explain(model, inputs)
    assert found.gate is not None and not found.gate[:2].any() and found.gate[2:].any((1, 2)).all()
    assert [len(received) for received in found.second.received] == [4] * len(found.second.received)
    assert model.peft_config["default"].skip_closed_rows
    for first, second in zip(found.first.received, found.second.received, strict=True):
        np.testing.assert_allclose(first[:2], second[:2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_encoder_and_decoder_with_a_sequence_gate_are_explained(stack: str) -> None:
    model = steered(tiny_model(T5), r=4, gate="sequence")
    assert explain(model, inputs_of(model), stack=stack).swapped_logits is not None


def test_pictures_of_one_stack_are_drawn_in_training(tmp_path: Path) -> None:
    model = new_model(T5, r=4)
    options = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    for stack in (None, "decoder"):
        trainer = trainer_for(model, tmp_path, **options)
        trainer.add_callback(FeedbackCallback(trainer, inputs_of(model), stack=stack))
        if stack is None:
            with pytest.raises(ValueError, match="the stacks with feedback are .* name one of them"):
                trainer.train()
        else:
            trainer.train()
    assert len(list((tmp_path / "feedback").iterdir())) == 2


# ------------------------------------------------------------------------------------------------------- mixed batches


def mixed(dtype_of_second: torch.dtype | None = None) -> PeftModel:
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), TopDownConfig(r=4), adapter_name="a").eval()
    model.add_adapter("b", TopDownConfig(r=4))
    for name in "ab":
        steer(model, name)
        for key, parameter in model.named_parameters():
            if name == "b" and dtype_of_second is not None and f".{name}." in key:
                parameter.data = parameter.data.to(dtype_of_second)
    return model


@pytest.mark.parametrize("dtypes", [("a", "b"), ("b", "a")], ids=str)
def test_mixed_batch_of_adapters_of_different_dtypes(dtypes: tuple[str, str]) -> None:
    model = mixed(torch.float64)
    inputs = inputs_of(model, batch_size=2)
    with torch.no_grad():
        found = model(**inputs, adapter_names=list(dtypes)).logits
        for row, name in enumerate(dtypes):
            model.set_adapter(name)
            expected = output_of(model, {key: x[row : row + 1] for key, x in inputs.items()})
            assert_same(found[row : row + 1], expected.to(found.dtype))


def test_a_cache_knows_whether_adapters_are_summed_or_of_rows() -> None:
    model = mixed()
    ids = inputs_of(model, batch_size=2)["input_ids"]

    def filled(**options: Any) -> tf.Cache:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, **options)[CACHE]

    def goes_on(cache: tf.Cache, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids[:, :1], **{CACHE: cache}, **options).logits

    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="by the TOAST adapter 'a . b' for other rows; its keys and values"):
        goes_on(filled(), adapter_names=["a", "b"])
    model.set_adapter("a")
    expected = goes_on(filled())
    assert_same(goes_on(filled(), adapter_names=["a", "a"]), expected)
    assert_same(goes_on(filled(adapter_names=["a", "a"])), expected)


@pytest.mark.parametrize("names", [["a", "b"], ["a", None], ["a", "a"]], ids=str)
def test_prompts_for_a_mixed_batch_are_refused(names: list[str | None]) -> None:
    model = mixed()
    inputs = inputs_of(model, batch_size=2)
    with pytest.raises(ValueError, match="`topdown_prompt` was given"):
        model(**inputs, adapter_names=names, topdown_prompt=torch.ones(2, 32))
    with model.prompted(torch.ones(32)), pytest.raises(ValueError, match="`adapter_names` was given in a `with"):
        model(**inputs, adapter_names=names)


def test_features_of_others_need_two_rows_of_an_adapter() -> None:
    model = mixed()
    with (
        swapped_features(model),
        pytest.raises(ValueError, match="'b' is for one row of the batch; expected at least"),
    ):
        model(**inputs_of(model, batch_size=3), adapter_names=["a", "b", "a"])


# ------------------------------------------------------------------------------------------- loading, deleting, export


def test_a_gate_with_a_pretrained_feedback_and_little_memory(tmp_path: Path) -> None:
    steered(tiny_model(tf.LlamaForCausalLM)).save_pretrained(tmp_path)
    config = TopDownConfig(r=4, gate="sequence", pretrained_feedback=str(tmp_path))
    outputs = []
    for options in ({}, {"low_cpu_mem_usage": True}):
        model = get_peft_model(tiny_model(tf.LlamaForCausalLM), config, **options).eval()
        outputs.append(output_of(model, inputs_of(model)))
    assert_same(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], output_of(tiny_model(tf.LlamaForCausalLM), inputs_of(model)), atol=0.1)


@pytest.mark.parametrize("deleted", ["default", "b"])
def test_deleting_an_adapter_makes_no_idle_one_trainable(deleted: str, tmp_path: Path) -> None:
    steered(tiny_model(tf.LlamaForCausalLM), r=4).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), tmp_path)
    model.load_adapter(tmp_path, "b")
    model.delete_adapter("b")
    assert model.active_adapters == ["default"] and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_export_without_a_peft_model(model_class: type) -> None:
    model = steered(tiny_model(model_class, num_hidden_layers=2), r=4).get_base_model()
    inputs = inputs_of(model) | ({"use_cache": False} if model_class is tf.LlamaForCausalLM else {})
    exported = torch.export.export(model, (), inputs, strict=False).module()
    with torch.no_grad():
        assert_same(exported(**inputs).logits, output_of(model, inputs))


def test_drafting_with_an_adapter_on_the_vision_tower() -> None:
    base = tiny_model(tf.LlavaForConditionalGeneration)
    model = adapted(base, target_modules=r".*vision_tower.*v_proj", task_type="CAUSAL_LM")
    inputs = {name: x[:1] for name, x in inputs_of(model).items()}
    with pytest.raises((NotImplementedError, ValueError), match="leave out `custom_generate`"):
        model.generate(**inputs, custom_generate=draft_with_first_pass, max_new_tokens=2)
