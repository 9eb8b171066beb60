"""What the comparisons of fine-tuning methods share: the search, the runs that are kept and resumed, table and plot.

All methods get the same: for each of them `--tries` learning rates and weight decays, spread in the same way around
the learning rate that is usual for it, are tried on a part of the training data and compared on the rest, the
validation split. The best is trained anew on all training data with `--seeds` seeds and measured on the test split,
which the search never sees. A new head has the same learning rate with all methods, as if it was trained alone.

Every training is an entry of `results.json` in the output folder. The same command goes on where it was interrupted;
with more methods, tries or seeds it trains what is missing.
"""

import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from adaptation import BaseModelArguments, number_of_trainable_parameters
from benchmarks.cost import Method, activation_memory
from fine_tuning_methods import HEAD_LEARNING_RATE, apply_method
from matplotlib.figure import Figure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments, set_seed

Rows = list[dict[str, Any]]


@dataclass
class ComparisonArguments(BaseModelArguments):
    """Which model to adapt, and what to compare."""

    methods: list[str] | None = field(
        default=None, metadata={"help": "Methods of `fine_tuning_methods.py`. Default: all that can run."}
    )
    tries: int = field(default=3, metadata={"help": "Learning rates and weight decays tried for each method."})
    seeds: int = field(default=3, metadata={"help": "How often the best of these is trained and tested."})
    validation_share: float = field(
        default=0.2,
        metadata={
            "help": "Part of the training data that the tries are compared on. With a handful of rows, as of the "
            "offline digits, the choice is much of a chance."
        },
    )
    pretrained_feedback: str | None = field(
        default=None, metadata={"help": "Saved TOAST adapter that the method toast-pretuned starts from."}
    )

    def check(self, parser: HfArgumentParser, possible: Iterable[str]) -> None:
        """Set the methods if none are named, or end the script with an error if something cannot run."""
        possible = [name for name in possible if name != "toast-pretuned" or self.pretrained_feedback is not None]
        self.methods = possible if self.methods is None else self.methods
        for method in self.methods:
            if method == "toast-pretuned" and self.pretrained_feedback is None:
                parser.error("--methods toast-pretuned needs --pretrained_feedback.")
            if method not in possible:
                parser.error(f"--methods {method} is unknown; choose some of {', '.join(possible)}.")
        if min(self.tries, self.seeds) < 1:
            parser.error(f"--tries {self.tries} --seeds {self.seeds}: both must be at least 1.")


