"""What is refused: with one message that says what is wrong, and the model left as it was."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.core.layers import FeedbackLayer

from ..helpers import adapted, leaves_untouched, output_of, steer, steered, takes_adapters
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model

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
        ({"target_modules": "v_proj"}, r"for how names end give a list, \['v_proj'\]. Without it they are looked for"),
        ({"pass2_target_modules": "up_proj"}, r"`pass2_target_modules` has 'up_proj', .* a list, \['up_proj'\]"),
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
        (
            {"modules_to_save": ["classifier"]},
            "`modules_to_save` names 'classifier', but LlamaForCausalLM has no such",
        ),
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
    assert all(word in message for word in ("MambaForCausalLM", "'mamba'", "target_modules=['v_proj']"))
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


def test_projection_of_more_than_values() -> None:
    config = tf.DeepseekV3Config(**_SIZES, **_LATENT, first_k_dense_replace=2, intermediate_size=16)
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="as well as values.*does not know where they are"):
        adapted(model, target_modules=["kv_b_proj"])
    with pytest.raises(
        ValueError, match=r"the values of model\.layers come from a latent \(self_attn.kv_a_proj_with_mqa\)"
    ):
        adapted(model)
    assert not hasattr(model, "peft_config")


def test_normalize_features_without_a_known_norm() -> None:
    model = tf.BertModel(tf.BertConfig(**_SIZES, intermediate_size=16))
    with pytest.raises(ValueError, match="'bert' has no final norm"):
        adapted(model, normalize_features=True)


def test_second_adapter_that_fails_leaves_the_first() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    with leaves_untouched(model), pytest.raises(ValueError, match="does not fit a model with 4 blocks"):
        model.add_adapter("other", TopDownConfig(feedback_from=9))


FIRST_CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["lm_head"]),
    "toast": TopDownConfig(init_weights=False, modules_to_save=["lm_head"], trainable_token_indices=[3, 5]),
}


@pytest.mark.parametrize(
    "inner", [lambda model: model, lambda model: model.get_base_model()], ids=["PeftModel", "base"]
)
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("first", FIRST_CONFIGS)
def test_get_peft_model_that_fails_leaves_the_adapter_before(first: str, name: str, inner: Callable) -> None:
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), copy.deepcopy(FIRST_CONFIGS[first])).eval()
    for options in ({"feedback_from": 99}, {"modules_to_save": ["lm_haed"]}, {"pretrained_feedback": "/nowhere"}):
        with leaves_untouched(model), pytest.raises(ValueError):
            get_peft_model(inner(model), TopDownConfig(**options), name)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_failure_in_the_middle_of_the_injection(
    model_class: type, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the memory runs out at the third block."""
    model = steered(tiny_model(model_class)) if second else tiny_model(model_class)
    update_layer, calls = FeedbackLayer.update_layer, []

    def fail_at_the_third_block(layer: FeedbackLayer, *args: Any) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        update_layer(layer, *args)

    monkeypatch.setattr(FeedbackLayer, "update_layer", fail_at_the_third_block)
    with leaves_untouched(model), pytest.raises(MemoryError):
        model.add_adapter("other", TopDownConfig()) if second else adapted(model)


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


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    steered(tiny_model(tf.LlamaForCausalLM)).save_pretrained(path)
    return path


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)


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
    "not a number": (
        lambda w: w[f"{PREFIX}.selection.topdown_prompt.weight"][:3].fill_(torch.nan),
        "topdown_prompt.* has 3 of 32 values not finite",
    ),
    "infinite": (
        lambda w: w[f"{PREFIX}.layers.1.topdown_linear2.weight"][0, 0].fill_(-torch.inf),
        r"layers\.1\.topdown_linear2.* has 1 of 1024 values not finite",
    ),
    "too large for float32": (
        lambda w: w.update(
            {f"{PREFIX}.selection.topdown_prompt.weight": torch.full((32,), 1e300, dtype=torch.float64)}
        ),
        "topdown_prompt.* has 32 of 32 values not finite",
    ),
    **{
        str(dtype): (
            lambda w, dtype=dtype: w.update({f"{PREFIX}.selection.topdown_prompt.weight": torch.ones(32).to(dtype)}),
            f"topdown_prompt.* {dtype}, expected torch.float16",
        )
        for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "weight of the base model": (
        lambda w: w.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
        r"unexpected: .*model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "embedding of another size": (
        lambda w: w.update({"base_model.model.model.embed_tokens.weight": torch.zeros(41, 32)}),
        r"embed_tokens\.weight has shape \[41, 32\], expected \[40, 32\]",
    ),
    "names without the prefix": (
        lambda w: [w.update({name.removeprefix("base_model.model."): w.pop(name)}) for name in list(w)],
        r"missing: .*layers\.0",
    ),
}


