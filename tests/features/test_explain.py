"""What `explain` records, compared with the base model, the adapted model and the formulas."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from toast_peft import Explanation, explain
from toast_peft.explanation.attention import View, attention_rollout, of_class_token, scale_limit
from toast_peft.explanation.grids import covered, images_of, on_grid, patch_grid

from ..golden.reference import reference_feedback, reference_forward
from ..helpers import adapted, assert_same, features_of, output_of, paths_of, state_of, steered
from ..zoo import RANGES, VISION_TOWERS, VIT_AND_LLAMA, images, inputs_of, tiny_model

WITH_ATTENTIONS = [
    tf.ViTForImageClassification,
    tf.LlamaForCausalLM,
    tf.BertForSequenceClassification,
    tf.Gemma3ForCausalLM,
]


def attentions_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Of a model whose attention is eager, as it returns them itself."""
    with torch.no_grad():
        return [attention.float().numpy() for attention in model(**inputs, output_attentions=True).attentions]


def assert_all_equal(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


# ------------------------------------------------------------------------------------------------------ the two passes


@pytest.mark.parametrize("model_class", WITH_ATTENTIONS)
def test_passes_are_the_base_model_and_the_adapted_model(model_class: type) -> None:
    model = steered(tiny_model(model_class, attn_implementation="eager"))
    inputs = inputs_of(model)
    found = explain(model, inputs)
    with model.disable_adapter():
        assert_all_equal(found.first.attentions, attentions_of(model, inputs))
        np.testing.assert_array_equal(found.first.logits, logits_of(model, inputs))
    assert_all_equal(found.second.attentions, attentions_of(model, inputs))
    np.testing.assert_array_equal(found.second.logits, logits_of(model, inputs))
    assert np.abs(found.second.attentions[-1] - found.first.attentions[-1]).max() > 1e-3
    np.testing.assert_array_equal(found.second.attentions[0], found.first.attentions[0])  # what a block attends with


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", [tf.ViTForImageClassification, tf.LlamaForCausalLM])
def test_mask_and_norms_are_those_of_the_formulas(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    model = steered(copy.deepcopy(base), **RANGES[variant])
    inputs = inputs_of(model)
    found = explain(model, inputs)
    config = model.active_peft_config
    with torch.no_grad():
        features = features_of(base, inputs, config.feedback_range(4)[0])
        expected = reference_feedback(base, model, inputs)
    prompt = paths_of(model)[0].selection.topdown_prompt["default"].weight
    mask = torch.cosine_similarity(features, prompt.expand_as(features), dim=-1).clamp(0, 1).detach()
    assert_same(torch.tensor(found.mask), mask)
    assert_same(torch.tensor(found.features), features)
    assert sorted(found.feedback_norm) == sorted(expected)
    for block, td in expected.items():
        assert_same(torch.tensor(found.feedback_norm[block]), td.norm(dim=-1), f"block {block}")
    assert len(found.first.attentions) == len(found.second.attentions) == 4
    with torch.no_grad():
        assert_same(torch.tensor(found.second.logits), reference_forward(base, model, inputs).logits)


def test_it_is_shown_without_its_numbers() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    found = explain(model, inputs_of(model))
    mask, features = list(found.mask.shape), list(found.features.shape)
    blocks, images = "feedback to the blocks [0, 1, 2, 3]", f"images {list(found.images.shape)}"
    assert repr(found) == f"Explanation(mask {mask}, features {features}, {blocks}, {images})"


def test_head_that_was_trained_is_in_both_passes() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification), modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.copy_(torch.tensor([0.0, 100.0]))
    found = explain(model, inputs_of(model))
    assert (found.first.logits[:, 1] > 50).all() and (found.second.logits[:, 1] > 50).all()


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_is_explained_as_not_fused(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = inputs_of(model)
    expected = explain(model, inputs)
    model.fuse_feedback()
    found = explain(model, inputs)
    assert paths_of(model)[0].fused is not None
    assert found.feedback_norm.keys() == expected.feedback_norm.keys()
    for block, norm in expected.feedback_norm.items():
        np.testing.assert_allclose(found.feedback_norm[block], norm, rtol=1e-4)
    np.testing.assert_allclose(found.second.logits, expected.second.logits, rtol=1e-3, atol=1e-4)


def test_bfloat16() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM, attn_implementation="eager")).to(torch.bfloat16)
    found = explain(model, inputs_of(model))
    arrays = [found.mask, found.features, *found.feedback_norm.values(), *found.second.attentions, found.first.logits]
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)
    np.testing.assert_array_equal(found.second.logits, logits_of(model, inputs_of(model)))


