"""Several adapters active at once: their feedback is summed, each under its own gate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from toast_peft import TopDownConfig, feedback_statistics, fit_gate, initialize_feedback, store_features

from ..helpers import (
    CACHE,
    assert_same,
    assert_same_gradients,
    counted_block_calls,
    feedback_of,
    first_tensor,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steer,
    value_projections_of,
)
from ..zoo import MODELS, NUM_BLOCKS, VIT_AND_LLAMA, inputs_of, tiny_model
from .test_gate import open_for_half
from .test_shared_cache import assert_equal_to_rounding

NAMES = ["default", "late", "early"]
FAMILIES = [
    *VIT_AND_LLAMA,
    tf.GPT2LMHeadModel,
    tf.SwinForImageClassification,
    tf.SegformerForSemanticSegmentation,
    tf.ConvNextForImageClassification,
    tf.T5ForConditionalGeneration,
]
LORA = {"pass2_target_modules": "all-linear", "pass2_r": 3}


def inputs_for(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """Its inputs in its dtype."""
    inputs = inputs_of(model, **options)
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def with_adapters(
    model_class: type, options: Mapping[str, dict[str, Any]] | None = None, dtype: torch.dtype = torch.float64
) -> PeftModel:
    """A model with some adapters, by default one of all blocks, a late one of low rank, and an early one."""
    base = tiny_model(model_class).to(dtype)
    inputs = inputs_for(base)
    options = options or {"default": {}, "late": {"r": 3, "feedback_to": 0.5}, "early": {"feedback_from": 0.5}}
    torch.manual_seed(1)
    first, *others = options
    of_row = MODELS[type(base)].adapter
    model = get_peft_model(base, TopDownConfig(**of_row | options[first]), adapter_name=first).eval()
    for name in others:
        model.add_adapter(name, TopDownConfig(**of_row | options[name]))
    for name in options:
        steer(model.to(dtype), name, inputs)
    return model


def activate(model: PeftModel, *names: str) -> None:
    """As with LoRA: a `PeftModel` itself takes one name only."""
    model.base_model.set_adapter(list(names))


def feedback_alone(model: PeftModel, name: str, inputs: dict[str, Any]) -> list[dict[int, torch.Tensor]]:
    activate(model, name)
    return feedback_of(model, inputs)


# ---------------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_sum_by_hand(model_class: type) -> None:
    """The base model, with the feedback of each adapter alone added to the inputs of its value projections."""
    model = with_adapters(model_class)
    inputs = inputs_for(model)
    alone = [feedback_alone(model, name, inputs)[0] for name in NAMES]
    assert [sorted(td) for td in alone] == [[0, 1, 2, 3], [2, 3], [0, 1]]
    base = tiny_model(model_class).double()
    for index, projection in enumerate(value_projections_of(base)):
        td = sum(of_adapter[index] for of_adapter in alone if index in of_adapter)
        projection.register_forward_pre_hook(lambda module, args, td=td: (args[0] + td,))
    activate(model, *NAMES)
    assert_same(output_of(model, inputs), output_of(base, inputs))
    assert not torch.allclose(output_of(model, inputs), output_of(tiny_model(model_class).double(), inputs))


@pytest.mark.parametrize("model_class", FAMILIES)
def test_sum_in_all_families(model_class: type) -> None:
    """One adapter that is given the sum as its own feedback."""
    model = with_adapters(model_class)
    inputs = inputs_for(model)
    alone = [feedback_alone(model, name, inputs)[0] for name in NAMES]
    path = paths_of(model)[0]
    activate(model, "default")
    plain = output_of_stack(model, path, inputs)
    summed = {i: sum(td[i] for td in alone if i in td) for i in alone[0]}
    with path.register_forward_hook(lambda *_: summed):
        expected = output_of_stack(model, path, inputs)
    activate(model, *NAMES)
    found = output_of_stack(model, path, inputs)
    assert_same(found, expected)
    assert not torch.allclose(found, plain)


def output_of_stack(model: nn.Module, path: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """That of the stack of blocks with a feedback path, as a decoder's features depend on its encoder."""
    outputs = []
    with path.passes.backbone_forward.module.register_forward_hook(lambda *args: outputs.append(args[-1])):
        output_of(model, inputs)
    return first_tensor(outputs[0])


