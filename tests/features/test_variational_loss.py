"""Pre-tuning: the variational loss wherever a loss is computed, and adapters that start from others."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from toast_peft import OFFICIAL_STAGES, TopDownConfig
from toast_peft.core.layers import feedback_paths

from ..helpers import adapted, assert_same, blocks_of, gradients, loss_of, output_of, steered, takes_adapters
from ..zoo import NUM_BLOCKS, RANGES, VIT_AND_LLAMA, inputs_of, tiny_model

WEIGHT = 0.3


def with_labels(model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = inputs_of(model)
    labels = inputs["input_ids"] if "input_ids" in inputs else torch.tensor([0, 1])
    return inputs | {"labels": labels}


def pretuned(model_class: type, weight: float = WEIGHT, **options: Any) -> PeftModel:
    """A steered model in training mode, always the same but for the weight of the loss."""
    return steered(tiny_model(model_class), variational_weight=weight, **options).train()


def expected_loss(model: PeftModel, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    """From the formula, with what the blocks get and return in pass 2."""
    calls: dict[int, tuple] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(blocks_of(model)):
            hooks.enter_context(
                block.register_forward_hook(
                    lambda block, args, output, index=index: calls.update({index: (args[0], output)})
                )
            )
        model(**inputs)
    config, total = model.peft_config["default"], 0
    first, last = config.feedback_range(NUM_BLOCKS)
    for index in range(last, first):
        hidden_states, output = calls[index]
        output = output[0] if isinstance(output, tuple) else output
        linear1 = next(m for name, m in model.named_modules() if name.endswith(f"{index}.topdown_linear1.default"))
        squares = (output.detach() @ linear1.weight.T - hidden_states.detach()) ** 2
        mask = torch.ones(squares.shape[:2]) if mask is None else mask
        total = total + (squares.mean(-1) * mask).sum() / mask.sum()
    return config.variational_weight * total


@pytest.mark.parametrize("variant", RANGES)
@pytest.mark.parametrize(
    ("model_class", "task_type"),
    [(tf.ViTForImageClassification, None), (tf.LlamaForCausalLM, None), (tf.LlamaForCausalLM, "CAUSAL_LM")],
)
def test_is_added_to_the_loss(model_class: type, task_type: str | None, variant: str) -> None:
    with_it, without = (
        pretuned(model_class, weight, task_type=task_type, **RANGES[variant]) for weight in (WEIGHT, 0)
    )
    inputs = with_labels(with_it)
    expected = expected_loss(with_it, inputs)
    assert expected > 0.01
    plain = without(**inputs).loss
    torch.testing.assert_close(with_it(**inputs).loss, plain + expected)
    assert torch.equal(with_it.variational_loss(), torch.zeros(()))  # not a second time
    torch.testing.assert_close(with_it(**inputs, return_dict=False)[0], plain + expected)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_for_a_loss_outside_of_the_model(model_class: type) -> None:
    model = pretuned(model_class)
    inputs = inputs_of(model)
    expected = expected_loss(model, inputs)
    model(**inputs)
    torch.testing.assert_close(model.variational_loss(), expected)
    assert not model.variational_loss()
    model(**inputs)
    backbone, _ = next(feedback_paths(model))
    with pytest.raises(RuntimeError, match="stop"), backbone.register_forward_pre_hook(raise_stop):
        model(**inputs)
    model.eval()(**inputs)
    assert not model.variational_loss()  # nothing of the forwards before


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_forwards_in_between_that_do_not_train(model_class: type) -> None:
    """As in DPO, a reference without the adapter, or an evaluation, before the loss is taken."""
    model = pretuned(model_class)
    inputs = inputs_of(model)
    expected = expected_loss(model, inputs)
    model(**inputs)
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    with torch.no_grad():
        model.eval()(**inputs)
    torch.testing.assert_close(model.variational_loss(), expected)
    model.train()(**inputs)
    model(**inputs)
    torch.testing.assert_close(model.variational_loss(), expected)  # that of the last one


class Twice(nn.Module):
    """Calls its model twice, as a Siamese network does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
        outputs = [self.model(pixel_values=images).last_hidden_state for images in (first, second)]
        return ((outputs[0] - outputs[1]).square().mean(),)


