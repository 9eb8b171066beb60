"""Which texts does a gate leave alone, and what does it do where a text changes? Nothing is trained.

    python examples/benchmarks/text_gates.py
    python examples/benchmarks/text_gates.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --texts shakespeare wikitext stories --unseen news

Each of these is a folder with a train and a test file, .jsonl or .jsonl.gz. All texts of a folder are joined and cut
into blocks. Each of `--texts` is the target once, and the others are what the gate has to be closed for; those of
`--unseen` are in no reference. The gate depends on the base model alone, and behind it is an adapter with random
weights.

The table has, for each target, the percentage of the blocks of every text for which all logits are those of the base
model, bit for bit. It is to be high but for the target itself. The picture has blocks that are of the first two texts
by halves: how far the gate for the first one is open at each token, the mean over the blocks.

Without a model and data it needs no network: a small byte-level LLaMA that has read docstrings, and docstrings about
numbers, about anything else, code, and lists of numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import only_our_progress
from continual import offline_texts
from cost import HelpFormatter
from gates import Rows, blocks, load_folder
from image_gates import Splits, of_target, table
from matplotlib.figure import Figure
from offline import small_llama
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator, set_seed

from toast_peft import TopDownConfig
from toast_peft.core.layers import feedback_paths

Inputs = list[dict[str, Any]]


@dataclass
class Arguments:
    """Which texts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or a local folder. Default: a small byte-level LLaMA."}
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    texts: list[str] = field(
        default_factory=list, metadata={"help": "Folders of texts, two or more. Default: some on any machine."}
    )
    unseen: list[str] = field(default_factory=list, metadata={"help": "The same; these are in no reference."})
    targets: int | None = field(default=None, metadata={"help": "So many of the texts are the target. Default: all."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    fit_blocks: int = field(default=64, metadata={"help": "Blocks of each text that gates are fitted to."})
    test_blocks: int = field(default=100, metadata={"help": "Blocks of each text to test on."})
    quantile: float | None = field(
        default=None, metadata={"help": "How strict the gate is. Default: that of `fit_gate`."}
    )
    seed: int = field(default=0, metadata={"help": "Of the weights of the adapter."})
    output_dir: str = field(default="outputs/text_gates", metadata={"help": "Folder for the table and the picture."})


def load_inputs(arguments: Arguments, base: str) -> dict[str, Splits]:
    """Batches of each text, for fitting and for testing."""
    folders = [*arguments.texts, *arguments.unseen]
    texts: dict[str, Any] = {Path(path).name: load_folder(path) for path in folders} or offline_texts()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = {name: blocks(of, tokenizer, arguments.block_size) for name, of in texts.items()}
    number = {"train": arguments.fit_blocks, "test": arguments.test_blocks}
    return {name: {split: batches(of[split][: number[split]]) for split in number} for name, of in rows.items()}


def batches(rows: Rows) -> Inputs:
    """Blocks of tokens, eight at a time."""
    loader = DataLoader(rows, 8, collate_fn=default_data_collator)
    return [{"input_ids": batch["input_ids"], "use_cache": False} for batch in loader]


@torch.no_grad()
def opened(model: PeftModel, inputs: Inputs) -> torch.Tensor:
    """How far the gate is open at each token, the mean over the blocks. Shape: [n]"""
    [(_, path)] = feedback_paths(model)
    gates = []
    for batch in inputs:
        model(**batch)
        gates.append(path.state.current.gate.squeeze(-1))
    return torch.cat(gates).float().mean(0)


def halves(first: Inputs, second: Inputs) -> Inputs:
    """Blocks that begin as those of one text and end as those of another."""
    pairs = (
        (a["input_ids"], b["input_ids"])
        for a, b in zip(first, second, strict=False)
        if len(a["input_ids"]) == len(b["input_ids"])
    )
    changed = (torch.cat([a[:, : a.shape[1] // 2], b[:, b.shape[1] // 2 :]], dim=1) for a, b in pairs)
    return [{"input_ids": ids, "use_cache": False} for ids in changed]


def picture(model: PeftModel, inputs: dict[str, Splits]) -> Figure:
    """Of a gate that is fitted to the first text: where the text changes."""
    target, other = list(inputs)[:2]
    tests = {name: inputs[name]["test"] for name in (target, other)}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for first, second in ((target, target), (other, target), (target, other), (other, other)):
        label = first if first == second else f"{first}, then {second}"
        axes.plot(opened(model, halves(tests[first], tests[second])), label=label)
    axes.set(xlabel="token", ylabel="gate, mean over the blocks", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def measure(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """One row for each target and text; saves the picture of the first target."""
    set_seed(arguments.seed)
    folder = Path(arguments.output_dir)
    base = arguments.model_name_or_path or small_llama(
        folder / "small_llama", arguments.pretraining_steps, arguments.block_size
    )
    inputs = load_inputs(arguments, base)
    unseen = {Path(path).name for path in arguments.unseen}
    config = TopDownConfig(task_type="CAUSAL_LM", r=8, gate="sequence", init_weights=False, skip_closed_rows=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for index, target in enumerate([name for name in inputs if name not in unseen][: arguments.targets]):
        yield from of_target(model, target, inputs, unseen, arguments.quantile)
        if index == 0:
            picture(model, inputs).savefig(folder / "switch.png", dpi=150)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each target and text. The table is printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    folder = Path(parsed.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(measure(parsed))
    runs.to_csv(folder / "runs.csv", index=False)
    (folder / "text_gates.md").write_text(table(runs) + "\n")
    print(f"\n{table(runs)}")
    return runs


if __name__ == "__main__":
    main()