def test_lora_of_pass_2_and_feedback_to_the_output() -> None:
    """Two of rank 3 are one of rank 6; of the feedback to the output there are two as well."""
    options = {"trainable_parts": ["pass2", "output"], "feedback_to_output": True, **LORA}
    model = with_adapters(tf.LlamaForCausalLM, {"one": options, "two": options})
    inputs = inputs_for(model)
    [path] = paths_of(model)
    with torch.no_grad():
        for name, prompt in path.selection.topdown_prompt.items():  # the same selection
            prompt.weight.copy_(path.selection.topdown_prompt["one"].weight)
            path.selection.topdown_transform[name].weight.copy_(torch.eye(32))
            for layer in path.layers.values():
                layer.topdown_linear2[name].weight.zero_()
    activate(model, "one", "two")
    found = output_of(model, inputs)
    model.add_adapter("both", TopDownConfig(**options | {"pass2_r": 6, "pass2_lora_alpha": 16}))
    model.double()
    with torch.no_grad():
        for part in ("prompt", "transform"):
            container = getattr(path.selection, f"topdown_{part}")
            container["both"].weight.copy_(container["one"].weight)
        output = path.to_output.topdown_output
        output["both"].weight.copy_(output["one"].weight + output["two"].weight)
        for layer in path.second_pass.values():
            a, b = layer.topdown_pass2_A, layer.topdown_pass2_B
            a["both"].weight.copy_(torch.cat([a["one"].weight, a["two"].weight]))
            b["both"].weight.copy_(torch.cat([b["one"].weight, b["two"].weight], dim=1))
            layer.topdown_scaling["both"] = layer.topdown_scaling["one"]
    activate(model, "both")
    assert_same(found, output_of(model, inputs))
    with model.disable_adapter():
        assert not torch.allclose(found, output_of(model, inputs))


def test_each_has_its_own_strength() -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    inputs = inputs_for(model)
    activate(model, "late", "early")
    both = output_of(model, inputs)
    model.set_feedback_scale(0.0, "early")
    found = output_of(model, inputs)
    activate(model, "late")
    assert_same(found, output_of(model, inputs))
    assert not torch.allclose(found, both)


def test_order_does_not_matter_and_neither_does_who_was_active_before() -> None:
    model = with_adapters(tf.ViTForImageClassification)
    inputs = inputs_for(model)
    activate(model, *NAMES)
    expected = output_of(model, inputs)
    activate(model, *reversed(NAMES))
    assert_same(output_of(model, inputs), expected)
    assert model.active_adapters == NAMES[::-1]


@pytest.mark.parametrize(("names", "calls"), [(["late", "early"], 8), (["late"], 6), (["early"], 6)], ids=str)
def test_cost_is_that_of_the_range_of_all(names: list[str], calls: int) -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    activate(model, *names)
    with counted_block_calls(model) as counted:
        output_of(model, inputs_for(model) | {"use_cache": False})
    assert counted.total() == calls


# ------------------------------------------------------------------------------------------------------------- gates


def with_gates(model_class: type, **options: Any) -> PeftModel:
    """Two adapters, of which the one is open for the first row of the inputs and the other for the second."""
    model = with_adapters(model_class, {"law": {"gate": "sequence", **options}, "medicine": {"gate": "sequence"}})
    inputs = inputs_for(model)
    for name, row in (("law", 0), ("medicine", 1)):
        rows = [{key: x[i : i + 1] for key, x in inputs.items()} for i in range(2)]
        activate(model, name)
        fit_gate(model, [rows[row]], [rows[1 - row]], name, quantile=1.0)
    return model


@pytest.mark.parametrize("options", [{}, LORA], ids=["feedback", "LoRA of pass 2"])
@pytest.mark.parametrize("model_class", [tf.BertForSequenceClassification, tf.ViTForImageClassification])
def test_adapters_route_themselves(model_class: type, options: dict[str, Any]) -> None:
    """A closed one adds nothing at all, so each row is that of its own adapter."""
    model = with_gates(model_class, **options)
    inputs = inputs_for(model)
    activate(model, "law", "medicine")
    found = output_of(model, inputs)
    for row, name in enumerate(["law", "medicine"]):
        activate(model, name)
        alone = output_of(model, inputs)
        assert torch.equal(found[row], alone[row])
        with model.disable_adapter():
            plain = output_of(model, inputs)
        assert torch.equal(alone[1 - row], plain[1 - row]) and not torch.allclose(alone[row], plain[row])


