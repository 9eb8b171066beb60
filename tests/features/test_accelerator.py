"""What must hold on a GPU as on a CPU: forwards, data and pictures, training, saving and moving, compiling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from torch import nn

from toast_peft import (
    FeedbackCallback,
    TopDownConfig,
    explain,
    fit_gate,
    initialize_feedback,
    store_features,
)

from ..helpers import (
    adapted,
    assert_same,
    assert_same_gradients,
    blocks_of,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steered,
    value_projections_of,
)
from ..zoo import VARIANTS, VIT_AND_LLAMA, tiny_model
from . import test_initialization, test_stored_features
from .accelerators import (
    CHANGES,
    LLAMA,
    PRECISIONS,
    VIT,
    assert_same_in_float32,
    inputs_of,
    is_on,
    on_device_of,
    without_cache,
)
from .test_closed_rows import open_only
from .test_compile import BACKEND
from .test_fused_feedback import assert_fused_gives_the_same, recorded_values
from .test_fused_feedback import exact as in_float64
from .test_gate import closed, gated
from .test_gate_fitting import REFERENCE, TARGET, gate_of
from .test_mixed_batches import assert_each_row_is_that_of_its_adapter
from .test_mixed_precision import mixed_model
from .test_offload import AFTER_BLOCKS, is_offloaded, place
from .test_several_adapters import activate, feedback_alone, with_adapters
from .test_trainer import dataset_for, new_model, trainer_for

FAMILIES = [
    *VIT_AND_LLAMA,
    tf.GPT2LMHeadModel,
    tf.BertForSequenceClassification,
    tf.T5ForConditionalGeneration,
    tf.ConvNextForImageClassification,
    tf.SwinForImageClassification,
]


# ------------------------------------------------------------------------------------------------------------ forwards


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_new_adapter_is_the_base_model(model_class: type, dtype: torch.dtype, device: str) -> None:
    base = tiny_model(model_class).to(device, dtype)
    inputs = inputs_of(base)
    expected = output_of(base, inputs)
    model = adapted(base, **CHANGES)
    assert is_on(device, model)
    assert torch.equal(output_of(model, inputs), expected)


def test_new_adapter_draws_the_dropout_of_the_base_model(device: str) -> None:
    """Pass 1 uses up no random numbers, on no device."""
    base = tiny_model(VIT, hidden_dropout_prob=0.3).to(device).train()
    outputs = []
    for model in (base, adapted(base)):
        torch.manual_seed(3)
        outputs.append(output_of(model, inputs_of(model)))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], output_of(base, inputs_of(base)))


@pytest.mark.parametrize("model_class", FAMILIES)
def test_output_and_gradients_are_those_on_the_cpu(model_class: type, device: str) -> None:
    model = steered(tiny_model(model_class)).double()
    expected = output_of(model, inputs_of(model))
    loss_of(model, inputs_of(model)).backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    model.to(device)
    assert_same_in_float32(output_of(model, inputs_of(model)), expected)
    loss_of(model, inputs_of(model)).backward()
    assert_same_gradients({name: gradient.cpu() for name, gradient in gradients(model).items()}, expected_gradients)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_gate_gives_the_base_model(model_class: type, dtype: torch.dtype, skips: bool, device: str) -> None:
    model = gated(model_class, skip_closed_rows=skips, **CHANGES).to(device, dtype)
    inputs = without_cache(model)
    with model.disable_adapter():
        expected = output_of(model, inputs)
    with closed(model):
        assert torch.equal(output_of(model, inputs), expected)
    assert not torch.allclose(output_of(model, inputs), expected)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_row_beside_open_ones_is_the_base_model(
    model_class: type, dtype: torch.dtype, skips: bool, device: str
) -> None:
    model = steered(tiny_model(model_class), skip_closed_rows=skips).to(device, dtype)
    inputs = without_cache(model, batch_size=4)
    with model.disable_adapter():
        expected = output_of(model, inputs)
    with open_only(model, [True, False, True, False]):
        found = output_of(model, inputs)
    assert torch.equal(found[1::2], expected[1::2])
    assert not torch.isclose(found[::2], expected[::2]).flatten(1).all(1).any()


@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, tf.SwinForImageClassification])
def test_row_of_a_mixed_batch_is_that_of_its_adapter(model_class: type, device: str) -> None:
    model = with_adapters(model_class).to(device)
    assert_each_row_is_that_of_its_adapter(model, inputs_of(model, batch_size=6))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_two_active_adapters_add_up(model_class: type, device: str) -> None:
    model = with_adapters(model_class).to(device)
    inputs = inputs_of(model)
    alone = [feedback_alone(model, name, inputs)[0] for name in ("default", "late")]
    base = tiny_model(model_class).to(device, torch.float64)
    for index, projection in enumerate(value_projections_of(base)):
        td = sum(of_adapter[index] for of_adapter in alone if index in of_adapter)
        projection.register_forward_pre_hook(lambda module, args, td=td: (args[0] + td,))
    activate(model, "default", "late")
    assert_same(output_of(model, inputs), output_of(base, inputs))


@pytest.mark.parametrize("variant", ["full", "lite"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_is_the_same(model_class: type, variant: str, device: str) -> None:
    assert_fused_gives_the_same(in_float64(model_class, **VARIANTS[variant]).to(device))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_fused_feedback_has_the_precision_of_the_values(model_class: type, device: str) -> None:
    """Those of a model in bfloat16, with an adapter in float32."""
    model = mixed_model(model_class, torch.bfloat16, autocast_adapter=True).eval().to(device)
    inputs = inputs_of(model)
    expected = output_of(model, inputs)
    model.fuse_feedback()
    with recorded_values(model) as values:
        found = output_of(model, inputs)
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in paths_of(model)[0].fused.buffers()} == {torch.bfloat16}
    assert_same(found, expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_autocast(model_class: type, device: str) -> None:
    base = tiny_model(model_class).to(device)
    inputs = inputs_of(base)
    with torch.autocast(device, torch.bfloat16):
        expected = output_of(base, inputs)
        assert torch.equal(output_of(adapted(base), inputs), expected)
    model = steered(tiny_model(model_class)).to(device)
    expected = output_of(model, inputs)
    with torch.autocast(device, torch.bfloat16):
        found = output_of(model, inputs)
        loss = loss_of(model.train(), inputs)
    assert (found.float() - expected).abs().max() < 0.06 * expected.abs().max()
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# ------------------------------------------------------------------------------------------- data, gates and pictures


def test_initialised_as_on_the_cpu(device: str) -> None:
    """From batches on the CPU, as a dataloader gives them."""
    models = [adapted(tiny_model(VIT)).double() for _ in range(2)]
    batches = [on_device_of(models[0], batch) for batch in test_initialization.batches(models[0])]
    for model in (models[0], models[1].to(device)):
        initialize_feedback(model, batches)
    assert is_on(device, models[1])
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name).cpu(), parameter, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_gate_is_fitted_as_on_the_cpu(kind: str, device: str) -> None:
    models = [steered(tiny_model(LLAMA)).double(), steered(tiny_model(LLAMA)).to(device, torch.float64)]
    reports = [fit_gate(model, TARGET, REFERENCE, gate=kind) for model in models]
    assert reports[1] == pytest.approx(reports[0], abs=0.02)
    assert is_on(device, models[1])
    for name, parameter in gate_of(models[0]).named_parameters():
        found = gate_of(models[1]).get_parameter(name).cpu()
        torch.testing.assert_close(found, parameter.data, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_gate_against_what_the_base_model_writes_leaves_the_random_numbers(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toast_peft.gate_fitting._GENERATED", (8, 16))
    model = steered(tiny_model(LLAMA), gate="sequence").to(device)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    report = fit_gate(model, TARGET, "generate")
    assert torch.equal(torch.rand(3, device=device), expected)
    assert 0 <= report["open_reference"] < 0.5


@pytest.mark.parametrize("variant", ["full", "middle"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_stored_features_give_the_same(model_class: type, variant: str, device: str, tmp_path: Path) -> None:
    """Rows, files and batches are on the CPU, and the Trainer moves the batches."""
    model = test_stored_features.exact_model(model_class, **VARIANTS[variant]).to(device)
    rows = test_stored_features.rows_of(model)
    if model_class is LLAMA:  # padded
        rows = [row | {"attention_mask": (torch.arange(9) < 9 - i).long()} for i, row in enumerate(rows)]
        rows = [row | {"labels": row["input_ids"].where(row["attention_mask"] == 1, -100)} for row in rows]
    stored = test_stored_features.all_of(store_features(model, rows, tmp_path, batch_size=4))
    assert {x.device.type for x in stored.values()} == {"cpu"}
    batch = on_device_of(model, stored)
    found, expected = (
        test_stored_features.loss_and_gradients(model, b) for b in (batch, test_stored_features.without(batch))
    )
    test_stored_features.assert_exact(found, expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_explanation_is_that_on_the_cpu(model_class: type, device: str) -> None:
    model = gated(model_class)
    expected = explain(model, without_cache(model))
    model.to(device)
    found = explain(model, without_cache(model))
    for one, other in zip(arrays_of(found), arrays_of(expected), strict=True):
        assert type(one) is np.ndarray and one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert "<html" in found.to_html()


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_explanation_is_drawn(model_class: type, device: str) -> None:
    model = gated(model_class).to(device)
    explain(model, without_cache(model)).plot().canvas.draw()


def arrays_of(explanation: Any) -> list[np.ndarray]:
    passes = [array for p in (explanation.first, explanation.second) for array in (p.logits, *p.attentions)]
    others = [explanation.mask, explanation.gate, explanation.features, explanation.swapped_logits]
    return [*passes, *others, *explanation.feedback_norm.values()]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_trainer_with_bfloat16_trains_all_of_it(model_class: type, device: str, tmp_path: Path) -> None:
    model = new_model(model_class, gate="token", feedback_to_output=model_class is LLAMA, **CHANGES).to(device)
    data = dataset_for(model_class)
    batches = [{name: x for name, x in data[:16].items() if name != "labels"}]
    fit_gate(model, batches, [{name: x.flip(-1) for name, x in batch.items()} for batch in batches], quantile=0.2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = trainer_for(
        model, tmp_path, bf16=True, max_steps=6, eval_strategy="no", save_strategy="no", logging_steps=1,
        use_cpu=device == "cpu",
    )  # fmt: skip
    trainer.add_callback(FeedbackCallback(trainer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and np.isfinite(losses).all()
    trained = dict(model.named_parameters())
    assert {trained[name].dtype for name in before} == {torch.float32} and is_on(device, model)
    assert [name for name, start in before.items() if torch.equal(trained[name], start)] == []


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_gives_the_same_gradients(model_class: type, use_reentrant: bool, device: str) -> None:
    """With dropout, whose random numbers the recomputation draws again."""
    dropout = "hidden_dropout_prob" if model_class is VIT else "attention_dropout"
    results = []
    for checkpointing in (False, True):
        model = steered(tiny_model(model_class, **{dropout: 0.2}), **CHANGES).to(device, torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        loss_of(model, inputs_of(model)).backward()
        results.append(gradients(model))
    assert_same_gradients(*results)


# ------------------------------------------------------------------------------------------------------ saving, moving


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_saved_and_loaded_gives_the_same(model_class: type, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """Also on the CPU beside an accelerator, onto which PEFT would load the weights."""
    model = mixed_model(model_class, dtype, autocast_adapter=True, r=4, **CHANGES).eval().to(device)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_class).to(device, dtype), tmp_path)
    assert is_on(device, loaded)
    inputs = inputs_of(model)
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    with model.disable_adapter():
        assert not torch.allclose(output_of(loaded, inputs), output_of(model, inputs))


def test_adapter_moves_with_its_model(device: str) -> None:
    model = steered(tiny_model(VIT), gate="token", **CHANGES)
    expected = output_of(model)
    model.to(device)
    model.add_adapter("other", TopDownConfig(r=4, gate="sequence", **CHANGES))
    assert is_on(device, model)
    output_of(model, inputs_of(model))
    model.set_adapter("other")
    output_of(model, inputs_of(model))
    model.set_adapter("default")
    model.to("cpu")
    assert is_on("cpu", model)
    assert_same(output_of(model), expected)


def offloaded(model: nn.Module, device: str) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device(device))


def dispatched(model: nn.Module, device: str) -> nn.Module:
    """The upper two blocks on the CPU, from where they are fetched, all others on the device."""
    blocks = blocks_of(model)
    inside = {part for block in blocks for part in block.modules()}
    device_map = {name: device for name, part in model.named_modules() if part._parameters and part not in inside}
    for name, part in model.named_modules():
        if part in blocks:
            device_map[name] = "cpu" if part in blocks[2:] else device
    return dispatch_model(model, device_map, main_device=device, force_hooks=True)


def with_weights_of(reference: PeftModel, base: nn.Module, **options: Any) -> PeftModel:
    model = adapted(base, **options)
    weights = {name: x for name, x in reference.state_dict().items() if "topdown_" in name}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("offload", [offloaded, dispatched])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_offloaded_base_model(model_class: type, offload: Callable, device: str) -> None:
    reference = steered(tiny_model(model_class)).double()
    inputs = inputs_of(reference)
    base = offload(tiny_model(model_class).double(), device)
    assert is_offloaded(blocks_of(base)[-1]) or (device == "cpu" and offload is dispatched)
    model = with_weights_of(reference, base)
    assert_same_in_float32(output_of(model, inputs), output_of(reference, inputs))


@pytest.mark.parametrize("variant", ["full", "lite", "middle"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_model_split_over_two_devices(model_class: type, variant: str, device: str) -> None:
    reference = steered(tiny_model(model_class), **VARIANTS[variant]).double()
    base = tiny_model(model_class).double()
    place("cpu", *blocks_of(base)[:2])
    place(device, *blocks_of(base)[2:], *(module for name, module in base.named_modules() if name in AFTER_BLOCKS))
    model = with_weights_of(reference, base, **VARIANTS[variant])
    inputs = inputs_of(reference)
    assert_same_in_float32(output_of(model, inputs), output_of(reference, inputs))
    for trained in (model, reference):
        loss_of(trained, inputs).backward()
    assert_same_gradients({name: x.cpu() for name, x in gradients(model).items()}, gradients(reference))


# ----------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_compiled_forward(model_class: type, device: str) -> None:
    torch.compiler.reset()
    size = {"num_hidden_layers": 1, "problem_type": "single_label_classification"}
    model = steered(tiny_model(model_class, **size)).to(device, torch.float64)
    inputs = without_cache(model)
    expected = output_of(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else BACKEND)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert_same_in_float32(output_of(compiled, inputs), expected)
