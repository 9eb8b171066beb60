"""TRL's trainers fine-tune with TOAST as with LoRA, offline."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from toast_peft import TopDownConfig

from .models import VARIANTS, VOCAB_SIZE, assert_same, output_of, tiny_model

trl = pytest.importorskip("trl", reason="needs Python 3.11")

WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "bird",
    "fish",
    "sees",
    "hears",
    "finds",
    "takes",
    "small",
    "big",
    "red",
    "blue",
    "house",
    "tree",
    "river",
    "hill",
    "and",
    "under",
]
SENTENCES = [
    f"the {size} cat sees a {color} {place}"
    for size in WORDS[10:12]
    for color in WORDS[12:14]
    for place in WORDS[14:18]
]
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token for each word; the numbers of the special tokens are those of the tiny models."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    assert len(vocabulary) < VOCAB_SIZE
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def options(folder: Path, checkpointing: str, **more: Any) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": CHECKPOINTING[checkpointing] is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(CHECKPOINTING[checkpointing])},
        **more,
    }


def losses_of(trainer: tf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_learned(trainer: tf.Trainer, by: float) -> None:
    losses = losses_of(trainer)
    assert len(losses) == 20
    assert sum(losses[-3:]) < by * sum(losses[:3]), losses


def assert_saved_and_loaded(trainer: tf.Trainer, folder: Path) -> None:
    """The base model is as before, and the adapter that the trainer saves gives the trained model's output."""
    trainer.save_model(str(folder))
    inputs = dict(tiny_tokenizer()(SENTENCES[:4], return_tensors="pt", return_token_type_ids=False))
    base = tiny_model(tf.LlamaForCausalLM)
    base_output = output_of(base, inputs)
    model = trainer.model.eval()
    expected = output_of(model, inputs)
    assert (expected - base_output).abs().max() > 0.1
    with model.disable_adapter():
        assert_same(output_of(model, inputs), base_output)
    assert_same(output_of(PeftModel.from_pretrained(base, folder), inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("variant", ["full", "lite"])
def test_sft_lowers_the_loss(variant: str, checkpointing: str, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        model=tiny_model(tf.LlamaForCausalLM),
        args=trl.SFTConfig(**options(tmp_path, checkpointing)),
        train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=tiny_tokenizer(),
        peft_config=TopDownConfig(task_type="CAUSAL_LM", **VARIANTS[variant]),
    )
    trainer.train()
    assert_learned(trainer, by=0.7)
    assert_saved_and_loaded(trainer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("precompute", [False, True], ids=["reference along the way", "reference before"])
def test_dpo_lowers_the_loss(precompute: bool, checkpointing: str, tmp_path: Path) -> None:
    """The reference is the same model with its adapter disabled, so the loss starts at log 2."""
    pairs = {
        "prompt": [sentence.rsplit(" ", 2)[0] for sentence in SENTENCES],
        "chosen": [f" {sentence.split()[-2]} tree" for sentence in SENTENCES],
        "rejected": [f" {sentence.split()[-2]} bird" for sentence in SENTENCES],
    }
    trainer = trl.DPOTrainer(
        model=tiny_model(tf.LlamaForCausalLM),
        args=trl.DPOConfig(**options(tmp_path, checkpointing, precompute_ref_log_probs=precompute)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tiny_tokenizer(),
        peft_config=TopDownConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert_learned(trainer, by=0.7)
    assert_saved_and_loaded(trainer, tmp_path)
