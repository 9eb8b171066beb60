"""The Hugging Face Trainer: the loss falls, an interrupted run goes on, and frozen means frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from ..helpers import adapted, assert_same, output_of
from ..zoo import VIT_AND_LLAMA, VOCAB_SIZE, tiny_model

STEPS = 40
FEW_STEPS = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}  # four are an epoch


def dataset_for(model_class: type, rows: int = 64) -> Dataset:
    """Images whose class is their brightness, or sentences that count upwards."""
    generator = torch.Generator().manual_seed(0)
    if model_class is tf.ViTForImageClassification:
        labels = torch.randint(0, 2, (rows,), generator=generator)
        images = torch.randn(rows, 3, 8, 8, generator=generator) + (labels * 2.0 - 1).view(-1, 1, 1, 1)
        return Dataset.from_dict({"pixel_values": images.numpy(), "labels": labels.numpy()}).with_format("torch")
    start = torch.randint(0, VOCAB_SIZE, (rows, 1), generator=generator)
    ids = (start + torch.arange(8)) % VOCAB_SIZE
    return Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()}).with_format("torch")


def new_model(model_class: type, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    if model_class is tf.ViTForImageClassification:
        options = {"modules_to_save": ["classifier"]} | options
    else:
        options = {"task_type": "CAUSAL_LM"} | options
    return adapted(tiny_model(model_class), **options)


def trainer_for(model: PeftModel, folder: Path, **options: Any) -> Trainer:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 2,
        "save_steps": STEPS // 2,
        "logging_steps": STEPS // 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "label_names": ["labels"],
    }
    data = dataset_for(type(model.get_base_model()))
    arguments = TrainingArguments(output_dir=str(folder), **defaults | options)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def base_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """All tensors that are not trained."""
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if "topdown_" not in name and ".modules_to_save." not in name}


@pytest.mark.parametrize(
    ("model_class", "r", "options"),
    [
        (tf.ViTForImageClassification, 0, {}),
        (tf.LlamaForCausalLM, 4, {}),
        (tf.LlamaForCausalLM, 0, {"bf16": True}),
        (tf.ViTForImageClassification, 4, {"gradient_checkpointing": True}),
        (tf.LlamaForCausalLM, 4, {"gradient_checkpointing": True}),
        (tf.LlamaForCausalLM, 0, {"gradient_accumulation_steps": 2}),
    ],
    ids=["full", "lite", "bfloat16 autocast", "checkpointing ViT", "checkpointing Llama", "accumulation"],
)
def test_loss_falls_and_the_base_model_stays(model_class: type, r: int, options: dict, tmp_path: Path) -> None:
    model = new_model(model_class, r=r)
    before = base_tensors(model)
    feedback = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_for(model, tmp_path, **options)
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0] < 0.9 * loss_before
    after = base_tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    trained = dict(model.named_parameters())
    assert [name for name in feedback if torch.equal(trained[name], feedback[name])] == []


@pytest.mark.parametrize(("model_class", "bf16"), [(tf.ViTForImageClassification, True), (tf.LlamaForCausalLM, False)])
def test_resumed_run_gives_the_same_weights(model_class: type, bf16: bool, tmp_path: Path) -> None:
    """Interrupted amid an epoch and resumed in a new process' model, the weights are those of an uninterrupted run."""
    whole = new_model(model_class)
    trainer_for(whole, tmp_path, bf16=bf16, **FEW_STEPS).train()
    resumed = new_model(model_class)
    trainer_for(resumed, tmp_path, bf16=bf16, **FEW_STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected, found = whole.state_dict(), resumed.state_dict()
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert_same(found[name], weights)


@pytest.mark.parametrize("model_class", VIT_AND_LLAMA)
def test_checkpoint_is_an_adapter(model_class: type, tmp_path: Path) -> None:
    model = new_model(model_class)
    trainer_for(model, tmp_path, **FEW_STEPS).train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model(model_class), folder)
    assert_same(output_of(loaded.eval()), output_of(model.eval()))


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = new_model(tf.ViTForImageClassification)
    trainer = trainer_for(model, tmp_path, load_best_model_at_end=True, learning_rate=0.3)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses[:2]), rel=1e-6)
