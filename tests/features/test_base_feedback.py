"""The fixed matrices of Lite adapters, stored once in the full adapter that they started from."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

import toast_peft.base_feedback
from toast_peft import TopDownConfig

from ..helpers import adapted, loss_of, output_of, parts_in, steered
from ..zoo import add_noise, tiny_model
from .hub import COMMIT, Hub
from .test_trainer import trainer_for

FACTORS = {"prompt", "transform", "linear1_A", "linear1_B", "linear2_A", "linear2_B"}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base_feedback")
    tiny_model(tf.ViTForImageClassification).save_pretrained(path / "model")
    steered(base_of(path)).save_pretrained(path / "full")
    lite = train(shared(path / "full", base_of(path)))
    lite.save_pretrained(path / "lite")
    torch.save(output_of(lite), path / "output")
    return path


@pytest.fixture
def folder(made_once: Path, tmp_path: Path) -> Path:
    """With `model`, `full`, an adapter on it, `lite`, an adapter that shares its matrices, and the latter's output."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    for name in ("full", "lite"):  # they name each other and the model by their paths
        file = tmp_path / name / "adapter_config.json"
        file.write_text(file.read_text().replace(str(made_once), str(tmp_path)))
    return tmp_path


def base_of(folder: Path) -> nn.Module:
    return tf.ViTForImageClassification.from_pretrained(folder / "model").eval()


def shared(full: Path | str, base: nn.Module, **options: Any) -> PeftModel:
    return adapted(base, r=2, pretrained_feedback=full, share_pretrained_feedback=True, **options)


def train(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    torch.manual_seed(3)
    factors = [p for name, p in model.named_parameters() if p.requires_grad and ("_A" in name or "_B" in name)]
    assert factors
    add_noise(*factors)
    return model


def expected_of(folder: Path) -> torch.Tensor:
    """The output with `lite`, before it was saved."""
    return torch.load(folder / "output")


def edit(adapter: Path, **options: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


# ------------------------------------------------------------------------------------------------ saving and loading


def load_with_transformers(base: nn.Module, adapter: Path) -> nn.Module:
    base.load_adapter(str(adapter), peft_config=TopDownConfig.from_pretrained(adapter))
    return base


def load_as_second(base: nn.Module, adapter: Path) -> nn.Module:
    model = adapted(base)
    assert not model.load_adapter(adapter, "other").missing_keys
    model.set_adapter("other")
    return model


def load_by_injection(base: nn.Module, adapter: Path, **options: Any) -> nn.Module:
    inject_adapter_in_model(TopDownConfig.from_pretrained(adapter), base, **options)
    set_peft_model_state_dict(base, load_file(adapter / "adapter_model.safetensors"), **options)
    return base


LOADERS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "PeftModel": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, adapter: PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=True),
    "load_adapter": load_as_second,
    "AutoPeftModel": lambda base, adapter: AutoPeftModel.from_pretrained(adapter),
    "transformers": load_with_transformers,
    "injection": load_by_injection,
    "injection low_cpu_mem_usage": lambda base, adapter: load_by_injection(base, adapter, low_cpu_mem_usage=True),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_saved_without_the_matrices_and_loaded_with_them(loader: str, folder: Path) -> None:
    assert parts_in(folder / "lite") == FACTORS
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = LOADERS[loader](base_of(folder), folder / "lite").eval()
    assert torch.equal(output_of(model), expected_of(folder))
    assert not torch.equal(output_of(model), output_of(PeftModel.from_pretrained(base_of(folder), folder / "full")))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_start_computes_what_the_full_adapter_does(folder: Path) -> None:
    full = PeftModel.from_pretrained(base_of(folder), folder / "full")
    model = shared(folder / "full", base_of(folder))
    assert torch.equal(output_of(model), output_of(full))


@pytest.mark.parametrize("kind", ["hierarchical", "convnet"])
def test_other_kinds_of_feedback_paths(kind: str, tmp_path: Path) -> None:
    model_class = {"hierarchical": tf.SwinForImageClassification, "convnet": tf.ResNetForImageClassification}[kind]
    options = {"hierarchical": {"feedback_from": 3}, "convnet": {}}[kind]  # the start of another chain, see below
    full = adapted(tiny_model(model_class))
    add_noise(*(parameter for parameter in full.parameters() if parameter.requires_grad))
    full.save_pretrained(tmp_path / "full")
    model = train(shared(tmp_path / "full", tiny_model(model_class), **options))
    model.save_pretrained(tmp_path / "lite")
    loaded = PeftModel.from_pretrained(tiny_model(model_class), tmp_path / "lite")
    assert parts_in(tmp_path / "lite") == FACTORS
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    assert any(".layers." in name and ".topdown_linear1." in name for name in expected)


def test_saved_again_and_trained_on(folder: Path) -> None:
    model = PeftModel.from_pretrained(base_of(folder), folder / "lite", is_trainable=True).eval()
    assert {n.split("topdown_")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == FACTORS
    loss_of(model).backward()
    model.save_pretrained(folder / "again")
    assert parts_in(folder / "again") == FACTORS
    again = PeftModel.from_pretrained(base_of(folder), folder / "again")
    assert torch.equal(output_of(again), output_of(model))
    model.peft_config["default"].base_feedback = None  # from now on whole
    model.save_pretrained(folder / "whole")
    shutil.rmtree(folder / "full")
    assert parts_in(folder / "whole") == FACTORS | {"linear1", "linear2"}
    whole = PeftModel.from_pretrained(base_of(folder), folder / "whole")
    assert torch.equal(output_of(whole), output_of(model))


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"r": 3}], ids=str)
def test_starts_another_adapter(options: dict[str, Any], folder: Path) -> None:
    """The new one has everything in its own file."""
    model = adapted(base_of(folder), pretrained_feedback=folder / "lite", **options)
    error = (output_of(model) - expected_of(folder)).abs().max()
    assert error < 1e-5 * expected_of(folder).abs().max()
    model.save_pretrained(folder / "new")
    shutil.rmtree(folder / "full")
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "new")
    assert torch.equal(output_of(loaded), output_of(model))


