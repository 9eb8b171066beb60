"""Hierarchical transformers: feedback through stages of different sizes, into windows and smaller maps."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import window_reverse

from toast_peft import TopDownConfig
from toast_peft.core.layers import FeedbackPath

from ..helpers import adapted, assert_same, gradients, loss_of, output_of, paths_of, steered, turn_prompts
from ..zoo import (
    HIERARCHIES,
    NUM_BLOCKS,
    PYRAMID,
    RANGES,
    VARIANTS,
    images,
    inputs_of,
    readable,
    tiny_model,
    with_variants,
)

VALUES = ("v_proj", "value")


def path_of(model: nn.Module) -> FeedbackPath:
    [path] = paths_of(model)
    return path


def value_projections_of(model: nn.Module) -> list[nn.Module]:
    named = model.named_modules()
    return [module for name, module in named if name.endswith(VALUES) and "feedback_path" not in name]


@pytest.mark.parametrize(
    ("model_class", "variant", "size"),
    [(*pair, (36, 44)) for pair in with_variants(HIERARCHIES, VARIANTS)]
    + [(cls, "full", size) for cls in HIERARCHIES for size in ((32, 32), (24, 36))],
    ids=readable,
)
def test_only_values_see_the_feedback(model_class: type, variant: str, size: tuple[int, int]) -> None:
    """The input of each value projection is that of the keys, plus the feedback for just these tokens."""
    inputs = images(*size)
    if "Swin" in model_class.__name__:
        inputs["interpolate_pos_encoding"] = True
    model = steered(tiny_model(model_class), inputs, **VARIANTS[variant])
    feedback: dict[int, torch.Tensor] = {}
    path_of(model).register_forward_hook(lambda path, args, td: feedback.update(td))
    calls: dict[nn.Module, list] = {module: [] for module in model.modules() if isinstance(module, nn.Linear)}
    for module, inputs_of_module in calls.items():
        module.register_forward_hook(partial(record_input, inputs_of_module))
    output_of(model, inputs)
    first, last = TopDownConfig(**VARIANTS[variant]).feedback_range(NUM_BLOCKS)
    assert sorted(feedback) == list(range(last, first))
    for index, value_projection in enumerate(value_projections_of(model)):
        found = calls[value_projection]
        assert len(found) == (index < first) + (index >= last)
        keys = next(c for m, c in calls.items() if m is not value_projection and c and c[0] is found[0])
        added = found[-1] - keys[-1]
        if index in feedback:
            expected = arranged(model, index, feedback[index], added)
            torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)
            assert added.abs().max() > 1e-3
        else:
            assert not added.any()


def record_input(calls: list[torch.Tensor], module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    calls.append(args[0])


def arranged(model: nn.Module, index: int, td: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """What is to be added, from the formulas: see `added`, in windows, back as a map, or shrink the map."""
    block = [m for m in model.modules() if type(m).__name__.endswith(("Layer", "BlockLayer")) and hasattr(m, "mlp")]
    block = block or [m for m in model.modules() if type(m).__name__ == "Swinv2Layer"]
    height, width, channels = td.shape[1:]
    if not hasattr(block[index], "window_size"):
        ratio = PYRAMID["sr_ratios"][[0, 1, 1, 2][index]]
        maps = td.movedim(-1, 1)[:, :, : height // ratio * ratio, : width // ratio * ratio]
        patches = maps.unfold(2, ratio, ratio).unfold(3, ratio, ratio)
        return patches.mean((-1, -2)).flatten(2).transpose(1, 2)
    size, shift = int(block[index].window_size), int(block[index].shift_size)
    padded = [-(-length // size) * size for length in (height, width)]
    found = window_reverse(added.view(-1, size, size, channels), size, *padded)
    found = torch.roll(found, shifts=(shift, shift), dims=(1, 2))
    torch.testing.assert_close(found[:, :height, :width], td, rtol=1e-4, atol=1e-4)
    assert not found[:, height:].any() and not found[:, :, width:].any()
    return added


def test_windows_are_shifted_and_padded_in_these_tests() -> None:
    model = steered(tiny_model(tf.SwinForImageClassification))
    blocks = [module for module in model.modules() if type(module).__name__ == "SwinLayer"]
    assert [int(block.shift_size) for block in blocks] == [0, 2, 0, 2]


@pytest.mark.parametrize("variant", ["full", "early", "middle"])
def test_chain_of_the_formulas(variant: str) -> None:
    """z and td of every block of a Swin, with the way down into a stage as a transposed convolution."""
    model = steered(tiny_model(tf.SwinForImageClassification), **VARIANTS[variant])
    path, seen = path_of(model), {}
    path.register_forward_hook(lambda path, args, td: seen.update(features=args[0], td=td))
    output_of(model, inputs_of(model))
    weights = {name.removeprefix("layers."): p.detach() for name, p in path.named_parameters()}
    x = seen["features"]
    mask = F.cosine_similarity(x, weights["selection.topdown_prompt.default.weight"].expand_as(x), dim=-1).clamp(0, 1)
    z = (mask.unsqueeze(-1) * x) @ weights["selection.topdown_transform.default.weight"]
    first, last = TopDownConfig(**VARIANTS[variant]).feedback_range(NUM_BLOCKS)
    for index in range(first - 1, last - 1, -1):
        name = f"{index}_start" if index == first - 1 < NUM_BLOCKS - 1 else str(index)
        linear1 = weights[f"{name}.topdown_linear1.default.weight"]
        if linear1.shape == (64, 32):  # from the second stage into the first
            kernel = linear1.view(2, 2, 16, 32).permute(3, 2, 0, 1)
            z = F.conv_transpose2d(z.movedim(-1, 1), kernel, stride=2).movedim(1, -1)
        else:
            z = z @ linear1.T
        td = z @ weights[f"{name}.topdown_linear2.default.weight"].T
        torch.testing.assert_close(seen["td"][index], td, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feedback_from", [None, 3, 2])
def test_features_are_after_the_final_norm_where_its_channels_fit(feedback_from: int | None) -> None:
    """That is, from any block of the last stage."""
    model = steered(tiny_model(tf.SwinForImageClassification), feedback_from=feedback_from)
    layer = [module for module in model.modules() if type(module).__name__ == "SwinLayer"][(feedback_from or 4) - 1]
    features, outputs = [], []
    path_of(model).register_forward_pre_hook(lambda path, args: features.append(args[0]))
    layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    output_of(model)
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if feedback_from != 2:
        expected = model.get_base_model().swin.layernorm(expected)
    torch.testing.assert_close(features[0].flatten(1, 2), expected)


@pytest.mark.parametrize(("model_class", "variant"), with_variants(HIERARCHIES, RANGES))
def test_lite_starts_its_chain_as_full_does(model_class: type, variant: str) -> None:
    """What `linear1` of Lite does not store is what `init_weights=True` gives the full one."""
    chains = []
    for rank in (0, 2):
        torch.manual_seed(0)
        model = adapted(tiny_model(model_class), r=rank, **RANGES[variant])
        turn_prompts(model)
        path, found = path_of(model), []
        for layer in path.layers.values():
            layer.register_forward_hook(lambda layer, args, output, found=found: found.append(output[0]))
        output_of(model, inputs_of(model))
        chains.append(found)
    for full, lite in zip(*chains, strict=True):
        torch.testing.assert_close(full, lite)
        assert full.abs().max() > 0


CHECKPOINTED = [cls for cls in HIERARCHIES if cls.supports_gradient_checkpointing]
# The stages of a PVT return a tuple in a tuple, of which reentrant checkpoints lose the graph.
REENTRANT = [cls for cls in CHECKPOINTED if cls is not tf.PvtV2ForImageClassification]


@pytest.mark.parametrize(
    ("model_class", "variant", "use_reentrant"),
    [(*pair, False) for pair in with_variants(CHECKPOINTED, VARIANTS)]
    + [(*pair, True) for pair in with_variants(REENTRANT, VARIANTS)],
)
def test_gradient_checkpointing(model_class: type, variant: str, use_reentrant: bool) -> None:
    plain = steered(tiny_model(model_class), **VARIANTS[variant]).train()
    for module in plain.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
            module.eval()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [loss_of(m, inputs_of(model)) for m in (plain, model)]
    other = loss_of(model, images(24, 24) if "Swin" not in model_class.__name__ else inputs_of(model))  # in between
    for loss in losses:
        loss.backward()
    assert other.isfinite()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointed_stages_with_something_trained_below() -> None:
    model = steered(tiny_model(tf.Swinv2ForImageClassification), modules_to_save=["patch_embeddings"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(NotImplementedError, match="whole stages"):
        model(**inputs_of(model))
    model.gradient_checkpointing_disable()
    loss_of(model, inputs_of(model)).backward()


def test_adapters_that_start_from_different_stages() -> None:
    """The same block is the first of one chain and in the middle of the other."""
    alone = [steered(tiny_model(tf.SwinForImageClassification), **VARIANTS[variant]) for variant in ("full", "early")]
    expected = [output_of(model, inputs_of(model)) for model in alone]
    model = alone[0]
    model.add_adapter("early", TopDownConfig(**VARIANTS["early"]))
    weights = {
        name.replace(".default", ".early"): p for name, p in alone[1].state_dict().items() if "topdown_" in name
    }
    model.load_state_dict(weights, strict=False)
    assert_same(output_of(model, inputs_of(model)), expected[0])
    model.set_adapter("early")
    assert_same(output_of(model, inputs_of(model)), expected[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["v_proj"]}, "`target_modules=.*cannot be used with a hierarchical transformer"),
        ({"layers_to_transform": [0]}, "`layers_to_transform=.*cannot be used"),
        ({"normalize_features": True, "feedback_from": 2}, "final norm fits the output of the last stage"),
        ({"feedback_from": 7}, "does not fit a model with 4 blocks"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model = tiny_model(tf.SwinForImageClassification)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapted(model, **options)
    assert list(model.state_dict()) == names and not hasattr(model, "peft_config")


def test_linear_attention_is_refused() -> None:
    model = adapted(tiny_model(tf.PvtV2ForImageClassification, linear_attention=True))
    with pytest.raises(NotImplementedError, match="49 values for 16 x 16 tokens"):
        model(**images(64, 64))
