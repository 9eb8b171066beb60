"""Generation with a cache gives what recomputation gives, for every model that generates."""

import pytest
import torch

from ..helpers import assert_same_generation, steered
from ..zoo import GENERATING, RANGES, inputs_of, tiny_model, variant_of, with_variants


@pytest.mark.parametrize(("model_class", "variant"), with_variants(GENERATING, RANGES))
def test_cached_generation_is_recomputation(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **variant_of(model_class, variant))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"suppress_tokens": [36, 37, 38, 39]}  # with which the Qwen models would begin an image
    inputs = inputs_of(model, length=6)
    if model.config.is_encoder_decoder:
        inputs.pop("decoder_input_ids")
        options |= {"num_beams": 2}
    expected = model.generate(**inputs, **options, use_cache=False)
    assert_same_generation(model.generate(**inputs, **options), expected)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
    assert not torch.allclose(base.logits[0], expected.logits[0], atol=1e-3)
