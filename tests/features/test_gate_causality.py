"""Who sees what comes later: `fit_gate` finds out whether the tokens of a model see only those before them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from toast_peft import fit_gate
from toast_peft.gate_fitting import _is_causal

from ..helpers import paths_of, steered
from ..zoo import ZOO, inputs_of, tiny_model
from .test_gate_fitting import REFERENCE, TARGET, gate_of, llama

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")


def decoders() -> Iterator[type]:
    return (cls for cls in ZOO if cls.__name__.endswith(("ForCausalLM", "LMHeadModel")))


ENCODERS = [
    *(tf.BertForSequenceClassification, tf.ViTForImageClassification, tf.ModernBertForSequenceClassification),
    *(tf.ConvNextForImageClassification, tf.SwinForImageClassification),
]


@pytest.mark.parametrize("model_class", [*decoders(), *ENCODERS])
def test_who_sees_later_tokens_is_found_by_trying(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = inputs_of(model)
    other = {name: x.flip(0).flip(1) if name != "attention_mask" else x for name, x in inputs.items()}
    fit_gate(model, [inputs], [other], quantile=0.5)
    assert gate_of(model).is_causal == (model_class not in ENCODERS)


def test_padding_does_not_hide_who_sees_later_tokens() -> None:
    model = steered(tiny_model(tf.BertForSequenceClassification))
    ids = inputs_of(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    fit_gate(model, [{"input_ids": ids, "attention_mask": mask}], REFERENCE)
    assert not gate_of(model).is_causal


def in_one_row(*texts: torch.Tensor) -> dict[str, Any]:
    """Texts packed into one row. Shape of each: [n]"""
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None], "use_cache": False}


IDS = torch.arange(2, 10)
WITHOUT_TWO_TOKENS = {
    "one token": {"input_ids": IDS[:, None]},
    "padding": {
        "input_ids": F.pad(IDS[:, None], (3, 0)),
        "attention_mask": F.pad(torch.ones_like(IDS)[:, None], (3, 0)),
    },
    "nothing but padding": {"input_ids": IDS[None], "attention_mask": torch.zeros_like(IDS)[None]},
}


@pytest.mark.parametrize("model_class", [tf.BertForSequenceClassification, tf.LlamaForCausalLM])
@pytest.mark.parametrize("first", WITHOUT_TWO_TOKENS)
def test_batches_without_two_tokens_do_not_tell_who_sees_later_ones(first: str, model_class: type) -> None:
    model = steered(tiny_model(model_class))
    fit_gate(model, [WITHOUT_TWO_TOKENS[first], *TARGET], REFERENCE)
    assert gate_of(model).is_causal == (model_class is tf.LlamaForCausalLM)


@pytest.mark.parametrize("model_class", [tf.BertForSequenceClassification, tf.LlamaForCausalLM])
def test_where_no_batch_tells_nobody_is_shown_later_tokens(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    fit_gate(model, [WITHOUT_TWO_TOKENS["one token"]], REFERENCE)
    assert gate_of(model).is_causal


def test_text_of_one_token_in_a_row_of_several_does_not_tell() -> None:
    for texts, is_causal in (((IDS[:4], IDS[4:5]), None), ((IDS[:4], IDS[4:]), True)):
        model = llama(gate="sequence")
        assert _is_causal(model, paths_of(model)[0], in_one_row(*texts)) is is_causal
