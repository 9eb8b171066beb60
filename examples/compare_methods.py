"""Compare fine-tuning methods on a set of images: one command, one table.

    python examples/compare_methods.py
    python examples/compare_methods.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 128 \
        --dataset_name folder_with_a_train_and_a_test_split --max_train_samples 400 --output_dir outputs/mine

All methods get the same: for each of them `--tries` learning rates and weight decays, spread in the same way around
the learning rate that is usual for it, are tried on a part of the training images and compared on the rest, the
validation split. The best is trained anew on all training images with `--seeds` seeds and evaluated on the test split:
the one that the other example scripts evaluate on, which the search never sees. Images are not augmented, and the head
has the learning rate of the rest.

Every training is an entry of `results.json` in the output folder. The same command goes on where it was interrupted;
with more methods, tries or seeds it trains what is missing.

Without a model and data it needs no network: as in `image_classification.py` a small ViT learns the digits 5 to 9.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adaptation import BaseModelArguments, number_of_trainable_parameters
from benchmarks.cost import Method, activation_memory
from datasets import Dataset, DatasetDict
from demo import only_progress_of_training
from fine_tuning_methods import LEARNING_RATES, apply_method
from image_classification import (
    ImageArguments,
    accuracy,
    base_model_name,
    collate,
    load_images,
    load_model,
    preprocess,
)
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

Rows = list[dict[str, Any]]


@dataclass
class ComparisonArguments(BaseModelArguments):
    """Which model to adapt, and what to compare."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize images to this size, and the model's position embeddings with them."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": f"Some of {', '.join(LEARNING_RATES)}. Default: all that can run."}
    )
    tries: int = field(default=3, metadata={"help": "Learning rates and weight decays tried for each method."})
    seeds: int = field(default=3, metadata={"help": "How often the best of these is trained and tested."})
    validation_share: float = field(
        default=0.2,
        metadata={
            "help": "Part of the training images that the tries are compared on. With a handful of images, as of the "
            "offline digits, the choice is much of a chance."
        },
    )
    pretrained_feedback: str | None = field(
        default=None, metadata={"help": "Saved TOAST adapter that the method toast-pretuned starts from."}
    )


@dataclass(frozen=True)
class Run:
    """One training and its evaluation, on the split "validation" for the search or "test" for the table."""

    method: str
    evaluated_on: str
    learning_rate: float
    weight_decay: float
    seed: int
    pretrained_feedback: str | None = None


