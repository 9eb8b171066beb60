"""`from_official_checkpoint`: what it accepts, refuses and leaves alone."""

import warnings
from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from toast_peft import from_official_checkpoint

from ..helpers import assert_same
from .test_golden import Golden, assert_close


@pytest.fixture(scope="module")
def vit() -> Golden:
    return Golden("vit")


@pytest.fixture(scope="module")
def convnext() -> Golden:
    return Golden("convnext")


@pytest.fixture(scope="module")
def llama() -> Golden:
    return Golden("llama")


def vit_logits(model: torch.nn.Module, golden: Golden) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(golden.tensors["input/pixel_values"].double()).logits


def llama_logits(model: torch.nn.Module, golden: Golden) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(golden.tensors["input/input_ids"]).logits


def snapshot(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    return {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}


def assert_untouched(model: torch.nn.Module, before: dict[str, tuple[torch.Tensor, bool]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (value, requires_grad) in before.items():
        assert torch.equal(after[name][0], value)
        assert after[name][1] == requires_grad
    assert not any("feedback" in name for name, _ in model.named_modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_files(vit: Golden, tmp_path: Path, suffix: str) -> None:
    path, checkpoint = tmp_path / f"official{suffix}", vit.checkpoint(lite=False)
    if suffix == ".safetensors":
        save_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    model = from_official_checkpoint(vit.base_model(), path)
    assert_close(vit_logits(model, vit), vit.tensors["toast/pass2/logits"])


def test_file_of_the_official_trainer(vit: Golden, tmp_path: Path) -> None:
    state_dict = {f"module.{name}": tensor for name, tensor in vit.checkpoint(lite=True).items()}
    torch.save({"model": state_dict}, tmp_path / "official.pth")
    model = from_official_checkpoint(vit.base_model(), tmp_path / "official.pth")
    assert_close(vit_logits(model, vit), vit.tensors["toast-lite/pass2/logits"])


def test_a_pickled_object_is_not_executed(vit: Golden, tmp_path: Path) -> None:
    torch.save(vit, tmp_path / "official.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        from_official_checkpoint(vit.base_model(), tmp_path / "official.pth")


@pytest.mark.parametrize("lite", [False, True])
def test_saved_and_loaded_as_peft_adapter(vit: Golden, tmp_path: Path, lite: bool) -> None:
    model = from_official_checkpoint(vit.base_model(), vit.checkpoint(lite))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit.base_model(), tmp_path)
    assert_same(vit_logits(loaded, vit), vit_logits(model, vit))


def test_feedback_alone_is_enough(llama: Golden) -> None:
    feedback = {
        name: tensor
        for name, tensor in llama.checkpoint(lite=True).items()
        if any(part in name for part in ("prompt", "top_down_transform", "decoders"))
    }
    model = from_official_checkpoint(llama.base_model(), feedback)
    whole = from_official_checkpoint(llama.base_model(), llama.checkpoint(lite=True))
    assert_same(llama_logits(model, llama), llama_logits(whole, llama))


def test_official_behaviour_is_set_in_the_config(vit: Golden, llama: Golden) -> None:
    config = from_official_checkpoint(vit.base_model(), vit.checkpoint(lite=True)).peft_config["default"]
    assert (config.r, config.lora_alpha, config.double_value_bias, config.normalize_features) == (4, 1, True, True)
    assert config.trainable_parts == ["prompt", "transform", "linear1", "linear2"]
    assert config.modules_to_save == ["classifier"]
    config = from_official_checkpoint(llama.base_model(), llama.checkpoint(lite=False)).peft_config["default"]
    assert (config.r, config.double_value_bias, config.normalize_features) == (0, False, False)
    assert config.trainable_parts == ["prompt", "linear2"]
    assert config.task_type == "CAUSAL_LM"


def test_config_overrides(llama: Golden) -> None:
    model = from_official_checkpoint(llama.base_model(), llama.checkpoint(lite=False), trainable_parts=["transform"])
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "base_model.model.model.feedback_path.selection.topdown_transform.default.weight"
    }


def test_head_is_copied_where_it_fits(vit: Golden) -> None:
    base = vit.base_model()
    torch.nn.init.zeros_(base.classifier.weight)
    model = from_official_checkpoint(base, vit.checkpoint(lite=False))
    assert_close(vit_logits(model, vit), vit.tensors["toast/pass2/logits"])
    other = ViTForImageClassification(ViTConfig(**{**base.config.to_dict(), "num_labels": 7}))
    other.load_state_dict({k: v for k, v in base.state_dict().items() if "classifier" not in k}, strict=False)
    with pytest.warns(UserWarning, match=r"head of the checkpoint, \[5, 32\], is left out"):
        model = from_official_checkpoint(other, vit.checkpoint(lite=False))
    assert model.peft_config["default"].modules_to_save is None


def test_every_misfit_is_in_one_message_and_the_model_untouched(vit: Golden) -> None:
    checkpoint = vit.checkpoint(lite=False)
    del checkpoint["enc.decoders.1.linear.weight"]
    checkpoint["enc.decoders.7.linear.weight"] = torch.zeros(32, 32)
    checkpoint["enc.blocks.0.gate"] = torch.zeros(1)
    checkpoint["enc.prompt"] = torch.zeros(48)
    checkpoint["enc.norm.weight"] = torch.zeros(48)
    base = vit.base_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match="does not fit") as error:
        from_official_checkpoint(base, checkpoint)
    for part in (
        "missing: enc.decoders.1.linear.weight",
        "unexpected: enc.blocks.0.gate, enc.decoders.7.linear.weight",
        "enc.prompt has shape [48], expected [32]",
        "enc.norm.weight has shape [48], expected [32]",
    ):
        assert part in str(error.value)
    assert_untouched(base, before)


def test_a_decoder_is_expected_for_every_block_of_the_range(llama: Golden) -> None:
    checkpoint = {k: v for k, v in llama.checkpoint(lite=False).items() if "decoders.3" not in k}
    with pytest.raises(ValueError, match=r"missing: model.decoders.3.linear.weight, model.decoders.3.linear2.weight"):
        from_official_checkpoint(llama.base_model(), checkpoint)
    model = from_official_checkpoint(llama.base_model(), checkpoint, feedback_from=3)
    assert torch.isfinite(llama_logits(model, llama)).all()


def test_another_kind_of_model_is_refused(vit: Golden, convnext: Golden, llama: Golden) -> None:
    message = "official checkpoint of a '(vit|convnext|llama)' model, but the base model is a"
    for golden, other in permutations((vit, convnext, llama), 2):
        base = other.base_model()
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            from_official_checkpoint(base, golden.checkpoint(lite=False))
        assert_untouched(base, before)
    with pytest.raises(ValueError, match="not a checkpoint of the official TOAST code"):
        from_official_checkpoint(llama.base_model(), {"layers.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["list", "tensor", "dict of a list", "file of a list", "None"])
def test_what_is_no_state_dict(llama: Golden, tmp_path: Path, kind: str) -> None:
    torch.save([torch.zeros(1)], tmp_path / "checkpoint.pth")
    checkpoint = {
        "list": [torch.zeros(1)],
        "tensor": torch.zeros(1),
        "dict of a list": {"model.prompt": [0.0]},
        "file of a list": tmp_path / "checkpoint.pth",
        "None": None,
    }[kind]
    with pytest.raises(ValueError, match="The official checkpoint is a .*; expected a state dict, a dict of tensors"):
        from_official_checkpoint(llama.base_model(), checkpoint)


def test_another_backbone_is_noticed(llama: Golden) -> None:
    base = llama.base_model()
    torch.nn.init.ones_(base.model.layers[2].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match="differs from the base model in 1 tensors.*model.layers.2.mlp.up_proj"):
        from_official_checkpoint(base, llama.checkpoint(lite=False))


# ------------------------------------------------------------------------------------------------------- ConvNeXt


def test_convnext_config(convnext: Golden) -> None:
    config = from_official_checkpoint(convnext.base_model(), convnext.checkpoint(lite=False)).peft_config["default"]
    assert (config.r, config.double_value_bias, config.normalize_features) == (0, False, True)
    assert (config.backbone_type, config.num_blocks, config.hidden_size) == ("convnext", 4, 96)
    assert config.trainable_parts == ["prompt", "linear1", "linear2"]
    assert config.modules_to_save == ["classifier"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "feedback alone"])
def test_convnext_saved_and_loaded(convnext: Golden, tmp_path: Path, whole: bool) -> None:
    names = ("prompt", "top_down_transform", "decoders") if not whole else ("",)
    checkpoint = {k: v for k, v in convnext.checkpoint(lite=False).items() if any(name in k for name in names)}
    torch.save({"model": checkpoint}, tmp_path / "official.pth")
    from_official_checkpoint(convnext.base_model(), tmp_path / "official.pth").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(convnext.base_model(), tmp_path)
    assert_close(vit_logits(loaded, convnext), convnext.tensors["toast/pass2/logits"])


def test_convnext_backbone_is_compared_tensor_by_tensor(convnext: Golden) -> None:
    checkpoint = convnext.checkpoint(lite=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from_official_checkpoint(convnext.base_model(), checkpoint)
    own = ("enc.prompt", "enc.top_down_transform", "enc.decoders", "head")
    backbone = {name: tensor for name, tensor in checkpoint.items() if not name.startswith(own)}
    assert len(backbone) == len(convnext.base_model().convnext.state_dict()) == 63
    changed = checkpoint | {name: tensor + 1 for name, tensor in backbone.items()}
    with pytest.warns(UserWarning, match="differs from the base model in 63 tensors"):
        from_official_checkpoint(convnext.base_model(), changed)


def test_convnext_misfits_are_in_one_message(convnext: Golden) -> None:
    checkpoint = convnext.checkpoint(lite=False)
    del checkpoint["enc.decoders.1.linear.weight"]
    checkpoint["enc.decoders.0.linear.weight"] = torch.zeros(16, 3, 2, 2)
    checkpoint["enc.decoders.2.linear2.lora_A"] = torch.zeros(4, 64)
    checkpoint["enc.stages.0.0.gamma"] = torch.zeros(8)
    base = convnext.base_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match="does not fit") as error:
        from_official_checkpoint(base, checkpoint)
    for part in (
        "missing: enc.decoders.1.linear.weight",
        "unexpected: enc.decoders.2.linear2.lora_A",
        "enc.decoders.0.linear.weight has shape [16, 3, 2, 2], expected [16, 3, 4, 4]",
        "enc.stages.0.0.gamma has shape [8], expected [16]",
    ):
        assert part in str(error.value)
    assert_untouched(base, before)


def merged(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the official code saves after eval()."""
    checkpoint = dict(checkpoint)
    for name in [name for name in checkpoint if name.endswith("lora_A")]:
        product = checkpoint[name.replace("lora_A", "lora_B")].double() @ checkpoint[name].double()
        weight = name.replace("lora_A", "weight")
        checkpoint[weight] = checkpoint[weight].double() + product / 4
    return checkpoint


def test_merged_lite_checkpoints(vit: Golden) -> None:
    checkpoint = merged(vit.checkpoint(lite=True))
    base = vit.base_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match="lora_merged=True"):
        from_official_checkpoint(base, checkpoint)
    assert_untouched(base, before)
    model = from_official_checkpoint(base, checkpoint, lora_merged=True)
    assert_close(vit_logits(model, vit), vit.tensors["toast-lite/pass2/logits"])


def test_bare_backbones(vit: Golden, llama: Golden) -> None:
    llama_base = llama.base_model().model
    model = from_official_checkpoint(llama_base, llama.checkpoint(lite=False))
    whole = from_official_checkpoint(llama.base_model(), llama.checkpoint(lite=False))
    ids = llama.tensors["input/input_ids"]
    expected = whole.get_base_model().model(ids).last_hidden_state
    assert_same(model(ids).last_hidden_state, expected)


def test_only_the_official_architectures(llama: Golden) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="model.prompt has shape \\[32\\], expected \\[16\\]"):
        from_official_checkpoint(LlamaForCausalLM(config), llama.checkpoint(lite=False))
