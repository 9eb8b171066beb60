"""Adapt an image classifier with TOAST.

    python examples/image_classification.py
    python examples/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name folder_with_one_folder_of_images_for_each_class --output_dir outputs/mine

Without a model and data it needs no network: a small ViT that knows the handwritten digits 0 to 4 learns 5 to 9 from
ten examples of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from peft import get_peft_model
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback, store_features


@dataclass
class Arguments:
    """Which model to adapt, and to which images."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub or folder. Default: a small ViT."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub or folder. Default: handwritten digits."})
    train_file: str | None = field(default=None, metadata={"help": "Local file, for example .parquet, instead."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file for the evaluation."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images at most."})
    store_features: str | None = field(default=None, metadata={"help": "Run pass 1 once, stored in this folder."})
    pretraining_steps: int = field(default=800, metadata={"help": "Steps of pre-training of the small ViT."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/image_classification",
        learning_rate=1e-3,
        num_train_epochs=30,
        per_device_eval_batch_size=64,
        logging_steps=50,
        save_strategy="no",
        remove_unused_columns=False,  # the collator takes columns that the model does not
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def load_images(arguments: Arguments) -> DatasetDict:
    """The splits "train" and "validation" with the columns "image" and "label"."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        suffix = Path(arguments.train_file).suffix[1:]
        data = load_dataset(suffix, data_files={split: name for split, name in files.items() if name})
    elif arguments.dataset_name is not None:
        data = load_dataset(arguments.dataset_name)
    else:
        data = handwritten_digits(range(5, 10), examples_per_class=10)
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    columns = {arguments.image_column_name: "image", arguments.label_column_name: "label"}
    data = data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.class_encode_column("label")
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    return DatasetDict({split: data[split].select(range(len(data[split]))[:limit]) for split, limit in limits.items()})


def handwritten_digits(digits: Sequence[int], examples_per_class: int, orientations: int = 1) -> DatasetDict:
    """Images of some digits, 8 x 8 pixels; those that are not for training are for validation.

    With more orientations each image is also there turned and mirrored, and each orientation of a digit is a class. A
    model that tells these apart has features that also describe other digits.
    """
    images, targets = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / images.max())).astype(np.uint8)
    chosen = np.flatnonzero(np.isin(targets, digits))
    train_size = examples_per_class * len(digits)
    train, validation = train_test_split(chosen, train_size=train_size, stratify=targets[chosen], random_state=0)
    names = [f"{digit} orientation {o}" if o else str(digit) for digit in digits for o in range(orientations)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})

    def split(rows: np.ndarray) -> Dataset:
        pairs = [(row, o) for row in rows for o in range(orientations)]
        turned = [np.rot90(pixels[row], o)[:: 1 if o < 4 else -1] for row, o in pairs]
        labels = [digits.index(targets[row]) * orientations + o for row, o in pairs]
        images = [PILImage.fromarray(np.ascontiguousarray(image)) for image in turned]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    return DatasetDict(train=split(train), validation=split(validation))


def pretrain(folder: Path, steps: int) -> None:
    """Pre-train a small ViT on the digits 0 to 4 and save it without its head."""
    data = handwritten_digits(range(5), examples_per_class=150, orientations=8)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=40, **size))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    schedule = {"max_steps": steps, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    options = {"per_device_train_batch_size": 64, "weight_decay": 0.05, "remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), save_strategy="no", **schedule, **options)
    make_trainer(model, processor, data, arguments).train()
    processor.save_pretrained(folder)
    model.vit.save_pretrained(folder)


def load_model(name: str, classes: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier for the classes, its head new unless it fits, and the processor of its images."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    return model, AutoImageProcessor.from_pretrained(name, backend="pil")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class is predicted. Shapes: [images, classes] and [images]"""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    model: nn.Module, processor: BaseImageProcessor, data: DatasetDict, arguments: TrainingArguments
) -> Trainer:
    """A Trainer of an image classifier."""

    def preprocess(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"].with_transform(preprocess),
        eval_dataset=data["validation"].with_transform(preprocess),
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        processing_class=processor,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    base = arguments.model_name_or_path
    if base is None:
        base = f"{training_arguments.output_dir}/small_vit"
        pretrain(Path(base), arguments.pretraining_steps)
    data = load_images(arguments)
    model, processor = load_model(base, data["train"].features["label"].names)
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    model = get_peft_model(model, TopDownConfig(r=8, modules_to_save=head))
    model.print_trainable_parameters()
    trainer = make_trainer(model, processor, data, training_arguments)
    if arguments.store_features is not None:
        stored = store_features(model, trainer.train_dataset, arguments.store_features)
        trainer.train_dataset, trainer.data_collator = stored, stored.collate
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    trainer.save_model()  # model.save_pretrained(...) with the image processor, also in distributed training
    trainer.create_model_card()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()
