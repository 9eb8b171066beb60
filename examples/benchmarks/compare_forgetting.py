r"""Compare what fine-tuning methods teach a causal language model, and what they make it forget.

    python examples/benchmarks/compare_forgetting.py
    python examples/benchmarks/compare_forgetting.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --train_file mine.txt --test_file held_out.txt --source_file general.txt --output_dir mine

The table has two perplexities: that of the target, on held-out texts like those of the training, and that of the
source, on texts like those of pre-training. The learning rate is searched on the target only. How methods are compared
is told in `comparison.py`, what each of them trains in `methods.py`.

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings of Python's standard
library, the source, learns those of its modules about numbers, the target.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comparison import Comparison, ComparisonArguments, Rows, load_named_data, only_our_progress, parse
from datasets import Dataset, DatasetDict
from offline import docstrings, small_llama, token_rows
from pandas import DataFrame
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator


@dataclass
class ForgettingArguments(ComparisonArguments):
    """What to compare, and on which texts."""

    source_file: str | None = field(
        default=None, metadata={"help": "As train_file: texts like those of pre-training, to see what is forgotten."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column of the data set with the texts."})
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})


class ForgettingComparison(Comparison):
    """A comparison of language models, with the further split "source"."""

    kind = "text"
    columns = ["target perplexity", "source perplexity"]
    arguments: ForgettingArguments

    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """A language model, and all texts as blocks of tokens."""
        arguments, folder = self.arguments, self.folder / "small_llama"
        base = arguments.model_name_or_path
        base = base or small_llama(folder, arguments.pretraining_steps, arguments.block_size)
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = split(arguments)
        return base, {name: token_rows(part, tokenizer, arguments.block_size) for name, part in texts.items()}

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A language model."""
        return AutoModelForCausalLM.from_pretrained(self.base), {"task_type": "CAUSAL_LM"}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of blocks of tokens."""
        return default_data_collator(rows)

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Perplexities of target and source; infinite after a training that diverged."""
        losses = [trainer.evaluate(self.rows[name])["eval_loss"] for name in (split, "source")]
        perplexities = [math.exp(loss) if loss < 700 else math.inf for loss in losses]  # not of NaN either
        return dict(zip(self.columns, perplexities, strict=True))

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """The source does not count: whoever fine-tunes a model need not have it."""
        return (-metrics["target perplexity"],)

    def of_base_model(self) -> dict[str, float]:
        """The perplexities before any training."""
        model, _ = self.load_model()
        arguments = self.training_arguments(self.arguments.seed)
        return self.measure(Trainer(model, arguments, self.collate), "test")


def load_texts(arguments: ForgettingArguments) -> DatasetDict:
    """The splits "train" and "test" with the column "text"."""
    data = load_named_data(arguments, {arguments.text_column_name: "text"}) or docstrings(numeric=True)
    limits = {"train": arguments.max_train_samples, "test": arguments.max_test_samples}
    return DatasetDict({name: data[name].select(range(len(data[name]))[:limit]) for name, limit in limits.items()})


def split(arguments: ForgettingArguments) -> dict[str, Dataset]:
    """The splits "search", "validation", "test" and "source"."""
    data = load_texts(arguments)
    parts = data["train"].train_test_split(arguments.validation_share, seed=arguments.seed)
    if (file := arguments.source_file) is None:
        source = docstrings(numeric=False)["test"]
    else:
        source = load_texts(replace(arguments, train_file=file, test_file=file))["test"]
    return {"search": parts["train"], "validation": parts["test"], "test": data["test"], "source": source}


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The table, which is also printed, and a plot are saved.
    """
    only_our_progress()
    defaults = {"output_dir": "outputs/forgetting", "num_train_epochs": 3.0, "per_device_train_batch_size": 8}
    comparison = ForgettingComparison(parse(ForgettingArguments, "text", __doc__, arguments, **defaults))
    runs = comparison.run()
    print("Base model:", ", ".join(f"{name} {value:.3f}" for name, value in comparison.of_base_model().items()))
    return runs


if __name__ == "__main__":
    main()
