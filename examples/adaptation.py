"""What the example scripts share: the methods to compare, the arguments, and a run from data to saved adapter."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from toast_peft import TopDownConfig

METHODS = ("linear_probe", "lora", "toast", "toast_lite", "full")
# What transformers calls the projections, in most models and in the older vision models.
_QUERY_AND_VALUE = ["q_proj", "v_proj", "query", "value"]


@dataclass
class BaseModelArguments:
    """Which model to adapt."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model on the Hub or a local folder. Default: a small model, pre-trained on offline data at "
            "first use and kept beside the output folder."
        },
    )
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of this default model."})


@dataclass
class ModelArguments(BaseModelArguments):
    """Which model to adapt, and how."""

    method: str = field(default="toast", metadata={"help": "What is trained.", "choices": METHODS})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved adapter to start from, instead of a new one of the method."}
    )


@dataclass
class DataArguments:
    """Which data to adapt to."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub, or a local folder as `load_dataset` takes it. Default: offline data."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local .parquet, .json, .jsonl, .csv or .txt, or one of these with .gz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "As train_file, for the evaluation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many rows at most."})


def named_data(arguments: DataArguments) -> DatasetDict | None:
    """The data the arguments name, with the splits "train" and "validation"; `None` if they name none."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        suffix = Path(arguments.train_file.removesuffix(".gz")).suffix[1:]
        builder = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
        data = load_dataset(builder, data_files={split: name for split, name in files.items() if name})
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    else:
        return None
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    return data


def shortened(data: DatasetDict, arguments: DataArguments) -> DatasetDict:
    """The data with at most as many rows in each split as the arguments allow."""
    limits = {split: arguments.max_train_samples if split == "train" else arguments.max_eval_samples for split in data}
    return DatasetDict(
        {
            split: data[split] if limit is None else data[split].select(range(min(limit, len(data[split]))))
            for split, limit in limits.items()
        }
    )


def adapt(model: PreTrainedModel, arguments: ModelArguments, trainable: bool, **peft_options: Any) -> nn.Module:
    """Prepare a model for training with a method, or load a saved adapter onto it.

    Args:
        model: the base model.
        arguments: the method or the saved adapter.
        trainable: whether a loaded adapter is trained further.
        peft_options: `task_type` and `modules_to_save` of the PEFT config; the latter is what a method without an
            adapter trains if it does not train everything.

    Returns:
        A PEFT model, or for the methods without an adapter the model itself.
    """
    if arguments.adapter_name_or_path is not None:
        return PeftModel.from_pretrained(model, arguments.adapter_name_or_path, is_trainable=trainable)
    if arguments.method in ("linear_probe", "decoder_only"):
        model.requires_grad_(False)
        for name in peft_options["modules_to_save"]:
            model.get_submodule(name).requires_grad_(True)
    if arguments.method in ("linear_probe", "decoder_only", "full"):
        return model
    config = {
        "lora": LoraConfig(r=8, lora_alpha=16, target_modules=_QUERY_AND_VALUE, **peft_options),
        "toast": TopDownConfig(**peft_options),
        "toast_early": TopDownConfig(feedback_from=0.5, **peft_options),
        "toast_late": TopDownConfig(feedback_to=0.5, **peft_options),
        "toast_lite": TopDownConfig(r=4, **peft_options),
    }
    return get_peft_model(model, config[arguments.method])


def number_of_trainable_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train_and_evaluate(trainer: Trainer) -> dict[str, float]:
    """Train, save the model or adapter, and evaluate before and after, as far as the training arguments ask for it."""
    metrics = {"trainable_parameters": number_of_trainable_parameters(trainer.model)}
    if trainer.args.do_train:
        metrics |= trainer.evaluate(metric_key_prefix="before")
        metrics |= trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
        trainer.save_model()
    if trainer.args.do_eval:
        metrics |= trainer.evaluate()
    if trainer.args.do_train:
        trainer.create_model_card()
    return metrics


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
