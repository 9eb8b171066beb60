"""The swap test: feedback that is computed from the features of other inputs."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from toast_peft import explain, swapped_features
from toast_peft.core.feedback import token_mask

from ..helpers import adapted, assert_same, feedback_of, output_of, paths_of, steered
from ..zoo import VIT_AND_LLAMA, inputs_of, tiny_model
from .test_gate import gated, inputs_for

FAMILIES = [*VIT_AND_LLAMA, tf.SwinForImageClassification, tf.ConvNextForImageClassification]


def batch_of(model: nn.Module) -> dict[str, Any]:
    return inputs_of(model, batch_size=3) | ({"use_cache": False} if model.base_model.model.can_generate() else {})


@pytest.mark.parametrize("model_class", FAMILIES)
def test_each_row_gets_the_feedback_of_the_next(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = batch_of(model)
    [feedback] = feedback_of(model, inputs)
    plain = output_of(model, inputs)
    of_next = {index: td.roll(-1, 0) for index, td in feedback.items()}
    with paths_of(model)[0].register_forward_hook(lambda *_: of_next):
        expected = output_of(model, inputs)
    with swapped_features(model):
        found = output_of(model, inputs)
    assert_same(found, expected)
    assert not torch.allclose(found, plain)
    assert torch.equal(output_of(model, inputs), plain)  # afterwards it is as it was


def test_mean_of_the_batch() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    inputs, path, seen = batch_of(model), paths_of(model)[0], []
    with path.register_forward_pre_hook(lambda path, args: seen.append(args[0])):
        output_of(model, inputs)
    mean = seen[0].mean(0)
    with swapped_features(model, "mean"):
        output_of(model, inputs)
    mask = token_mask(mean, path.selection.topdown_prompt["default"].weight)
    assert_same(path.state.current.mask, mask.expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_gate_looks_at_the_other_features_and_their_padding(kind: str) -> None:
    model = gated(tf.BertForSequenceClassification, kind)
    inputs = inputs_for(model) | {"attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}
    output_of(model, inputs)
    gate = paths_of(model)[0].state.current.gate
    with swapped_features(model):
        output_of(model, inputs)
    assert_same(paths_of(model)[0].state.current.gate, gate.roll(-1, 0))


def test_explain_has_the_logits_with_other_features() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    inputs = inputs_of(model)
    with swapped_features(model):
        expected = output_of(model, inputs)
    found = explain(model, inputs)
    torch.testing.assert_close(torch.from_numpy(found.swapped_logits), expected, rtol=1e-4, atol=1e-5)
    assert explain(model, inputs_of(model, batch_size=1)).swapped_logits is None


def test_what_cannot_be_swapped_is_refused() -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), gate="sequence")
    with pytest.raises(ValueError, match="`other` is 'none'; expected"), swapped_features(model, "none"):
        pass
    with swapped_features(model):
        with pytest.raises(ValueError, match="is for one row of the batch; expected at least two"):
            output_of(model, inputs_of(model, batch_size=1) | {"use_cache": False})
        with pytest.raises(NotImplementedError, match="with a key-value cache.*set `use_cache=False`"):
            output_of(model, inputs_of(model))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="No TOAST adapter is active"),
        swapped_features(model),
    ):
        pass
