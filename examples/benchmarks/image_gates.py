"""Which images does a gate leave alone? Each set is the target once, and the others are what it has to be closed for.

    python examples/benchmarks/image_gates.py
    python examples/benchmarks/image_gates.py --model_name_or_path google/vit-base-patch16-224 --image_size 224 \
        --sets flowers/train.parquet textures/train.parquet digits/train.parquet --unseen animals/train.parquet

A set is a file with a column of images, and its name is that of the folder. Of each, some images are for fitting gates
and others for testing. The reference of a gate are all sets but its target; those of `--unseen` are in no reference.
Nothing is trained: the gate depends on the base model alone, and behind it is an adapter with random weights.

The table has, for each target, the percentage of the images of every set for which the logits are those of the base
model, bit for bit. It is to be high but for the target itself.

Without a model and data it needs no network: a small ViT that knows the digits 0 to 4, and digits as they are, others,
and negatives of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import only_our_progress
from cost import HelpFormatter
from datasets import Dataset, load_dataset
from gates import has_logits_of_base
from offline import digits, image_processor, image_rows, small_vit
from peft import PeftModel, get_peft_model
from PIL import ImageOps
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, HfArgumentParser, default_data_collator, set_seed

from toast_peft import TopDownConfig, fit_gate

Splits = dict[str, list[dict[str, Any]]]  # batches of inputs


@dataclass
class Arguments:
    """Which images."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or a local folder. Default: a small one, of digits."}
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    image_size: int | None = field(default=None, metadata={"help": "Resize images to this size."})
    sets: list[str] = field(default_factory=list, metadata={"help": "Parquet files of images. Default: digits."})
    unseen: list[str] = field(default_factory=list, metadata={"help": "The same; these are in no reference."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    fit_images: int = field(default=64, metadata={"help": "Images of each set that gates are fitted to."})
    test_images: int = field(default=100, metadata={"help": "Images of each set to test on."})
    quantile: float | None = field(
        default=None, metadata={"help": "How strict the gate is. Default: that of `fit_gate`."}
    )
    seed: int = field(default=0, metadata={"help": "Chooses the images, and the weights of the adapter."})
    output_dir: str = field(default="outputs/image_gates", metadata={"help": "Folder for the table."})


def load_sets(arguments: Arguments) -> dict[str, Dataset]:
    """The sets by their names, with the column "image"."""
    if not arguments.sets:
        known, others = (digits(classes, examples_per_class=60)["train"] for classes in (range(5), range(5, 10)))
        negatives = known.map(lambda row: {"image": ImageOps.invert(row["image"])})
        return {"digits": known, "other digits": others, "negatives": negatives}
    files = [*arguments.sets, *arguments.unseen]
    loaded = {Path(file).parent.name: load_dataset("parquet", data_files=file)["train"] for file in files}
    return {name: images.rename_columns(renamed(images, arguments)) for name, images in loaded.items()}


def renamed(images: Dataset, arguments: Arguments) -> dict[str, str]:
    """The column of images, if it is called something else than "image"."""
    found = arguments.image_column_name if arguments.image_column_name in images.column_names else "image"
    return {} if found == "image" else {found: "image"}


def batches(images: Dataset, base: str, arguments: Arguments) -> list[dict[str, Any]]:
    """The images preprocessed, in batches."""
    processor = image_processor(base, arguments.image_size)
    rows = image_rows(images.select_columns(["image"]).add_column("label", [0] * len(images)), processor)
    more = {"interpolate_pos_encoding": True} if arguments.image_size else {}
    return [
        {"pixel_values": batch["pixel_values"], **more}
        for batch in DataLoader(rows, 20, collate_fn=default_data_collator)
    ]


@torch.no_grad()
def left_alone(model: PeftModel, inputs: list[dict[str, Any]]) -> float:
    """Percentage of the rows for which all logits are those of the base model."""
    found = ((batch, model(**batch).logits) for batch in inputs)
    same = [has_logits_of_base(model, batch, logits).view(len(logits), -1).all(1) for batch, logits in found]
    return 100 * torch.cat(same).double().mean().item()


def of_target(
    model: PeftModel, target: str, inputs: dict[str, Splits], unseen: set[str], quantile: float | None
) -> Iterator[dict[str, Any]]:
    """Fit the gate to a target, and measure it on all sets.

    Args:
        model: has the adapter.
        target: one of `inputs`.
        inputs: batches of each set, those to fit to ("train") and those to test on.
        unseen: sets that are in no reference.
        quantile: how strict the gate is.
    """
    reference = {name: of["train"] for name, of in inputs.items() if name != target and name not in unseen}
    report = fit_gate(model, inputs[target]["train"], reference, quantile=quantile)
    for name, of in inputs.items():
        kind = "target" if name == target else "unseen" if name in unseen else "reference"
        row = {"target": target, "set": name, "is": kind, "left alone": left_alone(model, of["test"])}
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row | {"auc": report["auc"], "open_target": report["open_target"]}


def measure(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """One row for each target and set."""
    set_seed(arguments.seed)
    folder = Path(arguments.output_dir) / "small_vit"
    base = arguments.model_name_or_path or small_vit(folder, arguments.pretraining_steps)
    number = arguments.fit_images + arguments.test_images
    chosen = {
        name: images.shuffle(arguments.seed).select(range(min(number, len(images))))
        for name, images in load_sets(arguments).items()
    }
    of_all = {
        name: images.train_test_split(train_size=arguments.fit_images, seed=0) for name, images in chosen.items()
    }
    inputs = {name: {s: batches(part, base, arguments) for s, part in of.items()} for name, of in of_all.items()}
    unseen = {Path(file).parent.name for file in arguments.unseen}
    classifier = AutoModelForImageClassification.from_pretrained(base)
    model = get_peft_model(classifier, TopDownConfig(gate="sequence", init_weights=False)).eval()
    for target in inputs:
        yield from of_target(model, target, inputs, unseen, arguments.quantile)


def table(runs: pd.DataFrame) -> str:
    """A row for each target: the percentage that is left alone of each set, in brackets what the gate never saw."""
    runs = runs.assign(
        cell=[
            f"({x:.0f})" if kind == "unseen" else f"{x:.0f}"
            for x, kind in zip(runs["left alone"], runs["is"], strict=True)
        ]
    )
    cells = runs.pivot(index="target", columns="set", values="cell")[runs["set"].unique()]
    return cells.loc[runs["target"].unique()].to_markdown(disable_numparse=True)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each target and set. The table is printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    Path(parsed.output_dir).mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(measure(parsed))
    runs.to_csv(Path(parsed.output_dir) / "runs.csv", index=False)
    (Path(parsed.output_dir) / "image_gates.md").write_text(table(runs) + "\n")
    print(f"\n{table(runs)}")
    return runs


if __name__ == "__main__":
    main()
