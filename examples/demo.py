"""Adapt a vision model and a language model offline, compare TOAST with other methods, and reload every result.

    python examples/demo.py
    python examples/demo.py --short

Everything is done by two of the example scripts; this one calls them for each method and prints what they measured.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import image_classification
import language_modeling
import transformers
from adaptation import print_table


@dataclass
class Task:
    """One half of the demo.

    Args:
        name: heading, and the folder below the output folder.
        main: the example script.
        metric: what the script measures, without the prefix "before_" or "eval_".
        methods: the methods to compare.
        arguments: further arguments of the script.
        short_arguments: arguments that make the script take seconds.
    """

    name: str
    main: Callable[[list[str]], dict[str, float]]
    metric: str
    methods: tuple[str, ...]
    short_arguments: tuple[str, ...]


TASKS = (
    Task(
        name="images",
        main=image_classification.main,
        metric="accuracy",
        methods=("linear_probe", "lora", "toast", "toast_lite"),
        short_arguments=("--pretraining_steps", "150", "--num_train_epochs", "10", "--max_eval_samples", "200"),
    ),
    Task(
        name="text",
        main=language_modeling.main,
        metric="perplexity",
        methods=("lora", "toast", "toast_lite"),
        short_arguments=("--pretraining_steps", "100", "--max_steps", "20", "--max_eval_samples", "40"),
    ),
)


def only_progress_of_training() -> None:
    """Of the progress bars leave those of the training; that a model gets a new head is not worth a page each time."""
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    datasets.disable_progress_bars()


def compare(task: Task, folder: Path, extra_arguments: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Adapt with each method of a task, and evaluate each result once more from its saved form.

    Returns:
        The rows of the table.
    """
    rows = []
    for method in task.methods:
        print(f"\n{task.name}: {method}", flush=True)
        output = folder / task.name / method
        arguments = [*extra_arguments, "--method", method, "--output_dir", str(output)]
        trained = task.main(arguments)
        saved_as = "adapter" if (output / "adapter_config.json").exists() else "model"
        reloaded = task.main([*arguments, f"--{saved_as}_name_or_path", str(output), "--do_train", "False"])
        for measured in (f"eval_{task.metric}", "eval_loss"):
            if reloaded[measured] != trained[measured]:
                sys.exit(f"{output}: {measured} was {trained[measured]}, but is {reloaded[measured]} after reloading.")
        rows.append(
            (
                task.name,
                method,
                f"{trained['trainable_parameters']:,}",
                task.metric,
                f"{trained[f'before_{task.metric}']:.3f}",
                f"{trained[f'eval_{task.metric}']:.3f}",
                f"{trained['train_runtime']:.1f}",
                str(output),
            )
        )
    return rows


def main() -> None:
    """Run the demo; exits with an error if a reloaded adapter does not reproduce its evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="Everything is written below it.")
    parser.add_argument("--short", action="store_true", help="A quick run, below `short` in the output folder.")
    arguments = parser.parse_args()
    only_progress_of_training()
    folder = arguments.output_dir / "short" if arguments.short else arguments.output_dir
    rows = [("task", "method", "trainable parameters", "metric", "before", "after", "seconds", "saved in")]
    for task in TASKS:
        rows += compare(task, folder, task.short_arguments if arguments.short else ())
    print()
    print_table(rows)
    print("\nReloaded, every saved adapter and model gave exactly the same evaluation.")


if __name__ == "__main__":
    main()
