"""Padding is told from the mask of the backbone in each form that models give it, wherever tokens are counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from toast_peft import feedback_statistics, fit_gate, initialize_feedback, prompt_from
from toast_peft.core.padding import own_tokens

from ..helpers import paths_of, seed, steered, without_randomness
from ..zoo import add_noise

Batch = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = TEXT | {"max_position_embeddings": 64}
GEMMA3 = {
    "text_config": ENCODER | {"num_key_value_heads": 2, "head_dim": 8, "model_type": "gemma3_text"},
    "vision_config": SIZES | {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
    "image_token_id": 39,
    "mm_tokens_per_image": 4,
}
# For all of them but the last the mask of the backbone has four dimensions.
MODELS: dict[type, Callable[[], nn.Module]] = {
    tf.XLMRobertaForSequenceClassification: lambda: tf.XLMRobertaForSequenceClassification(
        tf.XLMRobertaConfig(**ENCODER)
    ),
    tf.LayoutLMForSequenceClassification: lambda: tf.LayoutLMForSequenceClassification(tf.LayoutLMConfig(**ENCODER)),
    tf.CLIPTextModel: lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**ENCODER)),
    tf.Gemma3ForConditionalGeneration: lambda: tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**GEMMA3)),
}
of_all_forms = pytest.mark.parametrize("model_class", MODELS)


def tokens(number: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 35, (rows, number), generator=torch.Generator().manual_seed(number))


def batches() -> tuple[Batch, Batch]:
    """The same sentences, bare and with padding behind them, which positions of no model look at."""
    ids = tokens(8)
    padded = F.pad(ids, (0, 20))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {
        "input_ids": padded,
        "attention_mask": (padded != 0).long(),
    }


def model_of(model_class: type, batch: Batch, **options: Any) -> nn.Module:
    seed(0)
    base = MODELS[model_class]().double().eval()
    add_noise(*base.parameters())
    return steered(base, inputs=batch, **options)


def assert_same_with_padding(found: Callable[[Batch], Any]) -> None:
    bare, padded = (found(batch) for batch in batches())
    torch.testing.assert_close(bare, padded, rtol=1e-5, atol=1e-5)


@of_all_forms
def test_prompts_from_data_are_those_without_it(model_class: type) -> None:
    def prompt(batch: Batch) -> torch.Tensor:
        model = model_of(model_class, batches()[0])
        initialize_feedback(model, [batch])
        return F.normalize(paths_of(model)[0].selection.topdown_prompt["default"].weight.detach(), dim=0)

    assert_same_with_padding(prompt)


@of_all_forms
def test_requested_prompts_are_those_without_it(model_class: type) -> None:
    model = model_of(model_class, batches()[0])
    assert_same_with_padding(lambda batch: prompt_from(model, batch))


@of_all_forms
def test_statistics_are_those_without_it(model_class: type) -> None:
    model = model_of(model_class, batches()[0])

    def statistics(batch: Batch) -> dict[str, float]:
        with torch.no_grad():
            model(**batch)
        return feedback_statistics(model)

    assert_same_with_padding(statistics)


@of_all_forms
def test_a_token_gate_is_fitted_without_it(model_class: type) -> None:
    reference = [{"input_ids": tokens(12, rows=8)}]

    def report(batch: Batch) -> dict[str, float]:
        return fit_gate(model_of(model_class, batches()[0]), [batch], reference, gate="token")

    assert_same_with_padding(report)


@of_all_forms
def test_variational_loss_can_leave_it_out(model_class: type) -> None:
    options = {"variational_weight": 1.0, "variational_ignore_padding": True}
    model = without_randomness(model_of(model_class, batches()[0], **options)).train()

    def loss(batch: Batch) -> torch.Tensor:
        types = {"token_type_ids": torch.zeros_like(batch["input_ids"])} if "gemma3" in str(model_class) else {}
        model(**batch, **types)
        return model.variational_loss().detach()

    assert_same_with_padding(loss)


# ---------------------------------------------------------------------------------------------------- forms of a mask

OWN = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]) != 0
CAUSAL = torch.ones(4, 4).tril().bool() & OWN[:, None, None, :]


def added(seen: torch.Tensor, hidden: float = torch.finfo(torch.float32).min) -> torch.Tensor:
    """What is added to the attention."""
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


@pytest.mark.parametrize(
    "mask",
    [
        OWN.long(),
        CAUSAL,
        CAUSAL.long(),
        added(CAUSAL),
        added(CAUSAL, float("-inf")),
        added(CAUSAL, -10000.0).bfloat16(),
        OWN[:, None, None],
        {"sliding_attention": None, "full_attention": CAUSAL},
        {"sliding_attention": CAUSAL},
    ],
    ids=["tokens", "seen", "whole", "added", "infinite", "old", "same_for_all", "full", "one_kind"],
)
def test_padding_is_told_from_a_mask_of_each_form(mask: Any) -> None:
    assert torch.equal(own_tokens(mask, (2, 4)), OWN)


def test_one_mask_for_all_rows_and_maps_of_tokens() -> None:
    assert torch.equal(own_tokens(CAUSAL[:1], (2, 2, 2)), OWN[:1].expand(2, 4))


@pytest.mark.parametrize("mask", [None, {}, {"full_attention": None}])
def test_without_a_mask_there_is_no_padding(mask: Any) -> None:
    assert own_tokens(mask, (2, 4)) is None


@pytest.mark.parametrize("room", [0, 3])
def test_tokens_in_the_cache_are_not_counted(room: int) -> None:
    """A static cache has columns for tokens to come as well, which nobody sees."""
    for mask in (OWN, CAUSAL[:, :, 1:], CAUSAL[:, :, -1:].expand(-1, -1, 3, -1)):
        mask = F.pad(mask, (0, room))
        for num_cached in (None, 1, torch.tensor(1)):
            found = own_tokens(mask, (2, 3), has_cache=True, num_cached=num_cached)
            assert torch.equal(found, OWN[:, 1:])


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5), torch.ones(2, 1, 3, 3), torch.ones(3, 4), torch.ones(2), torch.ones(()), "flash"]
)
def test_mask_of_other_tokens_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="`attention_mask` (has|is) .* expected"):
        own_tokens(mask, (2, 4))


def test_statistics_say_so_where_padding_is_not_known() -> None:
    batch = batches()[0]
    model = model_of(tf.XLMRobertaForSequenceClassification, batch)
    with torch.no_grad():
        model(**batch)
    expected = feedback_statistics(model)
    paths_of(model)[0].state.current.attention_mask = torch.ones(2, 1, 3, 3)
    with pytest.warns(UserWarning, match="count padding as well: `attention_mask` has"):
        assert feedback_statistics(model) == expected
