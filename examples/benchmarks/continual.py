r"""Tasks learned one after the other: adapters that route themselves by their gates, next to LoRA.

    python examples/benchmarks/continual.py
    python examples/benchmarks/continual.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --source stories --tasks shakespeare questions instructions --output_dir mine

Each of these is a folder with a train and a test file, .jsonl or .jsonl.gz; the source has texts like those of
pre-training. After each task the perplexity of the source and of all tasks so far is measured:

- one LoRA that is trained on and on, without and with replay: 50 % more tokens, of the source and of earlier tasks
- a LoRA of each task, chosen by an oracle that knows the task, and takes the base model for the source
- an adapter of each task, LoRA in pass 2, trained alone and then gated. Its gate is fitted once, against the source
  and the tasks before it, of which some blocks are kept. All adapters are active at once, or the oracle chooses one.

The first table has the perplexities, the second what it costs that the adapters route themselves, the third how far
their gates are open in the end.

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings learns those about
numbers, source code, and images of digits as numbers.
"""

import math
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from comparison import only_our_progress
from cost import HelpFormatter
from datasets import Dataset, DatasetDict
from gates import Rows, blocks, load_folder, train
from methods import METHODS
from offline import docstrings, small_llama
from peft import PeftConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from tables import BY_ORACLE, ROUTED
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator, set_seed

from toast_peft import feedback_statistics, fit_gate

LORA, GATED = "lora-all-linear", "pass2-lora"
SELF_ROUTED, REFITTED = ROUTED


