"""What is refused: with one message that says what is wrong, and the model left as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.feedback import FeedbackLayer

from .models import VIT_AND_LLAMA, adapted, inputs_of, output_of, steered, takes_adapters, tiny_model


def attributes_of(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) | set(module._modules) for name, module in model.named_modules()}


@contextmanager
def leaves_untouched(model: nn.Module) -> Iterator[None]:
    """Output, parameters, their requires_grad and the attributes of all modules are as before."""
    before = output_of(model)
    attributes, keys = attributes_of(model), list(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    yield
    assert attributes_of(model) == attributes
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not hasattr(model, "peft_config")
    assert torch.equal(output_of(model), before)


# --------------------------------------------------------------------------------------------------- configurations


def injected(model: nn.Module, **options: Any) -> nn.Module:
    return inject_adapter_in_model(TopDownConfig(**options), model)


@pytest.mark.parametrize("inject", [adapted, injected])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "matches 2 modules in block 0"),
        ({"target_modules": ["v_porj"]}, "matches no module"),
        ({"target_modules": "all-linear"}, "matches no module"),
        ({"target_modules": ["lm_head"]}, "in none"),
        ({"target_modules": ["mlp"]}, "matches model.layers.0.mlp, which does not compute values"),
        ({"target_modules": ["q_proj"]}, "q_proj, which does not compute values; expected 'self_attn.v_proj' of each"),
        ({"target_modules": ["k_proj"]}, "k_proj, which does not compute values; expected 'self_attn.v_proj' of each"),
        ({"target_modules": ["o_proj"]}, "o_proj, which does not compute values; expected 'self_attn.v_proj' of each"),
        ({"target_modules": ["gate_proj"]}, "gate_proj, which does not compute values; expected 'self_attn.v_proj'"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm, which does not compute values"),
        ({"target_modules": r"model\.layers\.[0-9]"}, "expected"),
        ({"exclude_modules": ["nope"]}, "`exclude_modules={'nope'}` matches none of the value projections"),
        ({"exclude_modules": ["q_proj"]}, "matches none of the value projections, model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": ["v_proj"]}, "No block is left"),
        ({"layers_to_transform": [4]}, r"`layers_to_transform` names the blocks \[4\]"),
        ({"layers_to_transform": [-1]}, r"`layers_to_transform` names the blocks \[-1\]"),
        ({"layers_to_transform": [1, 3], "feedback_from": 3}, r"names the blocks \[3\]"),
        ({"feedback_from": 5}, "does not fit a model with 4 blocks"),
        ({"feedback_to": 4}, "does not fit a model with 4 blocks"),
        ({"feedback_from": 2, "feedback_to": 2}, "does not fit a model with 4 blocks"),
        ({"feedback_to": 0.1, "feedback_from": 0.1}, "does not fit a model with 4 blocks"),
        ({"modules_to_save": ["lm_haed"]}, "`modules_to_save` names 'lm_haed'"),
        ({"modules_to_save": ["lm_head", "clasifier"]}, "'clasifier'"),
        # PEFT trains a copy of such a module, which the feedback would not reach.
        ({"modules_to_save": ["v_proj"]}, "`modules_to_save`"),
        ({"modules_to_save": ["self_attn"]}, "`modules_to_save`"),
        ({"modules_to_save": ["layers.3"]}, "`modules_to_save`"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_model(options: dict[str, Any], message: str, inject: Callable) -> None:
    model = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(model), pytest.raises(ValueError, match=message):
        inject(model, **options)


def test_unsupported_model_type() -> None:
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=40)
    model = tf.MambaForCausalLM(config)
    with pytest.raises(ValueError) as error:
        adapted(model)
    message = str(error.value)
    assert all(
        word in message for word in ("MambaForCausalLM", "'mamba'", "llama", "vit", "target_modules=['v_proj']")
    )
    assert not hasattr(model, "peft_config")


def test_several_stacks_of_supported_types() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    towers = nn.ModuleDict(
        {"first": tf.LlamaModel(tf.LlamaConfig(**text, vocab_size=40)), "second": tiny_model(tf.ViTModel)}
    )
    with pytest.raises(ValueError, match=r"\['first', 'second'\].*target_modules"):
        adapted(towers)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "target_modules"),
    [
        (tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=40), ["query_key_value"]),
        (tf.DeepseekV3Config(**_SIZES, **_LATENT, first_k_dense_replace=2, intermediate_size=16), ["kv_b_proj"]),
    ],
    ids=["unknown order", "latent attention"],
)
def test_projections_of_more_than_values(config: tf.PretrainedConfig, target_modules: list[str]) -> None:
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="as well as values.*gpt2, gpt_neox"):
        adapted(model, target_modules=target_modules)
    with pytest.raises(ValueError, match="does not know where the value projections"):
        adapted(model)
    assert not hasattr(model, "peft_config")


def test_normalize_features_without_a_known_norm() -> None:
    model = tf.BertModel(tf.BertConfig(**_SIZES, intermediate_size=16))
    with pytest.raises(ValueError, match="'bert' has no final norm"):
        adapted(model, normalize_features=True)


def test_second_adapter_that_fails_leaves_the_first() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    expected, keys = output_of(model), list(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="does not fit a model with 4 blocks"):
        model.add_adapter("other", TopDownConfig(feedback_from=9))
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_failure_in_the_middle_of_the_injection(
    model_class: type, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the memory runs out at the third block."""
    model = steered(tiny_model(model_class)) if second else tiny_model(model_class)
    expected, keys, attributes = output_of(model), list(model.state_dict()), attributes_of(model)
    trainable = [p.requires_grad for p in model.parameters()]
    update_layer, calls = FeedbackLayer.update_layer, []

    def fail_at_the_third_block(layer: FeedbackLayer, *args: Any) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        update_layer(layer, *args)

    monkeypatch.setattr(FeedbackLayer, "update_layer", fail_at_the_third_block)
    with pytest.raises(MemoryError):
        model.add_adapter("other", TopDownConfig()) if second else adapted(model)
    assert torch.equal(output_of(model), expected)
    assert list(model.state_dict()) == keys and attributes_of(model) == attributes
    assert [p.requires_grad for p in model.parameters()] == trainable