def test_model_that_calls_its_backbone_twice() -> None:
    images = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    model = adapted(Twice(tiny_model(tf.ViTModel)), variational_weight=WEIGHT).train()
    plain = adapted(Twice(tiny_model(tf.ViTModel))).train()
    single = [adapted(tiny_model(tf.ViTModel), variational_weight=WEIGHT).train() for _ in range(2)]
    for m, x in zip(single, images, strict=True):
        m(pixel_values=x)
    expected = plain(*images)[0] + sum(m.variational_loss() for m in single)
    torch.testing.assert_close(model(*images)[0], expected)


def test_backbone_that_is_called_past_the_forward_of_the_model() -> None:
    """As by the trainers of TRL: the loss is that of the last forward, and does not add up until memory is full."""
    model = pretuned(tf.LlamaForCausalLM)
    backbone = model.get_base_model().model
    inputs = inputs_of(model)
    expected = expected_loss(model, inputs)
    backbone(**inputs)
    with pytest.warns(UserWarning, match="was not used.*TRL"):
        backbone(**inputs)
    torch.testing.assert_close(model.variational_loss(), expected)
    model(**inputs)
    with pytest.warns(UserWarning, match="label smoothing"):
        model(**inputs)


def test_stale_loss_of_an_encoder_is_not_added() -> None:
    base = tiny_model(tf.T5ForConditionalGeneration, dropout_rate=0.0)
    model = adapted(base, variational_weight=WEIGHT).train()
    inputs = inputs_of(model)
    encoder_outputs = model(**inputs)
    reuse = {"encoder_outputs": (encoder_outputs.encoder_last_hidden_state,), "labels": inputs["input_ids"]}
    assert torch.equal(model(**reuse).loss, model(**reuse).loss)


def raise_stop(*_: Any) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_only_in_training(model_class: type) -> None:
    model, without = pretuned(model_class).eval(), pretuned(model_class, 0).eval()
    inputs = with_labels(model)
    assert_same(model(**inputs).loss, without(**inputs).loss)
    model.train()
    with model.disable_adapter():
        base = tiny_model(model_class).train()
        assert_same(model(**inputs).loss, base(**inputs).loss)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradients_reach_linear1_only(model_class: type) -> None:
    model = pretuned(model_class)
    model(**inputs_of(model))
    model.variational_loss().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "topdown_linear1" in name}


def test_padding_can_be_left_out() -> None:
    model = pretuned(tf.LlamaForCausalLM, variational_ignore_padding=True)
    inputs = inputs_of(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:] = 0
    inputs["attention_mask"] = mask
    expected = expected_loss(model, inputs, mask.float())
    model(**inputs)
    torch.testing.assert_close(model.variational_loss(), expected)
    everything = pretuned(tf.LlamaForCausalLM)
    everything(**inputs)
    assert not torch.allclose(everything.variational_loss(), expected)


@pytest.mark.parametrize(
    ("model_class", "variant", "use_reentrant"),
    [(cls, variant, False) for cls in VIT_AND_LLAMA for variant in RANGES]
    + [(cls, variant, True) for cls in VIT_AND_LLAMA for variant in ("full", "middle")],
)
def test_gradient_checkpointing(model_class: type, variant: str, use_reentrant: bool) -> None:
    plain = pretuned(model_class, **RANGES[variant])
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for m in (plain, model):
        m(**with_labels(m)).loss.backward()
    for name, gradient in gradients(plain).items():
        assert_same(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize(
    "model_class", [tf.ViTForImageClassification, pytest.param(tf.LlamaForCausalLM, marks=takes_adapters)]
)
def test_injected_and_removed(model_class: type) -> None:
    base = tiny_model(model_class)
    if model_class is tf.LlamaForCausalLM:
        base.add_adapter(TopDownConfig(variational_weight=WEIGHT))
    else:
        base = get_peft_model(base, TopDownConfig(variational_weight=WEIGHT)).get_base_model()
    inputs = with_labels(base)
    assert base.train()(**inputs).loss > tiny_model(model_class).train()(**inputs).loss + 0.01
    model = adapted(tiny_model(model_class), variational_weight=WEIGHT)
    unloaded = model.unload()
    assert not unloaded._forward_hooks and not unloaded._forward_hooks_with_kwargs


def test_encoder_and_decoder() -> None:
    model = adapted(tiny_model(tf.T5ForConditionalGeneration), variational_weight=WEIGHT).train()
    inputs = inputs_of(model)
    model(**inputs)
    both = model.variational_loss()
    model.get_encoder()(inputs["input_ids"])
    of_encoder = model.variational_loss()
    assert 0 < of_encoder < both


def test_hierarchical_transformers_are_refused() -> None:
    model = tf.SwinModel(tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))
    with pytest.raises(ValueError, match="`variational_weight=0.3` cannot be used with a hierarchical"):
        adapted(model, variational_weight=WEIGHT)


