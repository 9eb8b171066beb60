"""`explain` with several adapters, and with what an adapter adds in pass 2 besides its feedback."""

import numpy as np
import pytest
import torch
import transformers as tf

from toast_peft import TopDownConfig, explain

from ..helpers import steer, steered
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model
from .test_explain import logits_of


def test_active_adapter_of_several() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification, attn_implementation="eager"))
    inputs = inputs_of(model)
    first = explain(model, inputs)
    model.add_adapter("late", TopDownConfig(feedback_to=2))
    torch.manual_seed(3)
    steer(model, "late")
    np.testing.assert_array_equal(explain(model, inputs).second.logits, first.second.logits)
    model.set_adapter("late")
    late = explain(model, inputs)
    assert sorted(late.feedback_norm) == [2, 3]
    np.testing.assert_array_equal(late.second.logits, logits_of(model, inputs))
    np.testing.assert_array_equal(late.first.logits, first.first.logits)


def test_one_of_the_adapters_that_are_active_together() -> None:
    base = tiny_model(tf.ViTForImageClassification, attn_implementation="eager")
    inputs, of_base = inputs_of(base), logits_of(base, inputs_of(base))
    model = steered(base)
    model.add_adapter("late", TopDownConfig(feedback_to=2, gate="token"))
    torch.manual_seed(3)
    steer(model, "late")
    model.set_adapter("late")
    alone = explain(model, inputs)
    model.base_model.set_adapter(["default", "late"])
    for name, blocks in (("default", [0, 1, 2, 3]), ("late", [2, 3])):
        found = explain(model, inputs, adapter_name=name)
        assert sorted(found.feedback_norm) == blocks and (found.gate is None) == (name == "default")
        np.testing.assert_array_equal(found.second.logits, logits_of(model, inputs))
        np.testing.assert_allclose(found.first.logits, of_base, rtol=1e-5, atol=1e-6)
    for ours, expected in (
        (found.mask, alone.mask),
        *((found.feedback_norm[i], alone.feedback_norm[i]) for i in (2, 3)),
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    for name in (None, "other"):
        with pytest.raises(ValueError, match=rf"`adapter_name={name!r}`, but .*\['default', 'late'\]; name one"):
            explain(model, inputs, adapter_name=name)


def test_a_mixed_batch_is_refused() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    with pytest.raises(ValueError, match="`inputs` has `adapter_names`, .* leave them out"):
        explain(model, inputs_of(model) | {"adapter_names": ["default", None]})


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_pass_1_is_the_base_model_whatever_pass_2_adds(model_class: type) -> None:
    base = tiny_model(model_class, attn_implementation="eager")
    inputs, of_base = inputs_of(base), logits_of(base, inputs_of(base))
    options = {"pass2_target_modules": "all-linear", "pass2_bias": "all", "feedback_to_output": True}
    found = explain(steered(base, **options), inputs)
    np.testing.assert_allclose(found.first.logits, of_base, rtol=1e-4, atol=1e-5)
    assert np.abs(found.second.logits - of_base).max() > 0.1
