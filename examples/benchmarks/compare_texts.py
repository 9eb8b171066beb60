r"""Compare fine-tuning methods on a set of texts with classes: one command, one table.

    python examples/benchmarks/compare_texts.py
    python examples/benchmarks/compare_texts.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file sst2/train.jsonl --test_file sst2/test.jsonl --max_train_samples 300 --output_dir mine

The model is an encoder with a new head. How methods are compared is told in `comparison.py`, what each of them trains
in `methods.py`.

Without a model and data it needs no network: a small BERT that knows the modules of Python's standard library by
their docstrings learns to tell five of its packages apart.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from classifiers import ClassifierArguments, ClassifierComparison, load_examples, split
from comparison import Rows, only_our_progress, parse
from offline import labelled_tokens, package_docstrings, small_bert
from pandas import DataFrame
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)


@dataclass
class TextComparisonArguments(ClassifierArguments):
    """What to compare, and on which texts."""

    max_length: int = field(default=48, metadata={"help": "Texts are cut off after so many tokens."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})


class TextComparison(ClassifierComparison):
    """A comparison of encoders that classify texts."""

    kind = "encoder"
    arguments: TextComparisonArguments

    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """An encoder, and all texts as tokens."""
        arguments = self.arguments
        base = arguments.model_name_or_path or small_bert(self.folder / "small_bert", arguments.pretraining_steps)
        data = load_examples(arguments, arguments.text_column_name, "text") or package_docstrings(60, 200)
        self.classes = data["train"].features["label"].names
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.padded = DataCollatorWithPadding(tokenizer)
        parts = split(data, arguments).items()
        rows = {name: labelled_tokens(texts, tokenizer, arguments.max_length) for name, texts in parts}
        rows["test"].sort(key=lambda row: len(row["input_ids"]))  # little padding
        return base, rows

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A classifier with a new head."""
        model, options = self.with_new_head(AutoModelForSequenceClassification)
        return model, options | {"task_type": "SEQ_CLS"}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of texts, padded to the longest of them."""
        return dict(self.padded(rows))


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The table, which is also printed, and a plot are saved.
    """
    only_our_progress()
    defaults = {"output_dir": "outputs/texts", "pretraining_steps": 200, "num_train_epochs": 3.0}
    return TextComparison(parse(TextComparisonArguments, "encoder", __doc__, arguments, **defaults)).run()


if __name__ == "__main__":
    main()
