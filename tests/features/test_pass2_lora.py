"""LoRA in pass 2 only: `y = W x + g ((alpha / r) B A x + b)`, under the gate, compared with hooks on a base model."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from toast_peft import TopDownConfig, store_features

from ..golden.reference import ReferenceModel
from ..helpers import (
    adapted,
    assert_same,
    assert_same_gradients,
    blocks_of,
    counted_block_calls,
    feedback_of,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steered,
    turn_prompts,
    value_projections_of,
)
from ..zoo import NUM_BLOCKS, VARIANTS, VIT_AND_LLAMA, add_noise, inputs_of, tiny_model
from .test_gate import closed, gate_of, gated, inputs_for
from .test_shared_cache import BETWEEN, assert_equal_to_rounding, assert_same_numbers, generate, run_parts

MODELS = [*VIT_AND_LLAMA, tf.GPT2LMHeadModel, tf.BertForSequenceClassification]
LORA: dict[str, Any] = {"pass2_target_modules": "all-linear", "pass2_r": 3, "pass2_lora_alpha": 6, "pass2_bias": "all"}
ONLY = LORA | {"trainable_parts": ["pass2"], "r": 2}
BIASES = LORA | {"pass2_r": 0}
Change = Callable[[str, torch.Tensor], torch.Tensor]


def both(model_class: type, variant: str = "full", **options: Any) -> PeftModel:
    """A model in double precision with feedback, LoRA of pass 2 and a gate that is open for some tokens."""
    return gated(model_class, **LORA | VARIANTS[variant] | options)


def change_of(model: PeftModel) -> Change:
    """What LoRA adds to the output of a linear layer, from its weights; zero where it has none."""
    weights = dict(model.named_parameters())

    def change(name: str, x: torch.Tensor) -> torch.Tensor | int:
        index, _, rest = name.partition(".")
        part = f".second_pass.{index}-{rest.replace('.', '-')}-pass2.topdown_pass2_"
        found = {key.rpartition(part)[2][0]: p for key, p in weights.items() if part in key and ".default." in key}
        product = 2 * x @ found["A"].T @ found["B"].T if "A" in found else 0
        return product + found["b"] if found else 0

    return change  # type: ignore[return-value]


@contextmanager
def added_by_hand(
    base: nn.Module, change: Change, gate: torch.Tensor | float, is_on: Callable = bool
) -> Iterator[None]:
    """Hooks that add to the outputs of the linear layers of the blocks of a base model."""

    def add(name: str) -> Callable:
        return lambda module, args, output: output + gate * change(name, args[0]) if is_on(1) else None

    with ExitStack() as hooks:
        for index, block in enumerate(all_blocks_of(base)):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                    hooks.enter_context(module.register_forward_hook(add(f"{index}.{name}")))
        yield


def all_blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer.h) if isinstance(model, tf.GPT2LMHeadModel) else blocks_of(model)


def steer_values(td: torch.Tensor, is_fused: bool) -> dict[str, Callable]:
    """Hooks of a value projection: one of GPT-2 computes queries and keys as well, which see no feedback."""

    def of_values(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        columns = slice(2 * output.shape[-1] // 3, None)
        added = torch.zeros_like(output)
        added[..., columns] = td @ module.weight[:, columns]
        return output + added

    of_input = lambda module, args: (args[0] + td, *args[1:])  # noqa: E731
    return {"register_forward_hook": of_values} if is_fused else {"register_forward_pre_hook": of_input}


def by_hand(model_class: type, model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of pass 2 of a plain base model with the feedback and the LoRA of an adapter."""
    base = tiny_model(model_class).double()
    [feedback] = feedback_of(model, inputs)
    gate = gate_of(model)
    is_fused = model_class is tf.GPT2LMHeadModel
    values = [block.attn.c_attn for block in base.transformer.h] if is_fused else value_projections_of(base)
    with ExitStack() as hooks:
        for index, td in feedback.items():
            for register, hook in steer_values(td, is_fused).items():
                hooks.enter_context(getattr(values[index], register)(hook))
        hooks.enter_context(added_by_hand(base, change_of(model), 1.0 if gate is None else gate))
        return output_of(base, inputs)


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("model_class", "variant", "gate"),
    [*product(MODELS, ["full"], [None]), *product(MODELS, ["middle"], ["token", "sequence"])],
)
def test_output_is_that_of_the_formula(model_class: type, variant: str, gate: str | None) -> None:
    model = both(model_class, variant, gate=gate or "token")
    if gate is None:
        paths_of(model)[0].selection.add_gate("default", None)
        paths_of(model)[0].selection.topdown_config["default"].gate = None
    inputs = inputs_for(model)
    assert_same(output_of(model, inputs), by_hand(model_class, model, inputs))
    if gate is not None:
        assert (gate_of(model) > 0).any() and (gate_of(model) == 0).any()


@pytest.mark.parametrize("model_class", MODELS)
def test_biases_alone(model_class: type) -> None:
    model = gated(model_class, **BIASES)
    parts = {name.partition("topdown_pass2_")[2] for name, _ in model.named_parameters() if "pass2_" in name}
    assert parts == {"bias.default.weight"}
    assert_same(output_of(model, inputs_for(model)), by_hand(model_class, model, inputs_for(model)))


