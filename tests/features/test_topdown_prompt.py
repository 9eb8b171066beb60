"""A prompt given with the inputs takes the place of the learned one."""

import copy
import threading
import types
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from toast_peft import TopDownConfig, draft_with_first_pass, store_features

from ..golden.reference import reference_forward
from ..helpers import (
    adapted,
    assert_same,
    assert_same_generation,
    assert_same_gradients,
    counted_block_calls,
    features_of,
    first_tensor,
    gradients,
    loss_of,
    output_of,
    paths_of,
    steered,
)
from ..zoo import GENERATING, HIDDEN_SIZE, NUM_BLOCKS, RANGES, VARIANTS, VIT_AND_LLAMA, inputs_of, tiny_model

STAGES = [tf.ConvNextForImageClassification, tf.ResNetForImageClassification, tf.SwinForImageClassification]
ONE_STACK = [
    cls for cls in GENERATING if cls not in (tf.T5ForConditionalGeneration, tf.WhisperForConditionalGeneration)
]


def exact(model_class: type, **options: Any) -> PeftModel:
    return steered(tiny_model(model_class), **options).double()


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Its inputs in its dtype, without a cache."""
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs_of(model).items()}
    return inputs | ({"use_cache": False} if "input_ids" in inputs else {})


def prompts_near_features(model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Another prompt for each row, that opens some of its tokens. Shape: [b, d]"""
    compared: list[torch.Tensor] = []

    def keep(prompt: nn.Module, args: tuple) -> None:
        compared.append(args[0].flatten(1, -2))

    [path] = paths_of(model)
    with path.selection.topdown_prompt["default"].register_forward_pre_hook(keep):
        output_of(model, inputs)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(compared[0].shape[::2], generator=generator, dtype=compared[0].dtype)
    return compared[0][:, 0] + noise.to(compared[0]) * compared[0].std()


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_mask_is_the_cosine_with_the_prompt_of_the_row(model_class: type, variant: str) -> None:
    base = tiny_model(model_class).double()
    model = steered(copy.deepcopy(base), **VARIANTS[variant]).double()
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    first, _ = TopDownConfig(**VARIANTS[variant]).feedback_range(NUM_BLOCKS)
    x = features_of(base, inputs, first)
    for given in (prompts, prompts[:1], prompts[0]):
        expected = reference_forward(base, model, inputs, given)
        assert_same(output_of(model, inputs | {"topdown_prompt": given}), first_tensor(expected))
        mask = F.cosine_similarity(x, given if given.dim() == 1 else given[:, None], dim=-1).clamp(0, 1)
        assert_same(paths_of(model)[0].state.current.mask, mask[..., None])
    assert (output_of(model, inputs) - first_tensor(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_flow_to_it(model_class: type, checkpointing: bool | None) -> None:
    base, results = tiny_model(model_class).double(), []
    model = steered(copy.deepcopy(base), trainable_parts=["transform", "linear1", "linear2"]).double().train()
    inputs = inputs_for(model)
    start = prompts_near_features(model, inputs)
    for forward in (model, lambda **kwargs: reference_forward(base, model, inputs, kwargs["topdown_prompt"])):
        if forward is model and checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        prompts = start.clone().requires_grad_()
        model.zero_grad()
        loss_of(forward, inputs | {"topdown_prompt": prompts}).backward()
        results.append({"given": prompts.grad} | gradients(model))
    assert results[0]["given"].abs().min() > 0
    assert_same_gradients(*results)


@pytest.mark.parametrize("model_class", STAGES)
def test_positions_of_a_map_are_compared_with_the_prompt_of_their_row(model_class: type) -> None:
    model = exact(model_class)
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    found = output_of(model, inputs | {"topdown_prompt": prompts})
    path = paths_of(model)[0]
    assert path.state.current.mask.dim() == 4
    learned = path.selection.topdown_prompt["default"].weight
    for row in range(2):
        with torch.no_grad():
            learned.copy_(prompts[row])
        assert_same(output_of(model, inputs)[row], found[row])
    assert not torch.allclose(found[0], found[1])


def test_prompt_of_one_row_changes_no_other_row() -> None:
    model = exact(tf.ViTForImageClassification)
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    before = output_of(model, inputs | {"topdown_prompt": prompts})
    prompts[1] = -prompts[1]
    after = output_of(model, inputs | {"topdown_prompt": prompts})
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_low_precision(model_class: type, dtype: torch.dtype) -> None:
    model = exact(model_class)
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    expected = output_of(model, inputs | {"topdown_prompt": prompts})
    model = model.to(dtype)
    inputs = inputs_for(model)
    for given in (prompts.to(dtype), prompts.float()):
        found = output_of(model, inputs | {"topdown_prompt": given})
        assert found.dtype == dtype
        assert_same(found, expected.to(dtype))


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_autocast(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    expected = output_of(model, inputs | {"topdown_prompt": prompts})
    with torch.autocast("cpu", torch.bfloat16):
        found = output_of(model, inputs | {"topdown_prompt": prompts})
    assert_same(found.bfloat16(), expected.bfloat16())


# ------------------------------------------------------------------------------------------------------ other features


@pytest.mark.parametrize("variant", ["full", "lite", "middle"])
def test_fused_feedback(variant: str) -> None:
    model = exact(tf.ViTForImageClassification, **VARIANTS[variant])
    inputs = inputs_for(model)
    inputs["topdown_prompt"] = prompts_near_features(model, inputs)
    expected = output_of(model, inputs)
    model.fuse_feedback()
    assert_same(output_of(model, inputs), expected)


@pytest.mark.parametrize("variant", RANGES)
def test_rows_that_it_closes_are_skipped(variant: str) -> None:
    models = [
        exact(tf.ViTForImageClassification, skip_closed_rows=skips, **RANGES[variant]) for skips in (True, False)
    ]
    inputs = inputs_for(models[0])
    prompts = prompts_near_features(models[0], inputs)
    prompts[0] = 0  # similar to nothing
    found, expected = (output_of(model, inputs | {"topdown_prompt": prompts}) for model in models)
    assert_same(found, expected)
    with models[0].disable_adapter():
        base = output_of(models[0], inputs)
    assert_same(found[0], base[0])
    assert not torch.allclose(found[1], base[1])


def test_each_of_two_adapters_takes_it() -> None:
    model = exact(tf.ViTForImageClassification)
    model.add_adapter("other", TopDownConfig(init_weights=False))
    model.double().set_adapter("other")
    inputs = inputs_for(model)
    given = {"topdown_prompt": torch.ones(HIDDEN_SIZE, dtype=torch.float64)}
    found = output_of(model, inputs | given)
    model.set_adapter("default")
    assert not torch.allclose(output_of(model, inputs | given), found)


def test_stored_features_are_compared_with_it(tmp_path: Any) -> None:
    model = steered(tiny_model(tf.ViTForImageClassification)).train()
    rows = [{"pixel_values": x} for x in inputs_of(model)["pixel_values"]]
    stored = store_features(model, rows, tmp_path)
    prompts = prompts_near_features(model, inputs_of(model))
    batch = stored.collate([{**stored[i], "topdown_prompt": prompts[i]} for i in range(2)])
    assert batch["topdown_features"].shape[0] == 2
    assert_same(output_of(model, batch), output_of(model, inputs_of(model) | {"topdown_prompt": prompts}))


def test_forward_of_another_library_that_calls_the_backbone(tmp_path: Any) -> None:
    """Those of TRL's trainers hand on what they do not know."""
    model = steered(tiny_model(tf.LlamaForCausalLM)).train()
    inputs = {"input_ids": inputs_of(model)["input_ids"]}
    given = {"topdown_prompt": prompts_near_features(model, inputs), "use_cache": False}
    expected = model(**inputs, **given, output_hidden_states=True).hidden_states[-1]
    stored = store_features(model, [{"input_ids": ids} for ids in inputs["input_ids"]], tmp_path)
    base = model.get_base_model()
    base.forward = types.MethodType(lambda self, **kwargs: self.model(**kwargs), base)
    with counted_block_calls(model) as calls:
        found = model(**stored.collate([stored[i] for i in range(2)]), **given).last_hidden_state
    assert set(calls.values()) == {1}
    assert_same(found, expected)
    assert_same(model(**inputs, **given).last_hidden_state, expected)
    assert not torch.allclose(model(**inputs).last_hidden_state, expected)


def test_trainer_keeps_the_column(tmp_path: Any) -> None:
    model = steered(tiny_model(tf.ViTForImageClassification), trainable_parts=["linear2"])
    given: list[torch.Tensor] = []
    pixels = inputs_of(model)["pixel_values"]
    rows = [
        {"pixel_values": x, "labels": 0, "topdown_prompt": torch.full((HIDDEN_SIZE,), float(i)), "unknown": 1}
        for i, x in enumerate(pixels)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )

    def keep(prompt: nn.Module, args: tuple) -> None:
        given.append(args[1].prompts)

    with paths_of(model)[0].selection.topdown_prompt["default"].register_forward_pre_hook(keep):
        Trainer(model.get_base_model(), arguments, train_dataset=rows).train()
    assert sorted(given[0][:, 0].tolist()) == [0.0, 1.0]


def test_injected_adapters_take_it() -> None:
    base = inject_adapter_in_model(TopDownConfig(init_weights=False), tiny_model(tf.LlamaForCausalLM))
    inputs = inputs_of(base)
    given = {"topdown_prompt": torch.ones(2, HIDDEN_SIZE)}
    assert not torch.allclose(base(**inputs, **given).logits, base(**inputs).logits)
    assert base.generate(**inputs, **given, max_new_tokens=2).shape == (2, 11)


@pytest.mark.slow
def test_compiled_model_is_compiled_for_no_other_prompt() -> None:
    torch.compiler.reset()
    size = {"num_hidden_layers": 1, "problem_type": "single_label_classification"}
    model = steered(tiny_model(tf.ViTForImageClassification, **size))
    prompts = prompts_near_features(model, inputs_of(model))
    batches = [inputs_of(model) | {"topdown_prompt": x} for x in (prompts, -prompts, prompts + 0.1)]
    expected = [output_of(model, batch) for batch in batches]
    model.compile(backend="eager", fullgraph=True)
    for step, batch in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile" if step > 0 else "default"):
            assert_same(output_of(model, batch), expected[step])
    with model.prompted(prompts):
        assert_same(output_of(model), expected[0])


# --------------------------------------------------------------------------------------------------------- generation

GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 2, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["", "skip_closed_rows"])
def test_generation_with_a_cache_is_that_without(options: dict[str, Any], shared: bool) -> None:
    model = exact(tf.LlamaForCausalLM, task_type="CAUSAL_LM", skip_closed_rows=shared)
    inputs = inputs_of(model)
    arguments = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    prompts = prompts_near_features(model, inputs)
    arguments |= {"topdown_prompt": prompts}
    found = model.generate(**inputs, **arguments, **options)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert_same_generation(found, model.generate(**inputs, **arguments, **options, use_cache=False))


def test_rows_of_beams_have_the_prompt_of_their_row() -> None:
    model = exact(tf.LlamaForCausalLM, task_type="CAUSAL_LM")
    inputs = inputs_of(model)
    prompts = prompts_near_features(model, inputs)
    options = {"max_new_tokens": 6, "num_beams": 3}
    found = model.generate(**inputs, **options, topdown_prompt=prompts)
    for row in range(2):
        of_row = model.generate(input_ids=inputs["input_ids"][row : row + 1], **options, topdown_prompt=prompts[row])
        assert torch.equal(of_row[0], found[row])


@pytest.mark.parametrize("model_class", ONE_STACK, ids=lambda cls: cls.__name__)
def test_every_step_of_generation_has_it(model_class: type) -> None:
    model = steered(tiny_model(model_class), task_type="CAUSAL_LM")
    given: list[Any] = []

    def keep(prompt: nn.Module, args: tuple) -> None:
        given.append(args[1])

    [path] = paths_of(model)
    d = path.selection.topdown_prompt["default"].hidden_size
    with path.selection.topdown_prompt["default"].register_forward_pre_hook(keep):
        model.generate(**inputs_of(model), max_new_tokens=3, topdown_prompt=torch.ones(d))
        assert len(given) == 3 and all(prompt is not None for prompt in given)
        model.generate(**inputs_of(model), max_new_tokens=1)
    assert given[-1] is None


def test_drafting_with_pass_1_gives_the_same_tokens() -> None:
    model = exact(tf.LlamaForCausalLM, task_type="CAUSAL_LM")
    inputs = inputs_of(model, batch_size=1)
    given = {"topdown_prompt": prompts_near_features(model, inputs), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **given)
    assert torch.equal(model.generate(**inputs, **given, custom_generate=draft_with_first_pass), expected)
    assert not torch.equal(model.generate(**inputs, **given | {"topdown_prompt": None}), expected)


# ------------------------------------------------------------------------------------------------- how long it holds


def test_block_of_code_with_a_prompt() -> None:
    model = exact(tf.ViTForImageClassification)
    inputs = inputs_for(model)
    prompts = prompts_near_features(model, inputs)
    learned, one, other = (output_of(model, inputs | {"topdown_prompt": x}) for x in (None, prompts, prompts.flip(0)))
    assert not torch.allclose(learned, one) and not torch.allclose(one, other)
    with model.prompted(prompts):
        assert torch.equal(output_of(model, inputs), one)
        assert torch.equal(output_of(model, inputs | {"topdown_prompt": prompts.flip(0)}), other)
        with model.prompted(prompts.flip(0)):
            assert torch.equal(output_of(model, inputs), other)
        assert torch.equal(output_of(model, inputs), one)
    assert torch.equal(output_of(model, inputs), learned)


@pytest.mark.parametrize("how", ["argument", "block"])
def test_gone_after_an_exception(how: str) -> None:
    model = exact(tf.ViTForImageClassification)
    inputs = inputs_for(model)
    expected = output_of(model, inputs)
    prompts = prompts_near_features(model, inputs)
    with pytest.raises((RuntimeError, ValueError)):
        if how == "argument":
            model(pixel_values=inputs["pixel_values"][:, :1], topdown_prompt=prompts)
        else:
            with model.prompted(prompts):
                model(pixel_values=inputs["pixel_values"][:, :1])
    assert paths_of(model)[0].state.current.prompt is None
    assert torch.equal(output_of(model, inputs), expected)


def test_other_threads_have_their_own() -> None:
    model = exact(tf.ViTForImageClassification)
    inputs = inputs_for(model)
    expected, found = output_of(model, inputs), []
    with model.prompted(prompts_near_features(model, inputs)):
        thread = threading.Thread(target=lambda: found.append(output_of(model, inputs)))
        thread.start()
        thread.join(timeout=60)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("model_class", [tf.LlamaForCausalLM, tf.T5ForConditionalGeneration])
def test_unload_takes_the_argument_away(model_class: type) -> None:
    base = adapted(tiny_model(model_class)).unload()
    assert "forward" not in vars(base) and "generate" not in vars(base)
    with pytest.raises((TypeError, ValueError)):
        base.generate(**inputs_of(base), topdown_prompt=torch.ones(HIDDEN_SIZE), max_new_tokens=1)


def test_copies_have_their_own_argument() -> None:
    model = exact(tf.LlamaForCausalLM)
    copied = copy.deepcopy(model)
    inputs = inputs_for(model) | {"topdown_prompt": torch.ones(HIDDEN_SIZE)}
    expected = output_of(model, inputs)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert torch.equal(output_of(copied, inputs), expected)
    assert copied.get_base_model().generate.module is copied.get_base_model()


# -------------------------------------------------------------------------------------------------- what does not fit

D = HIDDEN_SIZE
WRONG = {
    "size": (torch.ones(2, 7), rf"shape \[2, 7\]; expected \[{D}\], or \[rows of the batch, {D}\]"),
    "dimensions": (torch.ones(2, 1, D), rf"shape \[2, 1, {D}\]; expected"),
    "empty": (torch.ones(0, D), rf"shape \[0, {D}\]; expected"),
    "whole numbers": (torch.ones(2, D, dtype=torch.long), r"type torch\.int64; expected a tensor of floating-point"),
    "list": ([1.0] * D, "type list; expected a tensor"),
    "rows": (torch.ones(3, D), r"has 3 rows and the features .* \[2, 5, 32\]; expected one prompt for each row"),
    "device": (torch.ones(2, D, device="meta"), "is on 'meta' and the features on 'cpu'; move it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    prompts, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        model(**inputs_of(model), topdown_prompt=prompts)
    with pytest.raises(ValueError, match=message), model.prompted(prompts):
        model(**inputs_of(model))


def test_fewer_prompts_than_rows_are_refused_outside_of_generation() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    inputs = inputs_of(model, batch_size=4)
    with pytest.raises(ValueError, match="has 2 rows .* expected one prompt for each row of the batch"):
        model(**inputs, topdown_prompt=torch.ones(2, D))


def test_no_active_adapter_is_refused() -> None:
    model = steered(tiny_model(tf.ViTForImageClassification))
    with model.disable_adapter(), pytest.raises(ValueError, match="0 stacks of blocks .* Enable an adapter"):
        model(**inputs_of(model), topdown_prompt=torch.ones(D))


@pytest.mark.parametrize("model_class", [tf.T5ForConditionalGeneration, tf.WhisperForConditionalGeneration])
def test_encoder_and_decoder_with_feedback_are_refused(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="2 stacks of blocks have an active .* in an encoder-decoder"):
            call(**inputs_of(model), topdown_prompt=torch.ones(D))


def test_decoder_of_an_encoder_decoder_takes_it() -> None:
    model = steered(tiny_model(tf.T5ForConditionalGeneration), target_modules=r"decoder.*\.0\.SelfAttention\.v")
    assert len(paths_of(model)) == 1
    found = model.generate(**inputs_of(model), topdown_prompt=torch.ones(2, D), max_new_tokens=3, num_beams=2)
    assert len(found) == 2
