"""What the comparisons of classifiers share: examples with a class, their splits, the new head, and the accuracy."""

from dataclasses import dataclass, field
from typing import Any

import torch
from comparison import Comparison, ComparisonArguments, load_named_data
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import Trainer


@dataclass
class ClassifierArguments(ComparisonArguments):
    """What to compare, and where the classes are."""

    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})


class ClassifierComparison(Comparison):
    """A comparison of classifiers, of the classes `classes`."""

    columns = ["accuracy"]
    classes: list[str]

    def with_new_head(self, auto_class: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The base model with a new head for the classes, and the `modules_to_save` of a PEFT config."""
        model = auto_class.from_pretrained(
            self.base, id2label=dict(enumerate(self.classes)), ignore_mismatched_sizes=True
        )
        parts = {name: list(part.parameters()) for name, part in model.named_children()}
        head = [name for name, parameters in parts.items() if parameters and name != model.base_model_prefix]
        return model, {"modules_to_save": head}

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Accuracy and loss."""
        predicted = trainer.predict(self.rows[split])
        correct = predicted.predictions.argmax(-1) == predicted.label_ids
        return {"accuracy": float(correct.mean()), "loss": predicted.metrics["test_loss"]}

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """Accuracy; of equal ones the lowest loss is the best."""
        return metrics["accuracy"], -metrics["loss"]


def load_examples(arguments: ClassifierArguments, column: str, name: str) -> DatasetDict | None:
    """The data that the arguments name, with the splits "train" and "test"; `None` if they name none.

    Args:
        arguments: those of the script.
        column: which one is classified.
        name: what that is called in the splits, next to the column "label".
    """
    data = load_named_data(arguments, {column: name, arguments.label_column_name: "label"})
    if data is None or isinstance(data["train"].features["label"], ClassLabel):
        return data
    return data.class_encode_column("label")


def limited(examples: Dataset, limit: int | None, seed: int) -> Dataset:
    """So many of them at most, with the same mixture of classes."""
    if limit is None or limit >= len(examples):
        return examples
    return examples.train_test_split(train_size=limit, stratify_by_column="label", seed=seed)["train"]


def split(data: DatasetDict, arguments: ClassifierArguments) -> dict[str, Dataset]:
    """The splits "search", "validation" and "test", each with the same mixture of classes."""
    parts = limited(data["train"], arguments.max_train_samples, arguments.seed).train_test_split(
        arguments.validation_share, stratify_by_column="label", seed=arguments.seed
    )
    test = limited(data["test"], arguments.max_test_samples, arguments.seed)
    return {"search": parts["train"], "validation": parts["test"], "test": test}
