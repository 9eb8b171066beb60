r"""Compare what fine-tuning methods teach a causal language model, and what they make it forget.

    python examples/benchmarks/forgetting.py
    python examples/benchmarks/forgetting.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name shakespeare --sources wikitext2 alpaca gsm8k stories --reference wikitext2 alpaca \
        --scales 0.7 0.5 0.3 --output_dir mine

The model learns a *target*, and every other domain is a *source*: what it knew before, or will be asked for later.
Measured are the perplexities of all of them on held-out texts; by how many per cent those of the sources changed, the
mean and the largest; and PEFT's own measure of forgetting, the loss of a token of the sources after minus before. With
a gate there are also the percentages of tokens whose logits are those of the base model, bit for bit.

Any method forgets little if it is weak enough. So learning rate and strength are chosen together, on validation texts:
the lowest perplexity of the target among those whose mean change is at most `--max_change`. A mean hides what is lost
in one domain behind what is gained in others, so another choice is made by the largest change. Both are trained anew
with `--seeds` seeds; `limits.md` has their test results, `frontier.png` their curves over the strength. How methods
are compared is told in `comparison.py`, what each of them trains in `methods.py`.

A target or source is a data set as `load_dataset` takes it, or a file; the texts in all its columns are joined and cut
into blocks of tokens, which are the rows that are counted. The gate and the replay see blocks of the `--reference`,
from the training part; of other sources they see nothing. The validation blocks are the last of the training part, as
neighbours are alike.

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings of Python's standard
library, the source, learns those of its modules about numbers, the target.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from comparison import SPLITS, Comparison, ComparisonArguments, Rows, load_named_data, only_our_progress, parse
from datasets import DatasetDict
from gates import has_logits_of_base
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from offline import docstrings, joined_columns, small_llama, token_rows
from optuna.trial import FrozenTrial
from pandas import DataFrame
from peft import PeftModel
from tables import (
    CHANGES,
    TARGET,
    at_every_strength,
    choice_at_limit,
    choices_at_limit,
    limit_table,
    perplexity_of,
    unchanged_of,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, default_data_collator


@dataclass
class ForgettingArguments(ComparisonArguments):
    """What to compare, and on which texts."""

    sources: list[str] = field(
        default_factory=list, metadata={"help": "All other domains: data sets or files. Default: docstrings."}
    )
    reference: list[str] = field(
        default_factory=list, metadata={"help": "Those of the sources that gate and replay see. Default: all."}
    )
    max_change: float = field(
        default=1.0, metadata={"help": "Limit of the mean change of the sources' perplexities, in per cent."}
    )
    block_size: int = field(default=128, metadata={"help": "The texts are joined and cut into blocks of this length."})


class ForgettingComparison(Comparison):
    """A comparison of language models, with validation and test blocks of each source under its name."""

    kind = "text"
    scaled = SPLITS
    arguments: ForgettingArguments

    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """A language model, and all texts as blocks of tokens."""
        arguments, folder = self.arguments, self.folder / "small_llama"
        base = arguments.model_name_or_path
        base = base or small_llama(folder, arguments.pretraining_steps, arguments.block_size)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        rows = self.split(load_named_data(arguments) or docstrings(numeric=True))
        texts = {name_of(path): load_texts(arguments, path) for path in arguments.sources}
        self.sources: dict[str, dict[str, Rows]] = {}
        for name, data in (texts or {"prose": docstrings(numeric=False)}).items():
            parts = self.sources[name] = self.split(data)
            parts["validation"] = parts["validation"][: arguments.max_test_samples]
        known = [name_of(path) for path in arguments.reference] or list(self.sources)
        self.reference = {name: self.sources[name]["search"] for name in known}
        self.columns = [TARGET, *map(perplexity_of, self.sources), *CHANGES, "forgetting"]
        return base, rows

    def split(self, data: DatasetDict) -> dict[str, Rows]:
        """The blocks "search", "validation" and "test" of a domain."""
        arguments = self.arguments
        train, test = (
            token_rows(joined_columns(data[part]), self.tokenizer, arguments.block_size) for part in ("train", "test")
        )
        train = train[: arguments.max_train_samples]
        searched = len(train) - max(1, round(arguments.validation_share * len(train)))
        return {"search": train[:searched], "validation": train[searched:], "test": test[: arguments.max_test_samples]}

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A language model."""
        return AutoModelForCausalLM.from_pretrained(self.base), {"task_type": "CAUSAL_LM"}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of blocks of tokens."""
        return default_data_collator(rows)

    def perplexities(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Those of the target and of each source; infinite after a training that diverged."""
        rows = {TARGET: self.rows[split]} | {perplexity_of(name): of[split] for name, of in self.sources.items()}
        losses = {name: trainer.evaluate(of_name)["eval_loss"] for name, of_name in rows.items()}
        return {name: math.exp(loss) if loss < 700 else math.inf for name, loss in losses.items()}  # not of NaN either

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """All perplexities, and how those of the sources changed."""
        after = self.perplexities(trainer, split)
        return after | changes(
            {name: (self.of_base_model[split][name], after[name]) for name in after if name != TARGET}
        )

    @torch.no_grad()
    def measure_once(self, trainer: Trainer, split: str) -> dict[str, float]:
        """With a gate, the percentage of the tokens of each text that have the logits of the base model."""
        model = trainer.model
        if not isinstance(model, PeftModel) or getattr(model.active_peft_config, "gate", None) is None:
            return {}
        model.eval()
        texts = {"target": self.rows[split]} | {name: of[split] for name, of in self.sources.items()}
        return {unchanged_of(name): 100 * self.unchanged(model, rows) for name, rows in texts.items()}

    def unchanged(self, model: PeftModel, rows: Rows) -> float:
        """The share of the tokens that have the logits of the base model."""
        same = []
        for batch in DataLoader(rows, self.arguments.per_device_eval_batch_size, collate_fn=self.collate):
            inputs = {"input_ids": batch["input_ids"].to(model.device), "use_cache": False}
            same.append(has_logits_of_base(model, inputs, model(**inputs).logits))
        return torch.cat(same).double().mean().item()

    def goodness(self, metrics: dict[str, float], change: str = CHANGES[0]) -> tuple[float, ...]:
        """That of the best strength; a training that is over the limit at every strength is the worst."""
        best = choice_at_limit(at_every_strength(DataFrame([metrics])), self.arguments.max_change, change)
        return -best[TARGET] if best[change] <= self.arguments.max_change else -math.inf, -best[change]

    def chosen(self, searched: list[FrozenTrial]) -> list[FrozenTrial]:
        """The best at the limit of the mean change, and at that of the largest one if it is another."""

        def best(change: str) -> FrozenTrial:
            return max(searched, key=lambda trial: self.goodness(trial.user_attrs, change))

        return list({trial.number: trial for trial in map(best, CHANGES)}.values())

    @cached_property
    def of_base_model(self) -> dict[str, dict[str, float]]:
        """The perplexities before any training, on both splits."""
        model, _ = self.load_model()
        trainer = Trainer(model, self.training_arguments(self.arguments.seed), self.collate)
        trainer.remove_callback(PrinterCallback)
        return {split: self.perplexities(trainer, split) for split in SPLITS}

    def save(self, runs: DataFrame) -> None:
        """The tables of all comparisons, of the first choice, and those of both choices at their limits."""
        first = runs["method"].map(runs[runs["split"] == "test"].groupby("method")["learning_rate"].first())
        super().save(runs[(runs["split"] != "test") | (runs["learning_rate"] == first)])
        runs.to_csv(self.folder / "runs.csv", index=False)
        tables = [
            f"{limit_table(runs, self.arguments.max_change, change).to_markdown(disable_numparse=True)}\n"
            for change in CHANGES
        ]
        (self.folder / "limits.md").write_text("\n".join(tables))
        base = self.of_base_model["test"]
        frontier(runs, base, self.arguments.max_change).savefig(self.folder / "frontier.png", dpi=90)
        print("", *tables, sep="\n")
        print("Base model:", ", ".join(f"{name} {value:.3f}" for name, value in base.items()))


