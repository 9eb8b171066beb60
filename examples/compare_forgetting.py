"""Compare what fine-tuning methods teach a causal language model, and what they make it forget.

    python examples/compare_forgetting.py
    python examples/compare_forgetting.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --train_file mine.txt --validation_file held_out.txt --source_file general.txt --output_dir outputs/mine

The table has two perplexities: that of the target, on held-out texts like those of the training, and that of the
source, on texts like those of pre-training. The learning rate is searched on the target only. How methods are compared
is told in `comparison.py`, what each of them trains in `fine_tuning_methods.py`.

Without a model and data it needs no network: as in `language_modeling.py` a small LLaMA that has read docstrings of
Python's standard library, the source, learns those of its modules about numbers, the target.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comparison import Comparison, ComparisonArguments, Results, Rows, parse_comparison, run_comparison
from datasets import Dataset, DatasetDict
from demo import only_progress_of_training
from fine_tuning_methods import TEXT_LEARNING_RATES
from language_modeling import TextArguments, base_model_name, load_texts, preprocess
from offline_data import library_docstrings
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

COLUMNS = ["target perplexity", "source perplexity"]


@dataclass
class ForgettingArguments(ComparisonArguments):
    """Which model to adapt, and what to compare."""

    source_file: str | None = field(
        default=None, metadata={"help": "As train_file: texts like those of pre-training, to see what is forgotten."}
    )


class ForgettingComparison(Comparison):
    """A comparison of language models, with the further split "source"."""

    learning_rates = TEXT_LEARNING_RATES

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A language model."""
        return AutoModelForCausalLM.from_pretrained(self.base), {"task_type": "CAUSAL_LM"}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of blocks of tokens."""
        return default_data_collator(rows)

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Perplexities of target and source."""
        splits = (split, "source")
        losses = [trainer.evaluate(self.rows[name])["eval_loss"] for name in splits]
        return dict(zip(COLUMNS, map(math.exp, losses), strict=True))

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """The source does not count: whoever fine-tunes a model need not have it."""
        return (-metrics["target perplexity"],)

    def of_base_model(self) -> dict[str, float]:
        """The perplexities before any training."""
        model, _ = self.load_model()
        return self.measure(self.make_trainer(model, self.rows["train"], self.training_arguments.seed), "test")


def parse(arguments: list[str] | None = None) -> tuple[ForgettingArguments, TextArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((ForgettingArguments, TextArguments, TrainingArguments), description=__doc__)
    return parse_comparison(
        parser,
        TEXT_LEARNING_RATES,
        arguments,
        output_dir="outputs/forgetting",
        num_train_epochs=3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        prediction_loss_only=True,
    )


def source_texts(source_file: str | None, text_arguments: TextArguments) -> Dataset:
    """Texts like those the base model was trained on, with the column "text"."""
    if source_file is None:
        return library_docstrings(numeric=False)["validation"]
    limited = replace(text_arguments, train_file=source_file, validation_file=source_file)
    return load_texts(limited)["validation"]


def prepare(
    arguments: ForgettingArguments, text_arguments: TextArguments, training_arguments: TrainingArguments
) -> ForgettingComparison:
    """Everything before the first run."""
    results = Results.of(arguments, text_arguments, training_arguments)
    set_seed(training_arguments.seed)
    base = base_model_name(arguments, training_arguments.output_dir, text_arguments.block_size)
    data = load_texts(text_arguments)
    parts = data["train"].train_test_split(arguments.validation_share, seed=training_arguments.seed)
    texts = {
        "search": parts["train"],
        "validation": parts["test"],
        "test": data["validation"],
        "source": source_texts(arguments.source_file, text_arguments),
    }
    blocks = preprocess(DatasetDict(texts), AutoTokenizer.from_pretrained(base), text_arguments.block_size)
    rows = {name: list(split) for name, split in blocks.items()}
    rows["train"] = rows["search"] + rows["validation"]
    return ForgettingComparison(arguments, training_arguments, base, rows, results, tqdm())


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The rows of the table, which is also printed and, with a plot, saved.
    """
    only_progress_of_training()
    comparison = prepare(*parse(arguments))
    rows = run_comparison(comparison, COLUMNS)
    print("Base model:", ", ".join(f"{name} {value:.3f}" for name, value in comparison.of_base_model().items()))
    return rows


if __name__ == "__main__":
    main()