def test_closed_rows_have_no_feedback() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True)
    inputs = inputs_of(model)
    with torch.no_grad():
        paths_of(model)[0].selection.topdown_prompt["default"].weight.zero_()
    found = explain(model, inputs)
    assert sorted(found.feedback_norm) == [0, 1, 2, 3]
    assert not any(norm.any() for norm in (found.mask, *found.feedback_norm.values()))
    np.testing.assert_allclose(found.second.logits, found.first.logits, rtol=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_encoder_and_decoder_are_explained_one_by_one(part: str) -> None:
    model = steered(tiny_model(tf.T5ForConditionalGeneration, attn_implementation="eager"))
    inputs = inputs_of(model) | {"decoder_input_ids": inputs_of(model)["input_ids"][:, :4]}
    found = explain(model, inputs, stack=part)
    with torch.no_grad():
        expected = getattr(model(**inputs, output_attentions=True), f"{part}_attentions")
    assert_all_equal(found.second.attentions, [attention.numpy() for attention in expected])
    ids = inputs["input_ids" if part == "encoder" else "decoder_input_ids"]
    assert found.tokens == [[str(i) for i in row] for row in ids.tolist()]
    assert (found.predictions() != []) == (part == "decoder")
    assert np.abs(found.second.logits - found.first.logits).max() > 1e-3


# ----------------------------------------------------------------------------------------------- the model is restored


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.CLIPForImageClassification])
def test_model_is_as_it_was_also_after_an_exception(model_class: type, fails: bool) -> None:
    model = steered(tiny_model(model_class, attn_implementation="sdpa")).train()
    base = model.get_base_model()
    blocks = [module for name, module in base.named_modules() if name.endswith("layers.2")]
    blocks[-1].eval()  # not all are in the same mode
    inputs = inputs_of(base)
    explain(model, inputs)  # transformers adds hooks for recording when it first records, and keeps them
    before = state_of(model)
    configs = [module.config for module in model.modules() if isinstance(module, tf.PreTrainedModel)]
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    if fails:
        with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)):
            explain(model, {name: value[..., :3].float() for name, value in inputs.items()})
    else:
        assert explain(model, inputs).first.attentions is not None
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    now = state_of(model)["modules"]
    assert [key for key, value in before["modules"].items() if now[key] != value] == []
    assert model.training and not blocks[-1].training


