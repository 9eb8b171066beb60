"""A channel transform of low rank: `transform_r`."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ..helpers import adapted, gradients, loss_of, output_of, parts_in, paths_of, steered
from ..zoo import CONVNEXT_AND_RESNET, VIT_AND_LLAMA, inputs_of, tiny_model

RANK = 4
CLASSES = [*VIT_AND_LLAMA, *CONVNEXT_AND_RESNET]


@pytest.mark.parametrize("model_class", CLASSES)
def test_starts_as_the_base_model(model_class: type) -> None:
    base = tiny_model(model_class)
    assert torch.equal(output_of(adapted(tiny_model(model_class), transform_r=RANK)), output_of(base))


@pytest.mark.parametrize("model_class", CLASSES)
def test_is_the_identity_plus_a_product(model_class: type) -> None:
    """`x @ transform` with `transform = 1 + A' B'` gives the same as a full adapter with that transform."""
    model = steered(tiny_model(model_class), transform_r=RANK).double()
    full = adapted(tiny_model(model_class).double())
    weights = {name: tensor for name, tensor in model.state_dict().items() if "topdown_" in name}
    for name in [name for name in weights if "transform_A" in name]:
        a, b = weights.pop(name), weights.pop(name.replace("transform_A", "transform_B"))
        assert a.shape[0] == b.shape[1] == RANK
        weights[name.replace("transform_A", "transform")] = torch.eye(a.shape[1]).to(a) + a.T @ b.T
    full.load_state_dict(weights, strict=False)
    base = tiny_model(model_class).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of(base).items()}
    torch.testing.assert_close(output_of(model, inputs), output_of(full, inputs), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(output_of(model, inputs), output_of(base, inputs), atol=1e-3)


@pytest.mark.parametrize("parts", [["transform"], ["prompt", "linear2"]], ids="-".join)
def test_is_trained_and_saved_as_the_transform(parts: list[str], tmp_path: Path) -> None:
    [model_class, *_] = VIT_AND_LLAMA
    model = steered(tiny_model(model_class), r=2, transform_r=RANK, trainable_parts=parts)
    loss_of(model).backward()
    trained = {name.split("topdown_")[1].split(".")[0] for name in gradients(model)}
    expected = {"transform_A", "transform_B"} if parts == ["transform"] else {"prompt", "linear2_A", "linear2_B"}
    assert trained == expected
    model.save_pretrained(tmp_path)
    assert {"transform_A", "transform_B"} < parts_in(tmp_path) and "transform" not in parts_in(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class), tmp_path)
    assert torch.equal(output_of(loaded), output_of(model))


def test_adapter_with_another_transform_cannot_be_started_from(tmp_path: Path) -> None:
    [model_class, *_] = VIT_AND_LLAMA
    steered(tiny_model(model_class)).save_pretrained(tmp_path)
    base = tiny_model(model_class)
    with pytest.raises(ValueError, match=r"\(r=0, transform_r=0, .* cannot start one with r=0, transform_r=4"):
        adapted(base, pretrained_feedback=str(tmp_path), transform_r=RANK)
    assert not paths_of(base)
