"""What an adapter computes: the formulas, feedback for the values only, and only the blocks that are needed."""

import copy
from functools import partial

import pytest
import torch
import transformers as tf
from torch import nn

from ..families.test_transformers import FUSED
from ..golden.reference import reference_forward
from ..helpers import adapted, counted_block_calls, feedback_of, output_of, paths_of, steered
from ..zoo import NUM_BLOCKS, OTHERS, PLAIN, RANGES, VARIANTS, inputs_of, tiny_model, variant_of, with_variants

LINEAR = (nn.Linear, tf.pytorch_utils.Conv1D)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(PLAIN, VARIANTS))
def test_output_is_that_of_the_formulas(model_class: type, variant: str) -> None:
    base = tiny_model(model_class).double()
    model = steered(copy.deepcopy(base).float(), **VARIANTS[variant]).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of(base).items()}
    with torch.no_grad():
        expected = reference_forward(base, model, inputs)[0]
    assert not torch.allclose(expected, output_of(base, inputs), atol=1e-2)
    torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(PLAIN | OTHERS, RANGES))
def test_values_see_the_feedback_and_queries_and_keys_do_not(model_class: type, variant: str) -> None:
    """In pass 2 what a value projection gets is what its neighbours with the same input get, plus td."""
    model = steered(tiny_model(model_class), **variant_of(model_class, variant))
    calls: dict[nn.Module, list] = {}
    for module in model.modules():
        if isinstance(module, LINEAR):
            calls[module] = []
            module.register_forward_hook(partial(record_input, calls[module]))
    for path, feedback in zip(paths_of(model), feedback_of(model), strict=True):
        assert feedback
        for index, td in feedback.items():
            value_projection = path.layers[str(index)].value_projection
            # A fused one runs on h + td and on h.
            first, second = calls[value_projection][0], calls[value_projection][-1 - (model_class in FUSED)]
            assert second.shape == td.shape and td.abs().max() > 0.01
            inputs = [calls[value_projection][-1]] if model_class in FUSED else []
            neighbours = [m for m in calls if m is not value_projection and calls[m] and calls[m][0] is first]
            # Some project other things as well, of another shape (DeBERTa its relative positions).
            inputs += [[x for x in calls[m] if x.shape == td.shape][-1] for m in neighbours]
            assert inputs
            for hidden_states in inputs:
                torch.testing.assert_close(second, hidden_states + td)


def record_input(calls: list[torch.Tensor], module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    calls.append(args[0])


@pytest.mark.parametrize(("model_class", "variant"), with_variants(PLAIN, RANGES))
def test_blocks_that_are_not_needed_are_skipped(model_class: type, variant: str) -> None:
    model = adapted(tiny_model(model_class), **RANGES[variant])
    first, last = RANGES[variant].get("feedback_from", NUM_BLOCKS), RANGES[variant].get("feedback_to", 0)
    with counted_block_calls(model) as calls:
        output_of(model)
    assert calls == {index: (index < first) + (index >= last) for index in range(NUM_BLOCKS)}
    assert calls.total() == first + NUM_BLOCKS - last


@pytest.mark.parametrize(
    ("model_class", "variant", "by_config"),
    [(*pair, False) for pair in with_variants(PLAIN, RANGES)] + [(cls, "middle", True) for cls in PLAIN],
)
def test_recorded_outputs_are_those_of_the_second_pass(model_class: type, variant: str, by_config: bool) -> None:
    recorded = {"output_hidden_states": True, "output_attentions": True}
    base = tiny_model(model_class, attn_implementation="eager")
    model = steered(copy.deepcopy(base), **RANGES[variant])
    with torch.no_grad():
        expected = reference_forward(base, model, inputs_of(base), **recorded)
        if by_config:
            for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
                for name in recorded:
                    setattr(config, name, True)
            output = model(**inputs_of(model))
        else:
            output = model(**inputs_of(model), **recorded)
    torch.testing.assert_close(output[0], expected[0], rtol=1e-4, atol=1e-4)
    for name, count in (("hidden_states", NUM_BLOCKS + 1), ("attentions", NUM_BLOCKS)):
        assert len(output[name]) == len(expected[name]) == count
        torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_class", PLAIN)
def test_forward_leaves_no_state(model_class: type) -> None:
    """Other batches in between change nothing, neither in evaluation nor in training."""
    model = steered(tiny_model(model_class))
    other = {name: x[:1] for name, x in inputs_of(model).items()}
    for training in (False, True):
        model.train(training)
        expected = output_of(model)
        assert output_of(model, other).shape[0] == 1
        assert torch.equal(output_of(model), expected)
