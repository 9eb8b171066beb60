"""Feedback initialised from data."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig, initialize_feedback
from toast_peft.core.layers import FeedbackPath

from ..helpers import adapted, assert_same, assert_state_is, features_of, output_of, state_of
from ..zoo import NUM_BLOCKS, RANGES, VIT_AND_LLAMA, add_noise, inputs_of, tiny_model


def batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Enough different tokens to determine a matrix."""
    inputs = inputs_of(model, batch_size=24)
    if "input_ids" in inputs:
        return [{name: x[rows] for name, x in inputs.items()} for rows in (slice(0, 10), slice(10, 24))]
    return [{name: torch.randn(12, *x.shape[1:]) for name, x in inputs.items()} for _ in range(2)]


def prompt_of(model: PeftModel) -> torch.Tensor:
    [prompt] = (p.detach() for name, p in model.named_parameters() if "topdown_prompt" in name)
    return prompt


def chain_gradients(model: PeftModel, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Those of the variational loss over all data."""
    model.zero_grad()
    for batch in data:
        model(**batch)
        (len(next(iter(batch.values()))) * model.variational_loss()).backward()
    return torch.stack([p.grad for name, p in model.named_parameters() if "topdown_linear1" in name])


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_chain_is_the_minimum_of_the_variational_loss(model_class: type, variant: str) -> None:
    base = tiny_model(model_class)
    data = batches(base)
    first, _ = TopDownConfig(**RANGES[variant]).feedback_range(NUM_BLOCKS)
    features = torch.cat([features_of(base, batch, first) for batch in data]).flatten(0, 1)
    expected = output_of(base)
    model = adapted(base, variational_weight=1.0, **RANGES[variant]).train()
    before = chain_gradients(model, data)
    initialize_feedback(model, data, ridge=1e-9)
    assert (chain_gradients(model, data).flatten(1).norm(dim=1) < 1e-4 * before.flatten(1).norm(dim=1)).all()
    assert model.training and torch.equal(output_of(model.eval()), expected)
    assert_same(F.normalize(prompt_of(model), dim=0), F.normalize(F.normalize(features, dim=-1).mean(0), dim=0))


def test_ridge_holds_the_chain_at_the_identity() -> None:
    distances = []
    for ridge in (1e-6, 1.0, 1e6):
        model = adapted(tiny_model(tf.ViTModel))
        initialize_feedback(model, batches(model), ridge=ridge)
        chain = torch.stack([p.detach() for name, p in model.named_parameters() if "linear1" in name])
        distances.append((chain - torch.eye(chain.shape[-1])).norm())
    assert distances[0] > 2 * distances[1] > 1e3 * distances[2]


def test_padding_is_left_out() -> None:
    ids = inputs_of(tiny_model(tf.LlamaForCausalLM))["input_ids"]
    padded = F.pad(ids, (0, 5), value=0)
    models = [adapted(tiny_model(tf.LlamaForCausalLM)) for _ in range(2)]
    initialize_feedback(models[0], [{"input_ids": ids, "labels": ids}])
    initialize_feedback(models[1], [{"input_ids": padded, "attention_mask": (padded != 0).long()}])
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), parameter, rtol=1e-3, atol=1e-3, msg=name)


def test_mask_lets_more_through_than_with_a_random_prompt() -> None:
    model = adapted(tiny_model(tf.ViTModel))
    path = model.get_base_model().feedback_path
    means = []
    path.selection.topdown_prompt["default"].register_forward_hook(lambda m, args, mask: means.append(mask.mean()))
    output_of(model)
    initialize_feedback(model, batches(model))
    means.clear()
    with torch.no_grad():
        random_prompt = prompt_of(model).clone().normal_()
        for batch in batches(model):
            model(**batch)
        of_data = torch.stack(means).mean()
        means.clear()
        prompt_of(model).copy_(random_prompt)
        for batch in batches(model):
            model(**batch)
    assert of_data > 1.5 * torch.stack(means).mean()


def test_lite_gets_a_prompt_only() -> None:
    model = adapted(tiny_model(tf.ViTModel), r=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    initialize_feedback(model, batches(model))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 1 and "topdown_prompt" in changed[0]


@pytest.mark.parametrize("model_class", [tf.ConvNextForImageClassification, tf.SwinForImageClassification])
def test_other_kinds_of_paths_get_a_prompt_only(model_class: type) -> None:
    model = adapted(tiny_model(model_class))
    before = {name: p.clone() for name, p in model.named_parameters()}
    initialize_feedback(model, [inputs_of(model)])
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 1 and "topdown_prompt" in changed[0]
    torch.testing.assert_close(prompt_of(model).square().mean().sqrt(), torch.tensor(0.3))


def test_encoder_and_decoder() -> None:
    model = adapted(tiny_model(tf.T5ForConditionalGeneration))
    initialize_feedback(model, [inputs_of(model)])
    prompts = [p for name, p in model.named_parameters() if "topdown_prompt" in name]
    assert len(prompts) == 2 and all(torch.isclose(p.square().mean().sqrt(), torch.tensor(0.3)) for p in prompts)


def test_second_adapter_and_other_state(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTModel))
    add_noise(*(p for name, p in model.named_parameters() if "topdown_" in name))
    expected = output_of(model)
    model.add_adapter("other", TopDownConfig())
    model.set_adapter("other")
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    initialize_feedback(model, batches(model), "other")
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    model.set_adapter("default")
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize(("name", "data"), [("other", None), ("default", [])])
def test_what_does_not_fit(name: str, data: list | None) -> None:
    model = adapted(tiny_model(tf.ViTModel))
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match="`adapter_name` is 'other'.*default" if name == "other" else "gave no tokens"
    ):
        initialize_feedback(model, batches(model) if data is None else data, name)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


class Failing:
    """Batches that can be read some times, and then fail after the first."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], num_reads: int) -> None:
        self.batches, self.left = batches, num_reads

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield self.batches[0]
        if self.left == 0:
            raise RuntimeError("no network")
        self.left -= 1
        yield from self.batches[1:]


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
@pytest.mark.parametrize("num_reads", [0, 1])
def test_data_that_fails_leaves_prompt_and_gate_as_they_were(num_reads: int) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM))
    data, reference = batches(model), [{"input_ids": torch.arange(16, 32).view(2, 8)}]
    before, config = state_of(model), model.peft_config["default"].to_dict()
    with pytest.raises(RuntimeError, match="no network"):
        initialize_feedback(model, Failing(data, num_reads), reference=reference)
    assert_state_is(model, before)
    assert model.peft_config["default"].to_dict() == config
    initialize_feedback(model, Failing(data, 2), reference=reference)
    assert model.peft_config["default"].gate == "sequence"