def test_statistics_are_those_of_each() -> None:
    model = with_gates(tf.BertForSequenceClassification)
    inputs = inputs_for(model) | {"attention_mask": torch.ones(2, 9)}
    alone = {}
    for name in ("law", "medicine"):
        activate(model, name)
        output_of(model, inputs)
        alone |= {f"{name}_{key}": value for key, value in feedback_statistics(model).items()}
    assert 0 < alone["law_mean_gate"] < 1
    activate(model, "law", "medicine")
    output_of(model, inputs)
    assert feedback_statistics(model) == alone
    assert paths_of(model)[0].state.current.mask is None  # there is not one


def test_closed_rows_are_those_that_none_of_them_changes() -> None:
    options = {"gate": "sequence", "skip_closed_rows": True}
    model = with_adapters(tf.BertForSequenceClassification, {"law": options, "medicine": options})
    inputs = inputs_for(model, batch_size=3)
    rows = [{key: x[i : i + 1] for key, x in inputs.items()} for i in range(3)]
    for name, row in (("law", 0), ("medicine", 1)):
        activate(model, name)
        fit_gate(model, [rows[row]], [rows[i] for i in range(3) if i != row], name, quantile=1.0)
    activate(model, "law", "medicine")
    found = output_of(model, inputs)
    sizes = []
    handle = (
        paths_of(model)[0]
        .passes.block_forwards[0]
        .module.output.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    )
    assert torch.equal(output_of(model, inputs), found)
    handle.remove()
    assert sizes == [3, 2]
    with model.disable_adapter():
        assert torch.equal(found[2], output_of(model, inputs)[2])
    for config in model.peft_config.values():
        config.skip_closed_rows = False
    assert_same(output_of(model, inputs), found)


# ------------------------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("names", [NAMES, ["late", "early"], ["early", "late"]], ids=str)
@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.MistralForCausalLM, tf.GPT2LMHeadModel])
def test_cached_is_recomputed(model_class: type, names: list[str]) -> None:
    model = with_adapters(model_class)
    activate(model, *names)
    ids = inputs_for(model)["input_ids"]
    whole, cache, found = output_of(model, {"input_ids": ids}), tf.DynamicCache(config=model.config), []
    for part in ids.split([4, 3, 1, 1], dim=1):
        found.append(output_of(model, {"input_ids": part, CACHE: cache}))
    assert_equal_to_rounding(torch.cat(found, dim=1), whole)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generation(options: dict[str, Any]) -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    activate(model, *NAMES)
    inputs = inputs_for(model)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("share", [False, True])
def test_running_sums_in_a_cache(share: bool) -> None:
    """One for each kind of features that a sequence gate looks at."""
    options = {"gate": "sequence", "skip_closed_rows": share}
    model = with_adapters(
        tf.LlamaForCausalLM,
        {"one": options, "two": {**options, "r": 3}, "early": {**options, "feedback_from": 2}, "open": {}},
    )
    inputs = inputs_for(model)
    for name in ("one", "two", "early"):
        activate(model, name)
        open_for_half(model, paths_of(model)[0], inputs, is_causal=True, name=name)
    activate(model, "one", "two", "early", *([] if share else ["open"]))
    whole, cache, found = output_of(model, inputs), tf.DynamicCache(config=model.config), []
    for part in inputs["input_ids"].split([2, 4, 2, 1], dim=1):
        found.append(output_of(model, {"input_ids": part, CACHE: cache}))
    assert_equal_to_rounding(torch.cat(found, dim=1), whole)
    assert len(cache.layers) == 2 * NUM_BLOCKS + 2


