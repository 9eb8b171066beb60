r"""Sets of images learned one after the other: adapters that route themselves by their gates, next to LoRA.

    python examples/benchmarks/continual_images.py
    python examples/benchmarks/continual_images.py --model_name_or_path google/vit-base-patch16-224 --image_size 224 \
        --source imagenet/test.parquet --tasks textures/train.parquet flowers/train.parquet --output_dir mine

A task is a parquet file of labelled images beside a `test.parquet`, and its name is that of the folder. The source is
one of images that the base model knows, with its labels; one half is kept for replay and gates, the other for tests.
Each task has a head of its own, which is trained with it and then stays as it is. That of the source is the base
model's. The methods are those of `continual.py`, and in place of the base model:

- heads alone: only the heads are trained, on the base model
- one LoRA that is trained on and on, without and with replay: 50 % more images, each under its own head
- a LoRA of each task, chosen by an oracle that knows the task, and takes the base model for the source
- an adapter of each task, LoRA in pass 2. Its gate is fitted before it is trained, so that its head learns under the
  gate, against the source and the tasks before it. All adapters are active at once, or the oracle chooses one.

The accuracy of all of them is that under the head of the set that an image is from: someone says which head to use.
Gated adapters can say so themselves, and this is measured as well: the head is that of the gate which is most open,
and the base model's if all are closed.

Without a model and data it needs no network: a small ViT that knows the digits 0 to 4 learns all ten as negatives, on
their side, and pale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import make_optimizer, only_our_progress
from continual import LORA, Continual, with_replay
from cost import HelpFormatter
from datasets import ClassLabel, DatasetDict, load_dataset
from gates import Rows, train
from heads import Heads, heads_of
from methods import METHODS
from offline import digits, image_batch, image_processor, image_rows, small_vit
from peft import PeftConfig
from PIL import ImageOps
from tables import continual_images_table, routing_table
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser, set_seed

from toast_peft.core.layers import feedback_paths


@dataclass
class Arguments:
    """What to learn, one after the other."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier on the Hub or a local folder. Default: a small one, of digits."}
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    image_size: int | None = field(default=None, metadata={"help": "Resize images to this size."})
    source: str | None = field(
        default=None, metadata={"help": "Parquet file of images and labels that the model knows. Default: digits."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Parquet files of what to learn, in this order."})
    max_train_images: int = field(default=200, metadata={"help": "Train on so many images of each task at most."})
    fit_images: int = field(default=64, metadata={"help": "Images of each set that gates are fitted to."})
    test_images: int = field(default=200, metadata={"help": "Test on so many images of each set at most."})
    quantile: float | None = field(
        default=None, metadata={"help": "How strict gates are. Default: that of `fit_gate`."}
    )
    refit_gates: bool = field(
        default=False, metadata={"help": "Also fit all gates anew after each task, each against all other tasks."}
    )
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs of each training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images in a batch."})
    learning_rate: float = field(default=1.1e-3, metadata={"help": "That of all adapters."})
    weight_decay: float = field(default=0.013, metadata={"help": "That of all trainings."})
    seeds: int = field(default=1, metadata={"help": "How often everything is trained."})
    output_dir: str = field(default="outputs/continual_images", metadata={"help": "Folder for the tables."})


class ContinualImages(Continual):
    """Images of which the classes are learned.

    Args:
        arguments: those of the script.
    """

    kind = "set"
    arguments: Arguments

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        folder, self.seed = Path(arguments.output_dir) / "small_vit", 0
        self.base = arguments.model_name_or_path or small_vit(folder, arguments.pretraining_steps, with_head=True)
        data = offline_sets() if arguments.source is None else load_sets(arguments.source, arguments.tasks)
        self.source, *self.tasks = data
        self.classes = {self.source: AutoConfig.from_pretrained(self.base).num_labels}
        self.classes |= {task: len(data[task]["train"].features["label"].names) for task in self.tasks}
        self.rows = {name: self.preprocessed(name, images) for name, images in data.items()}
        model = self.load()
        with torch.no_grad():
            self.of_base = {name: [model(**batch).logits for batch, _ in self.tested(name)] for name in data}

    def preprocessed(self, name: str, images: DatasetDict) -> dict[str, Rows]:
        """The rows of a set, with labels that go on where those of the sets before it end."""
        arguments, names = self.arguments, list(self.classes)
        processor = image_processor(self.base, arguments.image_size)
        first = sum(self.classes[before] for before in names[: names.index(name)])
        limits = {"train": arguments.max_train_images, "test": arguments.test_images}
        rows = {}
        for split, limit in limits.items():
            chosen = images[split].shuffle(seed=0).select(range(min(limit, len(images[split]))))
            rows[split] = [row | {"labels": first + row["labels"]} for row in image_rows(chosen, processor)]
        return rows

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images."""
        return image_batch(rows, self.arguments.image_size)

    def tested(self, name: str) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Inputs and labels of the test images of a set, always in the same batches."""
        for batch in DataLoader(self.rows[name]["test"], 32, collate_fn=self.collate):
            labels = batch.pop("labels")
            yield batch, labels

    def run(self) -> Iterator[dict[str, Any]]:
        """The same with each seed."""
        for seed in range(self.arguments.seeds):
            self.seed = seed
            for row in super().run():
                yield row | {"seed": seed}

    def load(self) -> torch.nn.Module:
        """The base model with new heads beside its own, and nothing to train."""
        set_seed(self.seed)
        model = AutoModelForImageClassification.from_pretrained(self.base)
        [name] = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        own = model.get_submodule(name)
        new = {task: nn.Linear(own.in_features, self.classes[task]) for task in self.tasks}
        model.set_submodule(name, Heads({self.source: own, **new}))
        return model.requires_grad_(False).eval()

    def config(self, method: str) -> PeftConfig:
        """A new adapter; LoRA would be on the heads as well."""
        return METHODS[method].config(**({"exclude_modules": r".*\.of\..*"} if method == LORA else {}))

    def without_adapter(self) -> Iterator[dict[str, Any]]:
        """The base model, of which nothing but the heads is trained."""
        model = self.load()
        for after, task in enumerate(self.tasks, start=1):
            self.train(model, task, replayed=[])
            yield from self.measured(model, "heads alone", after)

    def train(self, model: nn.Module, task: str, replayed: list[str]) -> None:
        """Train the head of a task, and the active adapter on it and on what is replayed."""
        arguments, heads = self.arguments, heads_of(model)
        if any(feedback_paths(model)):
            self.fit_gate(model, task, self.tasks[: self.tasks.index(task)])
        heads.requires_grad_(False).of[task].requires_grad_(True)
        optimizer = make_optimizer(model, arguments.learning_rate, arguments.weight_decay, new_modules=["of"])
        train(
            model,
            with_replay(self.rows, task, replayed, arguments.max_train_images),
            {"data_collator": self.collate, "compute_loss_func": heads.loss, "optimizers": (optimizer, None)},
            output_dir=arguments.output_dir,
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            remove_unused_columns=False,
            seed=self.seed,
        )

    def sample(self, name: str) -> list[dict[str, Any]]:
        """Images in batches."""
        rows = [{"pixel_values": row["pixel_values"]} for row in self.rows[name]["train"][: self.arguments.fit_images]]
        return list(DataLoader(rows, 32, collate_fn=self.collate))

    @torch.no_grad()
    def measure(self, model: nn.Module, name: str) -> dict[str, float]:
        """Percentages of the test images of a set, and how far each gate is open."""
        found = [
            self.measured_images(model, model(**batch).logits, labels, of_base)
            for (batch, labels), of_base in zip(self.tested(name), self.of_base[name], strict=True)
        ]
        return {key: torch.cat([values[key] for values in found]).double().mean().item() for key in found[0]}

    def measured_images(
        self, model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, of_base: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What is measured of each image; shares are 0 or 100. Shapes: [b, classes], [b], [b, classes] -> [b]"""
        heads, number = heads_of(model), self.classes[self.source]
        own = heads.set_of_class[labels]
        values = {
            "accuracy": heads.chosen(logits, own).argmax(-1) == labels,
            "same prediction": logits[:, :number].argmax(-1) == of_base[:, :number].argmax(-1),
            "unchanged": (logits[:, :number] == of_base[:, :number]).all(-1),
        }
        if gates := gates_of(model):
            opened = torch.stack([gates.get(task, torch.zeros(len(labels))) for task in self.tasks], dim=-1)
            by_gates = torch.where(opened.amax(-1) > 0, 1 + opened.argmax(-1), 0)
            values["right head"] = by_gates == own
            values["accuracy by gates"] = heads.chosen(logits, by_gates).argmax(-1) == labels
        percent = {key: 100 * value.float() for key, value in values.items()}
        return percent | {f"gate of {name}": gate for name, gate in gates.items()}


def gates_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """How far the gate of each active adapter was open in the last forward. Shape of each: [b]"""
    paths = [path for _, path in feedback_paths(model) if not path.selection.disable_adapters]
    selected = {name: of for path in paths for name, of in path.state.current.selected.items()}
    return {name: of.gate.flatten(1).mean(1) for name, of in selected.items() if of.gate is not None}


def load_sets(source: str, tasks: list[str]) -> dict[str, DatasetDict]:
    """The source, cut in two halves, and the tasks, with the columns "image" and "label"."""
    sets = {
        Path(source).parent.name: load_dataset("parquet", data_files=source)["train"].train_test_split(0.5, seed=0)
    }
    for task in map(Path, tasks):
        files = {"train": str(task), "test": str(task.with_name("test.parquet"))}
        images = load_dataset("parquet", data_files=files)
        has_names = isinstance(images["train"].features["label"], ClassLabel)
        sets[task.parent.name] = images if has_names else images.class_encode_column("label")
    return sets


def offline_sets() -> dict[str, DatasetDict]:
    """The source and three tasks that are on any machine."""
    known, both = (digits(classes, examples_per_class=40) for classes in (range(5), range(10)))
    negatives = both.map(lambda row: {"image": ImageOps.invert(row["image"])})
    on_their_side = both.map(lambda row: {"image": row["image"].rotate(90)})
    pale = both.map(lambda row: {"image": row["image"].point(lambda value: value // 4)})
    return {"digits": known, "negatives": negatives, "on their side": on_their_side, "pale": pale}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each method, number of learned tasks, set and seed. The tables are printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    folder = Path(parsed.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(ContinualImages(parsed).run())
    runs.to_csv(folder / "runs.csv", index=False)
    tables = [table(runs).to_markdown(disable_numparse=True) for table in (continual_images_table, routing_table)]
    (folder / "continual_images.md").write_text("\n\n".join(tables) + "\n")
    print("", *tables, sep="\n\n")
    return runs


if __name__ == "__main__":
    main()
