"""A prompt from an example: the mean normalised feature, of all that is compared with the prompt."""

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig, prompt_from

from ..helpers import assert_same, counted_block_calls, features_of, output_of, paths_of, state_of, steered
from ..zoo import HIDDEN_SIZE, NUM_BLOCKS, RANGES, VIT_AND_LLAMA, images, inputs_of, tiny_model

VIT = tf.ViTForImageClassification
ANSWERS = [tf.ConvNextForImageClassification, tf.SwinForImageClassification, *VIT_AND_LLAMA]


def mean_direction(features: torch.Tensor) -> torch.Tensor:
    """Shape: [..., k, d] -> [..., d]"""
    return F.normalize(features, dim=-1).mean(-2)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_is_the_mean_normalised_feature_of_each_row(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    inputs = inputs_of(base)
    first, _ = TopDownConfig(**RANGES[variant]).feedback_range(NUM_BLOCKS)
    features = features_of(base, inputs, first)
    model = steered(base, **RANGES[variant])
    assert_same(prompt_from(model, inputs), mean_direction(features).detach())
    assert_same(prompt_from(model, inputs, tokens=[1, 3]), mean_direction(features[:, [1, 3]]).detach())
    of_each = torch.stack([features[0, [1, 1]], features[1, [4, 2]]])
    assert_same(prompt_from(model, inputs, tokens=[[1, 1], [4, 2]]), mean_direction(of_each).detach())
    mask = torch.arange(features.shape[1]) > 1
    for tokens in (mask, mask.expand(2, -1)):
        assert_same(prompt_from(model, inputs, tokens=tokens), mean_direction(features[:, 2:]).detach())


@pytest.mark.parametrize("model_class", ANSWERS)
def test_token_that_is_asked_for_is_open(model_class: type) -> None:
    """It is what the mask compares with, also where that is something else than the features."""
    model = steered(tiny_model(model_class))
    inputs = inputs_of(model)
    request = prompt_from(model, inputs, tokens=[3])
    output_of(model, inputs | {"topdown_prompt": request})
    mask = paths_of(model)[0].state.current.mask.flatten(1)
    assert_same(mask[:, 3], torch.ones(2))
    assert (mask < 0.999).any(dim=1).all()


@pytest.mark.parametrize("normalize_features", [True, False])
def test_passes_the_norm_that_the_features_pass(normalize_features: bool) -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), normalize_features=normalize_features)
    inputs = inputs_of(model)
    request = prompt_from(model, inputs, tokens=[5])
    output_of(model, inputs | {"topdown_prompt": request})
    assert_same(paths_of(model)[0].state.current.mask[:, 5, 0], torch.ones(2))