# --------------------------------------------------------------------------------------------------- with Trainer


class OwnLossTrainer(tf.Trainer):
    """Label smoothing takes the labels from the model, so the variational loss has to be added here."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.accelerator.unwrap_model(model).variational_loss()
        return (loss, outputs) if return_outputs else loss


def trained(
    folder: Path, model_class: type, trainer_class: type = tf.Trainer, weight: float = WEIGHT, **options: Any
) -> Any:
    model = pretuned(model_class, weight)
    inputs = {name: x.repeat(4, *[1] * (x.dim() - 1)) for name, x in with_labels(model).items()}
    if "input_ids" in inputs:
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][0, 4:] = -100  # uneven numbers of labels
    rows = Dataset.from_dict({name: x.tolist() for name, x in inputs.items()}).with_format("torch")
    arguments = tf.TrainingArguments(
        str(folder),
        max_steps=3,
        learning_rate=5e-4,
        optim="sgd",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        **options,
    )
    trainer = trainer_class(model, arguments, train_dataset=rows)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        rows, batch_size=arguments.per_device_train_batch_size, collate_fn=trainer.data_collator
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_gradient_accumulation(model_class: type, tmp_path: Path) -> None:
    """Whole batches and batches split in two train alike; the second batch of LLaMA has more labels."""
    whole = trained(tmp_path, model_class, per_device_train_batch_size=8)
    split = trained(tmp_path, model_class, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    without = trained(tmp_path, model_class, weight=0, per_device_train_batch_size=8)
    for name in whole:
        tolerance = 2e-3 if "linear1" in name else 1e-5  # a mean of means, weighted by labels
        torch.testing.assert_close(split[name], whole[name], rtol=tolerance, atol=tolerance, msg=name)
    assert any(not torch.allclose(whole[name], without[name], atol=1e-2) for name in whole if "linear1" in name)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_label_smoothing(model_class: type, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8}
    in_model = trained(tmp_path, model_class, OwnLossTrainer, **options)  # added once, although it asks for more
    expected = trained(tmp_path, model_class, **options)
    for name in expected:
        torch.testing.assert_close(in_model[name], expected[name], msg=name)
    smooth = trained(tmp_path, model_class, OwnLossTrainer, label_smoothing_factor=0.1, **options)
    without = trained(tmp_path, model_class, weight=0, label_smoothing_factor=0.1, **options)
    assert any(not torch.allclose(smooth[name], without[name], atol=1e-2) for name in smooth if "linear1" in name)


# -------------------------------------------------------------------------------------- starting from another adapter


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_starts_from_pretrained_feedback(model_class: type, rank: int, tmp_path: Path) -> None:
    source = steered(tiny_model(model_class))
    source.save_pretrained(tmp_path / "pretrained")
    options = {
        "r": rank,
        "trainable_parts": ["prompt", "linear2"],
        "pretrained_feedback": str(tmp_path / "pretrained"),
    }
    model = adapted(tiny_model(model_class), **options)
    assert torch.equal(output_of(model), output_of(source))
    of_parts = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = ("topdown_prompt", "topdown_linear2_" if rank else "topdown_linear2.")
    assert of_parts and all(any(part in name for part in wanted) for name in of_parts)
    loss_of(model).backward()
    model.save_pretrained(tmp_path / "tuned")
    config_file = tmp_path / "pretrained" / "adapter_config.json"
    config_file.unlink()  # loading the tuned one does not need the other
    loaded = PeftModel.from_pretrained(tiny_model(model_class), tmp_path / "tuned").eval()
    assert torch.equal(output_of(loaded), output_of(source))


@pytest.mark.parametrize("name", ["default", "l", "layers", "weight"])
def test_pretrained_feedback_on_a_model_in_low_precision(name: str, tmp_path: Path) -> None:
    """Its weights are not rounded on the way into a float32 adapter, whatever the adapter's name."""
    source = steered(tiny_model(tf.ViTModel))
    source.save_pretrained(tmp_path)
    base = tiny_model(tf.ViTModel).to(torch.bfloat16)
    model = get_peft_model(base, TopDownConfig(pretrained_feedback=str(tmp_path)), adapter_name=name)
    for key, parameter in source.named_parameters():
        if "topdown_" in key:
            assert torch.equal(model.get_parameter(key.replace(".default.", f".{name}.")), parameter)