def test_a_loaded_config_that_starts_from_another_adapter(folder: Path) -> None:
    """What it says of its old weights does not hold for the new ones."""
    config = TopDownConfig.from_pretrained(folder / "lite")
    config.pretrained_feedback = str(folder / "lite")
    model = get_peft_model(base_of(folder), config).eval()
    model.save_pretrained(folder / "new")
    assert parts_in(folder / "new") == FACTORS | {"linear1", "linear2"}
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "new")
    assert torch.equal(output_of(loaded), expected_of(folder))


def test_state_dict_functions_of_peft(folder: Path) -> None:
    model = PeftModel.from_pretrained(base_of(folder), folder / "lite")
    weights = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert not any(".topdown_linear1." in name or ".topdown_linear2." in name for name in weights)
    other = shared(folder / "full", base_of(folder))
    assert not set_peft_model_state_dict(other, weights).unexpected_keys
    assert torch.equal(output_of(other), output_of(model))


def test_checkpoints_of_the_trainer(folder: Path) -> None:
    def new() -> PeftModel:
        torch.manual_seed(3)
        return shared(folder / "full", tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"])

    options = {"max_steps": 4, "eval_strategy": "no", "save_steps": 2}
    whole, resumed = new(), new()
    trainer_for(whole, folder / "out", **options).train()
    assert not parts_in(folder / "out" / "checkpoint-2") & {"linear1", "linear2"}
    trainer_for(resumed, folder / "out", **options).train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


def test_two_adapters_one_of_which_shares(folder: Path) -> None:
    model = PeftModel.from_pretrained(base_of(folder), folder / "full", adapter_name="whole")
    model.load_adapter(folder / "lite", "lite")
    model.save_pretrained(folder / "both")
    assert parts_in(folder / "both" / "lite") == FACTORS
    assert parts_in(folder / "both" / "whole") == {"prompt", "transform", "linear1", "linear2"}


def test_not_rounded_on_a_model_in_low_precision(folder: Path) -> None:
    expected = PeftModel.from_pretrained(base_of(folder), folder / "lite")
    model = PeftModel.from_pretrained(base_of(folder).to(torch.bfloat16), folder / "lite")
    for name, parameter in model.named_parameters():
        if "topdown_" in name:
            assert torch.equal(parameter, expected.get_parameter(name)), name


# ------------------------------------------------------------------------------------------------------- refusals


def alter(folder: Path) -> None:
    weights = load_file(folder / "full" / "adapter_model.safetensors")
    name = next(name for name in weights if "linear2" in name)
    save_file(
        weights | {name: weights[name].nextafter(torch.tensor(9.0))}, folder / "full" / "adapter_model.safetensors"
    )


def pickle(folder: Path) -> None:
    file = folder / "full" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "moved": (lambda folder: (folder / "full").rename(folder / "other"), "base_feedback='.*full', which could not be"),
    "altered": (alter, "has others than those it was trained with .SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}."),
    "only a pickle": (pickle, "base_feedback='.*full', which could not be read"),
    "no hash": (
        lambda folder: edit(folder / "lite", base_feedback_sha256=None),
        "has others than those .*expected None",
    ),
    "no matrices": (
        lambda folder: edit(folder / "lite", init_weights=True),
        "has others than those it was trained with",
    ),
    "subfolder": (
        lambda folder: edit(folder / "lite", base_feedback_subfolder="none"),
        "full' subfolder='none', which could not be read",
    ),
    "full": (lambda folder: edit(folder / "lite", r=0), "needs fixed matrices, but with `r=0` they are trained"),
    "a number": (lambda folder: edit(folder / "lite", base_feedback=3), "`base_feedback` is 3; expected a string"),
}


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_without_the_right_matrices_it_is_refused(damage: str, second: bool, folder: Path) -> None:
    change, message = DAMAGES[damage]
    model = base_of(folder)
    if second:
        model = steered(model)
    state, expected = {name: x.clone() for name, x in model.state_dict().items()}, output_of(model)
    change(folder)
    with pytest.raises(ValueError, match=message):
        if second:
            model.load_adapter(folder / "lite", "other")
        else:
            PeftModel.from_pretrained(model, folder / "lite")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(output_of(model), expected)
    assert list(getattr(model, "peft_config", {})) == (["default"] if second else [])


