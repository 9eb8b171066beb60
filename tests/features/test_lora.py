"""TOAST and LoRA on one model: whichever comes first, the same numbers, and either can go again."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from toast_peft import TopDownConfig

from ..helpers import assert_same, loss_of, output_of, steered
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model

TARGETS = {tf.GPT2LMHeadModel: ["c_attn"]}


def put_lora(model: nn.Module) -> LoraConfig:
    targets = TARGETS.get(type(model), ["q_proj", "v_proj"])
    return inject_adapter_in_model(LoraConfig(target_modules=targets, init_lora_weights=False), model, "lora")


def put_toast(model: nn.Module) -> nn.Module:
    return inject_adapter_in_model(TopDownConfig(), model, "toast")


def both(model_class: type, *methods: Callable, **size: int) -> nn.Module:
    """A model in float64 with both, the same weights whichever came first."""
    model = tiny_model(model_class, **size).double()
    for put in methods:
        put(model)
    return set_weights(model)


@torch.no_grad()
def set_weights(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "topdown_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
        if "topdown_prompt" in name:
            parameter.add_(0.2)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    return output_of(model, double(inputs_of(model)))


def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()} | {"return_dict": False}


@pytest.mark.parametrize("lora_name", ["default", "lora"])
def test_saved_without_the_lora_of_the_same_model(lora_name: str, tmp_path: Path) -> None:
    model = tiny_model(tf.ViTForImageClassification)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, lora_name)
    toast = steered(model, modules_to_save=["classifier"])
    toast.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert any("topdown_" in name for name in names) and any("classifier" in name for name in names)
    assert not any("lora_" in name for name in names)
    loaded = PeftModel.from_pretrained(tiny_model(tf.ViTForImageClassification), tmp_path).eval()
    assert_same(output_of(loaded), output_of(toast))


@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, tf.GPT2LMHeadModel])
def test_either_order_gives_the_same(model_class: type) -> None:
    lora_first = both(model_class, put_lora, put_toast)
    toast_first = both(model_class, put_toast, put_lora)
    torch.testing.assert_close(run(toast_first), run(lora_first), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(copy.deepcopy(toast_first)), run(lora_first), rtol=1e-12, atol=1e-12)
    for model in (lora_first, toast_first):
        model.requires_grad_(True)
        loss_of(model, double(inputs_of(model))).backward()
    trained = [name for name, _ in toast_first.named_parameters() if "lora_" in name or "topdown_" in name]
    for name in trained:
        gradient, expected = toast_first.get_parameter(name).grad, lora_first.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_lora_on_a_copy_of_a_model_with_toast(model_class: type, copied: Callable) -> None:
    original = both(model_class, put_toast)
    expected = run(original)
    model = copied(original)
    put_lora(model)
    torch.testing.assert_close(
        run(set_weights(model)), run(both(model_class, put_lora, put_toast)), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(run(original), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_lora_by_get_peft_model_after_toast(model_class: type) -> None:
    base = get_peft_model(tiny_model(model_class).double(), TopDownConfig(), "toast").get_base_model()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = set_weights(get_peft_model(base, config, "lora"))
    expected = run(both(model_class, put_lora, put_toast))
    torch.testing.assert_close(run(model), expected, rtol=1e-12, atol=1e-12)
    check_lora_comes_and_goes(model, expected)


def check_lora_comes_and_goes(model: PeftModel, expected: torch.Tensor) -> None:
    """Merged, taken out of the weights again, and merged for good, the feedback stays as it was."""
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(run(merged), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_lora_is_removed_from_below_toast(model_class: type) -> None:
    lora = get_peft_model(
        tiny_model(model_class).double(), LoraConfig(target_modules=["v_proj"], init_lora_weights=False), "lora"
    )
    put_toast(lora.get_base_model())
    model = set_weights(lora.unload())
    torch.testing.assert_close(run(model), run(both(model_class, put_toast)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_unload_takes_lora_along_and_leaves_no_hook(model_class: type) -> None:
    """As PEFT's own methods do."""
    base = tiny_model(model_class).double()
    toast = get_peft_model(base, TopDownConfig(), "toast")
    put_lora(base)
    set_weights(base)
    model = toast.unload()
    assert torch.equal(run(model), run(tiny_model(model_class).double()))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_compiled_right_after_lora_was_put_on_toast() -> None:
    toast_first, lora_first = (
        both(tf.LlamaForCausalLM, *methods, num_hidden_layers=2)
        for methods in ((put_toast, put_lora), (put_lora, put_toast))
    )
    torch.compiler.reset()
    compiled = torch.compile(toast_first, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(**double(inputs_of(toast_first)), use_cache=False)[0]
    torch.testing.assert_close(found, run(lora_first), rtol=1e-12, atol=1e-12)
