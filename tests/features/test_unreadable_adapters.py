"""Saved adapters that cannot be read: PEFT finds out when the adapter is in the model, so they are read before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toast_peft import TopDownConfig

from ..helpers import adapted, leaves_untouched, output_of, steered
from ..zoo import tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    steered(tiny_model(tf.LlamaForCausalLM), init_prompt="features").save_pretrained(tmp_path)
    return tmp_path


def write(content: bytes, name: str = "adapter_model.safetensors") -> Callable:
    def damage(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return damage


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(content: Any) -> Callable:
    def damage(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save(content, folder / "adapter_model.bin")

    return damage


UNREADABLE = {
    "truncated": cut,
    "header": write(b"\xff" * 200),
    "missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "empty": write(b""),
    "bin": write(b"no pickle", "adapter_model.bin"),
    "bin that runs code": pickled({"weight": Path}),
    "bin of something else": pickled([torch.ones(2)]),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("damage", UNREADABLE)
def test_weights_that_cannot_be_read(damage: str, low_cpu_mem_usage: bool, saved: Path) -> None:
    UNREADABLE[damage](saved)
    base = tiny_model(tf.LlamaForCausalLM)
    message = f"(?s)weights of the TOAST adapter '{saved}'.* again"
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    model = steered(base)
    with leaves_untouched(model), pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "other", low_cpu_mem_usage=low_cpu_mem_usage)


def test_weights_in_a_subfolder_are_looked_at(saved: Path) -> None:
    (saved / "sub").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (saved / name).rename(saved / "sub" / name)
    base = tiny_model(tf.LlamaForCausalLM)
    model = PeftModel.from_pretrained(base, saved, subfolder="sub")
    assert torch.equal(output_of(model), output_of(steered(tiny_model(tf.LlamaForCausalLM))))
    cut(saved / "sub")
    base = model.unload()
    with leaves_untouched(base), pytest.raises(ValueError, match="(?s)cannot be read"):
        PeftModel.from_pretrained(base, saved, subfolder="sub")


def test_adapter_without_weights_says_so_and_is_replaced_by_the_next(saved: Path) -> None:
    """Of a config that is passed it is not known where it is from. PEFT fails to read the weights after injection."""
    content = (saved / "adapter_model.safetensors").read_bytes()
    cut(saved)
    base = tiny_model(tf.LlamaForCausalLM)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base, saved, config=PeftConfig.from_pretrained(saved), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="has no weights"):
        output_of(base)
    (saved / "adapter_model.safetensors").write_bytes(content)
    model = PeftModel.from_pretrained(base, saved)
    assert torch.equal(output_of(model), output_of(steered(tiny_model(tf.LlamaForCausalLM))))
    assert torch.equal(output_of(model.unload()), output_of(tiny_model(tf.LlamaForCausalLM)))


def test_rank_of_another_adapter_is_refused_before_layers_are_made(tmp_path: Path) -> None:
    """With the rank of this config they would take 128 TB."""
    steered(tiny_model(tf.ViTModel), r=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 10**12}))
    base = tiny_model(tf.ViTModel)
    with leaves_untouched(base), pytest.raises(ValueError, match=r"`r=1000000000000`.* are \[4\]"):
        PeftModel.from_pretrained(base, tmp_path)


def test_task_type_that_the_model_is_not_for() -> None:
    base = tiny_model(tf.LlamaModel)
    with leaves_untouched(base), pytest.raises(ValueError, match="`task_type='CAUSAL_LM'`.*LlamaModel"):
        adapted(base, task_type="CAUSAL_LM")


def test_saved_config_makes_a_new_adapter(saved: Path) -> None:
    """With other options than the weights next to it have."""
    config = TopDownConfig.from_pretrained(saved)
    config.r, config.inference_mode = 2, False
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), config)
    assert torch.equal(output_of(model.eval()), output_of(tiny_model(tf.LlamaForCausalLM)))
    assert any(p.requires_grad for p in model.parameters())


def test_prompt_of_a_new_adapter_with_the_config_of_another_one(saved: Path) -> None:
    """No weights come for it, so it starts as any new adapter does, and none are waited for when it is trained."""
    same = TopDownConfig.from_pretrained(saved)
    same.inference_mode = False
    other = TopDownConfig.from_pretrained(saved)
    other.lora_dropout, other.inference_mode = 0.1, False
    read = PeftConfig.from_pretrained(saved)
    read.inference_mode = False
    new = TopDownConfig()
    get_peft_model(tiny_model(tf.LlamaForCausalLM), new)
    for config in (same, other, read, TopDownConfig(**new.to_dict())):
        model = get_peft_model(tiny_model(tf.LlamaForCausalLM), config)
        [prompt] = [p for name, p in model.named_parameters() if "topdown_prompt" in name]
        torch.testing.assert_close(prompt.square().mean().sqrt(), torch.tensor(0.3))
        assert not model.train().base_model._loads


def test_adapter_to_be_trained_is_taken_away_when_its_weights_do_not_fit(saved: Path) -> None:
    """Its prompt has got a start, as its weights were not known; that is a part of the load and no training."""
    file = saved / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor[:1] if "topdown_prompt" in name else tensor for name, tensor in weights.items()}, file)
    base = tiny_model(tf.LlamaForCausalLM)
    config = PeftConfig.from_pretrained(saved)
    with leaves_untouched(base), pytest.raises(ValueError, match="do not fit its config"):
        PeftModel.from_pretrained(base, saved, config=config, is_trainable=True)


def test_failed_weights_take_only_their_own_adapter_away(saved: Path) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM))
    model.add_adapter("other", PeftConfig.from_pretrained(saved))
    with pytest.raises(ValueError, match="missing"):
        set_peft_model_state_dict(model, {}, "other")
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", PeftConfig.from_pretrained(saved))
    model.add_adapter("trained", TopDownConfig())
    with pytest.raises(ValueError, match="missing"):
        set_peft_model_state_dict(model, {}, "other")
    model.set_adapter("trained")
    assert set(model.peft_config) == {"default", "other", "trained"}
    assert any(".trained." in name for name, _ in model.named_parameters())
