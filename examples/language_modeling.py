"""Adapt a causal language model with TOAST.

    python examples/language_modeling.py
    python examples/language_modeling.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --train_file mine.txt --validation_file held_out.txt --block_size 512 --output_dir outputs/mine

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings of Python's standard
library learns those of its modules about numbers, which are worked examples, quite unlike the prose of the others.
"""

import ast
import math
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback, store_features

NUMERIC_MODULES = ["_pydecimal.py", "fractions.py", "statistics.py"]
# Only what every installation of Python has.
PACKAGES = ["asyncio", "collections", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml"]


@dataclass
class Arguments:
    """Which model to adapt, and to which texts."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the Hub or a local folder. Default: a small LLaMA, pre-trained first."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub or a local folder. Default: docstrings of Python's library."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Local .txt, .jsonl, .csv or .parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file for the evaluation."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many texts at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many texts at most."})
    store_features: str | None = field(default=None, metadata={"help": "Run pass 1 once, stored in this folder."})
    pretraining_steps: int = field(default=500, metadata={"help": "Steps of pre-training of the small LLaMA."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/language_modeling",
        learning_rate=3e-3,
        num_train_epochs=3,
        logging_steps=50,
        save_strategy="no",
        prediction_loss_only=True,
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def load_texts(arguments: Arguments) -> DatasetDict:
    """The splits "train" and "validation" with the column "text"."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        suffix = Path(arguments.train_file.removesuffix(".gz")).suffix[1:]
        builder = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
        data = load_dataset(builder, data_files={split: name for split, name in files.items() if name})
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name)
    else:
        data = library_docstrings(numeric=True)
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    data = data.select_columns(arguments.text_column_name)
    if arguments.text_column_name != "text":
        data = data.rename_column(arguments.text_column_name, "text")
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return DatasetDict({split: data[split].select(range(len(data[split]))[:limit]) for split, limit in limits.items()})


def library_docstrings(numeric: bool) -> DatasetDict:
    """Docstrings of Python's standard library, of the `NUMERIC_MODULES` or of the others; every fifth to validate."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [*sorted(root.glob("*.py")), *(path for name in PACKAGES for path in sorted((root / name).glob("*.py")))]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    trees = [ast.parse(path.read_bytes()) for path in paths if (path.name in NUMERIC_MODULES) == numeric]
    found = [ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, documented)]
    texts = list(dict.fromkeys(filter(None, found)))  # many share a docstring, which must not be in both splits
    random.Random(0).shuffle(texts)
    train = [text for index, text in enumerate(texts) if index % 5]
    return DatasetDict(train=Dataset.from_dict({"text": train}), validation=Dataset.from_dict({"text": texts[::5]}))


def blocks_of_tokens(tokenizer: PreTrainedTokenizerBase, block_size: int) -> Callable[[dict], dict]:
    """A function that tokenizes texts, joins them and cuts them into blocks; what is left at the end is dropped."""

    def blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = tokenizer(rows["text"])["input_ids"]
        # Not every tokenizer marks where a text starts or ends.
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        ends = [tokenizer.eos_token_id] if marks.isdisjoint(texts[0][:1] + texts[0][-1:]) else []
        tokens = list(chain.from_iterable(text + ends for text in texts))
        cut = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    return blocks


def make_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    block_size: int,
    arguments: TrainingArguments,
) -> Trainer:
    """A Trainer of a language model."""
    blocks = data.map(blocks_of_tokens(tokenizer, block_size), batched=True, remove_columns="text")
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )


def pretrain(folder: Path, steps: int, block_size: int) -> None:
    """Pre-train a small LLaMA on docstrings of modules that are not about numbers, and save it."""
    bytes_and_end = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(vocab={token: index for index, token in enumerate(bytes_and_end)}, merges=[])
    size = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ends))
    schedule = {"max_steps": steps, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    options = {"adam_beta2": 0.95, "weight_decay": 0.1, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **schedule, **options)
    make_trainer(model, tokenizer, library_docstrings(numeric=False), block_size, arguments).train()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    base = arguments.model_name_or_path
    if base is None:
        base = f"{training_arguments.output_dir}/small_llama"
        pretrain(Path(base), arguments.pretraining_steps, arguments.block_size)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, TopDownConfig(task_type="CAUSAL_LM", r=8))
    model.print_trainable_parameters()
    trainer = make_trainer(model, tokenizer, load_texts(arguments), arguments.block_size, training_arguments)
    if arguments.store_features is not None:
        stored = store_features(model, trainer.train_dataset, arguments.store_features)
        trainer.train_dataset, trainer.data_collator = stored, stored.collate
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    metrics |= {f"{when}_perplexity": math.exp(metrics[f"{when}_loss"]) for when in ("before", "eval")}
    trainer.save_model()  # model.save_pretrained(...) with the tokenizer, also in distributed training
    trainer.create_model_card()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()
