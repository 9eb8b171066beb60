"""TRL's trainers fine-tune with TOAST as with LoRA, offline, and so does the example script."""

import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from toast_peft import TopDownConfig, store_features

from .helpers import adapted, assert_same, counted_block_calls, output_of
from .zoo import VARIANTS, VOCAB_SIZE, tiny_model

trl = pytest.importorskip("trl", reason="needs Python 3.11")
instruction_tuning = importlib.import_module("instruction_tuning")

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
@pytest.mark.parametrize(
    ("variant", "checkpointing"), [("full", "none"), ("lite", "non-reentrant"), ("full", "reentrant")]
)
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


@pytest.fixture
def tokens() -> Dataset:
    tokenizer = tiny_tokenizer()
    return Dataset.from_list([dict(tokenizer(sentence, return_token_type_ids=False)) for sentence in SENTENCES])


def losses_with(model: PeftModel, data: Dataset, collator: Any, folder: Path) -> list[float]:
    more = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 4}
    arguments = trl.SFTConfig(**options(folder, "none", **more))
    trainer = trl.SFTTrainer(model, arguments, collator, data, processing_class=tiny_tokenizer())
    trainer.train()
    return losses_of(trainer)


def test_sft_with_stored_features(tokens: Dataset, tmp_path: Path) -> None:
    """As the guide says: the losses are those of two passes."""
    models = [adapted(tiny_model(tf.LlamaForCausalLM), task_type="CAUSAL_LM") for _ in range(2)]
    collator = tf.DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    stored = store_features(models[0], tokens, tmp_path / "features", data_collator=collator)
    rows = Dataset.from_dict({"row": range(len(stored))})
    rows = rows.with_transform(lambda batch: {"stored": [stored[index] for index in batch["row"]]})
    with_stored = lambda batch: stored.collate([row["stored"] for row in batch])  # noqa: E731
    with counted_block_calls(models[0]) as calls:
        found = losses_with(models[0], rows, with_stored, tmp_path)
    assert set(calls.values()) == {4}  # pass 1 does not run in the four steps
    assert found == pytest.approx(losses_with(models[1], tokens, collator, tmp_path), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precompute", "checkpointing"), [(False, "none"), (True, "non-reentrant"), (False, "reentrant")]
)
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


# -------------------------------------------------------------------------------- examples/instruction_tuning.py

EXAMPLE = ["--pretraining_steps", "2", "--max_steps", "2", "--max_train_samples", "8", "--max_eval_samples", "4"]
EXAMPLE += ["--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]


@pytest.mark.usefixtures("library_is_small")
def test_the_example_learns_from_answers_and_saves(tmp_path: Path) -> None:
    metrics = instruction_tuning.main([*EXAMPLE, "--max_steps", "6", "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "all_results.json").read_text()) == metrics
    assert metrics["eval_loss"] < metrics["before_loss"]
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small_llama")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What does sum(numbers) do?"}]
    model = PeftModel.from_pretrained(base, tmp_path)
    answer = instruction_tuning.answer(model, tokenizer, question)
    assert 0 < len(tokenizer(answer)["input_ids"]) and "assistant:" not in answer[:10]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: Why?\nassistant: So.<|endoftext|>"


def test_the_example_takes_instructions_and_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}] * 10
    expected = {
        "prompt": [{"role": "user", "content": "Add.\n\n1 and 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }
    for name, written, read in (("alpaca", rows, expected), ("trl", [expected] * 10, expected)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, written)))
        arguments, _ = instruction_tuning.parse(["--train_file", str(file)])
        data = instruction_tuning.load_conversations(arguments)
        assert {split: len(data[split]) for split in data} == {"train": 9, "validation": 1}
        assert data["train"][0] == read


def test_the_help_of_the_example_is_about_our_own_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        instruction_tuning.parse(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70 and "--train_file" in text and "--weight_decay" not in text
