"""A new adapter: it is found where it belongs, changes nothing until it is trained, and trains nothing but itself."""

import pytest
import torch
from torch import nn

from toast_peft.families.convnets import CONVNETS
from toast_peft.families.hierarchies import HIERARCHIES
from toast_peft.families.model_types import ARCHITECTURES

from ..helpers import adapted, output_of, paths_of, without_randomness
from ..zoo import HEADS, VARIANTS, VISION_TOWERS, ZOO, inputs_of, tiny_model, variant_of, with_variants


def test_every_supported_type_is_in_the_zoo() -> None:
    adapters = [adapted(tiny_model(model_class)) for model_class in ZOO]
    adapters += [adapted(tiny_model(cls), target_modules=names) for cls, names in VISION_TOWERS.items()]
    types = {model.peft_config["default"].backbone_type for model in adapters}
    assert types >= {*ARCHITECTURES, *CONVNETS, *HIERARCHIES}


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ZOO, VARIANTS) + [(head, "full") for head in HEADS])
def test_starts_as_the_base_model_in_evaluation_and_in_training(model_class: type, variant: str) -> None:
    """Bit for bit; also the running statistics of batch norms."""
    base = without_randomness(tiny_model(model_class))
    expected = outputs_and_buffers(base)
    model = adapted(base, **variant_of(model_class, variant))
    for found, wanted in zip(outputs_and_buffers(model), expected, strict=True):
        assert torch.equal(found, wanted)
    assert all(parameter.requires_grad == ("topdown_" in name) for name, parameter in model.named_parameters())


def outputs_and_buffers(model: nn.Module) -> list[torch.Tensor]:
    """The outputs in both modes, then what the training mode has made of the buffers, which are put back."""
    inputs = inputs_of(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found = [output_of(model.eval(), inputs), output_of(model.train(), inputs), output_of(model, inputs)]
    found += [buffer.clone() for buffer, _ in buffers]
    for buffer, before in buffers:
        buffer.copy_(before)
    return found


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("model_class", ZOO)
def test_official_start_changes_the_output(model_class: type, r: int) -> None:
    base = tiny_model(model_class)
    expected = output_of(base)
    torch.manual_seed(1)  # with some random prompts no token of so short an input is open
    assert not torch.equal(output_of(adapted(base, r=r, init_weights=False)), expected)


@pytest.mark.parametrize("model_class", ZOO)
def test_every_block_gets_feedback_and_no_module_is_replaced(model_class: type) -> None:
    base = tiny_model(model_class)
    before = dict(base.named_modules())
    model = adapted(base)
    after = dict(model.get_base_model().named_modules())
    assert all(after[name] is module for name, module in before.items())
    assert all("feedback_path" in name for name in after.keys() - before.keys())
    num_blocks = model.peft_config["default"].num_blocks
    depths = num_blocks if isinstance(num_blocks, list) else [num_blocks]
    assert [list(map(int, path.layers)) for path in paths_of(model)] == [list(range(depth)) for depth in depths]
