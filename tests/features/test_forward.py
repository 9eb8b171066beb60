"""One forward: what it computes, what it costs, what it returns, and that nothing of it is left behind."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from toast_peft import TopDownConfig

from ..golden.reference import reference_forward
from ..helpers import (
    adapted,
    assert_same,
    blocks_of,
    counted_block_calls,
    loss_of,
    output_of,
    steer,
    steered,
    value_projections_of,
)
from ..zoo import CONVNEXT_AND_RESNET, NUM_BLOCKS, RANGES, VIT_AND_LLAMA, inputs_of, tiny_model

# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize(
    "options",
    [{"double_value_bias": True}, {"layers_to_transform": [0, 2]}, {"exclude_modules": ["layers.3.attention.v_proj"]}],
    ids=str,
)
def test_options_of_the_formulas(options: dict[str, Any]) -> None:
    base = tiny_model(tf.ViTModel)
    model = steered(copy.deepcopy(base), **options)
    with torch.no_grad():
        expected = reference_forward(base, model, inputs_of(base))[0]
    torch.testing.assert_close(output_of(model), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_normalize_features_changes_where_the_feedback_starts(model_class: type) -> None:
    by_model_type, switched = (
        steered(tiny_model(model_class), normalize_features=value)
        for value in (None, model_class is tf.LlamaForCausalLM)
    )
    switched.load_state_dict(by_model_type.state_dict())
    assert not torch.allclose(output_of(switched), output_of(by_model_type))


@pytest.mark.parametrize("options", [{}, {"r": 4}, {"gate": "token"}, {"pass2_target_modules": ["up_proj"]}], ids=str)
def test_functional_call_computes_with_the_weights_given(options: dict[str, Any]) -> None:
    """And with `torch.func`, gradients of single rows are those that each row gives alone."""
    model = steered(tiny_model(tf.LlamaForCausalLM), task_type="CAUSAL_LM", **options).double()
    inputs = inputs_of(model) | {"use_cache": False}
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    trained = {name: weights.pop(name) for name, weight in model.named_parameters() if weight.requires_grad}

    def loss(trained: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        row = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, weights | trained, (), row).loss

    assert_same(torch.func.functional_call(model, weights | trained, (), inputs).logits, output_of(model, inputs))
    doubled = {name: 2 * weight for name, weight in trained.items()}
    changed = torch.func.functional_call(model, weights | doubled, (), inputs).logits
    assert not torch.allclose(changed, output_of(model, inputs))
    of_rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, inputs["input_ids"])
    for index, ids in enumerate(inputs["input_ids"]):
        for name, of_row in torch.func.grad(loss)(trained, ids).items():
            torch.testing.assert_close(of_rows[name][index], of_row, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_disabled_adapter_costs_one_pass(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    with model.disable_adapter(), counted_block_calls(model) as calls:
        output_of(model)
    assert calls == dict.fromkeys(range(NUM_BLOCKS), 1)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_head_runs_once(model_class: type) -> None:
    model = adapted(tiny_model(model_class))
    head = model.get_submodule("lm_head" if model_class is tf.LlamaForCausalLM else "classifier")
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    output_of(model)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ recorded outputs


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
@pytest.mark.parametrize("variant", RANGES)
def test_recording_does_not_change_the_output(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class, attn_implementation="eager"), **RANGES[variant])
    inputs = inputs_of(model)
    recorded = inputs | {"output_hidden_states": True, "output_attentions": True}
    assert torch.equal(output_of(model, recorded), output_of(model, inputs))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_tuple_outputs_and_positional_inputs(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    [inputs] = inputs_of(model).values()
    with torch.no_grad():
        assert torch.equal(model(inputs, return_dict=False)[0], output_of(model))


# ----------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_model_to_dtype(model_class: type, dtype: torch.dtype) -> None:
    model = steered(tiny_model(model_class))
    expected = output_of(model)
    model = model.to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}
    output = output_of(model, inputs)
    assert output.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1 * expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_float32_adapter_on_bfloat16_model(model_class: type, autocast: bool) -> None:
    """PEFT keeps the adapter in float32; the base model still sees only its own dtype."""
    base = tiny_model(model_class).to(torch.bfloat16)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs_of(base).items()}
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        expected = output_of(base, inputs)
        model = adapted(base)
        assert {p.dtype for name, p in model.named_parameters() if "topdown_" in name} == {torch.float32}
        assert torch.equal(output_of(model, inputs), expected)
    # Another context: older torch keeps the low-precision copies of weights in it, here those made without a graph.
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss_of(model, inputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_bfloat16_adapter_on_bfloat16_model(model_class: type) -> None:
    base = tiny_model(model_class).to(torch.bfloat16)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs_of(base).items()}
    expected = output_of(base, inputs)
    model = get_peft_model(base, TopDownConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(output_of(model, inputs), expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_autocast_on_float32_model(model_class: type) -> None:
    base = tiny_model(model_class)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output_of(base)
        assert torch.equal(output_of(adapted(base)), expected)
    model = steered(tiny_model(model_class))
    in_float32 = output_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            output_of(model).float(), in_float32, rtol=0, atol=0.1 * in_float32.abs().max().item()
        )


# ---------------------------------------------------------------------------------------- state between forwards


class Interrupted(Exception):
    pass


def raise_at_call(number: int) -> Callable:
    """A hook that raises when it is called for the given time."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise Interrupted

    return hook


