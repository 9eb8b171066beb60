r"""Do the mask and the prediction follow a request? Mosaics of two classes, asked for one and then for the other.

    python examples/benchmarks/steering.py
    python examples/benchmarks/steering.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 128 \
        --dataset_name folder_with_a_train_and_a_test_split --output_dir mine

A TOAST-Lite adapter with a new head is trained in one of two ways: on "images", with the learned prompt, as usual; or
on "requests", mosaics of two tiles of one class and two of another, of training images, with the prompt of one of the
classes as `topdown_prompt` and that class as the label. It is then tested on mosaics of test images, with

- class: `prompt_from` the training images of the requested class
- class, centred: that, minus the mean of those of all classes
- random: a random vector, another one for each mosaic
- learned: that of the adapter, whatever is requested

The table has the share of the mask on the tiles of the requested class, of that on all patches; how many predictions
are the requested class; and how many are one of the two classes in the mosaic. Where requests are ignored the first is
50 %, and the second half of the third.

Without a model and data it needs no network: a small ViT and handwritten digits.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from classifiers import limited
from compare_methods import load_images
from comparison import make_optimizer, only_our_progress
from cost import HelpFormatter
from matplotlib.figure import Figure
from methods import METHODS, apply_method
from offline import image_processor, image_rows, small_vit
from peft import PeftModel
from tables import steering_table
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import prompt_from

Rows = list[dict[str, Any]]
WEIGHT_DECAY = 3e-3
COLUMNS = ["mask on the requested tiles", "requested class", "one of the two classes"]


@dataclass
class ImageArguments:
    """A model, images and mosaics of them."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or a local folder. Default: a small ViT."}
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub or a local folder. Default: handwritten digits."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Local file, for example .parquet, instead."})
    test_file: str | None = field(default=None, metadata={"help": "Local file for the test."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the data set with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the data set with the classes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images at most."})
    image_size: int | None = field(default=None, metadata={"help": "Of images and mosaics. Default: the model's."})
    mosaics: int = field(default=200, metadata={"help": "Number of mosaics of the test."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of each training."})
    seeds: int = field(default=3, metadata={"help": "How often a model is trained and tested."})
    output_dir: str = field(default="outputs/steering", metadata={"help": "Folder for the table."})


@dataclass
class Arguments(ImageArguments):
    """How to train. Each mosaic of the test is for two requests; those to train on are as many as the images."""

    trainings: list[str] = field(
        default_factory=lambda: ["images", "requests"], metadata={"help": "Ways to train: images, requests."}
    )
    centred: bool = field(
        default=True, metadata={"help": "Train on requests with centred prompts, or with plain ones."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Draw two requests on one mosaic there."})


class Images:
    """The images of a split as tensors.

    Args:
        rows: those of the split.
        num_classes: number of classes.
    """

    def __init__(self, rows: Rows, num_classes: int) -> None:
        self.pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])  # images, 3, height, width
        self.labels = torch.tensor([row["labels"] for row in rows])
        self.num_classes = num_classes

    @cached_property
    def tiles(self) -> torch.Tensor:
        """The images at half their size. Shape: [images, 3, height / 2, width / 2]"""
        return F.interpolate(self.pixels, scale_factor=0.5, mode="bilinear", antialias=True)

    def mosaics(self, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random mosaics of 2 x 2 images of half the size, two of one class and two of another.

        Returns:
            The mosaics, the classes of the tiles and the two classes. Shapes: [m, 3, height, width], [m, 4], [m, 2]
        """
        generator = torch.Generator().manual_seed(seed)
        scenes, classes, pairs = [], [], []
        for _ in range(number):
            pair = torch.randperm(self.num_classes, generator=generator)[:2]
            order = pair.repeat(2)[torch.randperm(4, generator=generator)]
            scenes.append(self.mosaic(order, generator))
            classes.append(order)
            pairs.append(pair)
        return torch.stack(scenes), torch.stack(classes), torch.stack(pairs)

    def mosaic(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Random images of the given classes, row by row. Shape: [4] -> [3, height, width]"""
        parts = [self.tiles[self._one_of(int(label), generator)] for label in order]
        return torch.cat([torch.cat(parts[:2], dim=-1), torch.cat(parts[2:], dim=-1)], dim=-2)

    def _one_of(self, label: int, generator: torch.Generator) -> int:
        of_class = (self.labels == label).nonzero().flatten()
        return int(of_class[torch.randint(len(of_class), (1,), generator=generator)])


class Steering:
    """A model, images, and what is measured on them.

    Args:
        arguments: those of the script.
    """

    arguments: Any

    def __init__(self, arguments: ImageArguments) -> None:
        self.arguments = arguments
        folder = Path(arguments.output_dir)
        self.base = arguments.model_name_or_path or small_vit(folder / "small_vit", arguments.pretraining_steps)
        data = load_images(arguments)  # its arguments have the same names
        self.classes = data["train"].features["label"].names
        processor = image_processor(self.base, arguments.image_size)
        data["train"] = limited(data["train"], arguments.max_train_samples, seed=0)
        self.options = {"interpolate_pos_encoding": True} if arguments.image_size else {}
        self.class_prompts: dict[str, torch.Tensor] = {}
        self.train, self.test = (
            Images(image_rows(data[split], processor), len(self.classes)) for split in ("train", "test")
        )

    def run(self) -> pd.DataFrame:
        """Train and test with all seeds; one row for each training, seed and prompt."""
        rows = []
        for seed, training in product(range(self.arguments.seeds), self.arguments.trainings):
            model = self.trained(training, seed)
            for name, measured in self.tested(model).items():
                rows.append({"training": training, "prompt": name, "seed": seed} | measured)
            print(pd.DataFrame(rows[-4:]).to_string(index=False), flush=True)
        if self.arguments.output_file is not None:
            self.draw(model).savefig(self.arguments.output_file, dpi=150)
        return pd.DataFrame(rows)

    def trained(self, training: str, seed: int) -> nn.Module:
        """A model with a Lite adapter, trained on images or on requests."""
        model, head = self.new_model("toast-lite", seed)
        self.class_prompts = self.class_prompts or self.prompts_of_classes(model)  # pass 1 is frozen
        rows = self.rows_of_images() if training == "images" else self.rows_of_requests(seed)
        return self.fit(model, "toast-lite", head, rows, seed)

    def new_model(self, method: str, seed: int) -> tuple[nn.Module, list[str]]:
        """A classifier to be trained with a method, and the names of the modules of its new head."""
        set_seed(seed)
        model = AutoModelForImageClassification.from_pretrained(
            self.base, id2label=dict(enumerate(self.classes)), ignore_mismatched_sizes=True
        )
        head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        return apply_method(model, method, modules_to_save=head), head

    def fit(self, model: nn.Module, method: str, head: list[str], rows: Rows, seed: int) -> nn.Module:
        """Train a model on rows, with the usual learning rate of the method."""
        arguments = TrainingArguments(
            output_dir=self.arguments.output_dir,
            num_train_epochs=self.arguments.num_train_epochs,
            per_device_train_batch_size=20,
            seed=seed,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            remove_unused_columns=False,
        )
        new_modules = [] if method == "linear" else head
        optimizer = make_optimizer(model, METHODS[method].vision, WEIGHT_DECAY, new_modules)
        trainer = Trainer(model, arguments, self.collate, rows, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model.eval()

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images or mosaics, these with their prompts."""
        return default_data_collator(rows) | self.options

    def rows_of_images(self) -> Rows:
        """The training images."""
        pairs = zip(self.train.pixels, self.train.labels.tolist(), strict=True)
        return [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]

    def rows_of_requests(self, seed: int) -> Rows:
        """Mosaics of training images, half as many as there are images, each with two requests."""
        scenes, _, pairs = self.train.mosaics(len(self.train.labels) // 2, seed)
        prompts = self.class_prompts["class, centred" if self.arguments.centred else "class"]
        return [
            {"pixel_values": scene, "labels": label, "topdown_prompt": prompts[label].cpu()}
            for scene, pair in zip(scenes, pairs, strict=True)
            for label in pair.tolist()
        ]

    def prompts_of_classes(self, model: PeftModel) -> dict[str, torch.Tensor]:
        """What to ask for a class with. Shapes: [classes, d]"""
        of_images = torch.cat(
            [prompt_from(model, {"pixel_values": pixels} | self.options) for pixels in self.train.pixels.split(50)]
        )
        of_classes = torch.stack([of_images[self.train.labels == i].mean(0) for i in range(len(self.classes))])
        return {"class": of_classes, "class, centred": of_classes - of_classes.mean(0)}

    def tested(self, model: PeftModel) -> dict[str, dict[str, float]]:
        """The columns of the table for each kind of prompt, always on the same mosaics."""
        scenes, tiles, pairs = self.test.mosaics(self.arguments.mosaics, seed=0)
        measured: dict[str, list[torch.Tensor]] = {}
        for requested in pairs.T:
            prompts = {name: of_classes[requested] for name, of_classes in self.class_prompts.items()}
            random = torch.randn(prompts["class"].shape, generator=torch.Generator().manual_seed(0))
            prompts |= {"random": random.to(prompts["class"]), "learned": None}
            for name, prompt in prompts.items():
                shares, predicted = self.answers(model, scenes, prompt, tiles == requested[:, None])
                columns = [shares, predicted == requested, (predicted[:, None] == pairs).any(1)]
                measured.setdefault(name, []).append(torch.stack([column.float() for column in columns], dim=1))
        return {
            name: dict(zip(COLUMNS, (100 * torch.cat(found).nanmean(0)).tolist(), strict=True))
            for name, found in measured.items()
        }

    @torch.no_grad()
    def answers(
        self, model: PeftModel, scenes: torch.Tensor, prompts: torch.Tensor | None, is_requested: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model makes of requests.

        Args:
            model: the model.
            scenes: mosaics. Shape: [m, 3, height, width]
            prompts: one for each, `None` for the learned one. Shape: [m, d]
            is_requested: which tiles are of the requested class. Shape: [m, 4]

        Returns:
            The share of the mask on these tiles, NaN where it is zero everywhere, and the predicted classes. Shapes:
            [m], [m]
        """
        shares, predicted = [], []
        for batch in torch.arange(len(scenes)).split(50):
            options = self.options | ({} if prompts is None else {"topdown_prompt": prompts[batch]})
            pixels = scenes[batch].to(model.device)
            predicted.append(model(pixel_values=pixels, **options).logits.argmax(-1).cpu())
            of_tiles = self.mask_of(model).unflatten(2, (2, -1)).unflatten(1, (2, -1)).sum((2, 4)).flatten(1)
            shares.append((of_tiles * is_requested[batch]).sum(1) / of_tiles.sum(1))
        return torch.cat(shares), torch.cat(predicted)

    def mask_of(self, model: PeftModel) -> torch.Tensor:
        """The mask of the patches in the last forward, which is kept for looking at. Shape: [b, rows, columns]"""
        path = next(part for name, part in model.named_modules() if name.endswith("feedback_path"))
        rows, columns = (size // model.config.patch_size for size in self.test.pixels.shape[-2:])
        return path.state.current.mask[:, -rows * columns :, 0].unflatten(1, (rows, columns)).cpu()

    @torch.no_grad()
    def draw(self, model: PeftModel) -> Figure:
        """A mosaic, and the mask with a request for each of its classes."""
        scenes, _, pairs = self.test.mosaics(4, seed=1)
        figure = Figure(figsize=(9, 12), layout="constrained")
        for index, (scene, pair) in enumerate(zip(scenes, pairs, strict=True)):
            axes = figure.add_subplot(4, 3, 3 * index + 1)
            image = scene - scene.amin((1, 2), keepdim=True)
            axes.imshow((image / image.amax((1, 2), keepdim=True)).permute(1, 2, 0))
            axes.set_axis_off()
            for column, label in enumerate(pair.tolist(), start=2):
                request = self.class_prompts["class, centred"][label]
                options = self.options | {"topdown_prompt": request}
                answer = model(pixel_values=scene[None].to(model.device), **options).logits.argmax(-1)
                axes = figure.add_subplot(4, 3, 3 * index + column)
                axes.imshow(self.mask_of(model)[0], vmin=0, cmap="viridis")
                axes.set(title=f"asked: {self.classes[label]}\nsays: {self.classes[int(answer)]}")
                axes.set_axis_off()
        return figure


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training, seed and kind of prompt. The table of their means is printed and saved.
    """
    only_our_progress()
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    Path(parsed.output_dir).mkdir(parents=True, exist_ok=True)
    runs = Steering(parsed).run()
    table = steering_table(runs).to_markdown(disable_numparse=True)
    runs.to_csv(Path(parsed.output_dir) / "runs.csv", index=False)
    (Path(parsed.output_dir) / "steering.md").write_text(table + "\n")
    print(f"\n{table}")
    return runs


if __name__ == "__main__":
    main()
