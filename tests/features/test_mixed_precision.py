"""Base model in one precision, adapter in another, with autocast and without: no dtype error, finite, saved so."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from toast_peft import TopDownConfig

from ..helpers import assert_same, loss_of, output_of, steered
from ..zoo import HIDDEN_SIZE, VIT_AND_LLAMA, inputs_of, tiny_model

# Data type of the base model, and that of autocast. ViT itself cannot mix bfloat16 and float16.
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32, autocast to bfloat16": (torch.float32, torch.bfloat16),
    "float32, autocast to float16": (torch.float32, torch.float16),
    "bfloat16, autocast to bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16, autocast to float16": (torch.float16, torch.float16),
}
precisions = pytest.mark.parametrize(("base_dtype", "autocast_dtype"), PRECISIONS.values(), ids=PRECISIONS)
adapter_precisions = pytest.mark.parametrize("autocast_adapter", [True, False], ids=["float32 adapter", "as base"])


def autocast(dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def mixed_model(model_class: type, base_dtype: torch.dtype, autocast_adapter: bool, **options: Any) -> PeftModel:
    """A steered model; PEFT makes the adapter float32 unless told not to."""
    base = tiny_model(model_class).to(base_dtype)
    model = get_peft_model(base, TopDownConfig(**options), autocast_adapter_dtype=autocast_adapter).train()
    expected = torch.float32 if autocast_adapter else base_dtype
    assert {p.dtype for name, p in model.named_parameters() if "topdown_" in name} == {expected}
    in_float32 = steered(tiny_model(model_class), **options).state_dict()
    model.load_state_dict({name: tensor for name, tensor in in_float32.items() if "topdown_" in name}, strict=False)
    return model


def batch(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}


# Identities without weights, and whatever can be added: fixed matrices, low-rank products, the bias once more.
@pytest.mark.parametrize(
    ("model_class", "variant", "autocast_adapter"),
    [(cls, {"r": 4}, autocast_adapter) for cls in VIT_AND_LLAMA for autocast_adapter in (True, False)]
    + [(tf.ViTForImageClassification, {"r": 4, "init_weights": False, "double_value_bias": True}, False)],
)
@precisions
def test_training_steps(
    model_class: type,
    base_dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
    autocast_adapter: bool,
    variant: dict[str, Any],
) -> None:
    model = mixed_model(model_class, base_dtype, autocast_adapter, **variant)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3)
    for _ in range(2):
        with autocast(autocast_dtype):
            output = model(**batch(model))[0]
            loss = loss_of(model, batch(model))
        loss.backward()
        assert output.isfinite().all() and loss.isfinite()
        assert output.dtype == (autocast_dtype or base_dtype)
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in trainable)
        assert any(p.grad.any() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in trainable)


@precisions
@pytest.mark.parametrize(
    ("model_class", "use_reentrant"), [(tf.ViTForImageClassification, True), (tf.LlamaForCausalLM, False)]
)
def test_gradient_checkpointing_recomputes_in_the_same_precision(
    model_class: type, base_dtype: torch.dtype, autocast_dtype: torch.dtype | None, use_reentrant: bool
) -> None:
    found = []
    for checkpointing in (False, True):
        model = mixed_model(model_class, base_dtype, autocast_adapter=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with autocast(autocast_dtype):
            loss = loss_of(model, batch(model))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert_same(found[1][name], gradient)


@precisions
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_output_is_that_of_full_precision(
    model_class: type, base_dtype: torch.dtype, autocast_dtype: torch.dtype | None
) -> None:
    """To the rounding of the lowest precision involved."""
    expected = output_of(steered(tiny_model(model_class)))
    model = mixed_model(model_class, base_dtype, autocast_adapter=True).eval()
    with autocast(autocast_dtype):
        output = output_of(model, batch(model)).float()
    torch.testing.assert_close(output, expected, rtol=0, atol=0.06 * expected.abs().max().item())


@adapter_precisions
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_saved_as_it_is_and_loaded_equal(
    model_class: type, base_dtype: torch.dtype, autocast_adapter: bool, tmp_path: Path
) -> None:
    model = mixed_model(model_class, base_dtype, autocast_adapter).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32 if autocast_adapter else base_dtype}
    base = tiny_model(model_class).to(base_dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast_adapter)
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name
    assert_same(output_of(loaded, batch(loaded)), output_of(model, batch(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_zeros_are_weighted_zero(dtype: torch.dtype) -> None:
    """A token whose features are all zero has no direction; in low precision the eps of the norm must not vanish."""
    model = mixed_model(VIT_AND_LLAMA[1], dtype, autocast_adapter=False)
    selection = model.base_model.model.model.feedback_path.selection
    features = torch.randn(1, 3, HIDDEN_SIZE, dtype=dtype)
    features[:, 1] = 0
    features.requires_grad_()
    selected = selection(*selection.weigh(features, "default"), "default")
    selected.sum().backward()
    assert selected.isfinite().all() and not selected[:, 1].any()
    assert features.grad.isfinite().all()
    assert selection.topdown_prompt["default"].weight.grad.isfinite().all()


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_accelerate_takes_its_autocast_away_from_an_injected_adapter(model_class: type) -> None:
    model = inject_adapter_in_model(TopDownConfig(init_weights=False), tiny_model(model_class)).eval()
    expected = output_of(model)
    model._original_forward = model.forward  # as `Accelerator.prepare_model`
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    assert not torch.equal(output_of(model), expected)
    assert_same(output_of(extract_model_from_parallel(model, keep_fp32_wrapper=False)), expected)
