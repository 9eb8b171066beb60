"""Mixed batches: `adapter_names` names an adapter for each row, as with PEFT's LoRA."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from toast_peft import feedback_statistics, fit_gate
from toast_peft.core.active_adapters import Rows
from toast_peft.core.second_pass_lora import in_rows

from ..helpers import CACHE, assert_same, counted_block_calls, output_of, paths_of
from ..zoo import NUM_BLOCKS, VIT_AND_LLAMA, tiny_model
from .test_several_adapters import LORA, activate, inputs_for, with_adapters

NAMES = ["late", "__base__", "default", "late", "early", None]
FAMILIES = [
    *VIT_AND_LLAMA,
    tf.GPT2LMHeadModel,
    tf.BertForSequenceClassification,
    tf.SwinForImageClassification,
    tf.SegformerForSemanticSegmentation,
    tf.ConvNextForImageClassification,
    tf.T5ForConditionalGeneration,
]


def rows_of(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    return {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def alone(model: PeftModel, name: str | None, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model gives with one adapter for all rows."""
    if name in (None, "__base__"):
        with model.disable_adapter():
            return output_of(model, inputs)
    activate(model, name)
    return output_of(model, inputs)


def assert_each_row_is_that_of_its_adapter(
    model: PeftModel, inputs: dict[str, Any], names: list[str | None] = NAMES
) -> None:
    """Row by row, run one by one."""
    activate(model, next(iter(model.peft_config)))
    found = output_of(model, inputs | {"adapter_names": names})
    expected = torch.cat([alone(model, name, rows_of(inputs, [row])) for row, name in enumerate(names)])
    assert_same(found, expected)
    plain = alone(model, None, inputs)
    for row, name in enumerate(names):
        assert torch.allclose(found[row], plain[row]) == (name in (None, "__base__"))


@pytest.mark.parametrize("model_class", FAMILIES)
def test_each_row_is_that_of_its_adapter(model_class: type) -> None:
    model = with_adapters(model_class)
    inputs = inputs_for(model, batch_size=6)
    assert_each_row_is_that_of_its_adapter(model, inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding_and_gates(side: str) -> None:
    options = {"one": {"gate": "sequence"}, "two": {"gate": "sequence", "r": 3}, "three": {"gate": "token"}}
    model = with_adapters(tf.LlamaForCausalLM, options)
    inputs = inputs_for(model, batch_size=4) | {"attention_mask": torch.ones(4, 9, dtype=torch.long)}
    inputs["attention_mask"][1, slice(3) if side == "left" else slice(-3, None)] = 0
    for name in options:
        activate(model, name)
        fit_gate(model, [rows_of(inputs, [0, 1])], [rows_of(inputs, [2, 3])], name, quantile=0.5)
    names = ["one", "two", "three", "__base__"]
    own = inputs["attention_mask"].bool()
    activate(model, "one")
    found = output_of(model, inputs | {"adapter_names": names})
    expected = torch.cat([alone(model, name, rows_of(inputs, [row])) for row, name in enumerate(names)])
    assert_same(found[own], expected[own])


def test_rows_of_the_base_model_are_the_base_model() -> None:
    """In every bit: the batch is the same, and zero is added."""
    model = with_adapters(tf.LlamaForCausalLM, dtype=torch.float32)
    inputs = inputs_for(model, batch_size=6)
    found = output_of(model, inputs | {"adapter_names": NAMES})
    plain = alone(model, None, inputs)
    assert all(torch.equal(found[row], plain[row]) for row, name in enumerate(NAMES) if name in (None, "__base__"))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("names", "passes"), [(["__base__", None], 1), (["late", "late"], 1.5), (["late", "early"], 2)], ids=str
)
def test_what_a_mixed_batch_costs(names: list[str | None], passes: float, skip: bool) -> None:
    """No pass 2 where there is no adapter, and of one adapter only its own blocks."""
    options = {"late": {"feedback_to": 2}, "early": {"feedback_from": 2}}
    model = with_adapters(
        tf.LlamaForCausalLM, {name: {**of_range, "skip_closed_rows": skip} for name, of_range in options.items()}
    )
    with counted_block_calls(model) as calls:
        output_of(model, inputs_for(model) | {"use_cache": False, "adapter_names": names})
    assert calls.total() == passes * NUM_BLOCKS


@pytest.mark.parametrize("options", [{}, LORA, {"modules_to_save": ["classifier"]}], ids=str)
def test_rows_without_adapter_are_skipped(options: dict[str, Any]) -> None:
    skip = {"skip_closed_rows": True}
    model = with_adapters(tf.BertForSequenceClassification, {"one": options | skip, "two": {"r": 3} | options | skip})
    inputs = inputs_for(model, batch_size=6)
    names = ["two", None, "one", "__base__", None, "two"]
    assert_each_row_is_that_of_its_adapter(model, inputs, names)
    sizes: list[int] = []
    layer = paths_of(model)[0].passes.block_forwards[0].module.output
    with layer.register_forward_hook(lambda module, args, output: sizes.append(len(output))):
        output_of(model, inputs | {"adapter_names": names})
    assert sizes == [6, 3]


