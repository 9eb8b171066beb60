"""An adapter is saved and loaded, switched off, and taken away again, and the base model is what it was."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..helpers import assert_same, output_of, steered
from ..zoo import HEADS, ZOO, tiny_model, variant_of, with_variants


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ZOO, ["lite", "middle"]))
def test_saved_and_loaded(model_class: type, variant: str, tmp_path: Path) -> None:
    model = steered(tiny_model(model_class), **variant_of(model_class, variant))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class), tmp_path).eval()
    assert_same(output_of(loaded), output_of(model))
    assert all("feedback_path" in key for key in get_peft_model_state_dict(model))


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ZOO, ["full", "lite", "middle"]))
def test_switched_off_or_taken_away_the_base_model_is_left(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    expected, keys, hooks = output_of(base), list(base.state_dict()), hooks_on(base)
    model = steered(base, **variant_of(model_class, variant))
    steered_output = output_of(model)
    assert not torch.allclose(steered_output, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output_of(model), expected)
    assert torch.equal(output_of(model), steered_output)
    unloaded = model.unload()
    assert unloaded is base and type(unloaded) is model_class
    assert torch.equal(output_of(unloaded), expected)
    assert list(unloaded.state_dict()) == keys and hooks_on(unloaded) == hooks
    assert not any("forward" in module.__dict__ for module in unloaded.modules())
    assert not any(hasattr(module, "feedback_path") for module in unloaded.modules())


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_class", HEADS)
def test_whatever_the_head_an_adapter_comes_and_goes(model_class: type, tmp_path: Path) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    model = steered(base)
    steered_output = output_of(model)
    assert not torch.allclose(steered_output, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output_of(model), expected)
    model.save_pretrained(tmp_path)
    assert_same(output_of(PeftModel.from_pretrained(tiny_model(model_class), tmp_path).eval()), steered_output)
    unloaded = model.unload()
    assert type(unloaded) is model_class and torch.equal(output_of(unloaded), expected)
