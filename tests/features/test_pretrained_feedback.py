"""Adapters that start from a saved one: the same feedback, only what the user named is read, matrices stored once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

import toast_peft.base_feedback
import toast_peft.model
from toast_peft import TopDownConfig

from ..helpers import Inputs, adapted, assert_same, feedback_of, output_of, paths_of, steered
from ..zoo import CONVNEXT_AND_RESNET, VIT_AND_LLAMA, inputs_of, tiny_model
from .hub import COMMIT, Hub

MODELS = [
    *VIT_AND_LLAMA,
    tf.T5ForConditionalGeneration,
    *CONVNEXT_AND_RESNET,
    tf.SwinForImageClassification,
    tf.SegformerForSemanticSegmentation,
]
SAVED = {"full": {}, "lite": {"r": 2}, "lite random": {"r": 2, "init_weights": False}}
STARTED = {
    "full": {},
    "other rank": {"r": 3, "lora_alpha": 0.5},
    "other alpha": {"r": 2, "lora_alpha": 3},
    "same": {"r": 2},
}
SEED = 7


def base_of(model_class: type, dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_model(model_class).to(dtype)


def inputs_for(model: nn.Module) -> Inputs:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}


def assert_same_feedback(found: list[dict], expected: list[dict]) -> None:
    assert [path.keys() for path in found] == [path.keys() for path in expected]
    for of_path, expected_of_path in zip(found, expected, strict=True):
        for index, td in expected_of_path.items():
            assert_same(of_path[index], td)


def trained(model: nn.Module) -> set[str]:
    """Parts of the feedback that are trained."""
    return {name.split("topdown_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def edit(folder: Path, **options: Any) -> Path:
    """Change the config file of a saved adapter by hand; `None` takes an option out."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | options
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


# ----------------------------------------------------------------------------------------------- the same feedback


@pytest.mark.parametrize(
    ("model_class", "saved"),
    [(cls, saved) for cls in MODELS for saved in SAVED if cls in VIT_AND_LLAMA or saved != "lite"],
)
def test_starts_with_the_same_feedback(model_class: type, saved: str, tmp_path: Path) -> None:
    base = base_of(model_class)
    source = steered(base, inputs_for(base), **SAVED[saved])
    source.save_pretrained(tmp_path)
    expected = feedback_of(source, inputs_for(source))
    assert all(td.abs().max() > 1e-3 for path in expected for td in path.values())
    for options in STARTED.values() if model_class is tf.ViTForImageClassification else list(STARTED.values())[:3]:
        model = adapted(base_of(model_class), pretrained_feedback=tmp_path, **options)
        assert_same_feedback(feedback_of(model, inputs_for(model)), expected)
        factors = {"linear1_A", "linear1_B", "linear2_A", "linear2_B"}
        assert trained(model) == {"prompt", "transform"} | (factors if "r" in options else {"linear1", "linear2"})
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(base_of(model_class), tmp_path / "again")
    assert_same_feedback(feedback_of(loaded, inputs_for(loaded)), expected)


def test_an_identical_lite_adapter_stores_no_fixed_matrices(tmp_path: Path) -> None:
    source = steered(tiny_model(tf.ViTModel), r=4)
    source.save_pretrained(tmp_path / "source")
    model = adapted(tiny_model(tf.ViTModel), r=4, pretrained_feedback=tmp_path / "source")
    model.save_pretrained(tmp_path / "again")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_lite_trains_what_its_config_says(tmp_path: Path) -> None:
    steered(tiny_model(tf.ViTModel), r=4).save_pretrained(tmp_path)
    options = {"pretrained_feedback": tmp_path, "trainable_parts": ["prompt", "linear2"]}
    assert trained(adapted(tiny_model(tf.ViTModel), r=2, **options)) == {"prompt", "linear2_A", "linear2_B"}
    assert trained(adapted(tiny_model(tf.ViTModel), **options)) == {"prompt", "linear2"}


