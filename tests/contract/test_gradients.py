"""What is learned: every trained part gets the gradient of the formulas, also with gradient checkpointing."""

import copy

import pytest
from peft import PeftModel

from ..golden.reference import ReferenceModel
from ..helpers import assert_same_gradients, blocks_of, gradients, loss_of, steered, without_randomness
from ..zoo import OTHERS, PLAIN, VARIANTS, ZOO, inputs_of, tiny_model, variant_of, with_variants


@pytest.mark.parametrize(("model_class", "variant"), with_variants(ZOO, VARIANTS))
def test_gradients_reach_every_trained_part(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **variant_of(model_class, variant))
    loss_of(model).backward()
    found = gradients(model)
    assert found and all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize(("model_class", "variant"), with_variants(PLAIN, VARIANTS))
def test_gradients_are_those_of_the_formulas(model_class: type, variant: str) -> None:
    base = tiny_model(model_class).requires_grad_(False)
    model = steered(copy.deepcopy(base), **VARIANTS[variant])
    loss_of(model).backward()
    found = gradients(model)
    model.zero_grad()
    loss_of(ReferenceModel(base, model), inputs_of(base)).backward()
    assert_same_gradients(found, gradients(model))
    assert all("topdown_" in name and gradient.any() for name, gradient in found.items())


def training(model_class: type) -> PeftModel:
    return without_randomness(steered(tiny_model(model_class))).train()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", PLAIN | OTHERS)
def test_checkpointing_gives_the_same_gradients(model_class: type, use_reentrant: bool) -> None:
    """Of the model types that have it; which of their blocks is the model's own decision."""
    if not model_class.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support"):
            training(model_class).gradient_checkpointing_enable()
        return
    plain = training(model_class)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for m in (plain, model):
        loss_of(m).backward()
    assert_same_gradients(gradients(model), gradients(plain))
    if model_class in PLAIN:
        assert all(block.gradient_checkpointing for block in blocks_of(model))