def name_of(path: str) -> str:
    """What a data set or file is called in the tables."""
    return Path(path).name.partition(".")[0]


def load_texts(arguments: ForgettingArguments, path: str) -> DatasetDict:
    """The splits "train" and "test" of a data set or file."""
    is_file = Path(path).is_file()
    place = {"train_file": path if is_file else None, "test_file": None, "dataset_name": None if is_file else path}
    return load_named_data(replace(arguments, **place))


def changes(perplexities: dict[str, tuple[float, float]]) -> dict[str, float]:
    """How much the perplexities of the sources changed.

    Args:
        perplexities: those before and after the training, by the names of the sources.

    Returns:
        The mean and the largest change in per cent, and the mean of the changes of the loss.
    """
    relative = [100 * (after / before - 1) for before, after in perplexities.values()]
    losses = [math.log(after / before) for before, after in perplexities.values()]
    mean, largest = CHANGES
    return {mean: sum(relative) / len(relative), largest: max(relative), "forgetting": sum(losses) / len(losses)}


def frontier(runs: DataFrame, base: dict[str, float], limit: float) -> Figure:
    """What is learned in exchange for what changes: the mean of the sources on the left, the largest on the right.

    Args:
        runs: one row for each training.
        base: the perplexities before the training.
        limit: of both changes, in per cent.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, change in zip(figure.subplots(1, 2, sharex=True), CHANGES, strict=True):
        draw_curves(axes, runs, base[TARGET], limit, change)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_curves(axes: Axes, runs: DataFrame, target_of_base: float, limit: float, change: str) -> None:
    """A curve over the strength for each method, from the base model, at the learning rate chosen at the limit."""
    chosen = choices_at_limit(runs, limit, change)
    points = at_every_strength(runs[runs["split"] == "test"])
    axes.set_yscale("symlog", linthresh=1.0)
    for index, (method, choice) in enumerate(chosen.items()):
        of_rate = points[(points["method"] == method) & (points["learning_rate"] == choice["learning_rate"])]
        curve = of_rate.groupby("alpha")[[TARGET, change]].mean()
        style = {"marker": "os^vD"[index % 5], "markersize": 4, "color": f"C{index % 10}"}
        axes.plot([target_of_base, *curve[TARGET]], [0.0, *curve[change]], label=method, **style)
    axes.axhline(limit, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel=TARGET, ylabel=f"{change} of the other domains' perplexities, %", xscale="log")
    axes.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The tables, which are also printed, and plots are saved.
    """
    only_our_progress()
    defaults = {"output_dir": "outputs/forgetting", "num_train_epochs": 3.0, "per_device_train_batch_size": 8}
    parsed = parse(ForgettingArguments, "text", __doc__, arguments, **defaults)
    return ForgettingComparison(parsed).run()


if __name__ == "__main__":
    main()