def test_sdpa_gives_what_eager_gives() -> None:
    found, expected = (
        explain(model, inputs_of(model))
        for name in ("sdpa", "eager")
        for model in [steered(tiny_model(tf.ViTForImageClassification, attn_implementation=name))]
    )
    assert len(found.second.attentions) == 4
    for one, other in zip(found.second.attentions, expected.second.attentions, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------- tokens and patches


def tiny_dinov2_with_registers() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
    config = tf.Dinov2WithRegistersConfig(**sizes, image_size=8, patch_size=4, num_register_tokens=4)
    torch.manual_seed(0)
    return tf.Dinov2WithRegistersModel(config).eval()


@pytest.mark.parametrize(
    "make, num_prefix, options",
    [
        (lambda: tiny_model(tf.ViTForImageClassification), 1, {"interpolate_pos_encoding": True}),
        (lambda: tiny_model(tf.DeiTForImageClassification), 2, {"interpolate_pos_encoding": True}),
        (lambda: tiny_model(tf.SiglipVisionModel), 0, {"interpolate_pos_encoding": True}),
        (tiny_dinov2_with_registers, 5, {}),
    ],
    ids=["class token", "distillation token", "patches only", "registers"],
)
def test_patches_of_images_that_are_not_square(make: Any, num_prefix: int, options: dict[str, Any]) -> None:
    base = make()
    inputs = images(8, 16) | options
    model = steered(base, inputs=inputs)
    found = explain(model, inputs)
    assert found.grid == (2, 4) and found.mask.shape == (2, num_prefix + 8)
    assert found.images.shape == (2, 8, 16, 3) and found.tokens is None
    np.testing.assert_array_equal(on_grid(found.mask, found.grid)[0, 1, 2], found.mask[0, num_prefix + 4 + 2])
    found.plot().canvas.draw()


def test_patch_that_changes_is_where_it_was_changed() -> None:
    """The patch embedding of one patch is that of its pixels alone."""
    model = steered(tiny_model(tf.ViTForImageClassification), inputs=images(8, 8))
    inputs = images(8, 16) | {"interpolate_pos_encoding": True}
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:, :, 4:8, 8:12] += 3
    with torch.no_grad():
        embed = model.get_base_model().vit.embeddings
        difference = (embed(**changed) - embed(**inputs)).norm(dim=-1).numpy()
    assert np.argwhere(on_grid(difference, (2, 4))[0] > 1e-3).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "model_class", [tf.ConvNextForImageClassification, tf.ResNetForImageClassification, tf.SwinForImageClassification]
)
def test_stages_give_maps(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = inputs_of(model)
    found = explain(model, inputs)
    tds = {}
    with paths_of(model)[0].register_forward_hook(lambda path, args, td: tds.update(td)):
        np.testing.assert_allclose(found.second.logits, output_of(model, inputs).numpy(), rtol=1e-5)
    with model.disable_adapter():
        np.testing.assert_allclose(found.first.logits, output_of(model, inputs).numpy(), rtol=1e-4, atol=1e-5)
    assert found.first.attentions is None and found.mask.ndim == 3 and found.grid == found.mask.shape[1:]
    channels = -1 if model_class is tf.SwinForImageClassification else 1
    assert sorted(found.feedback_norm) == sorted(tds)
    for index, td in tds.items():
        np.testing.assert_allclose(found.feedback_norm[index], td.norm(dim=channels).numpy(), rtol=1e-5)
    for block in found.feedback_norm:
        found.plot(block=block).canvas.draw()


@pytest.mark.parametrize(
    "patch, image_size, grid, expected",
    [
        ((16, 16), (224, 224), (14, 14), (224, 224)),
        ((16, 16), (230, 250), (14, 15), (224, 240)),  # the last pixels are of no patch
        ((16, 8), (32, 32), (2, 4), (32, 32)),
        (None, (200, 300), (50, 75), (200, 300)),
        (None, (200, 300), (25, 38), (200, 304)),  # Swin fills up before it makes one place of four
        (None, (200, 300), (7, 10), (224, 320)),
        (None, (100, 70), (3, 2), (96, 64)),  # ConvNeXt cuts off
        (None, (60, 60), (20, 20), (60, 60)),  # three pixels a place: no stage halves to that
    ],
)
def test_what_a_map_covers_of_the_image(patch: Any, image_size: Any, grid: Any, expected: tuple[int, int]) -> None:
    assert covered(patch, image_size, grid) == expected


@pytest.mark.parametrize(
    "model_class, of_mask, of_norms",
    [
        (tf.SwinForImageClassification, 4, [2, 2, 4, 4]),
        (tf.SegformerForSemanticSegmentation, 16, [4, 8, 8, 16]),
        (tf.ConvNextForImageClassification, 32, [1, 4, 8, 16]),  # what enters a stage; the first one is the image
        (tf.ResNetForImageClassification, 32, [1, 4, 8, 16]),
        (tf.ViTForImageClassification, 4, [4, 4, 4, 4]),
    ],
)
def test_each_place_of_a_map_covers_the_pixels_that_it_is_made_of(
    model_class: type, of_mask: int, of_norms: list[int]
) -> None:
    interpolates = model_class in (tf.SwinForImageClassification, tf.ViTForImageClassification)
    inputs = images(98, 142) | ({"interpolate_pos_encoding": True} if interpolates else {})
    found = explain(steered(tiny_model(model_class), inputs), inputs)
    norms = [norm.shape[1:] if norm.ndim == 3 else found.grid for norm in found.feedback_norm.values()]
    for size, side in zip([found.grid, *norms], [of_mask, *of_norms], strict=True):
        assert found.extent(size) == (size[0] * side, size[1] * side)


def test_padding_and_names_of_tokens() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"w{ids[0]}"

    model = steered(tiny_model(tf.LlamaForCausalLM))
    inputs = inputs_of(model) | {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :4] = 0
    found = explain(model, inputs, Tokenizer())
    assert found.tokens[0][0] == f"w{inputs['input_ids'][0, 0]}" and found.is_padding.sum() == 4
    [best, *_] = found.predictions(1)
    probabilities = np.exp(found.second.logits[1, -1]) / np.exp(found.second.logits[1, -1]).sum()
    assert best.label == f"w{probabilities.argmax()}" and best.second == pytest.approx(probabilities.max(), rel=1e-4)


def test_images_are_as_before_the_processor() -> None:
    pixels = np.random.default_rng(0).uniform(size=(2, 5, 7, 3)).astype(np.float32)
    processor = tf.ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    normalised = (pixels - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(images_of(normalised.transpose(0, 3, 1, 2), processor), pixels, atol=1e-6)
    [one, other] = images_of(normalised.transpose(0, 3, 1, 2))
    assert one.min() == other.min() == 0 and one.max() == other.max() == 1
    assert images_of(normalised.transpose(0, 3, 1, 2)[:, :1]).shape == (2, 5, 7, 3)


def test_tokens_that_are_no_patches_have_no_grid() -> None:
    config = tf.ViTConfig(patch_size=4)
    assert patch_grid(config, (8, 8), 5) == (2, 2)
    assert patch_grid(config, (8, 8), 3) is None and patch_grid(config, (8, 8), 20) is None
    assert patch_grid(tf.LlamaConfig(), (8, 8), 5) is None and patch_grid(None, (8, 8), 5) is None


# ------------------------------------------------------------------------------------------------------- the attention


def test_rollout_is_that_by_hand() -> None:
    first = np.array([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.1, 0.9]]]], np.float32)
    second = np.array([[[[0.2, 0.8], [0.6, 0.4]]]], np.float32)
    # The means of the heads are [[1, 0], [0.3, 0.7]] and `second[0]`; with the residual connection
    # [[1, 0], [0.15, 0.85]] and [[0.6, 0.4], [0.3, 0.7]].
    expected = [[0.6 * 1 + 0.4 * 0.15, 0.4 * 0.85], [0.3 * 1 + 0.7 * 0.15, 0.7 * 0.85]]
    np.testing.assert_allclose(attention_rollout([first, second])[0], expected, rtol=1e-6)
    np.testing.assert_allclose(View(0, rollout=True).matrix([first, second])[0], [[1, 0], [0.15, 0.85]], rtol=1e-6)