class Results:
    """What all runs have measured, kept in a file.

    Args:
        file: the file; what it has is read.
        settings: what the runs have in common.

    Raises:
        ValueError: if the runs in the file had other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self.settings = json.loads(json.dumps(settings))
        self.runs: dict[Run, dict[str, float]] = {}
        if file.exists():
            stored = json.loads(file.read_text())
            self._check(stored["settings"])
            self.runs = {Run(**entry["run"]): entry["metrics"] for entry in stored["runs"]}

    def _check(self, stored: dict[str, Any]) -> None:
        names = sorted(stored.keys() | self.settings.keys())
        different = [
            f"{name} was {stored.get(name)!r}, is {self.settings.get(name)!r}"
            for name in names
            if stored.get(name) != self.settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.file} has runs with other settings: {'; '.join(different)}. Give the same ones to go on with "
                "them, or another --output_dir."
            )

    def add(self, run: Run, metrics: dict[str, float]) -> None:
        """Store a run; an interruption leaves the file as it was before or after."""
        self.runs[run] = metrics
        entries = [{"run": asdict(run), "metrics": metrics} for run, metrics in self.runs.items()]
        unfinished = self.file.with_suffix(".tmp")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"settings": self.settings, "runs": entries}, indent=1))
        unfinished.replace(self.file)


@dataclass
class Comparison:
    """All that a run needs.

    Args:
        arguments, training_arguments: those of the script.
        base: name of the base model.
        classes: a data set with the classes.
        rows: the images of the splits as tensors; "train" is "search" and "validation".
        results: the runs so far.
        progress: a bar that counts the runs.
    """

    arguments: ComparisonArguments
    training_arguments: TrainingArguments
    base: str
    classes: DatasetDict
    rows: dict[str, Rows]
    results: Results
    progress: tqdm

    def metrics(self, run: Run) -> dict[str, float]:
        """What a run has measured, now or before."""
        self.progress.set_postfix_str(f"{run.method}, {run.evaluated_on}")
        if run not in self.results.runs:
            self.results.add(run, self._train(run))
        self.progress.update()
        return self.results.runs[run]

    def _train(self, run: Run) -> dict[str, float]:
        set_seed(run.seed)
        model, _ = load_model(self.base, self.classes)
        rows = self.rows["train" if run.evaluated_on == "test" else "search"]
        batch_size = self.training_arguments.per_device_train_batch_size
        batches = DataLoader(rows, batch_size, shuffle=True, collate_fn=self._collate)
        model.to(self.training_arguments.device)
        start = time.perf_counter()
        model = apply_method(model, run.method, batches, run.pretrained_feedback)
        trainer = self._make_trainer(model, rows, run)
        trainer.train()
        seconds = time.perf_counter() - start
        measured = trainer.evaluate(self.rows[run.evaluated_on])
        batch = {name: _to(value, model.device) for name, value in self._collate(rows[:batch_size]).items()}
        return {
            "accuracy": measured["eval_accuracy"],
            "loss": measured["eval_loss"],
            "trainable_parameters": number_of_trainable_parameters(model),
            "seconds": seconds,
        } | training_step_cost(model, batch)

    def _make_trainer(self, model: torch.nn.Module, rows: Rows, run: Run) -> Trainer:
        changes = {"learning_rate": run.learning_rate, "weight_decay": run.weight_decay, "seed": run.seed}
        trainer = Trainer(
            model=model,
            args=replace(self.training_arguments, **changes),
            train_dataset=rows,
            data_collator=self._collate,
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collate(self, rows: Rows) -> dict[str, Any]:
        resized = {} if self.arguments.image_size is None else {"interpolate_pos_encoding": True}
        return collate(rows) | resized

    def search(self, method: str) -> Run:
        """The learning rate and weight decay with the best validation accuracy; of equal ones with the lowest loss."""
        points = search_points(method, self.arguments.tries)
        start_from = self.arguments.pretrained_feedback if method == "toast-pretuned" else None
        runs = [Run(method, "validation", *point, self.training_arguments.seed, start_from) for point in points]
        measured = {run: self.metrics(run) for run in runs}
        return max(runs, key=lambda run: (measured[run]["accuracy"], -measured[run]["loss"]))

    def row(self, method: str) -> dict[str, Any]:
        """A method's row of the table: search, train with all seeds, and take means."""
        best = self.search(method)
        seeds = range(best.seed, best.seed + self.arguments.seeds)
        measured = [self.metrics(replace(best, evaluated_on="test", seed=seed)) for seed in seeds]
        accuracies = [metrics["accuracy"] for metrics in measured]
        return measured[0] | {
            "method": method,
            "learning_rate": best.learning_rate,
            "weight_decay": best.weight_decay,
            "accuracy": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seconds": statistics.mean(metrics["seconds"] for metrics in measured),
        }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def search_points(method: str, tries: int) -> list[tuple[float, float]]:
    """Learning rates within a factor of 10 of the usual one, and weight decays from 1e-3 to 1.

    They are spread evenly on a logarithmic scale: the first is the middle, and more tries only add points.
    """
    # The point before the first is the corner.
    points = SobolEngine(dimension=2).draw(tries + 1, dtype=torch.float64)[1:].tolist()
    return [(LEARNING_RATES[method] * 10 ** (2 * x - 1), 10 ** (3 * y - 3)) for x, y in points]


