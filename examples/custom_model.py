"""Adapt a model of your own, a plain nn.Module, with TOAST.

    python examples/custom_model.py
    python examples/custom_model.py --num_train_epochs 100 --learning_rate 3e-3 --output_dir outputs/mine

A small transformer that knows the handwritten digits 0 to 4 learns 5 to 9 from ten examples of each. Put your own
modules in its place: what TOAST needs is a list of blocks, and the name of the linear layer in each block that
computes the values of its attention.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback


class Block(nn.Module):
    """A transformer block. Shape of its input and output: [b, n, d]"""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.queries, self.keys, self.values, self.output = (nn.Linear(size, size) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, n, d / heads]
            for layer in (self.queries, self.keys, self.values)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.output(attended)
        return x + self.mlp(self.mlp_norm(x))


class Classifier(nn.Module):
    """A transformer that classifies images by their patches.

    Args:
        num_labels: number of classes.
        size: hidden size.
        num_blocks: number of blocks.
    """

    def __init__(self, num_labels: int, size: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, size)
        self.positions = nn.Parameter(0.02 * torch.randn(16, size))
        self.blocks = nn.Sequential(*(Block(size, heads=4) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(size)
        self.classifier = nn.Linear(size, num_labels)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs from which TOAST finds where a new prompt starts."""
        return {"patches": torch.randn(2, 16, 4)}

    def forward(self, patches: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The logits, and with labels the loss. Shapes: [b, 16, 4] and [b] -> [b, num_labels]"""
        x = self.blocks(self.embed(patches) + self.positions)
        logits = self.classifier(self.norm(x).mean(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass
class Arguments:
    """How much the model knows before."""

    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training on the digits 0 to 4."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/custom_model",
        learning_rate=1e-3,
        num_train_epochs=60,
        per_device_eval_batch_size=64,
        logging_steps=100,
        save_strategy="no",
        remove_unused_columns=False,  # the collator takes columns that the model does not
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def handwritten_digits(digits: range, examples_per_class: int, orientations: int = 1) -> DatasetDict:
    """Images of some digits as 16 patches of 2 x 2 pixels; those that are not for training are for validation.

    With more orientations each image is also there turned, and each orientation of a digit is a class.
    """
    images, targets = load_digits(return_X_y=True)
    chosen = np.isin(targets, digits)
    splits = train_test_split(
        images[chosen].reshape(-1, 8, 8) / 8 - 1,
        targets[chosen] - digits[0],
        train_size=examples_per_class * len(digits),
        stratify=targets[chosen],
        random_state=0,
    )

    def rows(images: np.ndarray, labels: np.ndarray) -> Dataset:
        images = np.concatenate([np.rot90(images, o, axes=(1, 2)) for o in range(orientations)])
        labels = np.concatenate([labels * orientations + o for o in range(orientations)])
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4).astype(np.float32)
        return Dataset.from_dict({"patches": patches, "labels": labels}).with_format("torch")

    return DatasetDict(train=rows(splits[0], splits[2]), validation=rows(splits[1], splits[3]))


def pretrain(file: Path, steps: int) -> None:
    """Train the model on the digits 0 to 4 and save it."""
    model = Classifier(num_labels=20)
    schedule = {"max_steps": steps, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    arguments = TrainingArguments(
        str(file.parent), save_strategy="no", per_device_train_batch_size=64, weight_decay=0.05, **schedule
    )
    data = handwritten_digits(range(5), examples_per_class=150, orientations=4)
    Trainer(model, arguments, default_data_collator, data["train"]).train()
    save_model(model, file)


def pretrained_model(file: Path) -> Classifier:
    """The pre-trained model with a new head for five classes."""
    model = Classifier(num_labels=20)
    load_model(model, file)
    model.classifier = nn.Linear(model.classifier.in_features, 5)
    return model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class is predicted. Shapes: [images, classes] and [images]"""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    output = Path(training_arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    pretrain(output / "pretrained.safetensors", arguments.pretraining_steps)
    config = TopDownConfig(target_modules=r"blocks\.\d+\.values", r=8, modules_to_save=["classifier"])
    model = get_peft_model(pretrained_model(output / "pretrained.safetensors"), config)
    model.print_trainable_parameters()
    data = handwritten_digits(range(5, 10), examples_per_class=10)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    trainer.save_model()  # model.save_pretrained(...), also in distributed training
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    # This is how to load it.
    PeftModel.from_pretrained(pretrained_model(output / "pretrained.safetensors"), output)
    return metrics


if __name__ == "__main__":
    main()
