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
from classifiers import ClassifierArguments, ClassifierComparison, load_examples, split
from comparison import Rows, only_our_progress, parse
from datasets import DatasetDict
from offline import digits, image_batch, image_processor, image_rows, small_vit
from pandas import DataFrame
from transformers import AutoModelForImageClassification


@dataclass
class ImageComparisonArguments(ClassifierArguments):
    """What to compare, and on which images."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this size, and the model's position embeddings with them."},
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})


class ImageComparison(ClassifierComparison):
    """A comparison of image classifiers."""

    kind = "vision"
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
        return self.with_new_head(AutoModelForImageClassification)

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images."""
        return image_batch(rows, self.arguments.image_size)


def load_images(arguments: ImageComparisonArguments) -> DatasetDict:
    """The splits "train" and "test" with the columns "image" and "label"."""
    return load_examples(arguments, arguments.image_column_name, "image") or digits(
        range(5, 10), examples_per_class=10
    )


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