def training_step_cost(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of a forward and backward, and megabytes that the forward keeps for the backward."""
    # PyTorch does not count the fused attention of CPUs. The optimizer is not counted, for any method.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(**batch).loss.backward()
    model.zero_grad()
    return {
        "flops_per_step": counter.get_total_flops(),
        "activation_megabytes": activation_memory(Method(model, batch)),
    }


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


def make_processor(base: str, image_size: int | None) -> BaseImageProcessor:
    """The base model's image processor, for another image size if one is given."""
    size = {} if image_size is None else {"height": image_size, "width": image_size}
    sizes = {name: size for name in ("size", "crop_size") if size}
    return AutoImageProcessor.from_pretrained(base, backend="pil", **sizes)


def to_markdown(rows: list[dict[str, Any]], arguments: ComparisonArguments, batch_size: int) -> str:
    """The table, and what its numbers are."""
    lines = [
        f"Mean and standard deviation over {arguments.seeds} seeds, with the best of {arguments.tries} learning rates "
        "and weight decays on the validation split.\n",
        "| method | trainable parameters | test accuracy | learning rate | weight decay "
        f"| GFLOPs / step of {batch_size} | activations kept, MB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        lines.append(
            f"| {row['method']} | {row['trainable_parameters']:,} | {row['accuracy']:.3f}{deviation} "
            f"| {row['learning_rate']:.1e} | {row['weight_decay']:.1e} | {row['flops_per_step'] / 1e9:.4g} "
            f"| {row['activation_megabytes']:.4g} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy against trainable parameters and against compute."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_parameters, by_compute = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(rows):
        style = {"color": f"C{index % 10}", "marker": "os^"[index % 3], "linestyle": "none", "capsize": 3}
        height = {"y": row["accuracy"], "yerr": row["deviation"]}
        by_parameters.errorbar(row["trainable_parameters"], **height, **style, label=row["method"])
        by_compute.errorbar(row["flops_per_step"] / 1e9, **height, **style)
    by_parameters.set(xlabel="trainable parameters", xscale="log", ylabel="test accuracy")
    by_compute.set(xlabel="GFLOPs per training step")
    for axes in (by_parameters, by_compute):
        axes.grid(alpha=0.3)
    figure.legend(*by_parameters.get_legend_handles_labels(), loc="outside right center")
    return figure


def parse(arguments: list[str] | None = None) -> tuple[ComparisonArguments, ImageArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((ComparisonArguments, ImageArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="outputs/comparison",
        learning_rate=None,
        weight_decay=None,
        num_train_epochs=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    comparison, images, training = parser.parse_args_into_dataclasses(arguments)
    if training.learning_rate is not None or training.weight_decay is not None:
        parser.error("--learning_rate and --weight_decay are chosen by the search; give --tries.")
    if comparison.methods is None:
        runnable = partial(_can_run, pretrained_feedback=comparison.pretrained_feedback)
        comparison.methods = list(filter(runnable, LEARNING_RATES))
    for method in comparison.methods:
        if method not in LEARNING_RATES:
            parser.error(f"--methods {method} is unknown; choose some of {', '.join(LEARNING_RATES)}.")
        if not _can_run(method, comparison.pretrained_feedback):
            parser.error(f"--methods {method} needs --pretrained_feedback.")
    if min(comparison.tries, comparison.seeds) < 1:
        parser.error(f"--tries {comparison.tries} --seeds {comparison.seeds}: both must be at least 1.")
    return comparison, images, training


def _can_run(method: str, pretrained_feedback: str | None) -> bool:
    return method != "toast-pretuned" or pretrained_feedback is not None


def settings_of(
    arguments: ComparisonArguments, image_arguments: ImageArguments, training_arguments: TrainingArguments
) -> dict[str, Any]:
    """What all runs must have in common to be compared."""
    settings = asdict(arguments) | asdict(image_arguments) | training_arguments.to_dict()
    free = ("methods", "tries", "seeds", "pretrained_feedback", "output_dir", "disable_tqdm")
    return {name: value for name, value in settings.items() if name not in free}


def prepare(
    arguments: ComparisonArguments, image_arguments: ImageArguments, training_arguments: TrainingArguments
) -> Comparison:
    """Everything before the first run."""
    file = Path(training_arguments.output_dir) / "results.json"
    results = Results(file, settings_of(arguments, image_arguments, training_arguments))
    seed = training_arguments.seed
    set_seed(seed)
    base = base_model_name(arguments, training_arguments.output_dir)
    data = load_images(replace(image_arguments, max_train_samples=None, max_eval_samples=None))
    splits = split(data, image_arguments, arguments.validation_share, seed)
    processor = make_processor(base, arguments.image_size)
    rows = {name: load_rows(images, processor) for name, images in splits.items()}
    rows["train"] = rows["search"] + rows["validation"]
    number_of_runs = len(arguments.methods) * (arguments.tries + arguments.seeds)
    return Comparison(arguments, training_arguments, base, data, rows, results, tqdm(total=number_of_runs))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The rows of the table, which is also printed and, with a plot, saved.
    """
    only_progress_of_training()
    comparison_arguments, image_arguments, training_arguments = parse(arguments)
    comparison = prepare(comparison_arguments, image_arguments, training_arguments)
    with comparison.progress:
        rows = [comparison.row(method) for method in comparison_arguments.methods]
    table = to_markdown(rows, comparison_arguments, training_arguments.per_device_train_batch_size)
    folder = Path(training_arguments.output_dir)
    (folder / "comparison.md").write_text(table)
    plot(rows).savefig(folder / "comparison.png", dpi=150)
    print(f"\n{table}")
    return rows


if __name__ == "__main__":
    main()
