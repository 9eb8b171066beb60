"""Does the feedback depend on the image? The accuracy with feedback that is computed from other images.

    python examples/benchmarks/swap.py
    python examples/benchmarks/swap.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 128 \
        --dataset_name folder_with_a_train_and_a_test_split --methods toast toast-lite --output_dir mine

All arguments are those of `compare_methods.py`, and the trainings are the same. Each TOAST adapter is tested as it is,
with the features of the next image of the batch, with those of the mean of the batch, and without feedback. What it
loses by these is what it owes to looking at the image; the rest is a bias that it has learned.
"""

from compare_methods import ImageComparison, ImageComparisonArguments
from comparison import only_our_progress, parse
from pandas import DataFrame
from transformers import Trainer

from toast_peft import swapped_features

COLUMNS = {"next": "of the next image", "mean": "of the mean"}
WITHOUT = "without feedback"


class SwapComparison(ImageComparison):
    """A comparison of image classifiers, each tested with the feedback of other images as well."""

    columns = ["accuracy", *COLUMNS.values(), WITHOUT]

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Accuracy and loss, and the accuracy with other feedback."""
        model, found = trainer.model, super().measure(trainer, split)
        for other, column in COLUMNS.items():
            with swapped_features(model, other):
                found[column] = super().measure(trainer, split)["accuracy"]
        with model.rescaled_feedback(0.0):
            found[WITHOUT] = super().measure(trainer, split)["accuracy"]
        return found


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The table, which is also printed, and a plot are saved.
    """
    only_our_progress()
    defaults = {"methods": ["toast-initialized", "toast-lite-initialized"], "output_dir": "outputs/swap"}
    return SwapComparison(parse(ImageComparisonArguments, "vision", __doc__, arguments, **defaults)).run()


if __name__ == "__main__":
    main()
