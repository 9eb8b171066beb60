"""Training mode with dropout: pass 1 has none, so an adapter that starts as a no-op starts as the base model does."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from toast_peft.core.dropout import has_dropout

from ..helpers import adapted, blocks_of, gradients, loss_of, output_of, paths_of, steered
from ..zoo import VARIANTS, inputs_of, tiny_model, with_variants

_OF_BERT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
RATES: dict[type, dict[str, Any]] = {
    tf.ViTModel: _OF_BERT,
    tf.BertForSequenceClassification: _OF_BERT,
    tf.LlamaModel: {"attention_dropout": 0.1},
    tf.Wav2Vec2ForCTC: {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "layerdrop": 0.5,
        "apply_spec_augment": False,
    },
    tf.DINOv3ViTModel: {"pos_embed_rescale": 2.0},
    tf.GPT2LMHeadModel: {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    tf.WhisperForConditionalGeneration: {"dropout": 0.1, "decoder_layerdrop": 0.5, "encoder_layerdrop": 0.5},
}


def with_dropout(model_class: type) -> nn.Module:
    return tiny_model(model_class, **RATES[model_class]).train()


def seeded_output(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(**inputs_of(model))[0]


@pytest.mark.parametrize(("model_class", "variant"), with_variants(RATES, VARIANTS))
def test_no_op_adapter_trains_as_the_base_model_with_the_same_seed(model_class: type, variant: str) -> None:
    base = with_dropout(model_class)
    model = adapted(copy.deepcopy(base), **VARIANTS[variant])
    expected = [seeded_output(base, seed) for seed in range(3)]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for seed in range(3):
        torch.testing.assert_close(seeded_output(model, seed), expected[seed], rtol=1e-5, atol=1e-5)
    assert all(module.training for module in model.modules())


def test_noise_of_neftune_is_that_of_the_base_model_with_the_same_seed() -> None:
    base = tiny_model(tf.LlamaForCausalLM).train()
    model = adapted(copy.deepcopy(base))
    for module in (base, model):
        embeddings = module.get_input_embeddings()
        embeddings.neftune_noise_alpha = 5.0
        embeddings.register_forward_hook(neftune_post_forward_hook)
    torch.testing.assert_close(seeded_output(model, 0), seeded_output(base, 0), rtol=1e-5, atol=1e-5)
    assert (seeded_output(base, 0) - seeded_output(base, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"feedback_to": 2}], ids=str)
def test_no_op_adapter_on_stages_trains_as_the_base_model_with_the_same_seed(options: dict[str, int]) -> None:
    base = tiny_model(tf.SwinForImageClassification, drop_path_rate=0.3).train()
    model = adapted(copy.deepcopy(base), **options)
    outputs = []
    for m in (base, model):
        torch.manual_seed(0)
        outputs.append(torch.stack([m(**inputs_of(base)).logits for _ in range(2)]))
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["full", "late"])
@pytest.mark.parametrize("model_class", [tf.ViTModel, tf.BertForSequenceClassification, tf.GPT2LMHeadModel])
def test_features_are_those_of_inference(model_class: type, variant: str) -> None:
    model = adapted(with_dropout(model_class), **VARIANTS[variant])
    features: list[torch.Tensor] = []
    [path] = paths_of(model)
    path.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    seeded_output(model, 0)
    model.eval()
    seeded_output(model, 0)
    torch.testing.assert_close(features[0], features[1])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", [tf.ViTForImageClassification, tf.WhisperForConditionalGeneration])
def test_first_pass_in_the_graph_has_none_either(model_class: type, checkpointing: bool | None) -> None:
    """Embeddings that are trained along are a part of both passes; checkpointed blocks run again as they ran."""
    is_vit = model_class is tf.ViTForImageClassification
    name = "vit.embeddings" if is_vit else "embed_tokens"
    rates = {"hidden_dropout_prob": 0.3} if is_vit else {"dropout": 0.3}
    results = []
    for enabled in (None, checkpointing):
        model = steered(tiny_model(model_class, **rates), modules_to_save=[name]).train()
        if enabled is not None:
            model.gradient_checkpointing_enable({"use_reentrant": enabled})
        torch.manual_seed(3)
        loss_of(model).backward()
        results.append(gradients(model))
    largest = max(gradient.abs().max() for gradient in results[0].values())
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, rtol=1e-4, atol=1e-5 * largest.item(), msg=key)


def test_a_model_without_dropout_is_left_alone() -> None:
    model = tiny_model(tf.LlamaModel).train()
    assert not has_dropout(model)
    assert not has_dropout(with_dropout(tf.LlamaModel).eval())
    assert has_dropout(with_dropout(tf.LlamaModel))
    blocks_of(model)[0].mlp.act_fn = nn.Dropout(0.1)  # not known to the config
    assert has_dropout(model)


def test_modules_are_in_training_mode_again_after_an_error() -> None:
    model = steered(with_dropout(tf.ViTModel))
    with pytest.raises(AttributeError):
        model(pixel_values="no image")
    assert all(module.training for module in model.modules())


def test_dropout_of_the_factors_alone_is_none_of_the_passes() -> None:
    model = adapted(tiny_model(tf.LlamaModel).train(), r=2, lora_dropout=0.5)
    assert not has_dropout(model.get_base_model())


def test_dropout_of_the_factors_drops_in_training_only() -> None:
    model = steered(tiny_model(tf.LlamaModel), r=2, lora_dropout=0.5)
    assert torch.equal(seeded_output(model, 0), seeded_output(model, 1))
    model.train()
    assert not torch.allclose(seeded_output(model, 0), seeded_output(model, 1), atol=1e-3)


def test_batch_norms_use_the_batch_also_in_a_first_pass_without_dropout() -> None:
    """And the features are those of the same model whose dropout has the rate 0."""
    features: list[torch.Tensor] = []
    for rate in (0.5, 0.0):
        base = tiny_model(tf.ResNetForImageClassification)
        base.resnet.encoder.stages[1].layers[0].activation = nn.Sequential(nn.ReLU(), nn.Dropout(rate))
        model = adapted(base.train())
        [path] = paths_of(model)
        path.register_forward_pre_hook(lambda path, args: features.append(args[0]))
        output_of(model, inputs_of(base))
    torch.testing.assert_close(features[0], features[1])


def test_first_pass_uses_up_no_random_numbers_whatever_draws_them() -> None:
    """As some models do for each block, also where they do not leave out any."""
    base = with_dropout(tf.ViTModel)
    for block in blocks_of(base):
        block.register_forward_pre_hook(draw)
    model = adapted(copy.deepcopy(base))
    torch.testing.assert_close(seeded_output(model, 0), seeded_output(base, 0), rtol=1e-5, atol=1e-5)


def draw(*_: Any) -> None:
    torch.rand(())
