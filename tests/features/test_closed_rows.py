"""`skip_closed_rows`: pass 2 only for the rows of a batch of which some token is selected.

`test_shared_cache.py` has what is done with a key-value cache.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from toast_peft import TopDownConfig

from ..helpers import blocks_of, counted_block_calls, first_tensor, loss_of, output_of, paths_of, steered
from ..zoo import NUM_BLOCKS, RANGES, VIT_AND_LLAMA, inputs_of, tiny_model, variant_of, with_variants

TRANSFORMERS = [*VIT_AND_LLAMA, tf.BertForSequenceClassification, tf.GPT2LMHeadModel]
MODELS = [
    *TRANSFORMERS,
    tf.T5ForConditionalGeneration,
    tf.ConvNextForImageClassification,
    tf.ResNetForImageClassification,
    tf.SwinForImageClassification,
]


@contextmanager
def open_only(model: nn.Module, is_open: list[bool]) -> Iterator[None]:
    """Close some rows of the batch for the prompt."""
    factors = torch.tensor(is_open, dtype=torch.float32)

    def close(module: nn.Module, args: tuple, mask: torch.Tensor) -> torch.Tensor:
        return mask * factors.to(mask).view(-1, *[1] * (mask.dim() - 1))

    handles = [path.selection.topdown_prompt["default"].register_forward_hook(close) for path in paths_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_cache(model: nn.Module, **options: Any) -> dict[str, Any]:
    return inputs_of(model, **options) | ({"use_cache": False} if model.can_generate() else {})


@pytest.mark.parametrize(("model_class", "variant"), with_variants(MODELS, RANGES, VIT_AND_LLAMA))
def test_closed_batch_gives_what_the_base_model_gives(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    model = steered(tiny_model(model_class), skip_closed_rows=True, **variant_of(model_class, variant))
    inputs = without_cache(base)
    with open_only(model, [False, False]):
        assert torch.equal(output_of(model, inputs), output_of(base, inputs))
    assert not torch.allclose(output_of(model, inputs), output_of(base, inputs), atol=1e-4)


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_batch_runs_each_block_once(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=True, **RANGES[variant])
    with open_only(model, [False, False]), counted_block_calls(model) as calls:
        output_of(model, without_cache(model))
    assert calls == dict.fromkeys(range(NUM_BLOCKS), 1)


@pytest.mark.parametrize(
    ("variant", "fused", "recorded"),
    [
        *((variant, False, {}) for variant in RANGES),
        ("middle", True, {}),
        ("middle", False, {"output_hidden_states": True}),
        ("middle", False, {"output_attentions": True}),
    ],
)
@pytest.mark.parametrize("model_class", TRANSFORMERS)
def test_open_rows_are_those_of_a_batch_that_runs_twice(
    model_class: type, variant: str, fused: bool, recorded: dict[str, bool]
) -> None:
    models = []
    for skips in (True, False):
        base = tiny_model(model_class).double()
        base.config._attn_implementation = "eager" if "output_attentions" in recorded else "sdpa"
        models.append(steered(base, double_inputs(base), skip_closed_rows=skips, **RANGES[variant]))
        if fused:
            models[-1].fuse_feedback()
    inputs = double_inputs(models[0], batch_size=4) | recorded
    outputs = []
    for model in models:
        with open_only(model, [False, True, False, True]), torch.no_grad():
            outputs.append(model(**inputs))
    assert list(outputs[0]) == list(outputs[1])
    for found, expected in zip(outputs[0].to_tuple(), outputs[1].to_tuple(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def double_inputs(model: nn.Module, **options: Any) -> dict[str, Any]:
    inputs = without_cache(model, **options)
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_only_open_rows_run_twice(model_class: type) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=True)
    sizes: list[int] = []
    blocks_of(model)[0].register_forward_hook(lambda block, args, output: sizes.append(len(first_tensor([output]))))
    with open_only(model, [True, False, False, False]):
        output_of(model, without_cache(model, batch_size=4))
    assert sizes == [4, 4, 1]  # the second one returns what pass 1 has computed
    sizes.clear()
    with open_only(model, [True, True, True, True]):
        output_of(model, without_cache(model, batch_size=4))
    assert sizes == [4, 4]


def test_what_cannot_be_cut_into_rows_runs_twice_as_a_whole() -> None:
    """A mask that all rows share, as an example."""
    outputs = []
    for skips in (True, False):
        model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=skips)
        inputs = without_cache(model) | {
            "attention_mask": torch.zeros(1, 1, 9, 9).triu(1) - 1e9 * torch.ones(9, 9).triu(1)
        }
        with open_only(model, [True, False]):
            outputs.append(output_of(model, inputs))
    assert torch.equal(*outputs)


def test_rows_of_positions_with_axes() -> None:
    """As many rows as axes, of Qwen-VL: [axes, rows, tokens]."""
    base = tiny_model(tf.Qwen2_5_VLForConditionalGeneration).get_decoder()
    ids = inputs_of(tiny_model(tf.LlamaForCausalLM), batch_size=3)["input_ids"]
    of_first_row = torch.stack([step * torch.arange(9) for step in (1, 2, 3)])
    positions = of_first_row.unsqueeze(1) + torch.arange(3).view(1, 3, 1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    outputs = []
    for skips in (True, False):
        model = steered(copy.deepcopy(base).double(), inputs, skip_closed_rows=skips)
        with open_only(model, [True, False, True]):
            outputs.append(output_of(model, inputs))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_training_runs_twice() -> None:
    """A closed prompt gets its gradients from pass 2, which are zero, and not none at all."""
    model = steered(tiny_model(tf.ViTForImageClassification), skip_closed_rows=True)
    with open_only(model, [False, False]):
        loss_of(model).backward()
    [path] = paths_of(model)
    assert path.selection.topdown_prompt["default"].weight.grad is not None


def test_not_together_with_a_bias_that_counts_twice() -> None:
    with pytest.raises(ValueError, match="`skip_closed_rows=True` cannot be used with `double_value_bias=True`"):
        TopDownConfig(skip_closed_rows=True, double_value_bias=True)