def test_config_with_pretrained_feedback_is_used_again(tmp_path: Path) -> None:
    source = steered(tiny_model(tf.ViTModel))
    source.save_pretrained(tmp_path)
    config = TopDownConfig(pretrained_feedback=str(tmp_path))
    loaded = TopDownConfig.from_pretrained(tmp_path)
    loaded.pretrained_feedback = str(tmp_path)
    for used in (config, config, replace(config, lora_dropout=0.1), loaded):
        model = get_peft_model(tiny_model(tf.ViTModel), used).eval()
        assert torch.equal(output_of(model), output_of(source))
    assert config.pretrained_feedback == str(tmp_path) and config.init_weights


def test_pretrained_feedback_of_another_method(tmp_path: Path) -> None:
    get_peft_model(tiny_model(tf.ViTModel), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA adapter; expected a TOAST one"):
        adapted(tiny_model(tf.ViTModel), pretrained_feedback=str(tmp_path))


def test_pretrained_feedback_for_some_of_its_blocks(tmp_path: Path) -> None:
    source = steered(tiny_model(tf.ViTModel))
    source.save_pretrained(tmp_path)
    model = adapted(tiny_model(tf.ViTModel), feedback_to=2, pretrained_feedback=str(tmp_path))
    for name, parameter in model.named_parameters():
        if "topdown_" in name:
            assert torch.equal(parameter, source.get_parameter(name))


@pytest.mark.parametrize(
    ("model_class", "saved", "options", "message"),
    [
        (tf.LlamaForCausalLM, {}, {}, "made for backbone_type='vit', the model has 'llama'"),
        (tf.ViTModel, {"feedback_to": 2}, {}, "lacks: feedback_path.layers.0"),
    ],
)
def test_pretrained_feedback_that_does_not_fit(
    model_class: type, saved: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapted(tiny_model(tf.ViTModel), **saved).save_pretrained(tmp_path)
    base = tiny_model(model_class)
    names, expected = list(base.state_dict()), output_of(base)
    with pytest.raises(ValueError, match=message):
        adapted(base, pretrained_feedback=str(tmp_path), **options)
    assert list(base.state_dict()) == names and not hasattr(base, "peft_config")
    assert torch.equal(output_of(base), expected)


@pytest.mark.parametrize("stage", OFFICIAL_STAGES)
def test_official_stages(stage: str) -> None:
    config = TopDownConfig.official_stage(stage, feedback_to=1)
    assert config.feedback_to == 1 and set(OFFICIAL_STAGES[stage]["trainable_parts"]) == set(config.trainable_parts)
    assert (config.variational_weight > 0) == ("pretuning" in stage) and (config.r > 0) == ("lite" in stage)


def test_unknown_stage() -> None:
    with pytest.raises(ValueError, match="no stage 'tuning'; expected one of .*'llama-tuning'"):
        TopDownConfig.official_stage("tuning")