def test_where_the_matrices_are_can_be_said_in_code(folder: Path) -> None:
    expected = expected_of(folder)
    (folder / "full").rename(folder / "other")
    config = PeftConfig.from_pretrained(folder / "lite")
    config.base_feedback = str(folder / "other")
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "lite", config=config)
    assert torch.equal(output_of(loaded), expected)


@pytest.mark.parametrize(
    ("base_feedback", "subfolder"),
    [("/full", None), ("../full", None), ("a/b/c", None), (r"\\host\share", None), ("a/b", ".."), ("a/b", "/full")],
    ids=str,
)
def test_a_downloaded_adapter_names_no_folder(
    base_feedback: str, subfolder: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder, monkeypatch)
    shutil.copytree(folder / "lite", hub.folder, dirs_exist_ok=True)
    edit(hub.folder, base_feedback=base_feedback, base_feedback_subfolder=subfolder)
    read: list[Any] = []
    monkeypatch.setattr(toast_peft.base_feedback, "cached_file", lambda *args, **kwargs: read.append(args))
    base = base_of(folder)
    names = list(base.state_dict())
    with pytest.raises(ValueError, match="as its `base_feedback`; expected a Hub id"):
        PeftModel.from_pretrained(base, "me/lite")
    with pytest.raises(ValueError, match="as its `base_feedback`; expected a Hub id"):
        get_peft_model(base, PeftConfig.from_pretrained("me/lite"))
    assert not read and list(base.state_dict()) == names


def test_from_hub_to_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder, monkeypatch)
    shutil.copytree(folder / "full", hub.folder / "paths" / "full")
    model = train(shared("me/model", base_of(folder), pretrained_subfolder="paths/full"))
    model.save_pretrained(hub.folder)
    hub.requests.clear()
    loaded = PeftModel.from_pretrained(base_of(folder), "me/lite")
    assert ("me/model", "adapter_model.safetensors", "paths/full", COMMIT) in hub.requests
    assert torch.equal(output_of(loaded), output_of(model))
    with_transformers = base_of(folder)
    with_transformers.load_adapter("me/lite")
    assert torch.equal(output_of(with_transformers), output_of(model))


def test_size_of_an_adapter_on_vit_ti(tmp_path: Path) -> None:
    """The numbers of the documentation."""
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    adapted(tf.ViTModel(tf.ViTConfig(**shape))).save_pretrained(tmp_path / "full")
    sizes = []
    for share in (True, False):
        options = {"pretrained_feedback": tmp_path / "full", "share_pretrained_feedback": share}
        adapted(tf.ViTModel(tf.ViTConfig(**shape)), r=4, **options).save_pretrained(tmp_path / "lite")
        sizes.append((tmp_path / "lite" / "adapter_model.safetensors").stat().st_size / 1e6)
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    assert f"{sizes[0]:.2f} MB instead of {sizes[1]:.2f} MB" in page