@pytest.fixture(params=TAMPERINGS)
def tampered(request: pytest.FixtureRequest, saved: Path) -> tuple[Path, str]:
    """A saved adapter with changed weights, and the message that must come."""
    change, message = TAMPERINGS[request.param]
    change_weights(saved, change)
    return saved, message


def change_weights(folder: Path, change: Callable) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_tampered_weights(tampered: tuple[Path, str], low_cpu_mem_usage: bool) -> None:
    folder, message = tampered
    base = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_tampered_weights_of_a_second_adapter(tampered: tuple[Path, str]) -> None:
    folder, message = tampered
    model = steered(tiny_model(tf.LlamaForCausalLM))
    for name in ("other", "default"):  # a new one, and into the one that is there
        with leaves_untouched(model), pytest.raises(ValueError, match=message):
            model.load_adapter(folder, name)


def test_tampered_weights_with_a_config_given(tampered: tuple[Path, str]) -> None:
    """It is not known where such a config is from, so the weights are looked at when they come."""
    folder, message = tampered
    base = tiny_model(tf.LlamaForCausalLM)
    with leaves_untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, config=PeftConfig.from_pretrained(folder))


def test_weights_that_do_not_fit_leave_a_trained_adapter(tampered: tuple[Path, str]) -> None:
    folder, message = tampered
    model = get_peft_model(tiny_model(tf.LlamaForCausalLM), PeftConfig.from_pretrained(folder))
    steer(model)
    weights = load_file(folder / "adapter_model.safetensors")
    with leaves_untouched(model), pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, weights)


HEADS = {
    "missing": lambda w: w.pop("base_model.model.classifier.weight"),
    "of another size": lambda w: w.update({"base_model.model.classifier.weight": torch.zeros(5, 32)}),
    "not finite": lambda w: w["base_model.model.classifier.bias"].fill_(torch.nan),
    "integers": lambda w: w.update({"base_model.model.classifier.bias": torch.ones(2, dtype=torch.int64)}),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("damage", HEADS)
def test_damaged_head(damage: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """A saved head that is not in the file would silently stay a random one."""
    steered(tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"]).save_pretrained(tmp_path)
    change_weights(tmp_path, HEADS[damage])
    base = tiny_model(tf.ViTForImageClassification)
    with leaves_untouched(base), pytest.raises(ValueError, match=r"classifier\.modules_to_save\.default"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    model = steered(base)
    with leaves_untouched(model), pytest.raises(ValueError, match=r"classifier\.modules_to_save\.other"):
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)


def test_modules_to_save_inside_of_each_other() -> None:
    """PEFT copies both, and the inner copy would never be trained."""
    model = tiny_model(tf.DPTForSemanticSegmentation)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="matches 'head.head' inside of another match"):
        adapted(model, modules_to_save=["head"])
    assert list(model.state_dict()) == names
    assert adapted(model, modules_to_save=["head.head"])(**inputs_of(model)).logits.isfinite().all()