def test_padding_is_left_out() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    ids = inputs_of(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = prompt_from(model, {"input_ids": ids, "attention_mask": mask})
    alone = prompt_from(model, {"input_ids": ids[1:, :6]})
    assert_same(found[1:], alone)
    with pytest.raises(ValueError, match="asks for padding, which `attention_mask` leaves out"):
        prompt_from(model, {"input_ids": ids, "attention_mask": mask}, tokens=[7])


@pytest.mark.parametrize("training", [False, True])
def test_runs_pass_1_only_and_leaves_the_model_as_it_was(training: bool) -> None:
    model = steered(tiny_model(VIT, hidden_dropout_prob=0.5), feedback_from=2).train(training)
    before = state_of(model)["modules"]
    with counted_block_calls(model) as calls:
        found = prompt_from(model, inputs_of(model))
    assert dict(calls) == {0: 1, 1: 1}
    assert torch.equal(prompt_from(model, inputs_of(model)), found) and not found.requires_grad
    assert state_of(model)["modules"] == before


def test_batch_norms_are_those_of_inference() -> None:
    model = steered(tiny_model(tf.ResNetForImageClassification))
    expected, buffers = prompt_from(model, inputs_of(model)), dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    assert torch.equal(prompt_from(model.train(), inputs_of(model)), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_is_of_the_precision_of_the_mask(dtype: torch.dtype) -> None:
    model = steered(tiny_model(VIT)).to(dtype)
    found = prompt_from(model, {"pixel_values": inputs_of(model)["pixel_values"].to(dtype)})
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# -------------------------------------------------------------------------------------------------------------- boxes


def with_prefix(model_class: type, **options: Any) -> PeftModel:
    return steered(tiny_model(model_class, **options), inputs=images(8, 16))


def test_box_in_an_image_that_is_not_square() -> None:
    model = with_prefix(VIT, image_size=[8, 16])  # 2 x 4 patches of 4 pixels after CLS
    inputs = images(8, 16)
    boxes = {(0, 0, 4, 4): [1], (12, 0, 16, 4): [4], (0, 4, 1, 8): [5], (4, 3, 9, 5): [2, 3, 6, 7], (5, 5, 6, 6): [6]}
    for box, tokens in boxes.items():
        assert torch.equal(prompt_from(model, inputs, boxes=box), prompt_from(model, inputs, tokens=tokens)), box
    found = prompt_from(model, inputs, boxes=torch.tensor([[0, 0, 4, 4], [12, 4, 16, 8]]))
    assert torch.equal(found, prompt_from(model, inputs, tokens=[[1], [8]]))


@pytest.mark.parametrize(
    ("model_class", "num_before"),
    [(VIT, 1), (tf.DeiTForImageClassificationWithTeacher, 2), (tf.SiglipForImageClassification, 0)],
)
def test_tokens_before_the_patches_are_of_no_place(model_class: type, num_before: int) -> None:
    model = steered(tiny_model(model_class))
    inputs = inputs_of(model)
    found = prompt_from(model, inputs, boxes=[4, 4, 8, 8])
    assert torch.equal(found, prompt_from(model, inputs, tokens=[num_before + 3]))
    everything = prompt_from(model, inputs, boxes=[0, 0, 8, 8])
    assert torch.equal(everything, prompt_from(model, inputs, tokens=range(num_before, num_before + 4)))


def test_box_on_a_map_of_tokens() -> None:
    model = steered(tiny_model(tf.ConvNextForImageClassification))
    inputs = images(64, 32)
    rows, columns = output_shape(model, inputs)
    corner = [32 - 32 // columns, 64 - 64 // rows, 32, 64]
    found = prompt_from(model, inputs, boxes=corner)
    assert torch.equal(found, prompt_from(model, inputs, tokens=[rows * columns - 1]))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[-1, -1] = True
    assert torch.equal(found, prompt_from(model, inputs, tokens=mask))


def output_shape(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, ...]:
    output_of(model, inputs)
    return tuple(paths_of(model)[0].state.current.mask.shape[1:3])


# -------------------------------------------------------------------------------------------------- what does not fit

WRONG = {
    "both": ({"tokens": [1], "boxes": [0, 0, 4, 4]}, "Both `tokens` and `boxes`"),
    "position": ({"tokens": [1, 5, -1]}, r"positions \[5, -1\]; expected some of 0 to 4"),
    "type": ({"tokens": [0.5]}, "expected a boolean mask, or positions"),
    "rows": ({"tokens": [[1], [2], [3]]}, r"shape \[3, 1\] .* \[k\] or \[2, k\]"),
    "mask": ({"tokens": torch.ones(4, dtype=torch.bool)}, r"shape \[4\]; expected \[5\] or \[2, 5\]"),
    "no token": ({"tokens": torch.zeros(5, dtype=torch.bool)}, r"from the rows \[0, 1\]: none of their tokens"),
    "box": ({"boxes": [4, 0, 4, 8]}, r"`boxes` is \[4, 0, 4, 8\]; expected left, top, right and bottom"),
    "boxes": ({"boxes": [[0, 0, 4, 4]] * 3}, "one for each of the 2 rows"),
    "outside": ({"boxes": [90, 0, 99, 8]}, r"from the rows \[0, 1\]: none of their tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    model = steered(tiny_model(VIT))
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        prompt_from(model, inputs_of(model), **options)


def test_box_in_a_sentence_is_refused() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    with pytest.raises(ValueError, match="`boxes` needs `pixel_values`"):
        prompt_from(model, inputs_of(model), boxes=[0, 0, 4, 4])


def test_features_that_are_not_finite_are_refused() -> None:
    model = steered(tiny_model(VIT))
    pixels = inputs_of(model)["pixel_values"]
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"from the rows \[1\].* NaN"):
        prompt_from(model, {"pixel_values": pixels})


@pytest.mark.parametrize(("model_class", "number"), [(tf.T5ForConditionalGeneration, 2), (VIT, 0)])
def test_needs_one_stack_with_an_active_adapter(model_class: type, number: int) -> None:
    model = steered(tiny_model(model_class))
    if number == 0:
        model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=f"`model` has {number} stacks of blocks with an active TOAST adapter"):
        prompt_from(model, inputs_of(model))


def test_steers_towards_the_row_it_is_from() -> None:
    """The rows of a class are averaged by the caller, and one prompt is for all rows."""
    model = steered(tiny_model(VIT))
    request = prompt_from(model, inputs_of(model)).mean(0)
    assert request.shape == (HIDDEN_SIZE,)
    with model.prompted(request):
        found = output_of(model)
    assert torch.equal(found, output_of(model, inputs_of(model) | {"topdown_prompt": request}))
