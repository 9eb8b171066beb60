"""Adapt a text classifier with TOAST.

    python examples/text_classification.py
    python examples/text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.jsonl --validation_file test.jsonl --max_length 128 --output_dir outputs/mine

Without a model and data it needs no network: a small ModernBERT that knows the modules of Python's standard library by
their docstrings learns to tell its packages apart.
"""

import ast
import sysconfig
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback

LIBRARY = Path(sysconfig.get_path("stdlib"))
MODULES = {path.stem: [path] for path in sorted(LIBRARY.glob("*.py"))}
PACKAGES = {
    name: sorted((LIBRARY / name).glob("*.py")) for name in ("asyncio", "email", "importlib", "logging", "unittest")
}


@dataclass
class Arguments:
    """Which model to adapt, and to which texts."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the Hub or a local folder. Default: a small ModernBERT, pre-trained first."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub or a local folder. Default: docstrings of Python."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Local .jsonl, .csv or .parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file for the evaluation."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    max_length: int = field(default=48, metadata={"help": "Texts are cut off after so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many texts at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many texts at most."})
    pretraining_steps: int = field(default=400, metadata={"help": "Steps of pre-training of the small ModernBERT."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/text_classification",
        learning_rate=3e-3,
        num_train_epochs=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        logging_steps=50,
        save_strategy="no",
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def load_texts(arguments: Arguments) -> DatasetDict:
    """The splits "train" and "validation" with the columns "text" and "label"."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        suffix = Path(arguments.train_file.removesuffix(".gz")).suffix[1:]
        files = {split: name for split, name in files.items() if name}
        data = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=files)
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name)
    else:
        data = library_docstrings(PACKAGES).train_test_split(train_size=400, seed=0)
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    columns = {arguments.text_column_name: "text", arguments.label_column_name: "label"}
    data = data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.class_encode_column("label")
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return DatasetDict({split: data[split].select(range(len(data[split]))[:limit]) for split, limit in limits.items()})


def library_docstrings(sources: dict[str, list[Path]]) -> Dataset:
    """The docstrings in some files of Python's standard library; what the files belong to is the label."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    label_of = {}  # many share a docstring, which must not be in both splits
    for label, paths in sources.items():
        for node in (node for path in paths for node in ast.walk(ast.parse(path.read_bytes()))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                label_of.setdefault(text, label)
    data = Dataset.from_dict({"text": list(label_of), "label": list(label_of.values())})
    return data.class_encode_column("label")


def pretrain(folder: str, steps: int, max_length: int) -> None:
    """Pre-train a small ModernBERT to tell modules by their docstrings, and save it."""
    data = library_docstrings(MODULES)
    tokenizer = BertTokenizer().train_new_from_iterator(data["text"], vocab_size=2000)
    size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    classes = {"num_labels": len(data.features["label"].names), "classifier_pooling": "mean"}
    config = ModernBertConfig(vocab_size=len(tokenizer), **size, **special, **classes)
    model = ModernBertForSequenceClassification(config)
    schedule = {"max_steps": steps, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    arguments = TrainingArguments(folder, save_strategy="no", per_device_train_batch_size=32, **schedule)
    tokens = tokenize(data, tokenizer, max_length)
    Trainer(model, arguments, DataCollatorWithPadding(tokenizer), tokens, processing_class=tokenizer).train()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def tokenize(
    data: Dataset | DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset | DatasetDict:
    """The texts as tokens."""
    options = {"truncation": True, "max_length": max_length}
    return data.map(lambda rows: tokenizer(rows["text"], **options), batched=True, remove_columns="text")


def load_model(name: str, classes: list[str]) -> PreTrainedModel:
    """A classifier for the classes, its head new unless it fits."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    return AutoModelForSequenceClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of texts whose class is predicted. Shapes: [texts, classes] and [texts]"""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    base = arguments.model_name_or_path
    if base is None:
        base = f"{training_arguments.output_dir}/small_modernbert"
        pretrain(base, arguments.pretraining_steps, arguments.max_length)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_texts(arguments)
    model = load_model(base, data["train"].features["label"].names)
    model = get_peft_model(model, TopDownConfig(task_type="SEQ_CLS", r=8))
    model.print_trainable_parameters()
    tokens = tokenize(data, tokenizer, arguments.max_length)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        processing_class=tokenizer,
    )
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    trainer.save_model()  # model.save_pretrained(...) with the tokenizer, also in distributed training
    trainer.create_model_card()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()