@dataclass
class Arguments:
    """What to learn, one after the other."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or a local folder. Default: a small byte-level LLaMA."}
    )
    pretraining_steps: int = field(default=300, metadata={"help": "Steps of pre-training of the default model."})
    source: str | None = field(
        default=None, metadata={"help": "Folder of texts like those of pre-training. Default: docstrings."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Folders of the texts to learn, in this order."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    max_train_blocks: int = field(default=100, metadata={"help": "Train on so many blocks of each task at most."})
    fit_blocks: int = field(default=64, metadata={"help": "Blocks of each text that gates are fitted to."})
    quantile: float | None = field(
        default=None, metadata={"help": "How strict gates are. Default: that of `fit_gate`."}
    )
    test_blocks: int = field(default=40, metadata={"help": "Test on so many blocks at most."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs of each training."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Blocks in a batch."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "That of all trainings."})
    refit_gates: bool = field(
        default=False, metadata={"help": "Also fit all gates anew after each task, each against all other tasks."}
    )
    output_dir: str = field(default="outputs/continual", metadata={"help": "Folder for the tables."})


class Continual(ABC):
    """A model, tasks, and what is measured after each.

    `source` is what the base model knows, `tasks` are what is to be learned, by their names, one after the other;
    `kind` is what each of them is, a column of the rows.

    Args:
        arguments: those of the script.
    """

    kind: ClassVar[str]
    source: str
    tasks: list[str]

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments

    @abstractmethod
    def load(self) -> torch.nn.Module:
        """The base model."""

    @abstractmethod
    def config(self, method: str) -> PeftConfig:
        """A new adapter."""

    @abstractmethod
    def train(self, model: torch.nn.Module, task: str, replayed: list[str]) -> None:
        """Train the active adapter on a task; half as many rows more are of what is replayed, if there is anything."""

    @abstractmethod
    def sample(self, name: str) -> list[dict[str, Any]]:
        """What is kept of the source or a task to fit gates to, in batches."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, name: str) -> dict[str, float]:
        """What the tables show of the source or a task."""

    def run(self) -> Iterator[dict[str, Any]]:
        """Train and measure all methods; one row for each method, number of learned tasks, and source or task."""
        yield from self.without_adapter()
        yield from self.one_lora(replay=False)
        yield from self.one_lora(replay=True)
        yield from self.own_lora()
        yield from self.gated_adapters()

    def without_adapter(self) -> Iterator[dict[str, Any]]:
        """The base model."""
        yield from self.measured(self.load(), "base", 0)

    def one_lora(self, replay: bool) -> Iterator[dict[str, Any]]:
        """One LoRA that learns everything."""
        model = get_peft_model(self.load(), self.config(LORA))
        for after, task in enumerate(self.tasks, start=1):
            self.train(model, task, [self.source, *self.tasks[: after - 1]] if replay else [])
            yield from self.measured(model, "one LoRA" + (" + replay" if replay else ""), after)

    def own_lora(self) -> Iterator[dict[str, Any]]:
        """A LoRA of each task."""
        for after, model in self.trained_apart(LORA):
            yield from self.measured(model, "LoRA of each task" + BY_ORACLE, after, by_oracle=True)

    def gated_adapters(self) -> Iterator[dict[str, Any]]:
        """A gated adapter of each task."""
        for after, model in self.trained_apart(GATED):
            for name in (SELF_ROUTED, REFITTED) if self.arguments.refit_gates else (SELF_ROUTED,):
                self.fit_gates(model, after, refitted=name == REFITTED)
                yield from self.measured(model, name + BY_ORACLE, after, by_oracle=True)
                model.base_model.set_adapter(self.tasks[:after])
                yield from self.measured(model, name, after)

    def trained_apart(self, method: str) -> Iterator[tuple[int, PeftModel]]:
        """The model after each task, with an adapter of each so far, none of which was active with others."""
        model = get_peft_model(self.load(), self.config(method), adapter_name=self.tasks[0])
        for after, task in enumerate(self.tasks, start=1):
            if after > 1:
                model.add_adapter(task, self.config(method))
            model.set_adapter(task)
            self.train(model, task, replayed=[])
            yield after, model

    def fit_gates(self, model: PeftModel, after: int, refitted: bool) -> None:
        """Fit the gates of all adapters so far, in closed form: as each was after its own task, or refitted to all."""
        seen = self.tasks[:after]
        for place, task in enumerate(seen):
            self.fit_gate(model, task, [name for name in (seen if refitted else seen[:place]) if name != task])

    def fit_gate(self, model: PeftModel, task: str, others: list[str]) -> None:
        """Fit the gate of the adapter of a task, against the source and some other tasks."""
        model.set_adapter(task)
        reference = {name: self.sample(name) for name in (self.source, *others)}
        quantile = self.arguments.quantile
        fit_gate(model, self.sample(task), reference, adapter_name=task, gate="sequence", quantile=quantile)

    def measured(
        self, model: torch.nn.Module, method: str, after: int, by_oracle: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What is measured of the source and of the tasks so far, before the first of all."""
        for name in (self.source, *self.tasks[: after or None]):
            with self.chosen(model, name) if by_oracle else nullcontext():
                row = {"method": method, "after": after, self.kind: name, **self.measure(model, name)}
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            yield row

    def chosen(self, model: PeftModel, name: str) -> AbstractContextManager:
        """The oracle: the adapter of a task, the base model for the source."""
        if name == self.source:
            return model.disable_adapter()
        model.set_adapter(name)
        return nullcontext()


class ContinualTexts(Continual):
    """Texts of which blocks of tokens are learned.

    Args:
        arguments: those of the script.
    """

    kind = "text"
    arguments: Arguments

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        folder, block_size = Path(arguments.output_dir) / "small_llama", arguments.block_size
        self.base = arguments.model_name_or_path or small_llama(folder, arguments.pretraining_steps, block_size)
        if arguments.source is None:
            data = offline_texts()
        else:
            data = {Path(path).name: load_folder(path) for path in (arguments.source, *arguments.tasks)}
        self.source, *self.tasks = data
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.rows = {name: blocks(texts, tokenizer, block_size) for name, texts in data.items()}

    def load(self) -> torch.nn.Module:
        """The base model."""
        set_seed(0)
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def config(self, method: str) -> PeftConfig:
        """A new adapter."""
        return METHODS[method].config(task_type="CAUSAL_LM")

    def train(self, model: PeftModel, task: str, replayed: list[str]) -> None:
        """Train the active adapter on a task, and on what is replayed."""
        train(
            model,
            with_replay(self.rows, task, replayed, self.arguments.max_train_blocks),
            output_dir=self.arguments.output_dir,
            num_train_epochs=self.arguments.num_train_epochs,
            per_device_train_batch_size=self.arguments.per_device_train_batch_size,
            learning_rate=self.arguments.learning_rate,
        )

    def sample(self, name: str) -> list[dict[str, Any]]:
        """Blocks in batches."""
        rows = self.rows[name]["train"][: self.arguments.fit_blocks]
        return list(DataLoader(rows, 8, collate_fn=default_data_collator))

    def measure(self, model: torch.nn.Module, name: str) -> dict[str, float]:
        """The perplexity of a text, and how far the gate of each adapter is open."""
        return measure(model, self.rows[name]["test"][: self.arguments.test_blocks])


def with_replay(rows: dict[str, dict[str, Rows]], task: str, replayed: list[str], limit: int) -> Rows:
    """What is trained on: rows of a task, and half as many of what is replayed, if there is anything.

    Args:
        rows: of the source and all tasks, by their names and splits.
        task: what to learn.
        replayed: the names of what is replayed, the same number of rows of each.
        limit: of the rows of the task.
    """
    new = rows[task]["train"][:limit]
    share = len(new) // 2 // max(len(replayed), 1)
    return new + [row for name in replayed for row in rows[name]["train"][:share]]


@torch.no_grad()
def measure(model: torch.nn.Module, rows: Rows) -> dict[str, float]:
    """The perplexity, and how far the gate of each adapter is open if there are several."""
    total: dict[str, float] = {}
    for batch in DataLoader(rows, 8, collate_fn=default_data_collator):
        values = {"loss": model(**batch, use_cache=False).loss.item()} | feedback_statistics(model)
        for key, value in values.items():
            total[key] = total.get(key, 0) + value * len(batch["input_ids"]) / len(rows)
    gates = {key: value for key, value in total.items() if key.endswith("_mean_gate")}
    return {"perplexity": math.exp(total["loss"]), **gates}


def offline_texts() -> dict[str, DatasetDict]:
    """The source and three tasks that are on any machine."""
    code = [file.read_text("utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))]
    digits = [" ".join(map(str, image)) for image in load_digits().data.astype(int)]
    new = {"code": code, "digits": digits}
    return {"prose": docstrings(numeric=False), "numeric": docstrings(numeric=True)} | {
        name: Dataset.from_dict({"text": texts}).train_test_split(0.2, seed=0) for name, texts in new.items()
    }


def tables(runs: pd.DataFrame) -> str:
    """Perplexities after each task, then self-routed over oracle, and how far each gate is open in the end."""
    cells = runs.set_index(["method", "after", "text"])["perplexity"].unstack(sort=False)
    last = cells.xs(runs["after"].max(), level="after")
    routed = [name for name in (SELF_ROUTED, REFITTED) if name in last.index]
    costs = pd.DataFrame({name: last.loc[name] / last.loc[name + BY_ORACLE] for name in routed}).T
    ended = runs[(runs["after"] == runs["after"].max()) & runs["method"].isin(routed)]
    gates = ended.set_index(["method", "text"]).filter(like="_mean_gate")
    gates.columns = gates.columns.str.removesuffix("_mean_gate").rename("gate of")
    parts = [
        cells.map("{:.4g}".format).replace("nan", "").reset_index(),
        costs.map("{:.3f}".format).rename_axis("self-routed / oracle").reset_index(),
        gates.stack().unstack("text", sort=False).map("{:.2f}".format).reset_index(),
    ]
    return "\n\n".join(part.to_markdown(index=False, disable_numparse=True) for part in parts)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each method, number of learned tasks, and text. The tables are printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    folder = Path(parsed.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(ContinualTexts(parsed).run())
    runs.to_csv(folder / "runs.csv", index=False)
    result = tables(runs)
    (folder / "continual.md").write_text(result + "\n")
    print(f"\n{result}")
    return runs


if __name__ == "__main__":
    main()