@pytest.mark.parametrize("model_class", MODELS)
def test_start_is_the_base_model(model_class: type) -> None:
    expected = output_of(tiny_model(model_class))
    model = adapted(tiny_model(model_class), **LORA)
    assert torch.equal(output_of(model), expected)
    add_noise(*(p for name, p in model.named_parameters() if "pass2_B" in name))
    assert not torch.allclose(output_of(model), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("variant", ["full", "early", "late"])
@pytest.mark.parametrize("model_class", MODELS)
def test_closed_gate_gives_the_output_of_the_base_model(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    model = steered(tiny_model(model_class), gate="sequence", **LORA, **VARIANTS[variant])
    inputs = inputs_for(base)
    with closed(model):
        assert torch.equal(output_of(model, inputs), output_of(base, inputs))
    assert not torch.allclose(output_of(model, inputs), output_of(base, inputs), atol=1e-4)


def test_pass_1_is_that_of_the_base_model() -> None:
    """The features, and with them mask and feedback, are those of an adapter without LoRA."""
    model = both(tf.LlamaForCausalLM)
    [found] = feedback_of(model, inputs_for(model))
    plain = gated(tf.LlamaForCausalLM)
    plain.load_state_dict(model.state_dict(), strict=False)
    [expected] = feedback_of(plain, inputs_for(model))
    for index, td in expected.items():
        assert torch.equal(found[index], td)


def test_value_projection_without_feedback_of_another_adapter_keeps_its_lora() -> None:
    """The hook of the feedback, made later, computes the values anew; LoRA adds to these."""
    model = steered(tiny_model(tf.GPT2LMHeadModel).double(), layers_to_transform=[3], **LORA)
    model.add_adapter("other", TopDownConfig(**LORA))
    for name, p in model.named_parameters():
        if ".other." in name and name.replace("other", "default") in dict(model.named_parameters()):
            p.data.copy_(model.get_parameter(name.replace("other", "default")))
    model.set_adapter("other")
    turn_prompts(model, "other", inputs_for(model))
    add_noise(*(p for name, p in model.named_parameters() if "linear2.other" in name))
    model.double()
    inputs = inputs_for(model)
    assert_same(output_of(model, inputs), by_hand(tf.GPT2LMHeadModel, model, inputs))


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("variant", "options", "checkpointing"),
    [
        (*row, None)
        for row in (("full", LORA), ("late", LORA), ("full", ONLY), ("middle", ONLY), ("full", ONLY | BIASES))
    ]
    + [(*row, use_reentrant) for row in (("late", LORA), ("full", ONLY)) for use_reentrant in (False, True)],
)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients(model_class: type, variant: str, options: dict[str, Any], checkpointing: bool | None) -> None:
    base = tiny_model(model_class).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of(base).items()}
    model = steered(copy.deepcopy(base), inputs, **options | VARIANTS[variant]).double().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss_of(model, inputs).backward()
    found = gradients(model)
    assert all(("pass2" in name) or options is LORA for name in found)
    model.zero_grad()
    calls: list[int] = []
    base.requires_grad_(False)
    with base.register_forward_pre_hook(lambda *_: calls.append(1)):
        in_second_pass = lambda _: len(calls) == 2  # noqa: E731
        with added_by_hand(base, change_of(model), 1.0, in_second_pass):
            loss_of(ReferenceModel(base, model), inputs).backward()
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpointing_keeps_the_gate(model_class: type, use_reentrant: bool) -> None:
    """Also when another forward, with a closed gate, has run before the backward pass."""
    found = []
    for checkpointing in (False, True):
        model = both(model_class, gate="token").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = loss_of(model, inputs_for(model))
        with closed(model):
            model(**inputs_for(model))
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("options", [LORA, ONLY, ONLY | BIASES])
def test_learns(options: dict[str, Any]) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM), pass2_lora_dropout=0.1, **options).train()
    labels = inputs_of(model)["input_ids"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(**inputs_of(model), labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert losses[-1] < (0.9 if options.get("pass2_r") else 0.98) * losses[0]
    [path] = paths_of(model)
    is_zero = not any(p.any() for name, p in path.layers.named_parameters() if re.search("linear2(_B)?[.]", name))
    assert is_zero == ("trainable_parts" in options)
    expected = output_of(model.eval())
    assert torch.equal(output_of(model), expected)  # dropout is for training


def test_autocast_and_half_precision() -> None:
    model = both(tf.LlamaForCausalLM).float()
    expected = output_of(model, inputs_for(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_of(model, inputs_for(model))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.06 * expected.abs().max().item())
    half = steered(tiny_model(tf.LlamaForCausalLM).bfloat16(), gate="token", **LORA)
    with closed(half):
        plain = output_of(tiny_model(tf.LlamaForCausalLM).bfloat16(), inputs_for(half))
        assert torch.equal(output_of(half, inputs_for(half)), plain)
    assert {p.dtype for name, p in half.named_parameters() if "pass2" in name} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("variant", ["full", "early", "late"])
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.GPT2LMHeadModel])
def test_cached_is_recomputed(model_class: type, variant: str, skips: bool) -> None:
    model = both(model_class, variant, skip_closed_rows=skips)
    ids = inputs_of(model, length=12)["input_ids"]
    expected = output_of(model, {"input_ids": ids, "use_cache": False})
    assert_equal_to_rounding(run_parts(model, [5, 4, 2, 1], None, BETWEEN["nothing"]), expected)


@pytest.mark.parametrize("gate", [None, "sequence"])
def test_generation_is_that_without_a_cache(gate: str | None) -> None:
    model = (
        steered(tiny_model(tf.LlamaForCausalLM).double(), **LORA).double()
        if gate is None
        else both(tf.LlamaForCausalLM)
    )
    assert_same_numbers(generate(model, num_beams=2), generate(model, num_beams=2, use_cache=False))


def test_generation_of_an_encoder_decoder() -> None:
    model = gated(tf.T5ForConditionalGeneration, **LORA)
    assert not any("EncDec" in name for path in paths_of(model) for name in path.second_pass)
    assert_same_numbers(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("variant", ["full", "early", "late"])
@pytest.mark.parametrize("model_class", [tf.ViTForImageClassification, tf.BertForSequenceClassification])
def test_rows_with_a_closed_gate_are_skipped(model_class: type, variant: str) -> None:
    """A row counts as open if its gate is, also where the mask is zero."""
    model = both(model_class, variant, skip_closed_rows=True)
    inputs = inputs_for(model)
    [path] = paths_of(model)
    no_mask = path.selection.topdown_prompt["default"].register_forward_hook(lambda module, args, mask: 0 * mask)
    with no_mask:
        found = output_of(model, inputs)
        assert sorted((gate_of(model) > 0).flatten(1).any(1).tolist()) == [False, True]
        assert not path.state.current.mask.any()
        model.peft_config["default"].skip_closed_rows = False
        assert_same(found, output_of(model, inputs))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_closed_rows_cost_one_pass(model_class: type) -> None:
    model = steered(tiny_model(model_class), gate="sequence", skip_closed_rows=True, **LORA)
    with closed(model), counted_block_calls(model) as calls:
        output = output_of(model, inputs_for(model))
    assert set(calls.values()) == {1} and len(calls) == NUM_BLOCKS
    assert torch.equal(output, output_of(tiny_model(model_class), inputs_for(model)))


def test_without_a_gate_no_row_is_skipped() -> None:
    model = steered(tiny_model(tf.LlamaForCausalLM), skip_closed_rows=True, **LORA)
    inputs = inputs_for(model)
    with paths_of(model)[0].selection.topdown_prompt["default"].register_forward_hook(lambda *args: 0 * args[2]):
        found = output_of(model, inputs)
        model.peft_config["default"].skip_closed_rows = False
        assert torch.equal(found, output_of(model, inputs))
    assert not torch.allclose(found, output_of(tiny_model(tf.LlamaForCausalLM), inputs), atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["mlp.fc1", "up_proj", "mlp.c_fc"]])
@pytest.mark.parametrize("model_class", MODELS[:3])
def test_fused_feedback_beside_it(model_class: type, targets: Any) -> None:
    if targets != "all-linear":
        name = {tf.ViTForImageClassification: "fc1", tf.LlamaForCausalLM: "up_proj"}.get(model_class, "c_fc")
        targets = [name]
    model = both(model_class, pass2_target_modules=targets)
    before = output_of(model, inputs_for(model))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fuse_feedback()
    # The input of a value projection that is a target has to have the feedback in it.
    assert paths_of(model)[0].fused.of_values == (targets != "all-linear")
    assert_same(output_of(model, inputs_for(model)), before)


@pytest.mark.parametrize("variant", ["full", "late"])
def test_stored_features_stay_valid(variant: str, tmp_path: Path) -> None:
    model = both(tf.LlamaForCausalLM, variant)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in inputs_of(model)["input_ids"]]
    stored = store_features(model, rows, tmp_path, dtype=torch.float64)
    batch = stored.collate([stored[0], stored[1]])
    plain = {name: value for name, value in batch.items() if name != "topdown_features"} | {"use_cache": False}
    assert_same(output_of(model, plain | {"topdown_features": batch["topdown_features"]}), output_of(model, plain))


# The first of three blocks runs in pass 1 only, the second in both, the third in pass 2 only.
MIDDLE = {"size": {"num_hidden_layers": 3}, "feedback_from": 2, "feedback_to": 1}


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    model = both(tf.ViTForImageClassification, gate="token", pass2_target_modules=["v_proj", "fc1"], **MIDDLE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = inputs_for(model)
    assert_same(output_of(compiled, inputs), output_of(model, inputs))


def test_exported() -> None:
    model = both(tf.ViTForImageClassification, pass2_target_modules=["v_proj", "fc1"], **MIDDLE)
    inputs = inputs_for(model)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False).module()
    assert_same(output_of(exported, inputs), output_of(model, inputs))
    assert gate_of(model) is not None  # of the last forward, and not of the traced one