@pytest.mark.parametrize("place", ["mlp", "v_proj"])
@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_exception_inside_of_a_forward(model_class: type, in_pass: int, place: str) -> None:
    base = tiny_model(model_class)
    base_output = output_of(base)
    model = steered(base)
    expected = output_of(model)
    block = blocks_of(model)[2]
    module = block.mlp if place == "mlp" else value_projections_of(model)[2]
    handle = module.register_forward_hook(raise_at_call(in_pass))
    with pytest.raises(Interrupted):
        output_of(model)
    handle.remove()
    assert torch.equal(output_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(output_of(model), base_output)


@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_base_forward_inside_of_a_forward(model_class: type, in_pass: int) -> None:
    base = tiny_model(model_class)
    base_output = output_of(base)
    model = steered(base)
    expected = output_of(model)
    calls, nested = [], []

    def run_base_model(*_: Any) -> None:
        calls.append(1)
        if len(calls) == in_pass:
            with model.disable_adapter():
                nested.append(output_of(model))

    with blocks_of(model)[2].mlp.register_forward_hook(run_base_model):
        assert torch.equal(output_of(model), expected)
    assert torch.equal(nested[0], base_output)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_threads_run_the_same_model(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = [{name: x[[row]] for name, x in inputs_of(model).items()} for row in (0, 1)]
    expected = [output_of(model, rows) for rows in inputs]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    together = threading.Barrier(2)

    def work(row: int) -> None:
        for _ in range(20):
            together.wait()
            results[row].append(output_of(model, inputs[row]))

    threads = [threading.Thread(target=work, args=(row,)) for row in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in (0, 1):
        assert len(results[row]) == 20 and all(torch.equal(output, expected[row]) for output in results[row])


def test_value_projection_in_another_thread_during_a_forward() -> None:
    """A thread that runs a projection by itself while another is in pass 2 gets the plain projection."""
    model = steered(tiny_model(tf.ViTModel))
    projection, hidden_states = value_projections_of(model)[1], torch.randn(1, 5, 32)
    expected = projection(hidden_states)
    outputs = []

    def run_projection(*_: Any) -> None:
        thread = threading.Thread(target=lambda: outputs.append(projection(hidden_states)))
        thread.start()
        thread.join()

    handle = value_projections_of(model)[2].register_forward_hook(run_projection)
    output_of(model)
    handle.remove()
    assert len(outputs) == 2 and all(torch.equal(output, expected) for output in outputs)


def test_single_block_without_its_feedback_is_refused() -> None:
    model = steered(tiny_model(tf.ViTModel))
    block, hidden_states = blocks_of(model)[1], torch.randn(1, 5, 32)
    with pytest.raises(RuntimeError, match="Block 1 was called past the forward"):
        block(hidden_states)
    with model.disable_adapter():
        assert block(hidden_states).isfinite().all()


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_tensors_of_a_forward_are_freed(model_class: type, variant: str) -> None:
    model = steered(tiny_model(model_class), **RANGES[variant])
    tensors: list[weakref.ref] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda module, args, output: tensors.append(weakref.ref(output)))
    output_of(model)
    gc.collect()
    assert len(tensors) == 2 * NUM_BLOCKS and all(tensor() is None for tensor in tensors)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_inference_mode_and_training_alternate(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    expected = output_of(model)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(**inputs_of(model))[0], expected)
        loss_of(model).backward()
    assert torch.equal(output_of(model), expected)


# ----------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_class", [*VIT_AND_LLAMA, *CONVNEXT_AND_RESNET, tf.SwinForImageClassification])
def test_copies_are_independent(model_class: type, copy_of: Callable) -> None:
    model = steered(tiny_model(model_class))
    expected = output_of(model)
    other = copy_of(model)
    assert_same(output_of(other), expected)
    steer(other)
    changed = output_of(other)
    assert not torch.allclose(changed, expected)
    assert torch.equal(output_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(output_of(other), changed)
    loss_of(other).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_state_dict_is_saved_and_loaded_by_torch(model_class: type, tmp_path: Any) -> None:
    model, other = steered(tiny_model(model_class)), adapted(tiny_model(model_class))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert_same(output_of(other), output_of(model))
