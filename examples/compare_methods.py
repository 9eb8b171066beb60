"""Compare fine-tuning methods on a set of images: one command, one table.

    python examples/compare_methods.py
    python examples/compare_methods.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 128 \
        --dataset_name folder_with_a_train_and_a_test_split --max_train_samples 400 --output_dir outputs/mine

How methods are compared is told in `comparison.py`, what each of them trains in `fine_tuning_methods.py`. The test
split is the one that the other example scripts evaluate on. Images are not augmented.

Without a model and data it needs no network: as in `image_classification.py` a small ViT learns the digits 5 to 9.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comparison import Comparison, ComparisonArguments, Results, Rows, parse_comparison, run_comparison
from datasets import Dataset, DatasetDict
from demo import only_progress_of_training
from fine_tuning_methods import LEARNING_RATES
from image_classification import (
    ImageArguments,
    accuracy,
    base_model_name,
    collate,
    load_images,
    load_model,
    make_processor,
    position_arguments,
    preprocess,
)
from tqdm import tqdm
from transformers import BaseImageProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ImageComparisonArguments(ComparisonArguments):
    """Which model to adapt, and what to compare."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this size, and the model's position embeddings with them."},
    )


@dataclass
class ImageComparison(Comparison):
    """A comparison of image classifiers.

    Args:
        classes: a data set with the classes.
    """

    learning_rates = LEARNING_RATES
    arguments: ImageComparisonArguments
    classes: DatasetDict

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A classifier with a new head."""
        model, _ = load_model(self.base, self.classes)
        head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        return model, {"modules_to_save": head}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images."""
        return collate(rows) | position_arguments(self.arguments.image_size)

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Accuracy and loss."""
        trainer.compute_metrics = accuracy
        measured = trainer.evaluate(self.rows[split])
        return {"accuracy": measured["eval_accuracy"], "loss": measured["eval_loss"]}

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """Accuracy; of equal ones the lowest loss is the best."""
        return metrics["accuracy"], -metrics["loss"]


def stratified(data: Dataset, seed: int, **size: float) -> DatasetDict:
    """Two parts of a data set, "train" and "test", with the same mixture of classes.

    Raises:
        ValueError: if there are too few images for this.
    """
    try:
        return data.train_test_split(stratify_by_column="label", seed=seed, **size)
    except ValueError as error:
        [(name, value)] = size.items()
        raise ValueError(
            f"{len(data)} images of {data.features['label'].num_classes} classes cannot be split into two parts that "
            f"have all classes with {name}={value} ({error}). Change --max_train_samples, --max_eval_samples or "
            "--validation_share."
        ) from error


def split(data: DatasetDict, arguments: ImageArguments, validation_share: float, seed: int) -> DatasetDict:
    """The splits "search", "validation" and "test", with at most as many images as the arguments allow."""
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    chosen = {
        name: data[name]
        if limit is None or limit >= len(data[name])
        else stratified(data[name], seed, train_size=limit)["train"]
        for name, limit in limits.items()
    }
    parts = stratified(chosen["train"], seed, test_size=validation_share)
    return DatasetDict(search=parts["train"], validation=parts["test"], test=chosen["validation"])


def load_rows(data: Dataset, processor: BaseImageProcessor) -> Rows:
    """All images of a split, decoded and preprocessed once."""
    return [
        {"pixel_values": image, "labels": label}
        for batch in preprocess(data, processor).iter(batch_size=64)
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]


def parse(
    arguments: list[str] | None = None,
) -> tuple[ImageComparisonArguments, ImageArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((ImageComparisonArguments, ImageArguments, TrainingArguments), description=__doc__)
    return parse_comparison(
        parser,
        LEARNING_RATES,
        arguments,
        output_dir="outputs/comparison",
        num_train_epochs=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        remove_unused_columns=False,
    )


def prepare(
    arguments: ImageComparisonArguments, image_arguments: ImageArguments, training_arguments: TrainingArguments
) -> ImageComparison:
    """Everything before the first run."""
    results = Results.of(arguments, image_arguments, training_arguments)
    seed = training_arguments.seed
    set_seed(seed)
    base = base_model_name(arguments, training_arguments.output_dir)
    data = load_images(replace(image_arguments, max_train_samples=None, max_eval_samples=None))
    splits = split(data, image_arguments, arguments.validation_share, seed)
    processor = make_processor(base, arguments.image_size)
    rows = {name: load_rows(images, processor) for name, images in splits.items()}
    rows["train"] = rows["search"] + rows["validation"]
    return ImageComparison(arguments, training_arguments, base, rows, results, tqdm(), data)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The rows of the table, which is also printed and, with a plot, saved.
    """
    only_progress_of_training()
    return run_comparison(prepare(*parse(arguments)), ["accuracy"])


if __name__ == "__main__":
    main()
