"""What the comparisons of fine-tuning methods share: the search, trainings that are kept and resumed, and the plot.

All methods get the same. For each of them `--tries` learning rates, over two decades around the one that is usual for
it, each with a weight decay, are tried on a part of the training data and compared on the rest, the validation split.
The best is trained anew on all training data with `--seeds` seeds and measured on the test split, which the search
never sees. New modules have the same learning rate with all methods.

Every training is a trial of an Optuna study in `study.db` in the output folder. The same command goes on where it was
interrupted; with more methods, tries or seeds it trains what is missing.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import optuna
import pandas as pd
import torch
import transformers
from cost import HelpFormatter, training_step_cost
from datasets import DatasetDict, disable_progress_bars, load_dataset
from matplotlib.figure import Figure
from methods import METHODS, apply_method
from optuna.trial import FrozenTrial, TrialState
from scaling import NOT_SCALED, Strength, curves
from tables import column_at, comparison_table
from torch import nn
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature, HfArgumentParser, PrinterCallback, Trainer, TrainingArguments, set_seed

from toast_peft import store_features

Rows = list[dict[str, Any]]
Point = dict[str, float]
SPLITS = ("validation", "test")
# Of new modules, with every method but "linear", which trains nothing else and searches around its own.
NEW_MODULES_LEARNING_RATE = 3e-3
GATE_ROWS = 64  # of each domain of the reference; more change little


@dataclass
class ComparisonArguments:
    """What to compare, and on what."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the Hub or a local folder. Default: a small one, made from offline data."},
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the default model."})
    methods: list[str] | None = field(
        default=None, metadata={"help": f"Some of {', '.join(METHODS)}. Default: all that can run."}
    )
    tries: int = field(default=7, metadata={"help": "Learning rates and weight decays tried for each method."})
    seeds: int = field(default=3, metadata={"help": "How often the best of these is trained and tested."})
    validation_share: float = field(
        default=0.2, metadata={"help": "Part of the training data that the tries are compared on."}
    )
    pretrained_feedback: str | None = field(
        default=None, metadata={"help": "Saved TOAST adapter that the method toast-pretuned starts from."}
    )
    store_features: str | None = field(
        default=None,
        metadata={"help": "Folder where pass 1 of each method with two is stored, to be run once for all trainings."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub, or a local folder as `load_dataset` takes it. Default: offline data."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local .parquet, .json, .jsonl, .csv or .txt, or one of these with .gz."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file, for the final test."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows at most."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on so many rows at most."})
    scales: list[float] | None = field(
        default=None,
        metadata={"help": "Test all trained models at these strengths as well, for example 0.7 0.5 0.3."},
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of each training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size of the trainings."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size of the evaluations."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    seed: int = field(default=42, metadata={"help": "First of the seeds, and that of the splits and the search."})
    output_dir: str = field(default="outputs/images", metadata={"help": "Folder for all results."})


Arguments = TypeVar("Arguments", bound=ComparisonArguments)


def parse(
    arguments_class: type[Arguments],
    kind: str,
    description: str | None,
    arguments: list[str] | None,
    **defaults: Any,
) -> Arguments:
    """The arguments of a comparison, from the command line if not given.

    Args:
        arguments_class: what to parse.
        kind: "vision", "text" or "encoder", as in `methods.Method`.
        description: for --help.
        arguments: as on the command line.
        defaults: of the script, where they are others.
    """
    parser = HfArgumentParser(arguments_class, description=description, formatter_class=HelpFormatter)
    parser.set_defaults(**defaults)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    possible = [name for name, method in METHODS.items() if getattr(method, kind) is not None]
    if parsed.pretrained_feedback is None and "toast-pretuned" in possible:
        possible.remove("toast-pretuned")
    parsed.methods = parsed.methods or possible
    for method in parsed.methods:
        if method not in possible:
            needed = " --pretrained_feedback is needed for toast-pretuned." if method == "toast-pretuned" else ""
            parser.error(f"--methods {method} cannot run; choose some of {', '.join(possible)}.{needed}")
    if min(parsed.tries, parsed.seeds) < 1:
        parser.error(f"--tries {parsed.tries} --seeds {parsed.seeds}: both must be at least 1.")
    return parsed


def load_named_data(arguments: ComparisonArguments, columns: dict[str, str] | None = None) -> DatasetDict | None:
    """The data that the arguments name, with the splits "train" and "test"; `None` if they name none.

    Args:
        arguments: those of the script.
        columns: the columns to keep, and their new names. Default: all.
    """
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "test": arguments.test_file}
        suffix = Path(arguments.train_file.removesuffix(".gz")).suffix[1:]
        builder = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
        data = load_dataset(builder, data_files={split: file for split, file in files.items() if file})
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name)
    else:
        return None
    if "test" not in data:
        data = data if "validation" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=data["train"], test=data["validation" if "validation" in data else "test"])
    if columns is None:
        return data
    data = data.select_columns(list(columns))
    return data.rename_columns({old: new for old, new in columns.items() if old != new})