def test_query_is_the_class_token_or_the_mean() -> None:
    matrix = np.random.default_rng(0).uniform(size=(2, 5, 5))
    np.testing.assert_array_equal(of_class_token(matrix, 4), matrix[:, 0])
    np.testing.assert_array_equal(of_class_token(matrix, 5), matrix.mean(1))


def test_sinks_are_clipped_or_kept() -> None:
    values = np.ones(100)
    values[7] = 50
    assert scale_limit(values, "clip") == 1 and scale_limit(values, "keep") == 50
    assert scale_limit(np.eye(30)[0], "clip") == 1 and scale_limit(np.zeros(3), "clip") == 1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": 7}, "`block=7`, but there are 4 blocks"),
        ({"head": 4}, "`head=4`, but block -1 has 4 heads"),
        ({"head": 0, "rollout": True}, "a rollout is of the mean of all heads"),
        ({"query": 5}, "`query=5`, but there are 5 tokens"),
        ({"rows": [0, 2]}, "the batch has the rows 0 to 1"),
        ({"rows": []}, "the batch has the rows 0 to 1"),
        ({"sinks": "hide"}, "`sinks='hide'`"),
    ],
)
def test_what_there_is_not_cannot_be_drawn(vit: Explanation, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit.plot(**options)


@pytest.fixture(scope="module")
def vit() -> Explanation:
    model = steered(tiny_model(tf.ViTForImageClassification))
    return explain(model, inputs_of(model))


def test_stage_without_feedback_cannot_be_drawn() -> None:
    model = steered(tiny_model(tf.ConvNextForImageClassification), feedback_to=2)
    with pytest.raises(ValueError, match=r"`block=0`, but those with feedback are \[2, 3\]"):
        explain(model, inputs_of(model)).plot(block=0)


def test_vision_tower_of_llava_and_not_of_qwen() -> None:
    llava, qwen = (
        steered(tiny_model(model_class), target_modules=VISION_TOWERS[model_class])
        for model_class in (tf.LlavaForConditionalGeneration, tf.Qwen2_5_VLForConditionalGeneration)
    )
    found = explain(llava, inputs_of(llava))
    assert found.grid == (2, 2) and found.tokens is None and found.first.attentions[0].shape == (1, 4, 5, 5)
    with pytest.raises(
        NotImplementedError, match="one sequence without a batch.*Put the adapter on the language model"
    ):
        explain(qwen, inputs_of(qwen))
    language_model = steered(tiny_model(tf.Qwen2_5_VLForConditionalGeneration))
    found = explain(language_model, inputs_of(language_model))
    n = inputs_of(language_model)["input_ids"].shape[1]
    assert found.mask.shape[1] == n and found.images is None and len(found.tokens[0]) == n
    assert found.second.attentions[-1].shape[2:] == (n, n)


def test_quantized_base_model(tmp_path: Path) -> None:
    tiny_model(tf.ViTForImageClassification, hidden_size=64).save_pretrained(tmp_path)
    quantization = pytest.importorskip("torchao.quantization")  # not among what the oldest versions are tested with
    config = tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = tf.ViTForImageClassification.from_pretrained(
        tmp_path, quantization_config=config, attn_implementation="eager"
    )
    model = steered(base.eval(), inputs=images(8, 8))
    found = explain(model, images(8, 8))
    assert_all_equal(found.second.attentions, attentions_of(model, images(8, 8)))
    with model.disable_adapter():
        assert_all_equal(found.first.attentions, attentions_of(model, images(8, 8)))


def test_models_and_inputs_that_cannot_be_explained() -> None:
    base = tiny_model(tf.LlamaForCausalLM)
    inputs = inputs_of(base)
    with pytest.raises(ValueError, match="No TOAST adapter is active"):
        explain(base, inputs)
    model = adapted(base)
    with model.disable_adapter(), pytest.raises(ValueError, match="No TOAST adapter is active"):
        explain(model, inputs)
    with pytest.raises(TypeError, match="`inputs` is a Tensor, expected a dict"):
        explain(model, inputs["input_ids"])
    with pytest.raises(ValueError, match="`inputs` has the cache `past_key_values`"):
        explain(model, inputs | {"past_key_values": tf.DynamicCache()})
    with pytest.raises(ValueError, match=r"`stack='encoder'`, but the stacks with feedback are \['model'\]"):
        explain(model, inputs, stack="encoder")
    t5 = adapted(tiny_model(tf.T5ForConditionalGeneration))
    with pytest.raises(ValueError, match=r"`stack=None`, but the stacks with feedback are \['encoder', 'decoder'\]"):
        explain(t5, inputs_of(t5))
