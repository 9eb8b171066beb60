"""Adapters and prompts of rows, where blocks get more than the rows that the model is called with: images, choices."""

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from toast_peft import TopDownConfig
from toast_peft.core.batch_rows import BatchRows, repeats_of

from ..helpers import assert_same, output_of, steer, steered
from ..zoo import HIDDEN_SIZE, inputs_of, tiny_model

Batch = dict[str, torch.Tensor]
NAMES = ["default", "other"]
IMAGE, TOKENS = 39, 4  # the token of an image, and how many of it an image has
TOWER = {"target_modules": r".*vision_tower.*v_proj"}
of_unequal_rows = pytest.mark.parametrize("numbers", [(3, 1), (2, 1), (2, 0)], ids=str)


def batch_of(*numbers: int) -> Batch:
    """Texts with so many images. They are padded on the left, as generation wants it."""
    texts = [[1, *[IMAGE] * TOKENS * number, 5, 6] for number in numbers]
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    images = torch.randn(sum(numbers), 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": images}


def row_of(batch: Batch, row: int, num_images: int) -> Batch:
    """One of the rows, where each has as many images."""
    images = batch["pixel_values"][row * num_images : (row + 1) * num_images]
    return {name: x[row : row + 1] for name, x in batch.items()} | {"pixel_values": images}


def llava(**options: Any) -> PeftModel:
    """It has feedback in its vision tower."""
    return steered(tiny_model(tf.LlavaForConditionalGeneration).double(), batch_of(1, 1), **TOWER | options)


def with_two_adapters(model: PeftModel, inputs: Batch, **options: Any) -> PeftModel:
    model.add_adapter("other", TopDownConfig(init_weights=False, init_prompt="random", **options))
    steer(model, "other", inputs)
    return model.eval()


def first_logits(model: PeftModel, batch: Batch, **options: Any) -> torch.Tensor:
    """Those of the first new token."""
    options |= {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, **options).logits[0]


def assert_rows_are_those_alone(model: PeftModel, found: torch.Tensor, rows: list[Batch]) -> None:
    expected = []
    for name, row in zip(NAMES, rows, strict=True):
        model.set_adapter(name)
        expected.append(output_of(model, row))
    assert_same(found, torch.cat(expected))
    assert not torch.allclose(expected[1], output_of(model, rows[0]))


@pytest.mark.parametrize("number", [1, 2])
def test_adapters_of_rows_with_as_many_images(number: int) -> None:
    batch = batch_of(number, number)
    model = with_two_adapters(llava(), batch, **TOWER)
    found = output_of(model, batch | {"adapter_names": NAMES})
    assert_rows_are_those_alone(model, found, [row_of(batch, row, number) for row in range(2)])


@of_unequal_rows
def test_adapters_of_rows_with_other_numbers_of_images_are_refused(numbers: tuple[int, int]) -> None:
    batch = batch_of(*numbers)
    model = with_two_adapters(llava(), batch_of(1, 1), **TOWER)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="2 names .* sequences for the 2 rows .* Give each row as many"):
            call(**batch, adapter_names=NAMES)


def test_adapters_of_texts_with_other_numbers_of_images() -> None:
    """It is known which row is which in the blocks of the language model."""
    text = {"target_modules": r".*language_model.*v_proj"}
    batch = batch_of(3, 1)
    model = with_two_adapters(llava(**text), batch, **text)
    found = output_of(model, batch | {"adapter_names": NAMES})
    for row, name in enumerate(NAMES):
        model.set_adapter(name)
        assert_same(found[row], output_of(model, batch)[row])


def test_adapters_of_rows_with_several_choices() -> None:
    config = tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ids = torch.randint(9, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    model = steered(tf.BertForMultipleChoice(config).double().eval(), {"input_ids": ids})
    with_two_adapters(model, {"input_ids": ids})
    found = output_of(model, {"input_ids": ids, "adapter_names": NAMES})
    assert_rows_are_those_alone(model, found, [{"input_ids": ids[row : row + 1]} for row in range(2)])


def prompts(number: int = 2) -> torch.Tensor:
    return torch.randn(number, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_prompts_of_rows_in_generation(options: dict[str, int]) -> None:
    batch, model = batch_of(2, 2), llava()
    found = first_logits(model, batch, topdown_prompt=prompts(), **options)
    beams = len(found) // 2
    for row, prompt in enumerate(prompts()):
        alone = first_logits(model, row_of(batch, row, 2), topdown_prompt=prompt)
        assert_same(found[row * beams], alone[0])


@of_unequal_rows
def test_prompts_of_rows_with_other_numbers_of_images_are_refused(numbers: tuple[int, int]) -> None:
    batch, model = batch_of(*numbers), llava()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="has 2 rows .* sequences for the 2 rows .* Give each row as many"):
            call(**batch, topdown_prompt=prompts())


def test_prompts_of_images() -> None:
    """As many as the tower has images, which are not the rows of the text."""
    batch, model = batch_of(3, 1), llava()
    one = prompts(1)[0]
    found = output_of(model, batch | {"topdown_prompt": one.repeat(4, 1)})
    assert_same(found, output_of(model, batch | {"topdown_prompt": one}))


def test_prompts_in_a_block_are_not_repeated_outside_of_generation() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM))
    inputs = inputs_of(model, batch_size=4)
    with model.prompted(prompts()):
        with pytest.raises(ValueError, match="has 2 rows .* expected one prompt for each row of the batch"):
            model(**inputs)
        two = {name: x[:2] for name, x in inputs.items()}
        assert model.generate(**two, max_new_tokens=2, num_beams=2).shape[0] == 2


def test_what_is_given_for_rows_is_repeated_in_generation_only() -> None:
    batch = BatchRows(4)
    assert repeats_of(2, 4, may_repeat=True, batch=batch) == 2
    assert repeats_of(2, 4, may_repeat=False, batch=batch) is None
    assert repeats_of(2, 8, may_repeat=True, batch=BatchRows(4, 2)) == 4
    assert repeats_of(1, 3, may_repeat=False, batch=BatchRows(1)) == 3  # all images are of the one row
    assert repeats_of(3, 4, may_repeat=True, batch=None) is None
    assert repeats_of(8, 4, may_repeat=True, batch=None) is None
