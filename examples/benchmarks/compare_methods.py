r"""Compare fine-tuning methods on a set of images: one command, one table.

    python examples/benchmarks/compare_methods.py
    python examples/benchmarks/compare_methods.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --image_size 128 --dataset_name folder_with_a_train_and_a_test_split --max_train_samples 400 --output_dir mine

How methods are compared is told in `comparison.py`, what each of them trains in `methods.py`. Images are not
augmented.

Without a model and data it needs no network: a small ViT that knows the digits 0 to 4 learns 5 to 9 from ten examples
of each.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from comparison import Comparison, ComparisonArguments, Rows, load_named_data, only_our_progress, parse
from datasets import ClassLabel, Dataset, DatasetDict
from offline import digits, image_processor, image_rows, small_vit
from pandas import DataFrame
from transformers import AutoModelForImageClassification, Trainer, default_data_collator


@dataclass
class ImageComparisonArguments(ComparisonArguments):
    """What to compare, and on which images."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this size, and the model's position embeddings with them."},
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the data set with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the data set with the classes."})


class ImageComparison(Comparison):
    """A comparison of image classifiers."""

    kind = "vision"
    columns = ["accuracy"]
    arguments: ImageComparisonArguments

    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """A ViT, and all images decoded and preprocessed once."""
        arguments = self.arguments
        base = arguments.model_name_or_path or small_vit(self.folder / "small_vit", arguments.pretraining_steps)
        data = load_images(arguments)
        self.classes = data["train"].features["label"].names
        processor = image_processor(base, arguments.image_size)
        return base, {name: image_rows(images, processor) for name, images in split(data, arguments).items()}

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A classifier with a new head."""
        model = AutoModelForImageClassification.from_pretrained(
            self.base, id2label=dict(enumerate(self.classes)), ignore_mismatched_sizes=True
        )
        head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        return model, {"modules_to_save": head}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images."""
        resized = self.arguments.image_size is not None
        return default_data_collator(rows) | ({"interpolate_pos_encoding": True} if resized else {})

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Accuracy and loss."""
        predicted = trainer.predict(self.rows[split])
        correct = predicted.predictions.argmax(-1) == predicted.label_ids
        return {"accuracy": float(correct.mean()), "loss": predicted.metrics["test_loss"]}

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """Accuracy; of equal ones the lowest loss is the best."""
        return metrics["accuracy"], -metrics["loss"]


def load_images(arguments: ImageComparisonArguments) -> DatasetDict:
    """The splits "train" and "test" with the columns "image" and "label"."""
    columns = {arguments.image_column_name: "image", arguments.label_column_name: "label"}
    data = load_named_data(arguments, columns) or digits(range(5, 10), examples_per_class=10)
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.class_encode_column("label")
    return data


def split(data: DatasetDict, arguments: ImageComparisonArguments) -> dict[str, Dataset]:
    """The splits "search", "validation" and "test", each with the same mixture of classes."""

    def limited(images: Dataset, limit: int | None) -> Dataset:
        if limit is None or limit >= len(images):
            return images
        return images.train_test_split(train_size=limit, stratify_by_column="label", seed=arguments.seed)["train"]

    parts = limited(data["train"], arguments.max_train_samples).train_test_split(
        arguments.validation_share, stratify_by_column="label", seed=arguments.seed
    )
    test = limited(data["test"], arguments.max_test_samples)
    return {"search": parts["train"], "validation": parts["test"], "test": test}


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The table, which is also printed, and a plot are saved.
    """
    only_our_progress()
    return ImageComparison(parse(ImageComparisonArguments, "vision", __doc__, arguments)).run()


if __name__ == "__main__":
    main()