@pytest.mark.parametrize("saved", SAVED)
def test_some_of_the_blocks(saved: str, tmp_path: Path) -> None:
    """In a hierarchical model the chain then starts at a layer that the saved adapter has inside of its chain."""
    base = base_of(tf.SwinForImageClassification)
    source = steered(base, inputs_for(base), **SAVED[saved])
    source.save_pretrained(tmp_path)
    for options in ({"feedback_to": 1}, {"feedback_from": 3}):
        base = base_of(tf.SwinForImageClassification)
        model = adapted(base, pretrained_feedback=tmp_path, **options)
        [path], [of_source] = paths_of(model), paths_of(source)
        for name, layer in path.layers.items():
            other = of_source.layers[name.removesuffix("_start")]
            z = torch.randn(1, 2, 2, layer.in_features, dtype=torch.float64)
            size = (4, 4) if layer.num_tokens > 1 else (2, 2)
            torch.testing.assert_close(layer(z, "default", size), other(z, "default", size), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="it lacks: .*layers.1.topdown_linear1.*of shape"):  # the other stage
        adapted(base_of(tf.SwinForImageClassification), pretrained_feedback=tmp_path, feedback_from=2)


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({"normalize_features": False}, {}, "would do something else with `normalize_features=None`; pass"),
        ({"double_value_bias": True}, {}, "would do something else with `double_value_bias=False`; pass"),
        ({"r": 2}, {"r": 2, "share_pretrained_feedback": True}, "needs a full adapter, but .* has `r=2`"),
    ],
)
def test_what_would_do_something_else_is_refused(
    saved: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapted(tiny_model(tf.ViTModel), **saved).save_pretrained(tmp_path)
    base = tiny_model(tf.ViTModel)
    names, expected = list(base.state_dict()), output_of(base)
    with pytest.raises(ValueError, match=message):
        adapted(base, pretrained_feedback=tmp_path, **options)
    assert list(base.state_dict()) == names and torch.equal(output_of(base), expected)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    steered(tiny_model(tf.ViTModel)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        weights = load_file(file)
        file.unlink()
    if damage == "pickle":
        torch.save(weights, tmp_path / "adapter_model.bin")
    base = tiny_model(tf.ViTModel)
    names, expected = list(base.state_dict()), output_of(base)
    with pytest.raises(ValueError, match="could not be read; expected a TOAST adapter .* with safetensors"):
        adapted(base, pretrained_feedback=tmp_path)
    assert list(base.state_dict()) == names and torch.equal(output_of(base), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "integers"])
def test_weights_that_are_no_numbers_are_refused(value: float | str, tmp_path: Path) -> None:
    steered(tiny_model(tf.ViTModel)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "topdown_linear1" in name)
    weights[name] = weights[name].int() if value == "integers" else weights[name].fill_(value)
    save_file(weights, file)
    with pytest.raises(
        ValueError, match="has weights with NaN, Inf or of a dtype other than .*topdown_linear1.weight"
    ):
        adapted(tiny_model(tf.ViTModel), pretrained_feedback=tmp_path)


# -------------------------------------------------------------------------------------- how the adapter is made


def test_on_the_meta_device(tmp_path: Path) -> None:
    """As on the other ranks of FSDP, which get their weights from the first."""
    steered(tiny_model(tf.ViTModel), r=2).save_pretrained(tmp_path)
    model = adapted(tiny_model(tf.ViTModel).to("meta"), r=3, pretrained_feedback=tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = adapted(tiny_model(tf.ViTModel), r=3, pretrained_feedback=tmp_path)
    assert model.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"r": 3}], ids=str)
def test_low_cpu_mem_usage(options: dict[str, Any], tmp_path: Path) -> None:
    source = steered(tiny_model(tf.ViTModel), r=2)
    source.save_pretrained(tmp_path)
    config = TopDownConfig(pretrained_feedback=tmp_path, **options)
    model = get_peft_model(tiny_model(tf.ViTModel), config, low_cpu_mem_usage=True).eval()
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(output_of(model), output_of(source))
    model.train()(**inputs_of(model))[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"r": 3}], ids=str)
def test_not_rounded_on_a_model_in_low_precision(options: dict[str, Any], tmp_path: Path) -> None:
    steered(tiny_model(tf.ViTModel), r=2).save_pretrained(tmp_path)
    config = TopDownConfig(pretrained_feedback=tmp_path, **options)
    torch.manual_seed(SEED)
    expected = get_peft_model(tiny_model(tf.ViTModel), config)
    model = get_peft_model(tiny_model(tf.ViTModel).to(torch.bfloat16), config)
    for name, parameter in model.named_parameters():
        if "topdown_" in name and (options.get("r") != 3 or ("_A" not in name and "_B" not in name)):
            assert torch.equal(parameter, expected.get_parameter(name)), name


