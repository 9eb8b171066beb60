"""Saved adapters: which files and keys, and that what is loaded gives the same numbers."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.core.topdown_layer import belongs_to

from ..helpers import adapted, assert_same, loss_of, output_of, steered, trained_everywhere
from ..zoo import NUM_BLOCKS, VARIANTS, VIT_AND_LLAMA, tiny_model, with_variants

SAVED_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
BACKBONE_NAMES = {tf.ViTForImageClassification: "vit", tf.LlamaForCausalLM: "model"}


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------- saved keys


def expected_keys(backbone: str, parts: list[str]) -> set[str]:
    prefix = f"base_model.model.{backbone}.feedback_path"
    selection = {f"{prefix}.selection.topdown_{name}.weight" for name in ("prompt", "transform")}
    return selection | {f"{prefix}.layers.{i}.topdown_{part}.weight" for i in range(NUM_BLOCKS) for part in parts}


FULL, FACTORS = ["linear1", "linear2"], ["linear1_A", "linear1_B", "linear2_A", "linear2_B"]


@pytest.mark.parametrize(
    ("r", "init_weights", "parts"),
    [(0, True, FULL), (0, False, FULL), (4, True, FACTORS), (4, False, FULL + FACTORS)],
    ids=["full", "full random", "lite", "lite random"],
)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_saved_keys(model_class: type, r: int, init_weights: bool, parts: list[str], tmp_path: Path) -> None:
    model = adapted(tiny_model(model_class), r=r, init_weights=init_weights)
    keys = expected_keys(BACKBONE_NAMES[model_class], parts)
    assert set(get_peft_model_state_dict(model)) == keys
    assert set(load_file(saved(model, tmp_path) / "adapter_model.safetensors")) == keys
    assert set(os.listdir(tmp_path)) == SAVED_FILES


def test_saved_keys_with_modules_to_save(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"])
    keys = expected_keys("vit", FULL) | {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}
    assert set(load_file(saved(model, tmp_path) / "adapter_model.safetensors")) == keys


def test_saved_keys_of_an_early_adapter_are_those_of_its_blocks(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), feedback_from=3, feedback_to=1)
    blocks = {key.split(".layers.")[1][0] for key in get_peft_model_state_dict(model) if ".layers." in key}
    assert blocks == {"1", "2"}


# ---------------------------------------------------------------------------------------------------- save and load


EXTRA = {
    tf.ViTForImageClassification: {"modules_to_save": ["classifier"]},
    tf.ResNetForImageClassification: {"modules_to_save": ["classifier"]},
    tf.LlamaForCausalLM: {"trainable_token_indices": [3, 5]},
    tf.LlamaForSequenceClassification: {"task_type": "SEQ_CLS"},
    tf.LlamaForTokenClassification: {"task_type": "TOKEN_CLS", "modules_to_save": ["score"]},
}


@pytest.mark.parametrize(
    ("model_class", "variant", "low_cpu_mem_usage"),
    [(*pair, False) for pair in with_variants(EXTRA, VARIANTS)]
    + [(cls, variant, True) for cls in EXTRA for variant in ("lite", "middle")],
)
def test_loaded_adapter_is_equal(model_class: type, variant: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = trained_everywhere(model_class, **EXTRA[model_class], **VARIANTS[variant])
    folder = saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(loaded) is type(model)
    assert_same(output_of(loaded), output_of(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_in_inference_mode(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    folder, base = saved(model, tmp_path), tiny_model(tf.LlamaForCausalLM)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(folder, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        for name in ("default", "other"):
            loaded.set_adapter(name)
            assert_same(output_of(loaded), output_of(model))


def test_head_that_peft_adds_by_the_task_type(tmp_path: Path) -> None:
    model = trained_everywhere(tf.LlamaForTokenClassification, task_type="TOKEN_CLS")
    folder = saved(model, tmp_path)
    assert "base_model.model.score.weight" in load_file(folder / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForTokenClassification), folder)
    assert_same(output_of(loaded), output_of(model))


SAVED_EMBEDDINGS = {
    "resized": {},
    "head": {"modules_to_save": ["lm_head"]},
    "both trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("options", SAVED_EMBEDDINGS)
def test_saved_embeddings_are_loaded(options: str, tied: bool, tmp_path: Path) -> None:
    """The only weights of the base model that are loaded, and only with their size."""
    model = trained_everywhere(tiny_model(tf.LlamaForCausalLM, tie_word_embeddings=tied), **SAVED_EMBEDDINGS[options])
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        next(p for name, p in embeddings.named_parameters() if "delta" not in name).add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM, tie_word_embeddings=tied), tmp_path)
    assert_same(output_of(loaded), output_of(model))
    with pytest.raises(ValueError, match=r"shape \[40, 32\], expected \[44, 32\]"):
        PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM, tie_word_embeddings=tied, vocab_size=44), tmp_path)


def test_loaded_for_training_goes_on(tmp_path: Path) -> None:
    model = trained_everywhere(
        tf.ViTForImageClassification, modules_to_save=["classifier"], trainable_parts=["linear2"]
    )
    folder = saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(tf.ViTForImageClassification), folder, is_trainable=True)
    for m in (model, loaded):
        m.eval()
        loss_of(m).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in loaded.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


def test_loaded_under_another_name(tmp_path: Path) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    folder = saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), folder, adapter_name="mine")
    assert loaded.active_adapter == "mine"
    assert_same(output_of(loaded), output_of(model))
    again = saved(loaded, tmp_path / "again")
    assert set(load_file(again / "mine" / "adapter_model.safetensors")) == set(get_peft_model_state_dict(model))
    third = PeftModel.from_pretrained(tiny_model(tf.LlamaForCausalLM), again / "mine")
    assert_same(output_of(third), output_of(model))


@pytest.mark.parametrize(
    ("parameter", "belongs"),
    [
        ("model.feedback_path.layers.0.topdown_linear1.layers.weight", True),
        ("model.feedback_path.layers.0.topdown_linear1.other.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_adapter_of_any_name_owns_its_feedback_only(parameter: str, belongs: bool) -> None:
    assert belongs_to("layers", parameter) == belongs


def test_config_survives_saving(tmp_path: Path) -> None:
    options = {
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 3,
        "feedback_from": 0.75,
        "feedback_to": 1,
        "trainable_parts": ["prompt"],
    }
    model = adapted(tiny_model(tf.LlamaForCausalLM), **options, target_modules=["v_proj"], layers_to_transform=[1])
    loaded = PeftConfig.from_pretrained(saved(model, tmp_path))
    assert isinstance(loaded, TopDownConfig)
    assert loaded.to_dict() | {"inference_mode": False} == model.peft_config["default"].to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOPDOWN"


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (tf.LlamaForCausalLM, AutoPeftModelForCausalLM),
        (tf.ViTForImageClassification, AutoPeftModel),
        (tf.ViTModel, AutoPeftModel),
    ],
)
def test_auto_classes(model_class: type, auto_class: type, tmp_path: Path) -> None:
    base = tiny_model(model_class)
    base.save_pretrained(tmp_path / "base")
    task_type = "CAUSAL_LM" if auto_class is AutoPeftModelForCausalLM else None
    model = steered(model_class.from_pretrained(tmp_path / "base").eval(), task_type=task_type)
    loaded = auto_class.from_pretrained(saved(model, tmp_path / "adapter")).eval()
    assert type(loaded.get_base_model()) is model_class
    assert_same(output_of(loaded), output_of(model))


def test_state_dict_functions_of_peft() -> None:
    model, other = steered(tiny_model(tf.ViTModel)), adapted(tiny_model(tf.ViTModel))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert_same(output_of(other), output_of(model))
