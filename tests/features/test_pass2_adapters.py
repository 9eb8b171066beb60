"""Adapters with LoRA of pass 2: saved, loaded, copied, beside others and beside LoRA of both passes, taken away."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.commands.saved import describe

from ..helpers import (
    adapted,
    assert_same,
    counted_block_calls,
    leaves_untouched,
    output_of,
    parts_in,
    paths_of,
    steered,
)
from ..zoo import add_noise, tiny_model
from .test_gate import gated, inputs_for
from .test_pass2_lora import LORA, MODELS, ONLY


@pytest.mark.parametrize("first", ["LoRA", "TOAST"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.GPT2LMHeadModel])
def test_lora_of_both_passes_in_either_order(model_class: type, first: str) -> None:
    name = "c_attn" if model_class is tf.GPT2LMHeadModel else "v_proj"
    lora = LoraConfig(target_modules=[name], init_lora_weights=False, fan_in_fan_out=name == "c_attn")

    def with_lora(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return inject_adapter_in_model(lora, model, adapter_name="below")

    expected = steered(with_lora(tiny_model(model_class)), **LORA)
    assert list(paths_of(expected)[0].second_pass) == list(
        paths_of(steered(tiny_model(model_class), **LORA))[0].second_pass
    )
    if first == "TOAST":
        model = adapted(tiny_model(model_class), **LORA)
        with_lora(model.get_base_model())
        model.load_state_dict(expected.state_dict(), strict=False)
        assert torch.equal(output_of(model), output_of(expected))
    with expected.disable_adapter():
        plain = output_of(expected)
    assert not torch.allclose(output_of(expected), plain, atol=1e-4)


def test_several_adapters() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification), **LORA)
    first = output_of(model)
    model.add_adapter("other", TopDownConfig(pass2_target_modules=["fc1"], feedback_to=2))
    model.add_adapter("plain", TopDownConfig())
    for name in ("other", "plain"):
        model.set_adapter(name)
        assert torch.equal(output_of(model), output_of(tiny_model(tf.ViTForImageClassification)))
    model.set_adapter("default")
    assert torch.equal(output_of(model), first)
    model.delete_adapter("default")
    assert not any(".default." in name for name, _ in model.named_parameters() if "topdown_" in name)
    model.set_adapter("plain")
    assert torch.equal(output_of(model), output_of(tiny_model(tf.ViTForImageClassification)))


@pytest.mark.parametrize("model_class", MODELS)
def test_unload_leaves_the_model_untouched(model_class: type) -> None:
    base = tiny_model(model_class)
    expected, before = output_of(base), hooks_on(base)
    unloaded = steered(base, **LORA).unload()
    assert hooks_on(unloaded) == before == {} and not any("feedback_path" in name for name in unloaded.state_dict())
    assert torch.equal(output_of(unloaded), expected)


def hooks_on(model: nn.Module) -> dict[str, Any]:
    modules = model.named_modules()
    return {name: hooks for name, m in modules if (hooks := {**m._forward_hooks, **m._forward_pre_hooks})}


def test_copies_and_saved_adapters(tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **LORA)
    expected = output_of(model)
    copied = copy.deepcopy(model)
    add_noise(*(p for name, p in model.named_parameters() if "pass2" in name))
    assert torch.equal(output_of(copied), expected) and not torch.equal(output_of(model), expected)
    copied.save_pretrained(tmp_path)
    assert {"pass2_A", "pass2_B", "pass2_bias"} <= parts_in(tmp_path)
    for low_cpu_mem_usage in (False, True):
        base = tiny_model(tf.LlamaForCausalLM)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(output_of(loaded), expected)
    sizes = describe(str(tmp_path)).parameters
    assert sizes["pass2"] == sum(p.numel() for name, p in copied.named_parameters() if "topdown_pass2" in name)
    assert "pass2_r=3" in (tmp_path / "README.md").read_text()


def test_biases_alone_are_saved(tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **LORA | {"pass2_r": 0})
    add_noise(*(p for name, p in model.named_parameters() if "pass2" in name))
    model.save_pretrained(tmp_path)
    assert {name for name in parts_in(tmp_path) if "pass2" in name} == {"pass2_bias"}
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), tmp_path).eval()
    assert torch.equal(output_of(loaded), output_of(model))
    loaded.delete_adapter("default")
    assert not any("pass2" in name for name, _ in loaded.named_parameters())


def test_description_of_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), **ONLY)
    for does_something in (False, True):
        model.save_pretrained(tmp_path)
        assert bool(describe(str(tmp_path)).notes) != does_something
        add_noise(*(p for name, p in model.named_parameters() if "pass2_bias" in name))


def test_another_rank_is_refused(tmp_path: Path) -> None:
    steered(tiny_model(tf.LlamaForCausalLM), **LORA).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"pass2_r": 3', '"pass2_r": 300000'))
    base = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(base), pytest.raises(ValueError, match=r"says `pass2_r=300000`, .* are \[3\]"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_start_from_another_adapter_has_new_lora(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    saved = steered(tiny_model(tf.LlamaForCausalLM), **LORA)
    saved.save_pretrained(tmp_path)
    model = adapted(tiny_model(tf.LlamaForCausalLM))
    config = TopDownConfig(pretrained_feedback=str(tmp_path), **LORA)
    model.add_adapter("new", config, low_cpu_mem_usage=low_cpu_mem_usage)
    new = {name: p for name, p in model.named_parameters() if "topdown_pass2" in name and ".new." in name}
    assert new and all(p.isfinite().all() and bool(p.any()) == ("pass2_A" in name) for name, p in new.items())


@pytest.mark.parametrize("options", [LORA, {"feedback_to_output": True}, LORA | {"feedback_to_output": True}])
def test_strength_is_a_factor_of_all(options: dict[str, Any]) -> None:
    """As if what comes last in each part were made weaker."""
    model, base = gated(tf.LlamaForCausalLM, r=2, **options), tiny_model(tf.LlamaForCausalLM).double()
    weaker = copy.deepcopy(model)
    last = ("topdown_linear2_B", "topdown_pass2_B", "topdown_pass2_bias", "topdown_output_B")
    for name, parameter in weaker.named_parameters():
        if any(part in name for part in last):
            parameter.data.mul_(0.7)
    inputs = inputs_for(model)
    model.set_feedback_scale(0.7)
    assert_same(output_of(model, inputs), output_of(weaker, inputs))
    model.set_feedback_scale(0)
    assert torch.equal(output_of(model, inputs), output_of(base, inputs))


def test_nothing_runs_twice_at_strength_zero() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), **LORA, skip_closed_rows=True)
    model.set_feedback_scale(0)
    plain = output_of(tiny_model(tf.LlamaForCausalLM), inputs_for(model))
    with counted_block_calls(model) as calls:
        assert torch.equal(output_of(model, inputs_for(model)), plain)
    assert set(calls.values()) == {1}
