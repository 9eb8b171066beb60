r"""What does a gate leave as it was, and what does it cost? Perplexities of a target, a reference and other texts.

    python examples/benchmarks/gates.py
    python examples/benchmarks/gates.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --target shakespeare --reference wikitext stories --others questions --output_dir mine

Each of these is a folder with a train and a test file, .jsonl or .jsonl.gz. Adapters learn the target, TOAST-Lite and
LoRA in pass 2, with the gate from the start or without it; those are then measured again under a gate. The gate is
fitted to blocks of the target and of each reference; of the other texts it has seen nothing. Beside them is LoRA on
all linear layers, scaled after training, as anyone can do. All texts are joined and cut into blocks.

The table has the perplexity of each test text, and behind it the percentage of its tokens whose logits are those of
the base model, bit for bit.

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings learns those about
numbers.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import only_our_progress
from cost import HelpFormatter
from datasets import Dataset, DatasetDict, load_dataset
from methods import METHODS, apply_method
from offline import docstrings, joined_columns, small_llama, token_rows
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import fit_gate

Rows = list[dict[str, Any]]
LORA = "lora-all-linear"


@dataclass
class Arguments:
    """What to learn, and what to leave alone."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or a local folder. Default: a small byte-level LLaMA."}
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    target: str | None = field(default=None, metadata={"help": "Folder of the texts to learn. Default: docstrings."})
    reference: list[str] = field(default_factory=list, metadata={"help": "Folders of texts to leave alone."})
    others: list[str] = field(default_factory=list, metadata={"help": "Folders of texts that the gate never sees."})
    methods: list[str] = field(
        default_factory=lambda: ["toast-lite-initialized", "pass2-lora"], metadata={"help": "What gets a gate."}
    )
    gates: list[str] = field(default_factory=lambda: ["sequence", "token"], metadata={"help": "Kinds of gates."})
    quantile: float | None = field(
        default=None, metadata={"help": "How strict the gate is. Default: that of `fit_gate`."}
    )
    scales: list[float] = field(default_factory=lambda: [1.0, 0.7, 0.5], metadata={"help": "Scales of LoRA."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    max_train_blocks: int | None = field(default=None, metadata={"help": "Train on so many blocks at most."})
    fit_blocks: int = field(default=64, metadata={"help": "Blocks of each text that the gate is fitted to."})
    test_blocks: int = field(default=100, metadata={"help": "Test on so many blocks at most."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs of each training."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Blocks in a batch."})
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Those of methods, as method=rate. Default: as in `methods.py`."}
    )
    seeds: int = field(default=3, metadata={"help": "How often everything is trained."})
    output_dir: str = field(default="outputs/gates", metadata={"help": "Folder for the table."})


class Gates:
    """A model, texts, and what is measured on them.

    Args:
        arguments: those of the script.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = Path(arguments.output_dir) / "small_llama"
        self.base = arguments.model_name_or_path or small_llama(
            folder, arguments.pretraining_steps, arguments.block_size
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.target = "numeric" if arguments.target is None else Path(arguments.target).name
        texts = {Path(path).name: path for path in [arguments.target, *arguments.reference, *arguments.others] if path}
        if arguments.target is None:
            data: dict[str, Any] = {name: docstrings(name == "numeric") for name in ("numeric", "prose")}
        else:
            data = {name: load_folder(path) for name, path in texts.items()}
        self.rows = {name: blocks(of, self.tokenizer, arguments.block_size) for name, of in data.items()}
        self.reference = [Path(path).name for path in arguments.reference] or [
            name for name in data if name != self.target
        ]

    def run(self) -> Iterator[dict[str, Any]]:
        """Train and measure with all seeds; one row for each method, seed and text."""
        base = AutoModelForCausalLM.from_pretrained(self.base).eval()
        yield from self.measured(base, method="base", seed=0)
        for seed in range(self.arguments.seeds):
            for method, gate in product(self.arguments.methods, (None, *self.arguments.gates)):
                model = self.trained(method, seed, gate)
                yield from self.measured(model, method if gate is None else f"{gate} gate, then {method}", seed)
                for later in self.arguments.gates if gate is None else []:
                    self.fit(model, later)
                    yield from self.measured(model, f"{method}, then {later} gate", seed)
            yield from self.of_lora(seed)

    def of_lora(self, seed: int) -> Iterator[dict[str, Any]]:
        """LoRA of both passes, with its output scaled."""
        model = self.trained(LORA, seed)
        for scale in self.arguments.scales:
            with nullcontext() if scale == 1 else rescale_adapter_scale(model, scale):
                yield from self.measured(model, f"{LORA} x {scale:g}", seed)

    def trained(self, method: str, seed: int, gate: str | None = None) -> PeftModel:
        """A model that has learned the target."""
        set_seed(seed)
        arguments, rows = self.arguments, self.rows[self.target]["train"][: self.arguments.max_train_blocks]
        model = AutoModelForCausalLM.from_pretrained(self.base)
        batches = DataLoader(rows[: arguments.fit_blocks], 16, collate_fn=default_data_collator)
        model = apply_method(model, method, batches, task_type="CAUSAL_LM")
        if gate is not None:
            self.fit(model, gate)
        chosen = dict(rate.split("=") for rate in arguments.learning_rates)
        return train(
            model,
            rows,
            output_dir=arguments.output_dir,
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            learning_rate=float(chosen.get(method, METHODS[method].text)),
            seed=seed,
        )

    def fit(self, model: PeftModel, gate: str) -> None:
        """Fit the gate of a model."""
        blocks = {
            name: [default_data_collator([row]) for row in self.rows[name]["train"][: self.arguments.fit_blocks]]
            for name in (self.target, *self.reference)
        }
        report = fit_gate(model, blocks.pop(self.target), blocks, gate=gate, quantile=self.arguments.quantile)
        print(f"{gate} gate:", ", ".join(f"{name} {value:.3f}" for name, value in report.items()), flush=True)

    def test(self, name: str) -> Rows:
        return self.rows[name]["test"][: self.arguments.test_blocks]

    @torch.no_grad()
    def measured(self, model: torch.nn.Module, method: str, seed: int) -> Iterator[dict[str, Any]]:
        """Perplexity of each text, and the percentage of the tokens that have the logits of the base model."""
        for name in self.rows:
            losses, same = [], []
            for batch in DataLoader(self.test(name), 8, collate_fn=default_data_collator):
                ids = batch["input_ids"].to(model.device)
                inputs = {"input_ids": ids, "use_cache": False}
                logits = model(**inputs).logits.float()
                same.append(has_logits_of_base(model, inputs, logits))
                losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
            loss, share = torch.cat(losses).double().mean().item(), torch.cat(same).double().mean().item()
            row = {"method": method, "seed": seed, "text": name, "perplexity": math.exp(loss), "same": 100 * share}
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            yield row


@torch.no_grad()
def has_logits_of_base(model: torch.nn.Module, inputs: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Where the logits are those of the base model, bit for bit.

    Args:
        model: a PEFT model, or the base model itself.
        inputs: of its forward.
        logits: what the model gives for these. Shape: [b, c], or [b, n, c]

    Returns:
        Shape: [b], or [b * n]
    """
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        return (logits == model(**inputs).logits).all(-1).flatten()


def load_folder(path: str) -> DatasetDict:
    """The splits "train" and "test" of a folder."""
    files = {split: [str(file) for file in sorted(Path(path).glob(f"{split}.jsonl*"))] for split in ("train", "test")}
    return load_dataset("json", data_files=files)


def blocks(texts: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, Rows]:
    """The texts of each split, each the strings of its columns, as blocks of tokens."""
    return {split: token_rows(joined_columns(rows), tokenizer, block_size) for split, rows in texts.items()}


def train(model: nn.Module, rows: Rows, options: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    """Train what can be trained of a model.

    Args:
        model: the model.
        rows: blocks of tokens, or other rows.
        options: further arguments of the [`Trainer`].
        settings: of the [`TrainingArguments`], what is not the same for all trainings.
    """
    arguments = TrainingArguments(
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **settings,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, **({"data_collator": default_data_collator} | (options or {}))
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def table(runs: pd.DataFrame, target: str) -> str:
    """Perplexity and, behind it, the percentage of tokens with the logits of the base model; means over the seeds."""
    means = runs.groupby(["method", "text"], sort=False)[["perplexity", "same"]].mean()
    cells = means.apply(lambda mean: f"{mean['perplexity']:.2f} ({mean['same']:.0f} %)", axis=1).unstack(sort=False)
    return cells[[target, *(name for name in cells if name != target)]].to_markdown(disable_numparse=True)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each method, seed and text. The table of their means is printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    Path(parsed.output_dir).mkdir(parents=True, exist_ok=True)
    gates = Gates(parsed)
    runs = pd.DataFrame(gates.run())
    runs.to_csv(Path(parsed.output_dir) / "runs.csv", index=False)
    result = table(runs, gates.target)
    (Path(parsed.output_dir) / "gates.md").write_text(result + "\n")
    print(f"\n{result}")
    return runs


if __name__ == "__main__":
    main()