def parse_comparison(
    parser: HfArgumentParser, methods: Iterable[str], arguments: list[str] | None = None, **defaults: Any
) -> tuple[Any, ...]:
    """The arguments of a comparison, from the command line if not given.

    Args:
        parser: for the `ComparisonArguments`, those of the data, and the `TrainingArguments`.
        methods: those that can be compared.
        arguments: as on the command line.
        defaults: of the training.
    """
    parser.set_defaults(
        learning_rate=None,
        weight_decay=None,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        label_names=["labels"],
        **defaults,
    )
    comparison, data, training = parser.parse_args_into_dataclasses(arguments)
    if training.learning_rate is not None or training.weight_decay is not None:
        parser.error("--learning_rate and --weight_decay are chosen by the search; give --tries.")
    comparison.check(parser, methods)
    return comparison, data, training


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

    @classmethod
    def of(cls, *arguments: Any) -> "Results":
        """Those in the output folder, if what all runs must have in common is as it was.

        Args:
            arguments: data classes with all arguments of the script, the last of them the `TrainingArguments`.
        """
        *others, training = arguments
        settings = {name: value for part in others for name, value in asdict(part).items()} | training.to_dict()
        for name in ("methods", "tries", "seeds", "pretrained_feedback", "output_dir", "disable_tqdm"):
            del settings[name]
        return cls(Path(training.output_dir) / "results.json", settings)

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
class Comparison(ABC):
    """All that a run needs.

    `learning_rates` are the usual ones of the methods; the search is around them.

    Args:
        arguments, training_arguments: those of the script.
        base: name of the base model.
        rows: the splits "search", "validation" and "test", and "train", which is the first two.
        results: the runs so far.
        progress: a bar that counts the runs.
    """

    learning_rates: ClassVar[dict[str, float]]
    arguments: ComparisonArguments
    training_arguments: TrainingArguments
    base: str
    rows: dict[str, Rows]
    results: Results
    progress: tqdm

    @abstractmethod
    def load_model(self) -> tuple[nn.Module, dict[str, Any]]:
        """The base model, and the `task_type` and `modules_to_save` of a PEFT config for it."""

    @abstractmethod
    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of the rows."""

    @abstractmethod
    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """What the table shows about a trained model, under the names of its columns, and more."""

    @abstractmethod
    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """Higher for a better model."""

    def metrics(self, run: Run) -> dict[str, float]:
        """What a run has measured, now or before."""
        self.progress.set_postfix_str(f"{run.method}, {run.evaluated_on}")
        if run not in self.results.runs:
            self.results.add(run, self._train(run))
        self.progress.update()
        return self.results.runs[run]

    def _train(self, run: Run) -> dict[str, float]:
        set_seed(run.seed)
        model, peft_options = self.load_model()
        rows = self.rows["train" if run.evaluated_on == "test" else "search"]
        batch_size = self.training_arguments.per_device_train_batch_size
        batches = DataLoader(rows, batch_size, shuffle=True, collate_fn=self.collate)
        model.to(self.training_arguments.device)
        start = time.perf_counter()
        model = apply_method(model, run.method, batches, run.pretrained_feedback, **peft_options)
        optimizer = make_optimizer(model, run, peft_options.get("modules_to_save", []))
        trainer = self.make_trainer(model, rows, run.seed, optimizer)
        trainer.train()
        measured = {"seconds": time.perf_counter() - start} | self.measure(trainer, run.evaluated_on)
        batch = {name: _to(value, model.device) for name, value in self.collate(rows[:batch_size]).items()}
        measured["trainable_parameters"] = number_of_trainable_parameters(model)
        return measured | training_step_cost(model, batch)

    def make_trainer(
        self, model: nn.Module, rows: Rows, seed: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Trainer:
        """A Trainer that does not print."""
        trainer = Trainer(
            model=model,
            args=replace(self.training_arguments, seed=seed),
            train_dataset=rows,
            data_collator=self.collate,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def search(self, method: str) -> Run:
        """The learning rate and weight decay that are best on the validation split."""
        points = search_points(self.learning_rates[method], self.arguments.tries)
        start_from = self.arguments.pretrained_feedback if method == "toast-pretuned" else None
        runs = [Run(method, "validation", *point, self.training_arguments.seed, start_from) for point in points]
        goodness = {run: self.goodness(self.metrics(run)) for run in runs}
        return max(runs, key=goodness.get)

    def row(self, method: str) -> dict[str, Any]:
        """A method's row of the table: search, train with all seeds, and take means."""
        best = self.search(method)
        seeds = range(best.seed, best.seed + self.arguments.seeds)
        measured = [self.metrics(replace(best, evaluated_on="test", seed=seed)) for seed in seeds]
        values = {name: [metrics[name] for metrics in measured] for name in measured[0]}
        means = {name: statistics.mean(value) for name, value in values.items()}
        deviations = {
            f"{name} deviation": statistics.stdev(value) if len(value) > 1 else None for name, value in values.items()
        }
        search = {"method": method, "learning_rate": best.learning_rate, "weight_decay": best.weight_decay}
        return means | deviations | search


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def make_optimizer(model: nn.Module, run: Run, new_modules: list[str]) -> torch.optim.Optimizer:
    """AdamW with the learning rate and weight decay of a run.

    Args:
        model: what is trained in it.
        run: the run.
        new_modules: names of the modules that are trained with every method. They have a learning rate of their own,
            unless nothing else is trained.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_new = run.method != "linear" and not set(new_modules).isdisjoint(name.split("."))
            rate = HEAD_LEARNING_RATE if is_new else run.learning_rate
            decay = 0.0 if parameter.dim() == 1 else run.weight_decay  # not of biases and norms, as in the Trainer
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    )


def search_points(learning_rate: float, tries: int) -> list[tuple[float, float]]:
    """Learning rates within a factor of 10 of the given one, and weight decays from 1e-3 to 1.

    They are spread evenly on a logarithmic scale: the first is the middle, and more tries only add points.
    """
    # The point before the first is the corner.
    points = SobolEngine(dimension=2).draw(tries + 1, dtype=torch.float64)[1:].tolist()
    return [(learning_rate * 10 ** (2 * x - 1), 10 ** (3 * y - 3)) for x, y in points]


def training_step_cost(model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of a forward and backward, and megabytes that the forward keeps for the backward."""
    # PyTorch does not count the fused attention of CPUs. The optimizer is not counted, for any method.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(**batch).loss.backward()
    model.zero_grad()
    return {
        "flops_per_step": counter.get_total_flops(),
        "activation_megabytes": activation_memory(Method(model, batch)),
    }