class Comparison(ABC):
    """A model and data on which methods are compared.

    `kind` is "vision", "text" or "encoder", `columns` are the measured ones in the table, `scaled` the splits that
    trained models are measured on at all strengths, `reference` what a gate is to leave alone, and what is replayed,
    by domains.

    Args:
        arguments: those of the script.

    Raises:
        ValueError: if the output folder has trainings with other settings.
    """

    kind: ClassVar[str]
    columns: list[str]
    scaled: ClassVar[tuple[str, ...]] = ("test",)

    def __init__(self, arguments: ComparisonArguments) -> None:
        self.arguments = arguments
        self.reference: dict[str, Rows] = {}
        self.folder = Path(arguments.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{self.folder / 'study.db'}")
        self.studies = {(method, split): self.study(method, split) for method in arguments.methods for split in SPLITS}
        set_seed(arguments.seed)
        self.base, self.rows = self.prepare()
        self.rows["train"] = self.rows["search"] + self.rows["validation"]

    @abstractmethod
    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """The name of the base model, and the splits "search", "validation" and "test"."""

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

    def chosen(self, searched: list[FrozenTrial]) -> list[FrozenTrial]:
        """The tries that are trained anew and tested: the best one."""
        return [max(searched, key=lambda trial: self.goodness(trial.user_attrs))]

    def measure_once(self, trainer: Trainer, split: str) -> dict[str, float]:
        """What is measured at full strength only."""
        return {}

    def study(self, method: str, split: str) -> optuna.Study:
        """The study of a method, of the search or of the test; its value is the first of `goodness`."""
        unshared = {"methods", "tries", "seeds", "output_dir", "store_features", "max_change"}
        unshared |= set() if method == "toast-pretuned" else {"pretrained_feedback"}
        settings = {name: value for name, value in asdict(self.arguments).items() if name not in unshared}
        study = optuna.create_study(
            storage=self.storage, study_name=f"{method}, {split}", direction="maximize", load_if_exists=True
        )
        check_settings(study, settings)
        return study

    def run(self) -> pd.DataFrame:
        """Train what is missing, print and save the table, and save all trainings and a plot.

        Returns:
            One row for each training.
        """
        methods, tries, seeds = self.arguments.methods, self.arguments.tries, self.arguments.seeds
        rows = []
        with tqdm(total=len(methods) * (tries + seeds)) as progress:
            for method in methods:
                searched = list(self.trials(method, "validation", self.search_points(method), progress))
                points = [
                    chosen.params | {"seed": self.arguments.seed + index}
                    for chosen in self.chosen(searched)
                    for index in range(seeds)
                ]
                tested = self.trials(method, "test", points, progress)
                for split, trials in zip(SPLITS, (searched, tested), strict=True):
                    rows += [{"method": method, "split": split} | trial.params | trial.user_attrs for trial in trials]
        runs = pd.DataFrame(rows)
        self.save(runs)
        return runs

    def save(self, runs: pd.DataFrame) -> None:
        """Print and save the table, and save all trainings and a plot."""
        table = comparison_table(runs, self.columns).to_markdown(disable_numparse=True)
        runs.to_csv(self.folder / "runs.csv", index=False)
        (self.folder / "comparison.md").write_text(table + "\n")
        plot(runs, self.columns[0]).savefig(self.folder / "comparison.png", dpi=150)
        print(f"\n{table}")
        if self.arguments.scales:
            table = curves(runs, self.columns, self.arguments.scales).to_markdown(index=False, disable_numparse=True)
            (self.folder / "scales.md").write_text(table + "\n")
            print(f"\n{table}")

    def search_points(self, method: str) -> list[Point]:
        """What the search tries: learning rates, weight decays, and the first seed."""
        points = search_points(getattr(METHODS[method], self.kind), self.arguments.tries)
        return [point | {"seed": self.arguments.seed} for point in points]

    def trials(self, method: str, split: str, points: list[Point], progress: tqdm) -> Iterator[FrozenTrial]:
        """The trials of a study at the points; those that it does not have yet are made now."""
        study = self.studies[method, split]
        for point in points:
            progress.set_postfix_str(f"{method}, {split}")
            if not completed(study, point):
                study.enqueue_trial(point)
                study.optimize(partial(self.objective, method=method, split=split), n_trials=1)
            progress.update()
            yield completed(study, point)[0]

    def objective(self, trial: optuna.Trial, method: str, split: str) -> float:
        """Train and measure at the point that was enqueued."""
        usual = getattr(METHODS[method], self.kind)
        learning_rate = trial.suggest_float("learning_rate", usual / 10, usual * 10, log=True)
        weight_decay = trial.suggest_float("weight_decay", 1e-3, 1.0, log=True)
        metrics = self.train(method, split, learning_rate, weight_decay, trial.suggest_int("seed", 0, 2**32 - 1))
        for name, value in metrics.items():
            trial.set_user_attr(name, value)
        return self.goodness(metrics)[0]

    def train(self, method: str, split: str, learning_rate: float, weight_decay: float, seed: int) -> dict[str, float]:
        """Train with a method, on all training data if it is for the test, and measure on the split."""
        set_seed(seed)
        model, peft_options = self.load_model()
        rows = self.rows["train" if split == "test" else "search"]
        arguments = self.training_arguments(seed)
        model.to(arguments.device)
        batch_size = arguments.per_device_train_batch_size
        batches = DataLoader(rows, batch_size, shuffle=True, collate_fn=self.collate)
        reference = {
            domain: DataLoader(of_domain[:GATE_ROWS], batch_size, collate_fn=self.collate)
            for domain, of_domain in self.reference.items()
        }
        start = time.perf_counter()
        model = apply_method(
            model, method, batches, self.arguments.pretrained_feedback, reference=reference, **peft_options
        )
        new_modules = [] if method == "linear" else peft_options.get("modules_to_save", [])
        optimizer = make_optimizer(model, learning_rate, weight_decay, new_modules)
        strength = Strength(model, peft_options.get("modules_to_save", []))
        data, collate = rows + self.replayed(round(METHODS[method].replay * len(rows))), self.collate
        if self.arguments.store_features is not None and method.startswith(("toast", "pass2")):
            folder = Path(self.arguments.store_features) / method / ("train" if split == "test" else "search")
            data = store_features(model, rows, folder, data_collator=collate)
            collate = data.collate
        trainer = Trainer(model, arguments, collate, data, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        measured = {"seconds": time.perf_counter() - start}
        measured |= self.measure(trainer, split) | self.measure_once(trainer, split)
        if split in self.scaled and method not in NOT_SCALED:
            measured |= self.measure_at_scales(trainer, strength, split)
        measured["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        batch = BatchFeature(self.collate(rows[:batch_size])).to(model.device)
        return measured | training_step_cost(model, batch)

    def replayed(self, number: int) -> Rows:
        """So many rows, or a few less: the first ones of each domain of the reference."""
        return [row for rows in self.reference.values() for row in rows[: number // len(self.reference)]]

    def measure_at_scales(self, trainer: Trainer, strength: Strength, split: str) -> dict[str, float]:
        """What the table shows about a trained model at the other strengths that were asked for."""
        measured = {}
        for alpha in self.arguments.scales or []:
            with strength.at(alpha):
                metrics = self.measure(trainer, split)
            measured |= {column_at(column, alpha): metrics[column] for column in self.columns}
        return measured

    def training_arguments(self, seed: int) -> TrainingArguments:
        """Those of all trainings with a seed."""
        return TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=self.arguments.num_train_epochs,
            per_device_train_batch_size=self.arguments.per_device_train_batch_size,
            per_device_eval_batch_size=self.arguments.per_device_eval_batch_size,
            bf16=self.arguments.bf16,
            use_cpu=not torch.accelerator.is_available(),  # has to be said for bf16
            seed=seed,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            remove_unused_columns=False,
        )


def search_points(learning_rate: float, tries: int) -> list[Point]:
    """Learning rates within a factor of 10 of the given one, and weight decays from 1e-3 to 1.

    They are spread evenly on a logarithmic scale: the first is the middle, and more tries only add points. They are
    not left to Optuna's own Sobol sampler, which gives up the point of an interrupted trial and goes on with the next:
    then not all methods would be searched alike.
    """
    # The point before the first is the corner.
    points = SobolEngine(dimension=2).draw(tries + 1, dtype=torch.float64)[1:].tolist()
    return [{"learning_rate": learning_rate * 10 ** (2 * x - 1), "weight_decay": 10 ** (3 * y - 3)} for x, y in points]


def completed(study: optuna.Study, point: Point) -> list[FrozenTrial]:
    """The trials at a point that were not interrupted."""
    return [trial for trial in study.get_trials(states=(TrialState.COMPLETE,)) if trial.params == point]


def check_settings(study: optuna.Study, settings: dict[str, Any]) -> None:
    """Store in a new study what all its trials have in common.

    Raises:
        ValueError: if that was something else.
    """
    stored = study.user_attrs.get("settings", settings)
    names = [name for name in settings if stored.get(name) != settings[name]]
    different = "; ".join(f"{name} was {stored.get(name)!r}, is {settings[name]!r}" for name in names)
    if different:
        raise ValueError(
            f"The output folder has trainings of {study.study_name} with other settings: {different}. Give the same "
            "ones to go on with them, or another --output_dir."
        )
    study.set_user_attr("settings", settings)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, new_modules: list[str]
) -> torch.optim.Optimizer:
    """AdamW; the new modules, given by their names, have a learning rate of their own."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_new = any(f".{module}." in f".{name}" for module in new_modules)
            rate = NEW_MODULES_LEARNING_RATE if is_new else learning_rate
            decay = 0.0 if parameter.dim() == 1 else weight_decay  # not of biases and norms, as in the Trainer
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    )


def plot(runs: pd.DataFrame, column: str) -> Figure:
    """A measured column against trainable parameters and against compute."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_parameters, by_compute = figure.subplots(1, 2, sharey=True)
    tested = runs[runs["split"] == "test"].groupby("method", sort=False)
    for index, (method, group) in enumerate(tested):
        style = {"color": f"C{index % 10}", "marker": "os^"[index % 3], "linestyle": "none", "capsize": 3}
        height = {"y": group[column].mean(), "yerr": group[column].std()}
        by_parameters.errorbar(group["trainable_parameters"].iloc[0], **height, **style, label=method)
        by_compute.errorbar(group["flops_per_step"].iloc[0] / 1e9, **height, **style)
    by_parameters.set(xlabel="trainable parameters", xscale="log", ylabel=column)
    by_compute.set(xlabel="GFLOPs per training step")
    for axes in (by_parameters, by_compute):
        axes.grid(alpha=0.3)
    figure.legend(*by_parameters.get_legend_handles_labels(), loc="outside right center")
    return figure


def only_our_progress() -> None:
    """One progress bar; that a model gets a new head, or that a study is new, is not worth a line each time."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
