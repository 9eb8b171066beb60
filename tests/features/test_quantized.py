"""Quantised base models: bitsandbytes 8-bit and 4-bit, torchao int8 weights, all on CPU."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from toast_peft import initialize_feedback

from ..helpers import adapted, assert_same, loss_of, output_of, paths_of, steered, value_projections_of
from ..zoo import NUM_BLOCKS, VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model

# How to quantise, and the value projection, or its weight, that results.
QUANTIZATIONS: dict[str, tuple[Any, str]] = {
    "bitsandbytes 8-bit": (tf.BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"),
    # Its kernel cannot compute as few classes as there are.
    "bitsandbytes 4-bit": (
        tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier", "lm_head"]
        ),
        "Linear4bit",
    ),
    "torchao int8": (tf.TorchAoConfig(Int8WeightOnlyConfig()), "Int8Tensor"),
}
# 4-bit kernels take blocks of 64 weights.
SIZES = {"hidden_size": 64, "intermediate_size": 128}

quantizations = pytest.mark.parametrize("quantization", QUANTIZATIONS)
both_models = pytest.mark.parametrize("model_class", VIT_AND_LLAMA)


@pytest.fixture
def checkpoint(model_class: type, tmp_path: Path) -> Path:
    """The folder of a saved base model."""
    sizes = SIZES | ({"head_dim": 16} if model_class is tf.LlamaForCausalLM else {})
    tiny_model(model_class, **sizes).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(model_class: type, checkpoint: Path, quantization: str) -> nn.Module:
    config, expected_type = QUANTIZATIONS[quantization]
    model = model_class.from_pretrained(checkpoint, quantization_config=config, device_map="cpu").eval()
    value_projection = value_projections_of(model)[0]
    assert expected_type in (type(value_projection).__name__, type(value_projection.weight).__name__)
    return model


def train(model: nn.Module, num_steps: int = 8) -> list[float]:
    """The losses of a few steps towards fixed labels."""
    inputs = inputs_of(model)
    labels = torch.tensor([0, 1]) if "pixel_values" in inputs else inputs["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@quantizations
@both_models
def test_starts_as_the_quantized_base_model(model_class: type, quantization: str, checkpoint: Path) -> None:
    base = quantized(model_class, checkpoint, quantization)
    expected = output_of(base)
    model = adapted(base)
    assert torch.equal(output_of(model), expected)
    assert {p.dtype for name, p in model.named_parameters() if "topdown_" in name} == {torch.float32}


@quantizations
@both_models
def test_a_model_in_evaluation_mode_can_be_trained(model_class: type, quantization: str, checkpoint: Path) -> None:
    """As `from_pretrained` gives it; making the adapter runs it, as `initialize_feedback` does."""
    model = adapted(quantized(model_class, checkpoint, quantization).eval())
    initialize_feedback(model, [inputs_of(model)])
    losses = train(model.train())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(
    ("model_class", "variant"), [(tf.LlamaForCausalLM, "lite"), *product(VIT_AND_LLAMA, ["middle"])]
)
@quantizations
def test_trained_saved_and_loaded(
    model_class: type, quantization: str, variant: str, checkpoint: Path, tmp_path: Path
) -> None:
    base = quantized(model_class, checkpoint, quantization)
    # Trained, saved and loaded before anything is evaluated: in its first forward in eval mode on CPU a 4-bit layer of
    # bitsandbytes packs its weights for inference. Afterwards it has no gradient, and a call of `state_dict` changes
    # its output. That is so without an adapter too.
    model = steered(base.train(), **VARIANTS[variant])
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0], losses
    model.save_pretrained(tmp_path / "adapter")
    expected = output_of(model.eval())
    loaded = PeftModel.from_pretrained(quantized(model_class, checkpoint, quantization), tmp_path / "adapter")
    assert_same(output_of(loaded), expected)
    base_output = output_of(quantized(model_class, checkpoint, quantization))
    assert (expected - base_output).abs().max() > 0.1
    with model.disable_adapter():
        assert_same(output_of(model), base_output)


@pytest.mark.parametrize(
    ("model_class", "checkpointing"),
    [
        (tf.ViTForImageClassification, "none"),
        (tf.ViTForImageClassification, "non-reentrant"),
        (tf.LlamaForCausalLM, "reentrant"),
    ],
)
@quantizations
def test_prepare_model_for_kbit_training(
    model_class: type, quantization: str, checkpointing: str, checkpoint: Path
) -> None:
    base = prepare_model_for_kbit_training(
        quantized(model_class, checkpoint, quantization),
        use_gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
    )
    model = steered(base.train())
    assert all("topdown_" in name for name, p in model.named_parameters() if p.requires_grad)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if "4-bit" not in name])
@both_models
def test_gradients_are_close_to_those_in_full_precision(
    model_class: type, quantization: str, checkpoint: Path
) -> None:
    plain = adapted(model_class.from_pretrained(checkpoint)).train()
    model = adapted(quantized(model_class, checkpoint, quantization).train())
    model.load_state_dict({name: p for name, p in plain.state_dict().items() if "topdown_" in name}, strict=False)
    found = []
    for trained in (plain, model):
        trained(**inputs_of(plain))[0].square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in trained.parameters() if p.requires_grad]))
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.97


@quantizations
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM])
@pytest.mark.filterwarnings("ignore")
def test_lora_of_pass_2_on_quantised_layers(model_class: type, quantization: str, checkpoint: Path) -> None:
    only = {"pass2_target_modules": "all-linear", "pass2_bias": "all", "trainable_parts": ["pass2"], "r": 2}
    model = adapted(quantized(model_class, checkpoint, quantization).train(), **only)
    assert len(paths_of(model)[0].second_pass) == 7 * NUM_BLOCKS
    loss_of(model).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pass2" in name)
    expected = output_of(quantized(model_class, checkpoint, quantization).train())
    assert torch.equal(output_of(model), expected)