def to_markdown(rows: list[dict[str, Any]], columns: list[str], comparison: Comparison) -> str:
    """The table, and what its numbers are; `columns` are the measured ones."""
    arguments, batch_size = comparison.arguments, comparison.training_arguments.per_device_train_batch_size
    lines = [
        f"Mean and standard deviation over {arguments.seeds} seeds, with the best of {arguments.tries} learning rates "
        "and weight decays on the validation split.\n",
        f"| method | trainable parameters | {' | '.join(columns)} | learning rate | weight decay "
        f"| GFLOPs / step of {batch_size} | activations kept, MB | seconds |",
        "|---" * (len(columns) + 7) + "|",
    ]
    for row in rows:
        measured = " | ".join(_with_deviation(row, name) for name in columns)
        lines.append(
            f"| {row['method']} | {row['trainable_parameters']:,} | {measured} "
            f"| {row['learning_rate']:.1e} | {row['weight_decay']:.1e} | {row['flops_per_step'] / 1e9:.4g} "
            f"| {row['activation_megabytes']:.4g} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _with_deviation(row: dict[str, Any], name: str) -> str:
    deviation = row[f"{name} deviation"]
    return f"{row[name]:.3f}" if deviation is None else f"{row[name]:.3f} ± {deviation:.3f}"


def plot(rows: list[dict[str, Any]], column: str) -> Figure:
    """A measured column against trainable parameters and against compute."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_parameters, by_compute = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(rows):
        style = {"color": f"C{index % 10}", "marker": "os^"[index % 3], "linestyle": "none", "capsize": 3}
        height = {"y": row[column], "yerr": row[f"{column} deviation"]}
        by_parameters.errorbar(row["trainable_parameters"], **height, **style, label=row["method"])
        by_compute.errorbar(row["flops_per_step"] / 1e9, **height, **style)
    by_parameters.set(xlabel="trainable parameters", xscale="log", ylabel=column)
    by_compute.set(xlabel="GFLOPs per training step")
    for axes in (by_parameters, by_compute):
        axes.grid(alpha=0.3)
    figure.legend(*by_parameters.get_legend_handles_labels(), loc="outside right center")
    return figure


def run_comparison(comparison: Comparison, columns: list[str]) -> list[dict[str, Any]]:
    """Train and measure what is missing; print and save the table, and save a plot of its first measured column.

    Returns:
        The rows of the table.
    """
    with comparison.progress as progress:
        methods, arguments = comparison.arguments.methods, comparison.arguments
        progress.reset(total=len(methods) * (arguments.tries + arguments.seeds))
        rows = [comparison.row(method) for method in methods]
    table = to_markdown(rows, columns, comparison)
    folder = Path(comparison.training_arguments.output_dir)
    (folder / "comparison.md").write_text(table)
    plot(rows, columns[0]).savefig(folder / "comparison.png", dpi=150)
    print(f"\n{table}")
    return rows
