"""Fused feedback gives what the feedback path gives, with few kernels, and says so where it cannot."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from toast_peft import TopDownConfig, initialize_feedback

from ..helpers import (
    CACHE,
    adapted,
    assert_same,
    assert_same_generation,
    compiles_copies,
    leaves_untouched,
    output_of,
    paths_of,
    state_of,
    steer,
    steered,
    value_projections_of,
)
from ..zoo import RANGES, VIT_AND_LLAMA, add_noise, inputs_of, tiny_model
from .test_overhead import MODELS as TWELVE_BLOCKS
from .test_overhead import kernels

VIT = tf.ViTForImageClassification
LLAMA = tf.LlamaForCausalLM  # with grouped queries
GPT2 = tf.GPT2LMHeadModel
# Values alone; with queries and keys, one after the other or by heads; encoder and decoder.
ROWS = [VIT, LLAMA, tf.BertForSequenceClassification, GPT2, tf.GPTNeoXForCausalLM, tf.FalconForCausalLM]
ROWS += [tf.ModernBertForSequenceClassification, tf.T5ForConditionalGeneration, tf.Qwen2ForCausalLM]
OPTIONS: dict[str, dict[str, Any]] = {
    "official": {"init_weights": False},
    "official lite": {"init_weights": False, "r": 4},
    "transform of low rank": {"transform_r": 3, "feedback_from": 2},
    "early": {"feedback_from": 2},
    "late lite": {"feedback_to": 2, "r": 4},
    "some blocks": {"layers_to_transform": [0, 2]},
    "double bias": {"double_value_bias": True},
    "double bias lite": {"double_value_bias": True, "r": 4, "feedback_from": 3},
}

# ---------------------------------------------------------------------------------------------------- the same numbers


def inputs_in_float64(model: nn.Module) -> dict[str, torch.Tensor]:
    """On its device."""
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of(model).items()}
    return {name: x.to(model.device) for name, x in inputs.items()}


def exact(model_class: type, **options: Any) -> PeftModel:
    """A steered model in float64."""
    base = tiny_model(model_class).double()
    return steered(base, inputs_in_float64(base), **options)


def fused(model_class: type = VIT, size: dict[str, int] | None = None, **options: Any) -> PeftModel:
    model = steered(tiny_model(model_class, **size or {}), **options)
    model.fuse_feedback()
    return model


def is_folded(model: nn.Module) -> list[bool]:
    return [path.fused.of_values for path in paths_of(model)]


@contextmanager
def recorded_values(model: nn.Module) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """What the layers with feedback compute in pass 2; norms in float32 would hide differences in the output."""
    values: dict[nn.Module, torch.Tensor] = {}
    modules = [hooks.module for path in paths_of(model) for hooks in path.passes.value_hooks.values()]
    record = lambda module, args, output: values.update({module: output.clone()})  # noqa: E731
    handles = [module.register_forward_hook(record) for module in modules]
    yield values
    for handle in handles:
        handle.remove()


def assert_fused_gives_the_same(model: PeftModel, folded: bool = True) -> None:
    inputs = inputs_in_float64(model)
    unfused = output_of(model, inputs)
    with recorded_values(model) as expected_values:
        expected = output_of(model, inputs)
    model.fuse_feedback()
    assert is_folded(model) == [folded] * len(paths_of(model))
    with recorded_values(model) as values:
        found = output_of(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for module, value in expected_values.items():
        torch.testing.assert_close(values[module], value, rtol=1e-10, atol=1e-10)
    with model.disable_adapter():
        base = output_of(model, inputs)
    assert (found - base).abs().max() > 1e-3
    model.unfuse_feedback()
    assert torch.equal(output_of(model, inputs), unfused)


@pytest.mark.parametrize("options", [{}, {"r": 4, "lora_alpha": 2}], ids=["full", "lite"])
@pytest.mark.parametrize("model_class", ROWS)
def test_same_values_and_outputs(model_class: type, options: dict[str, Any]) -> None:
    assert_fused_gives_the_same(exact(model_class, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model_class", [VIT, GPT2])
def test_same_with_all_options(model_class: type, options: dict[str, Any]) -> None:
    assert_fused_gives_the_same(exact(model_class, **options))


@pytest.mark.parametrize("options", [{}, {"r": 4}, {"double_value_bias": True}], ids=str)
def test_lora_on_the_values_before(options: dict[str, Any]) -> None:
    """Their weight is not all that they compute, and is not folded in."""
    base = tiny_model(VIT).double()
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), base, "lora")
    assert_fused_gives_the_same(steered(base, inputs_in_float64(base), **options), folded=False)


def test_weights_are_not_folded_where_one_of_the_layers_is_not_plain() -> None:
    model = exact(LLAMA)
    value_projections_of(model)[1].register_forward_pre_hook(lambda module, args: None)
    assert_fused_gives_the_same(model, folded=False)


def test_offloaded_base_model() -> None:
    base = tiny_model(VIT)
    expected = output_of(steered(copy.deepcopy(base)))
    model = steered(cpu_offload(base, execution_device=torch.device("cpu")))
    model.fuse_feedback()
    assert is_folded(model) == [False]
    assert_same(output_of(model), expected)


@pytest.mark.parametrize("variant", RANGES)
def test_an_adapter_in_float32_on_a_model_in_less(variant: str) -> None:
    """What is folded into weights in bfloat16 is in bfloat16: no less exact than those, and not slower."""
    model = steered(tiny_model(LLAMA).bfloat16(), **RANGES[variant])
    in_float32, expected = output_of(copy.deepcopy(model).float()), output_of(model)
    model.fuse_feedback()
    assert paths_of(model)[0].fused.down.dtype == torch.bfloat16
    error, found = ((output.float() - in_float32).abs().max() for output in (expected, output_of(model)))
    assert found < 2 * error


def test_feedback_statistics() -> None:
    model = steered(tiny_model(VIT))
    output_of(model)
    expected = model.feedback_statistics()
    model.fuse_feedback()
    model.get_base_model().vit.feedback_path.state.current.selected = {}
    output_of(model)
    assert model.feedback_statistics() == expected


# ----------------------------------------------------------------------------------------------- generation, compiling


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("model_class", [LLAMA, tf.Gemma3ForCausalLM, GPT2, tf.T5ForConditionalGeneration])
def test_generation_with_a_cache(model_class: type, cache: dict[str, Any]) -> None:
    model = steered(tiny_model(model_class), r=4)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | cache
    expected = model.generate(**inputs_of(model), **options)
    model.fuse_feedback()
    assert_same_generation(model.generate(**inputs_of(model), **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "options"), [(VIT, {"r": 4}), (GPT2, {})])
def test_compiled_once_in_one_graph(model_class: type, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = fused(model_class, size={"num_hidden_layers": 2}, **options)
    inputs = inputs_of(model) | ({} if model_class is VIT else {"use_cache": False})
    expected, run = output_of(model, inputs), torch.compile(model, fullgraph=True, backend="eager")
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance), torch.no_grad():
            assert_same(run(**inputs).logits, expected)


@pytest.mark.slow
@pytest.mark.skipif(not compiles_copies(), reason="this torch breaks the graph at a copy.copy of the cache")
def test_compiled_decoding_with_a_static_cache() -> None:
    torch.compiler.reset()
    model = fused(LLAMA, size={"num_hidden_layers": 2})
    results = []
    for decode in (model, torch.compile(model, fullgraph=True, backend="eager")):
        cache = tf.StaticCache(config=model.config, max_cache_len=12)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), **{CACHE: cache})
            logits = [decode(input_ids=torch.tensor([[token]]), **{CACHE: cache}).logits for token in (8, 9)]
        results.append(torch.stack(logits))
    assert_same(*results)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_few_kernels(model_class: type) -> None:
    """Two passes, and for all 12 blocks together not more than a tenth of a pass between them."""
    model = adapted(TWELVE_BLOCKS[model_class]().eval(), r=8)
    with model.disable_adapter():
        of_base = kernels(lambda: output_of(model))
    of_path = kernels(lambda: output_of(model))
    model.fuse_feedback()
    assert kernels(lambda: output_of(model)) <= 2.1 * of_base < of_path


# --------------------------------------------------------------------------------------------- copies, saving, removal


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable) -> None:
    model = fused()
    expected = output_of(model)
    copy_of_model = copied(model)
    assert torch.equal(output_of(copy_of_model), expected)
    copy_of_model.unfuse_feedback()
    assert_same(output_of(copy_of_model), expected)
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("changed_before", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_changed_weights_are_noticed_in_a_copy(copied: Callable, changed_before: bool) -> None:
    model = fused()
    if changed_before:
        add_noise(paths_of(model)[0].selection.topdown_prompt["default"].weight)
    copy_of_model = copied(model)
    if not changed_before:
        add_noise(paths_of(copy_of_model)[0].selection.topdown_prompt["default"].weight)
        output_of(model)
    with pytest.raises(RuntimeError, match="have changed since"):
        output_of(copy_of_model)


def test_moves_with_the_model() -> None:
    model = fused(LLAMA)
    expected = output_of(model)
    assert_same(output_of(model.double()).float(), expected)
    assert {buffer.dtype for buffer in paths_of(model)[0].fused.buffers()} == {torch.float64}


def test_saved_as_it_was_trained(tmp_path: Path) -> None:
    model = steered(tiny_model(VIT), r=4)
    state, expected = model.state_dict(), output_of(model)
    model.fuse_feedback()
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(VIT), tmp_path)
    assert torch.equal(output_of(loaded), expected)
    loaded.fuse_feedback()
    assert torch.equal(output_of(loaded), output_of(model))


@pytest.mark.parametrize("model_class", [VIT, GPT2, tf.T5ForConditionalGeneration])
def test_unfusing_leaves_nothing(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    with leaves_untouched(model):
        model.fuse_feedback()
        output_of(model)
        model.unfuse_feedback()
        model.unfuse_feedback()


def test_unload_takes_it_away() -> None:
    base = tiny_model(VIT)
    before, expected = state_of(base), output_of(base)
    model = fused().unload()
    assert_same(output_of(model), expected)
    assert "forward" not in vars(value_projections_of(model)[0])
    assert before["weights"].keys() == model.state_dict().keys()


def test_the_active_one_of_several_adapters() -> None:
    model = steered(tiny_model(VIT))
    model.add_adapter("other", TopDownConfig(r=4, feedback_from=2))
    steer(model, "other")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = output_of(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        model.fuse_feedback()
        assert_same(output_of(model), expected[name])
        model.unfuse_feedback()
    model.fuse_feedback()
    model.delete_adapter("default")
    assert_same(output_of(model), expected["other"])


# ----------------------------------------------------------------------------------------------------- what is refused


def train(model: PeftModel) -> None:
    try:
        model.train()(**inputs_of(model))
    finally:
        model.eval()


REFUSED: dict[str, tuple[Callable[[PeftModel], Any], str]] = {
    "fuse again": (lambda model: model.fuse_feedback(), "to fuse it again"),
    "switch": (lambda model: model.base_model.set_adapter("other"), "to switch adapters"),
    "add": (lambda model: model.add_adapter("third", TopDownConfig()), "to add an adapter"),
    "another method": (lambda model: get_peft_model(model.get_base_model(), TopDownConfig()), "to add an adapter"),
    "delete": (lambda model: model.delete_adapter("default"), "to delete it"),
    "load": (lambda model: set_peft_model_state_dict(model, {}, "default"), "to load other weights"),
    "initialise": (lambda model: initialize_feedback(model, [inputs_of(model)]), "to initialise it"),
    "train": (train, "is in training mode"),
    "gradients": (lambda model: model(**inputs_of(model)), "gives no gradients"),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(("action", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_while_fused(action: Callable[[PeftModel], Any], message: str) -> None:
    model = steered(tiny_model(VIT))
    model.add_adapter("other", TopDownConfig())
    model.eval()
    model.fuse_feedback()
    with leaves_untouched(model), pytest.raises((ValueError, RuntimeError), match=message):
        action(model)


def test_without_weights_to_train_no_context_is_needed() -> None:
    model = fused()
    expected = output_of(model)
    model.requires_grad_(False)
    assert torch.equal(model(**inputs_of(model)).logits, expected)


def test_a_switch_past_the_model_is_noticed() -> None:
    model = steered(tiny_model(VIT))
    model.add_adapter("other", TopDownConfig())
    model.fuse_feedback()
    for path in paths_of(model):
        path.selection.set_adapter("other")
    with pytest.raises(RuntimeError, match="of the adapter 'default' is fused, and 'other' is active"):
        output_of(model)


def replace(weight: str) -> Callable[[nn.Module], None]:
    def new(module: nn.Module) -> None:
        setattr(module, weight, nn.Parameter(torch.ones_like(getattr(module, weight)), requires_grad=False))

    return new


@torch.no_grad()
def change(module: nn.Module) -> None:
    next(module.parameters()).mul_(2)


@pytest.mark.parametrize("changed", [change, replace("weight"), replace("bias")], ids=["change", "weight", "bias"])
@pytest.mark.parametrize("where", ["value", "prompt", "feedback"])
def test_changed_weights_are_noticed(changed: Callable[[nn.Module], None], where: str) -> None:
    model = fused()
    path = paths_of(model)[0]
    parts = {
        "value": value_projections_of(model)[0],
        "prompt": path.selection.topdown_prompt["default"],
        "feedback": path.layer("2").topdown_linear1["default"],
    }
    if getattr(parts[where], "bias", None) is None and changed is not change:
        changed = replace("weight")
    changed(parts[where])
    with pytest.raises(RuntimeError, match="have changed since"):
        output_of(model)
    model.unfuse_feedback()
    expected = output_of(model)
    model.fuse_feedback()
    assert_same(output_of(model), expected)


@pytest.mark.parametrize("model_class", [VIT, GPT2])
def test_lora_on_folded_values_is_noticed(model_class: type) -> None:
    model = fused(model_class)
    targets = ["v_proj"] if model_class is VIT else ["c_attn"]
    inject_adapter_in_model(
        LoraConfig(target_modules=targets, init_lora_weights=False), model.get_base_model(), "lora"
    )
    with pytest.raises(RuntimeError, match="The value projection of block 0 is another layer, a Linear"):
        output_of(model)
    with model.disable_adapter():
        output_of(model)
    model.unfuse_feedback()
    expected = output_of(model)
    model.fuse_feedback()
    assert is_folded(model) == [False]
    assert_same(output_of(model), expected)


def test_an_error_leaves_no_forward_behind() -> None:
    model = fused()
    with leaves_untouched(model), torch.no_grad(), pytest.raises(ValueError, match="the channel dimension"):
        model(pixel_values=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("model_class", [tf.ConvNextForImageClassification, tf.SwinForImageClassification])
def test_stages_are_refused(model_class: type) -> None:
    model = steered(tiny_model(model_class))
    with (
        leaves_untouched(model),
        pytest.raises(NotImplementedError, match="does not support ConvNets and hierarchical"),
    ):
        model.fuse_feedback()


def test_offloaded_adapter_is_refused() -> None:
    model = cpu_offload(adapted(tiny_model(VIT)), execution_device=torch.device("cpu"))
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="in one piece, and they are offloaded"):
        model.fuse_feedback()
    assert state_of(model)["modules"] == before["modules"]


def test_no_active_adapter_is_refused() -> None:
    model = adapted(tiny_model(VIT))
    with (
        model.disable_adapter(),
        leaves_untouched(model),
        pytest.raises(ValueError, match="No TOAST adapter is active"),
    ):
        model.fuse_feedback()