# ---------------------------------------------------------------------------------- adapters of another base model


OTHER_BASES = {
    "depth": (tf.LlamaForCausalLM, {"num_hidden_layers": 3}, "num_blocks=4.*3"),
    "more blocks": (tf.LlamaForCausalLM, {"num_hidden_layers": 6}, "num_blocks=4.*6"),
    "width": (tf.LlamaForCausalLM, {"hidden_size": 48}, "hidden_size=32.*48"),
    "type": (tf.MistralForCausalLM, {}, "backbone_type='llama'.*'mistral'"),
    "modality": (tf.ViTForImageClassification, {}, "backbone_type='llama'.*'vit'"),
    "all": (
        tf.Qwen2ForCausalLM,
        {"hidden_size": 16, "num_hidden_layers": 2},
        "backbone_type.*num_blocks.*hidden_size",
    ),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    steered(tiny_model(tf.LlamaForCausalLM)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("differs", OTHER_BASES)
def test_adapter_of_another_base_model(differs: str, low_cpu_mem_usage: bool, saved: Path) -> None:
    model_class, options, message = OTHER_BASES[differs]
    base = tiny_model(model_class, **options)
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_cpu_mem_usage)


@takes_adapters
@pytest.mark.parametrize("differs", OTHER_BASES)
def test_adapter_of_another_base_model_loaded_by_transformers(differs: str, saved: Path) -> None:
    model_class, options, message = OTHER_BASES[differs]
    base = tiny_model(model_class, **options)
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(saved))
    assert not any("topdown_" in name for name, _ in base.named_parameters())
    assert torch.equal(output_of(base), output_of(tiny_model(model_class, **options)))


# ---------------------------------------------------------------------------------------------- tampered weights


PREFIX = "base_model.model.model.feedback_path"
TAMPERINGS = {
    "missing": (
        lambda w: w.pop(f"{PREFIX}.layers.2.topdown_linear1.weight"),
        r"missing: .*layers\.2\.topdown_linear1",
    ),
    "unexpected": (
        lambda w: w.update({f"{PREFIX}.layers.7.topdown_linear1.weight": torch.zeros(32, 32)}),
        r"unexpected: .*layers\.7\.topdown_linear1",
    ),
    "shape": (
        lambda w: w.update({f"{PREFIX}.selection.topdown_prompt.weight": torch.zeros(16)}),
        r"topdown_prompt.* has shape \[16\], expected \[32\]",
    ),
    "several": (
        lambda w: (
            w.pop(f"{PREFIX}.selection.topdown_prompt.weight"),
            w.pop(f"{PREFIX}.selection.topdown_transform.weight"),
        ),
        r"missing: .*topdown_prompt.*topdown_transform",
    ),
    "all": (lambda w: w.clear(), r"missing: .*layers\.0"),
}


@pytest.fixture(params=TAMPERINGS)
def tampered(request: pytest.FixtureRequest, saved: Path) -> tuple[Path, str]:
    """A saved adapter with changed weights, and the message that must come."""
    change, message = TAMPERINGS[request.param]
    weights = load_file(saved / "adapter_model.safetensors")
    change(weights)
    save_file(weights, saved / "adapter_model.safetensors")
    return saved, message


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_tampered_weights(tampered: tuple[Path, str], low_cpu_mem_usage: bool) -> None:
    folder, message = tampered
    base = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_tampered_weights_of_a_second_adapter(tampered: tuple[Path, str]) -> None:
    folder, message = tampered
    model = steered(tiny_model(tf.LlamaForCausalLM))
    expected, keys = output_of(model), list(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(output_of(model), expected)


def test_missing_head_is_reported(tmp_path: Path) -> None:
    """A saved head that is not in the file would silently stay a random one."""
    steered(tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.classifier.weight"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises((ValueError, KeyError), match=r"classifier\.weight"):
        PeftModel.from_pretrained(tiny_model(tf.ViTForImageClassification), tmp_path)


def test_modules_to_save_inside_of_each_other() -> None:
    """PEFT copies both, and the inner copy would never be trained."""
    model = tiny_model(tf.DPTForSemanticSegmentation)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="matches 'head.head' inside of another match"):
        adapted(model, modules_to_save=["head"])
    assert list(model.state_dict()) == names
    assert adapted(model, modules_to_save=["head.head"])(**inputs_of(model)).logits.isfinite().all()
