"""Adapt an image classifier with TOAST, or for comparison with LoRA, a linear probe or full fine-tuning.

    python examples/image_classification.py --method toast
    python examples/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name folder_with_one_folder_of_images_for_each_class --output_dir outputs/mine

Without a model and data set it needs no network: a small ViT that knows the digits 0 to 4 learns 5 to 9 from ten
examples of each.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adaptation import (
    BaseModelArguments,
    DataArguments,
    ModelArguments,
    adapt,
    named_data,
    shortened,
    train_and_evaluate,
)
from datasets import ClassLabel, Dataset, DatasetDict
from offline_data import handwritten_digits
from sklearn.metrics import accuracy_score
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
    set_seed,
)

# For the small ViT on the digits: for each method the best of 1e-3, 3e-3, 1e-2 and 3e-2 with another seed.
LEARNING_RATES = {"linear_probe": 3e-2, "lora": 1e-2, "toast": 1e-2, "toast_lite": 1e-2, "full": 1e-3}


@dataclass
class ImageArguments(DataArguments):
    """Which images to adapt to."""

    image_column_name: str = field(default="image", metadata={"help": "Column of the data set with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the data set with the classes."})


def parse(arguments: list[str] | None = None) -> tuple[ModelArguments, ImageArguments, TrainingArguments]:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((ModelArguments, ImageArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="outputs/images/toast",
        do_train=True,
        do_eval=True,
        learning_rate=None,
        num_train_epochs=30,
        per_device_eval_batch_size=64,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        # The forward of a PEFT model without a task type takes any arguments, so the Trainer cannot find these out.
        remove_unused_columns=False,
        label_names=["labels"],
    )
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(arguments)
    if training_arguments.learning_rate is None:
        training_arguments.learning_rate = LEARNING_RATES[model_arguments.method]
    return model_arguments, data_arguments, training_arguments


def load_images(arguments: ImageArguments) -> DatasetDict:
    """The data to adapt to, with the columns "image" and "label"."""
    data = named_data(arguments)
    if data is None:
        return shortened(handwritten_digits(range(5, 10), examples_per_class=10), arguments)
    columns = {arguments.image_column_name: "image", arguments.label_column_name: "label"}
    data = data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if not isinstance(data["train"].features["label"], ClassLabel):
        data = data.class_encode_column("label")
    return shortened(data, arguments)


def make_processor(base: str, image_size: int | None) -> BaseImageProcessor:
    """The base model's image processor, for another image size if one is given."""
    size = {} if image_size is None else {"height": image_size, "width": image_size}
    sizes = {name: size for name in ("size", "crop_size") if size}
    return AutoImageProcessor.from_pretrained(base, backend="pil", **sizes)


def position_arguments(image_size: int | None) -> dict[str, bool]:
    """What the forward needs to resize the position embeddings to images of another size, if one is given."""
    return {} if image_size is None else {"interpolate_pos_encoding": True}


def preprocess(data: Dataset, processor: BaseImageProcessor) -> Dataset:
    """The data with images turned into pixel values when they are read."""

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows["image"]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": rows["label"]}

    return data.with_transform(transform)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of the rows."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class is predicted."""
    return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))}


def make_trainer(
    model: torch.nn.Module, processor: BaseImageProcessor, data: DatasetDict, arguments: TrainingArguments
) -> Trainer:
    """A Trainer of an image classifier."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=preprocess(data["train"], processor),
        eval_dataset=preprocess(data["validation"], processor),
        data_collator=collate,
        compute_metrics=accuracy,
        processing_class=processor,
    )


def pretrain(folder: Path, steps: int) -> None:
    """Pre-train a small ViT on the digits 0 to 4 and save it without its head."""
    data = handwritten_digits(range(5), examples_per_class=150, orientations=8)
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=len(data["train"].features["label"].names),
    )
    model = ViTForImageClassification(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
    )
    make_trainer(model, processor, data, arguments).train()
    processor.save_pretrained(folder)
    model.vit.save_pretrained(folder)


def base_model_name(arguments: BaseModelArguments, output_dir: str) -> str:
    """The name of the model to adapt; if none is given the small ViT, which is pre-trained at first use."""
    if arguments.model_name_or_path is not None:
        return arguments.model_name_or_path
    folder = Path(output_dir).parent / "small_vit"
    if not (folder / "model.safetensors").exists():
        pretrain(folder, arguments.pretraining_steps)
    return str(folder)


def load_model(name: str, data: DatasetDict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier for the classes of the data, its head new unless it fits, and the processor of its images."""
    classes = data["train"].features["label"].names
    model = AutoModelForImageClassification.from_pretrained(
        name,
        id2label=dict(enumerate(classes)),
        label2id={label: index for index, label in enumerate(classes)},
        ignore_mismatched_sizes=True,
    )
    return model, AutoImageProcessor.from_pretrained(name, backend="pil")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        The metrics: `before_accuracy`, `eval_accuracy`, `trainable_parameters` and those of the Trainer.
    """
    model_arguments, data_arguments, training_arguments = parse(arguments)
    set_seed(training_arguments.seed)
    base = base_model_name(model_arguments, training_arguments.output_dir)
    data = load_images(data_arguments)
    set_seed(training_arguments.seed)  # the same new head whether or not the base model was pre-trained just now
    model, processor = load_model(base, data)
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    model = adapt(model, model_arguments, trainable=training_arguments.do_train, modules_to_save=head)
    return train_and_evaluate(make_trainer(model, processor, data, training_arguments))


if __name__ == "__main__":
    print(main())
