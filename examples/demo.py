"""Adapt a vision model and a language model offline, compare TOAST with other methods, and reload every result.

    python examples/demo.py
    python examples/demo.py --short

Models and data are those of image_classification.py and language_modeling.py.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import image_classification
import language_modeling
import pandas
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from toast_peft import TopDownConfig, initialize_feedback

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
HEAD = {"modules_to_save": ["classifier"]}
TEXT = {"task_type": "CAUSAL_LM"}
# The learning rates are chosen among 1e-3, 3e-3, 1e-2 and 3e-2 with another seed, those of TOAST-Lite with rank 4.
IMAGE_METHODS = {
    "linear probe": (None, 3e-2),
    "LoRA": (LoraConfig(**LORA, **HEAD), 1e-2),
    "TOAST": (TopDownConfig(**HEAD), 1e-2),
    "TOAST-Lite": (TopDownConfig(r=8, **HEAD), 1e-2),
}
TEXT_METHODS = {
    "LoRA": (LoraConfig(**LORA, **TEXT), 3e-2),
    "TOAST": (TopDownConfig(**TEXT), 3e-3),
    "TOAST-Lite": (TopDownConfig(r=8, **TEXT), 3e-3),
}
SHORT_IMAGES = ["--pretraining_steps", "150", "--num_train_epochs", "10", "--max_eval_samples", "200"]
SHORT_TEXT = ["--pretraining_steps", "100", "--max_steps", "20", "--max_eval_samples", "40"]


@dataclass
class Task:
    """One half of the demo.

    Args:
        name: what the table calls it.
        base: folder of the pre-trained model.
        load_model: loads a model from a folder.
        make_trainer: makes the Trainer of a model.
        arguments: those of the Trainer; the methods are saved in its output folder.
    """

    name: str
    base: Path
    load_model: Callable[[Path], nn.Module]
    make_trainer: Callable[[nn.Module, TrainingArguments], Trainer]
    arguments: TrainingArguments


def images(options: list[str]) -> Task:
    """A small ViT that knows the handwritten digits 0 to 4; it is to learn 5 to 9."""
    arguments, training_arguments = image_classification.parse(options)
    base = Path(training_arguments.output_dir) / "small_vit"
    set_seed(training_arguments.seed)
    image_classification.pretrain(base, arguments.pretraining_steps)
    data = image_classification.load_images(arguments)
    classes = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")

    def load_model(folder: Path) -> nn.Module:
        return image_classification.load_model(folder, classes)[0]

    def make_trainer(model: nn.Module, arguments: TrainingArguments) -> Trainer:
        return image_classification.make_trainer(model, processor, data, arguments)

    return Task("images", base, load_model, make_trainer, training_arguments)


def texts(options: list[str]) -> Task:
    """A small LLaMA that has read prose about Python; it is to learn examples with numbers."""
    arguments, training_arguments = language_modeling.parse(options)
    base = Path(training_arguments.output_dir) / "small_llama"
    set_seed(training_arguments.seed)
    language_modeling.pretrain(base, arguments.pretraining_steps, arguments.block_size)
    data = language_modeling.load_texts(arguments)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def make_trainer(model: nn.Module, training_arguments: TrainingArguments) -> Trainer:
        return language_modeling.make_trainer(model, tokenizer, data, arguments.block_size, training_arguments)

    return Task("text", base, AutoModelForCausalLM.from_pretrained, make_trainer, training_arguments)


def prepare(model: nn.Module, config: PeftConfig | None) -> nn.Module:
    """The model with an adapter, or without a config with nothing to train but its head."""
    if config is not None:
        return get_peft_model(model, config)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def measured(metrics: dict[str, float]) -> tuple[str, float]:
    """What a task is measured by: the accuracy if there is one, or the perplexity."""
    if "eval_accuracy" in metrics:
        return "accuracy", metrics["eval_accuracy"]
    return "perplexity", math.exp(metrics["eval_loss"])


def adapt(task: Task, method: str, config: PeftConfig | None, learning_rate: float) -> dict[str, Any]:
    """Train a method, save the result, and check it as it was saved.

    Returns:
        A row of the table.
    """
    print(f"\n{task.name}: {method}", flush=True)
    folder = Path(task.arguments.output_dir) / method
    arguments = replace(task.arguments, output_dir=str(folder), learning_rate=learning_rate)
    set_seed(arguments.seed)  # the same new head for every method
    trainer = task.make_trainer(prepare(task.load_model(task.base), config), arguments)
    if isinstance(config, TopDownConfig):
        initialize_feedback(trainer.model, islice(trainer.get_train_dataloader(), 8))
    metric, before = measured(trainer.evaluate())
    seconds = trainer.train().metrics["train_runtime"]
    metrics = trainer.evaluate()
    trainer.save_model()
    check_reloaded(task, folder, is_adapter=config is not None, expected=metrics["eval_loss"])
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    row = {"task": task.name, "method": method, "trainable parameters": f"{trainable:,}", "metric": metric}
    after = measured(metrics)[1]
    return row | {"before": f"{before:.3f}", "after": f"{after:.3f}", "seconds": f"{seconds:.1f}"}


def check_reloaded(task: Task, folder: Path, is_adapter: bool, expected: float) -> None:
    """Exit with an error if what was saved in a folder does not reproduce the loss."""
    model = task.load_model(task.base if is_adapter else folder)
    model = PeftModel.from_pretrained(model, folder) if is_adapter else model
    loss = task.make_trainer(model, replace(task.arguments, output_dir=str(folder))).evaluate()["eval_loss"]
    if loss != expected:
        sys.exit(f"{folder}: the loss was {expected}, but is {loss} after reloading.")


def only_progress_of_training() -> None:
    """Of the progress bars leave those of the training; that a model gets a new head is not worth a page each time."""
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> None:
    """Run the demo, with arguments as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="Everything is written below it.")
    parser.add_argument("--short", action="store_true", help="A quick run, below `short` in the output folder.")
    arguments = parser.parse_args(argv)
    only_progress_of_training()
    folder = arguments.output_dir / "short" if arguments.short else arguments.output_dir
    rows = []
    for make_task, name, methods, short in (
        (images, "images", IMAGE_METHODS, SHORT_IMAGES),
        (texts, "text", TEXT_METHODS, SHORT_TEXT),
    ):
        task = make_task([*(short if arguments.short else ()), "--output_dir", str(folder / name)])
        rows += [adapt(task, method, *how) for method, how in methods.items()]
    print(f"\n{pandas.DataFrame(rows).to_string(index=False)}")
    print("\nReloaded, every saved adapter and model gave exactly the same evaluation.")


if __name__ == "__main__":
    main()