def test_each_stack_leaves_out_its_own_padding() -> None:
    """A decoder's tokens are not those of the encoder's mask; labels make the decoder's inputs."""
    model = adapted(tiny_model(tf.T5ForConditionalGeneration))
    ids = inputs_of(model)["input_ids"]
    padded = ids.clone()
    padded[:, 6:] = 0
    labels = torch.cat([ids[:, :4], torch.full((2, 5), -100)], dim=1)
    prompts = {}
    for name, batch in {
        "all": {"input_ids": ids, "labels": labels},
        "encoder": {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels},
        "decoder": {"input_ids": ids, "labels": labels, "decoder_attention_mask": (labels != -100).long()},
    }.items():
        initialize_feedback(model, [batch])
        prompts[name] = [p.clone() for key, p in model.named_parameters() if "topdown_prompt" in key]
    assert not torch.allclose(prompts["all"][0], prompts["encoder"][0])  # the encoder's prompt
    assert torch.equal(prompts["all"][0], prompts["decoder"][0])
    assert not torch.allclose(prompts["all"][1], prompts["decoder"][1])  # the decoder's


def test_chain_from_elsewhere_is_kept(tmp_path: Path) -> None:
    source = adapted(tiny_model(tf.ViTModel))
    add_noise(*(p for name, p in source.named_parameters() if "topdown_" in name))
    source.save_pretrained(tmp_path)
    model = adapted(tiny_model(tf.ViTModel), pretrained_feedback=str(tmp_path))
    initialize_feedback(model, batches(model))
    for name, parameter in model.named_parameters():
        if "topdown_" in name:
            assert torch.equal(parameter, source.get_parameter(name)) == ("topdown_prompt" not in name)


def test_modes_of_modules_are_kept() -> None:
    model = adapted(tiny_model(tf.ViTModel)).train()
    frozen = model.get_base_model().layernorm.eval()
    initialize_feedback(model, batches(model))
    assert model.training and not frozen.training


@pytest.mark.parametrize("batch", [(torch.zeros(1, 3, 8, 8),), {"input_ids": 0}], ids=["tuple", "all padding"])
def test_batches_that_do_not_fit(batch: tuple | dict) -> None:
    model = adapted(tiny_model(tf.LlamaForCausalLM if isinstance(batch, dict) else tf.ViTModel))
    if isinstance(batch, dict):
        ids = inputs_of(model)["input_ids"]
        batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="gave a tuple; expected dicts|gave no tokens"):
        initialize_feedback(model, [batch])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_hidden_states_that_are_not_finite_or_zero_are_refused(model_class: type) -> None:
    """One NaN in one batch would make the whole adapter NaN."""
    model = adapted(tiny_model(model_class))
    data = batches(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    [path] = (module for module in model.modules() if isinstance(module, FeedbackPath))
    block = path.passes.block_forwards[1].module
    for value, message in ((float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "all zero")):

        def spoil(block: nn.Module, args: tuple, output: torch.Tensor, value: float = value) -> torch.Tensor:
            spoilt = output.clone()
            spoilt[:, 0] = value
            return spoilt if value else torch.zeros_like(output)

        with block.register_forward_hook(spoil), pytest.raises(ValueError, match=message):
            initialize_feedback(model, data)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_progress_bar_that_transformers_can_switch_off(is_shown: bool, capsys: pytest.CaptureFixture) -> None:
    model = adapted(tiny_model(tf.ViTForImageClassification))
    was_shown = tf.utils.logging.is_progress_bar_enabled()
    (tf.utils.logging.enable_progress_bar if is_shown else tf.utils.logging.disable_progress_bar)()
    try:
        initialize_feedback(model, [inputs_of(model)])
    finally:
        (tf.utils.logging.enable_progress_bar if was_shown else tf.utils.logging.disable_progress_bar)()
    assert ("Looking at the data" in capsys.readouterr().err) == is_shown