def test_a_cache_knows_the_set_that_it_was_filled_with() -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    ids = inputs_for(model)["input_ids"]
    activate(model, "default", "late")
    cache = tf.DynamicCache(config=model.config)
    output_of(model, {"input_ids": ids, CACHE: cache})
    for names in (["default"], ["late", "early"], NAMES):
        activate(model, *names)
        with pytest.raises(ValueError, match=r"filled by the TOAST adapter 'default \+ late'.*new cache"):
            output_of(model, {"input_ids": ids[:, :1], CACHE: cache})
    activate(model, "default", "late")
    output_of(model, {"input_ids": ids[:, :1], CACHE: cache})


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_of_them_are_trained(checkpointing: bool) -> None:
    """Each gets the gradient that it would get alone, beside the frozen feedback of the others."""
    options = {"one": LORA, "two": {"r": 3, **LORA}}
    model = with_adapters(tf.LlamaForCausalLM, options)
    activate(model, "one", "two")
    inputs = inputs_for(model) | {"use_cache": False}
    loss_of(model, inputs).backward()
    expected = gradients(model)
    assert {name.split(".")[-2] for name in expected} == {"one", "two"}
    again = with_adapters(tf.LlamaForCausalLM, options).train()
    activate(again, "one", "two")
    if checkpointing:
        again.gradient_checkpointing_enable({"use_reentrant": True})
    loss_of(again, inputs).backward()
    assert_same_gradients(gradients(again), expected)


def test_stored_features_serve_all_of_them(tmp_path: Path) -> None:
    model = with_adapters(tf.LlamaForCausalLM, {"one": {}, "two": {"r": 3}, "early": {"feedback_from": 2}})
    inputs = inputs_for(model) | {"use_cache": False}
    stored = store_features(model, [{"input_ids": row} for row in inputs["input_ids"]], tmp_path, dtype=torch.float64)
    batch = stored.collate([stored[0], stored[1]])
    activate(model, "one", "two")
    assert_same(output_of(model, dict(batch)), output_of(model, inputs))
    activate(model, "one", "early")
    with pytest.raises(ValueError, match="was stored for an adapter with feedback_from=4"):
        output_of(model, dict(batch))


# ------------------------------------------------------------------------------------------------------- what is not


def test_unknown_names_are_refused() -> None:
    model = with_adapters(tf.LlamaForCausalLM)
    with pytest.raises(ValueError, match=r"no adapters \['law'\]; expected some of \['default', 'late', 'early'\]"):
        activate(model, "default", "law")
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("option", "training"), [({"double_value_bias": True}, False), ({"variational_weight": 0.1}, True)], ids=str
)
def test_what_has_no_sum_is_refused(option: dict[str, Any], training: bool) -> None:
    model = with_adapters(tf.ViTForImageClassification, {"one": {}, "two": option}).train(training)
    activate(model, "one", "two")
    with pytest.raises(NotImplementedError, match=r"\['one', 'two'\] are active together, and 'two' .*one adapter"):
        model(**inputs_for(model))
    activate(model, "two")
    model(**inputs_for(model))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, inputs: initialize_feedback(model, [inputs], "default"),
        lambda model, inputs: fit_gate(model, [inputs], [inputs], "default"),
        lambda model, inputs: model.fuse_feedback(),
        lambda model, inputs: model(**inputs, topdown_prompt=torch.ones(32, dtype=torch.float64)),
        lambda model, inputs: store_features(model, [{"input_ids": row} for row in inputs["input_ids"]], "unused"),
    ],
    ids=["initialize_feedback", "fit_gate", "fuse_feedback", "topdown_prompt", "store_features"],
)
def test_what_is_for_one_adapter_says_so(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = with_adapters(tf.LlamaForCausalLM)
    activate(model, "default", "late")
    with pytest.raises(ValueError, match=r"\['default', 'late'\] are active together.*`set_adapter`"):
        call(model, inputs_for(model))


def test_one_of_them_may_have_a_head_of_its_own() -> None:
    """PEFT takes one head for a forward."""
    options = {"head": {"modules_to_save": ["classifier"]}, "plain": {}, "other": {"modules_to_save": ["classifier"]}}
    model = with_adapters(tf.ViTForImageClassification, options)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        activate(model, "head", "plain", "other")
    activate(model, "head")
    before = output_of(model, inputs_for(model))
    activate(model, "head", "plain")
    assert output_of(model, inputs_for(model)).shape == before.shape
    assert not torch.allclose(output_of(model, inputs_for(model)), before)