def test_subfolder(tmp_path: Path) -> None:
    source = steered(tiny_model(tf.ViTModel))
    source.save_pretrained(tmp_path / "adapters" / "cars")
    options = {"pretrained_feedback": tmp_path, "pretrained_subfolder": "adapters/cars"}
    assert torch.equal(output_of(adapted(tiny_model(tf.ViTModel), **options)), output_of(source))


def test_revision_and_subfolder_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, monkeypatch)
    source = steered(tiny_model(tf.ViTModel))
    source.save_pretrained(hub.folder / "cars")
    options = {"pretrained_feedback": "me/adapters", "pretrained_revision": "v2", "pretrained_subfolder": "cars"}
    model = adapted(tiny_model(tf.ViTModel), r=2, share_pretrained_feedback=True, **options)
    assert torch.equal(output_of(model), output_of(source))
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert hub.requests == [("me/adapters", file, "cars", "v2") for file in files]
    config = model.peft_config["default"]
    found = (config.base_feedback, config.base_feedback_revision, config.base_feedback_subfolder)
    assert found == ("me/adapters", COMMIT, "cars")  # pinned to what it was trained with


# ----------------------------------------------------------------------------------- only what the user has named


RUNTIME_ONLY = {
    "pretrained_feedback": "nowhere/in/this/world",
    "pretrained_revision": "v2",
    "pretrained_subfolder": "cars",
    "share_pretrained_feedback": True,
}


def test_runtime_options_are_not_saved(tmp_path: Path) -> None:
    config = TopDownConfig(r=2, **RUNTIME_ONLY)
    config.save_pretrained(tmp_path)
    assert not RUNTIME_ONLY.keys() & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    assert config.pretrained_feedback == RUNTIME_ONLY["pretrained_feedback"]


def load_with_transformers(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def load_as_second(base: nn.Module, folder: Path) -> nn.Module:
    model = adapted(base)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return model


LOADERS = {
    "PeftModel": PeftModel.from_pretrained,
    "PeftConfig": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=PeftConfig.from_pretrained(folder)
    ),
    "get_peft_config": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=get_peft_config(TopDownConfig.from_json_file(folder / "adapter_config.json"))
    ),
    "load_adapter": load_as_second,
    "AutoPeftModel": lambda base, folder: AutoPeftModel.from_pretrained(folder),
    "transformers": load_with_transformers,
    "AutoModel": lambda base, folder: tf.AutoModelForImageClassification.from_pretrained(folder),
}


@pytest.mark.parametrize("edited", [{}, {"num_blocks": None}], ids=["saved", "as if new"])
@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_file_names_is_not_read(
    loader: str, edited: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tf.ViTForImageClassification).save_pretrained(tmp_path / "base")
    source = steered(tf.ViTForImageClassification.from_pretrained(tmp_path / "base").eval(), r=2)
    source.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", **RUNTIME_ONLY, **edited)
    read: list[Any] = []
    for function in ("start_from_pretrained", "load_base_feedback"):
        monkeypatch.setattr(toast_peft.model, function, lambda *args: read.append(args))
    monkeypatch.setattr(toast_peft.base_feedback, "cached_file", lambda *args, **kwargs: read.append(args))
    base = tf.ViTForImageClassification.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="`pretrained_feedback='nowhere/in/this/world'` in the file of an adapter is"):
        model = LOADERS[loader](base, tmp_path / "adapter")
    assert not read
    assert torch.equal(output_of(model.eval()), output_of(source))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pretrained_feedback": "nowhere"}', "does not say its"),
        ("[]", "does not say its"),
        ('{"r": 2', "is no JSON"),
    ],
)
def test_a_file_that_is_not_a_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json' {message}"):
        TopDownConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pretrained_revision": "v2"},
            "`pretrained_revision='v2'` is about `pretrained_feedback`, which is not",
        ),
        ({"share_pretrained_feedback": True, "r": 2}, "is about `pretrained_feedback`, which is not given"),
        ({"share_pretrained_feedback": True, "pretrained_feedback": "x"}, "with `r=0` they are trained"),
        ({"share_pretrained_feedback": "no", "pretrained_feedback": "x"}, "is 'no'; expected True or False"),
        ({"pretrained_feedback": 3}, "`pretrained_feedback` is 3; expected the path of a saved adapter"),
        ({"base_feedback": ["x"], "r": 2}, "`base_feedback` is .'x'.; expected a string"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopDownConfig(**options)
