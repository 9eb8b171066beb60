"""The attention of hierarchical transformers on their maps, compared with a computation by hand."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from toast_peft import explain
from toast_peft.explanation.received import received_in_windows

from ..helpers import assert_same, paths_of, steered
from ..zoo import HIERARCHIES, NUM_BLOCKS, PYRAMID, RANGES, SWIN, images, tiny_model

SIZES = [(32, 32), (36, 44)]  # of which the second one fills up the windows, in height and in width
WINDOWS = [tf.SwinForImageClassification, tf.Swinv2ForImageClassification]


def inputs_for(model_class: type, size: tuple[int, int]) -> dict[str, Any]:
    options = {"interpolate_pos_encoding": True} if model_class in WINDOWS else {}
    return images(*size) | options


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in paths_of(model)[0].passes.block_forwards]


def attention_of(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What the eager attention of each block gives in the last pass, asked for as transformers is."""
    found: dict[int, torch.Tensor] = {}
    hooks = []
    for index, block in enumerate(blocks_of(model)):
        inside = getattr(block.attention, "self", block.attention)

        def keep(module: nn.Module, args: tuple, output: Any, index: int = index) -> None:
            if len(output) > 1:  # pass 1 is not recorded
                found[index] = output[1]

        hooks.append(inside.register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return [found[index] for index in sorted(found)]


def put_together(block: Any, attention: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The windows as transformers cuts them and puts them together, one after the other. Returns [b, heads, h, w]"""
    module = importlib.import_module(type(block).__module__)
    (height, width), window, shift = size, block.window_size, block.shift_size
    is_place = F.pad(torch.ones(1, height, width, 1), (0, 0, 0, -width % window, 0, -height % window))
    _, padded_height, padded_width, _ = is_place.shape
    windows = module.window_partition(is_place.roll((-shift, -shift), dims=(1, 2)), window).flatten(1)
    received = torch.zeros(len(attention), attention.shape[1], window**2)
    for index, of_window in enumerate(attention):
        for query in windows[index % len(windows)].nonzero().flatten():
            received[index] += of_window[:, query] / window**2
    received = received.transpose(1, 2).reshape(len(attention), window, window, -1)
    whole = module.window_reverse(received, window, padded_height, padded_width).roll((shift, shift), dims=(1, 2))
    return whole[:, :height, :width].permute(0, 3, 1, 2)


@pytest.mark.parametrize("size, variant", list(zip(SIZES, ("full", "middle"), strict=True)), ids=str)
@pytest.mark.parametrize("model_class", WINDOWS)
def test_windows_are_put_together_as_transformers_does(model_class: type, size: tuple[int, int], variant: str) -> None:
    inputs = inputs_for(model_class, size)
    model = steered(tiny_model(model_class, attn_implementation="eager"), inputs, **RANGES[variant])
    found = explain(model, inputs)
    blocks = blocks_of(model)
    assert [block.shift_size > 0 for block in blocks] == [False, True, False, True]
    sizes = [(size[0] // cell, size[1] // cell) for cell in (2, 2, 4, 4)]
    for of_pass, attentions in (
        (found.second, attention_of(model, inputs)),
        (found.first, attention_of_base(model, inputs)),
    ):
        assert of_pass.attentions is None and len(of_pass.received) == 4
        for block, attention, received, of_map in zip(blocks, attentions, of_pass.received, sizes, strict=True):
            assert received.shape[2:] == of_map
            assert_same(torch.tensor(received), put_together(block, attention, of_map))
    assert np.abs(found.second.received[-1] - found.first.received[-1]).max() > 1e-3
    np.testing.assert_array_equal(found.second.received[0], found.first.received[0])  # what a block attends with


def attention_of_base(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with model.disable_adapter():
        return attention_of(model, inputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("model_class", [c for c in HIERARCHIES if c not in WINDOWS])
def test_patches_of_keys_receive_the_mean_of_all_queries(model_class: type, size: tuple[int, int]) -> None:
    inputs = inputs_for(model_class, size)
    model = steered(tiny_model(model_class, attn_implementation="eager"), inputs)
    found = explain(model, inputs)
    for attention, received in zip(attention_of(model, inputs), found.second.received, strict=True):
        np.testing.assert_array_equal(received.reshape(*received.shape[:2], -1), attention.mean(2).numpy())
        np.testing.assert_allclose(received.sum((2, 3)), 1, rtol=1e-5)
    ratios = [
        ratio for ratio, depth in zip(PYRAMID["sr_ratios"], PYRAMID["depths"], strict=True) for _ in range(depth)
    ]
    maps = [norm.shape[1:] for norm in found.feedback_norm.values()]
    expected = [(height // ratio, width // ratio) for ratio, (height, width) in zip(ratios, maps, strict=True)]
    assert [received.shape[2:] for received in found.second.received] == expected


def test_keys_that_are_no_patches_are_not_put_on_the_map() -> None:
    """Linear attention pools all maps to 7 x 7 keys, and the first stage has 14 x 14 patches of two."""
    model = tiny_model(tf.PvtV2ForImageClassification, linear_attention=True, sr_ratios=[2, 2, 1])
    model = steered(model, images(112, 112), feedback_to=NUM_BLOCKS - 1)
    found = explain(model, images(112, 112))
    assert found.second.received is None and found.feedback_norm[NUM_BLOCKS - 1].shape == (2, 7, 7)
    found.plot().canvas.draw()


def test_attention_to_one_place_is_where_it_is() -> None:
    """One window of a shifted block, all of whose queries look at its first token: row 2, column 2 of the map."""

    class Block:
        window_size, shift_size = 4, 2

    attention = torch.zeros(4, 1, 16, 16)
    attention[0, :, :, 0] = 1
    received = received_in_windows(Block(), attention, (8, 8))
    expected = torch.zeros(1, 1, 8, 8)
    expected[0, 0, 2, 2] = 1
    assert torch.equal(received, expected)
    padded = received_in_windows(
        Block(), attention.roll(3, 0), (7, 8)
    )  # the last window, two of whose rows wrap around
    assert padded[0, 0, 6, 6] == 12 / 16 and padded.sum() == 12 / 16


def test_even_attention_is_even_on_the_map() -> None:
    class Block:
        window_size, shift_size = 4, 2

    attention = torch.full((4, 1, 16, 16), 1 / 16)
    assert torch.equal(received_in_windows(Block(), attention, (8, 8)), torch.full((1, 1, 8, 8), 1 / 16))


def test_figures_have_the_maps() -> None:
    inputs = inputs_for(tf.SwinForImageClassification, (36, 44))
    found = explain(steered(tiny_model(tf.SwinForImageClassification), inputs), inputs)
    figure = found.plot([1], block=1, head=1)
    _, first, second, change = (
        np.asarray(axis.images[1].get_array()) for axis in figure.axes if len(axis.images) == 2
    )
    np.testing.assert_array_equal(first, found.first.received[1][1, 1])
    np.testing.assert_array_equal(second, found.second.received[1][1, 1])
    np.testing.assert_array_equal(change, second - first)
    figure.canvas.draw()
    for options in ({"query": 3}, {"rollout": True}):
        with pytest.raises(ValueError, match="no attention between all tokens of its map; leave both out"):
            found.plot(**options)
    with pytest.raises(ValueError, match="`head=2`, but block 0 has 2 heads"):
        found.plot(block=0, head=2)


def test_model_is_as_it_was() -> None:
    inputs = inputs_for(tf.Swinv2ForImageClassification, (32, 32))
    model = steered(tiny_model(tf.Swinv2ForImageClassification), inputs)
    explain(model, inputs)
    for block in blocks_of(model):
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in (block, block.attention)]
        assert hooks == [0, 0]
    assert SWIN["depths"] == [2, 2]