@pytest.mark.parametrize("gate", [None, "token"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_lora_of_pass_2_and_feedback_to_the_output(model_class: type, gate: str | None) -> None:
    output = {"feedback_to_output": True} if model_class is tf.LlamaForCausalLM else {}
    options = {"gate": gate, **LORA, **output}
    model = with_adapters(model_class, {"one": options, "two": {"r": 3, "pass2_bias": "all", **options}, "plain": {}})
    inputs = inputs_for(model, batch_size=5)
    if gate is not None:
        for name in ("one", "two"):
            activate(model, name)
            fit_gate(model, [rows_of(inputs, [0, 1])], [rows_of(inputs, [2, 3])], name, quantile=0.2)
    assert_each_row_is_that_of_its_adapter(model, inputs, ["two", "one", None, "plain", "two"])


def test_modules_to_save_are_those_of_each_row() -> None:
    """Of an adapter without them, and of the base model, the head is that of the base model."""
    head = {"modules_to_save": ["classifier"]}
    model = with_adapters(tf.ViTForImageClassification, {"one": head, "two": head | {"r": 3}, "plain": {}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1.0 if ".one." in name else -2.0)
    inputs = inputs_for(model, batch_size=5)
    assert_each_row_is_that_of_its_adapter(model, inputs, ["two", "plain", "one", None, "two"])


@pytest.mark.parametrize("skip", [False, True])
def test_modules_to_save_in_the_backbone(skip: bool) -> None:
    """They run in both passes, with all rows of the batch."""
    options = {"modules_to_save": ["fc1"], "skip_closed_rows": skip}
    model = with_adapters(tf.ViTForImageClassification, {"one": options, "two": options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.3 if ".one." in name else -0.2)
    assert_each_row_is_that_of_its_adapter(model, inputs_for(model, batch_size=3), ["two", None, "one"])


def test_what_peft_runs_for_one_adapter_only_is_refused() -> None:
    model = with_adapters(tf.ViTForImageClassification, {"one": {"modules_to_save": ["layernorm"]}, "two": {}})
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules"):  # PEFT's own
        output_of(model, inputs_for(model) | {"adapter_names": ["one", "two"]})


# -------------------------------------------------------------------------------------------------------- generation


def generated(model: PeftModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **defaults | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.GPT2LMHeadModel, tf.T5ForConditionalGeneration])
def test_generation(model_class: type, options: dict[str, Any]) -> None:
    model = with_adapters(model_class)
    model.peft_config["default"].task_type = None
    inputs = {"input_ids": inputs_for(model, batch_size=6)["input_ids"]}
    found = generated(model, inputs, adapter_names=NAMES, **options)
    expected = []
    for row, name in enumerate(NAMES):
        activate(model, "default" if name in (None, "__base__") else name)
        if name in (None, "__base__"):
            with model.disable_adapter():
                expected.append(generated(model, rows_of(inputs, [row]), **options))
        else:
            expected.append(generated(model, rows_of(inputs, [row]), **options))
    assert torch.equal(found, torch.cat(expected))


def test_sampling_several_of_each_row() -> None:
    """Each continuation is that of the adapter of its row: no token is changed where the base model samples."""
    model = with_adapters(tf.LlamaForCausalLM)
    inputs = inputs_for(model, batch_size=2)
    found = generated(
        model, inputs, adapter_names=["default", None], do_sample=True, num_return_sequences=3, use_cache=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    names = ["default"] * 3 + [None] * 3
    logits = output_of(model, {"input_ids": found.sequences[:, :-1], "adapter_names": names})
    assert_same(logits[:, -1].float(), found.logits[-1])


def test_cached_is_recomputed_with_gates() -> None:
    options = {"one": {"gate": "sequence"}, "two": {"gate": "sequence", "r": 3, "feedback_to": 2}}
    model = with_adapters(tf.LlamaForCausalLM, options)
    inputs = inputs_for(model, batch_size=4)
    for name in options:
        activate(model, name)
        fit_gate(model, [rows_of(inputs, [0, 1])], [rows_of(inputs, [2, 3])], name, quantile=0.3)
    names = {"adapter_names": ["two", None, "one", "two"]}
    whole, cache, found = output_of(model, inputs | names), tf.DynamicCache(config=model.config), []
    for part in inputs["input_ids"].split([4, 3, 1, 1], dim=1):
        found.append(output_of(model, {"input_ids": part, CACHE: cache} | names))
    assert_same(torch.cat(found, dim=1), whole)
    with pytest.raises(ValueError, match="Start with a new cache"):
        output_of(model, {"input_ids": part, CACHE: cache, "adapter_names": names["adapter_names"][::-1]})


# ---------------------------------------------------------------------------------------- around it, and what is not


def test_statistics_are_those_of_the_rows() -> None:
    model = with_adapters(tf.BertForSequenceClassification)
    inputs = inputs_for(model, batch_size=4) | {"attention_mask": torch.ones(4, 9, dtype=torch.long)}
    inputs["attention_mask"][1, 3:] = 0
    expected = {}
    for name, rows in (("late", [1, 3]), ("default", [2])):
        activate(model, name)
        output_of(model, rows_of(inputs, rows))
        expected |= {f"{name}_{key}": value for key, value in feedback_statistics(model).items()}
    output_of(model, inputs | {"adapter_names": [None, "late", "default", "late"]})
    assert feedback_statistics(model) == pytest.approx(expected)


def test_after_it_all_is_as_before_also_when_it_fails() -> None:
    model = with_adapters(tf.ViTForImageClassification, {"one": {"modules_to_save": ["classifier"]}, "two": {}})
    inputs = inputs_for(model)
    activate(model, "two")
    expected, hooks = output_of(model, inputs), hooks_of(model)
    output_of(model, inputs | {"adapter_names": ["one", "two"]})
    assert torch.equal(output_of(model, inputs), expected) and hooks_of(model) == hooks
    with pytest.raises(ValueError):
        output_of(model, {"pixel_values": inputs["pixel_values"][:, :1], "adapter_names": ["one", "two"]})
    assert torch.equal(output_of(model, inputs), expected) and hooks_of(model) == hooks


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_another_thread_runs_the_active_adapter() -> None:
    model = with_adapters(tf.ViTForImageClassification, {"one": {"modules_to_save": ["classifier"]}, "two": {}})
    inputs = inputs_for(model)
    activate(model, "one")
    expected, found = output_of(model, inputs), []
    backbone = paths_of(model)[0].passes.backbone_forward.module

    def run_another(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.append(output_of(model, inputs)))
            thread.start()
            thread.join()

    with backbone.register_forward_pre_hook(run_another):
        output_of(model, inputs | {"adapter_names": ["two", None]})
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["default", "law"],
            r"names \['law'\], and the TOAST adapters of the model are \['default', 'early', 'late'\]",
        ),
        (["default"], "has 1 names and the batch has 2 rows"),
        (["default"] * 4, "has 4 names and the batch has 2 rows"),
        ("default", "is 'default'; expected a list"),
        ([], r"is \[\]; expected a list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_wrong_names_are_refused(model_class: type, names: Any, message: str) -> None:
    model = with_adapters(model_class)
    with pytest.raises(ValueError, match=message):
        model(**inputs_for(model), adapter_names=names)
    if model.base_model.model.can_generate():
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs_for(model), adapter_names=names)


@pytest.mark.parametrize("names", [["default"], ["default"] * 3], ids=["fewer", "more"])
def test_names_are_counted_where_a_task_type_hides_the_inputs(names: list[str]) -> None:
    """`PeftModelForCausalLM` hands on the names without the inputs."""
    model = with_adapters(tf.LlamaForCausalLM, {"default": {"task_type": "CAUSAL_LM"}, "late": {"feedback_to": 2}})
    inputs = inputs_for(model)
    with pytest.raises(ValueError, match=f"has {len(names)} names and the batch has 2 rows"):
        model(**inputs, adapter_names=names)
    assert_each_row_is_that_of_its_adapter(model, inputs, ["late", "default"])


def test_refused_in_training_fused_or_with_prompts() -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    given = inputs_for(model) | {"adapter_names": ["default", "late"]}
    with pytest.raises(ValueError, match="in training mode; call `model.eval"):
        model.train()(**given)
    model.eval().fuse_feedback()
    with pytest.raises(ValueError, match="is fused; call `unfuse_feedback.* to run a mixed batch"):
        model(**given)
    model.unfuse_feedback()
    with pytest.raises(ValueError, match="`topdown_prompt` was given in a mixed batch"):
        model(**given, topdown_prompt=torch.ones(32, dtype=torch.float64))


def test_modules_that_do_not_take_the_tokens_are_refused() -> None:
    """Experts get the tokens of all rows, sorted by expert; others all tokens in one sequence."""
    rows = Rows(torch.tensor([1]), batch_size=2, num_tokens=3)
    assert in_rows(torch.ones(6, 4), rows).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"\[5, 4\] in a mixed batch of 2 rows, so it is not known"):
        in_rows(torch.ones(5, 4), rows)


def test_saved_adapters_in_one_batch(tmp_path: Path) -> None:
    """As a user would: two adapters from folders, one batch."""
    model = with_adapters(tf.ViTForImageClassification, {"one": {}, "two": {"r": 3}})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(tf.ViTForImageClassification).double(), tmp_path / "one", adapter_name="one"
    )
    loaded.load_adapter(tmp_path / "two", "two")
    assert_each_row_is_that_of_its_adapter(loaded.double().eval(), inputs_for(loaded.double()), ["two", "one"])
