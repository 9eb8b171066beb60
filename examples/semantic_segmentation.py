"""Adapt a model for semantic segmentation with TOAST.

    python examples/semantic_segmentation.py
    python examples/semantic_segmentation.py --model_name_or_path nvidia/mit-b0 --dataset_name mine --image_size 512

The model is any of AutoModelForSemanticSegmentation that TOAST supports, such as SegFormer, DPT, BEiT and UperNet with
BEiT or DINOv2. Its decoder is trained with the feedback. A pixel of a mask is the number of its class.

Without a model and data it needs no network: a small SegFormer that has learned to segment scenes of the handwritten
digits 0 to 4 learns those of 5 to 9.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.metrics import jaccard_score
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from toast_peft import FeedbackCallback, TopDownConfig, initialize_feedback

UNLABELLED = 255  # the class that the losses of segmentation models leave out


@dataclass
class Arguments:
    """Which model to adapt, and to which images."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a small one, pre-trained first."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set. Default: handwritten digits."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    mask_column_name: str = field(default="mask", metadata={"help": "Column with the masks."})
    unlabelled: int = field(default=UNLABELLED, metadata={"help": "Pixels of the masks that do not count."})
    image_size: int | None = field(default=None, metadata={"help": "Resize the images. Default: that of the model."})
    pretraining_steps: int = field(default=400, metadata={"help": "Steps of pre-training of the small SegFormer."})


def parse(argv: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """The arguments of the script. `--help` shows our own; those of the Trainer are over a hundred."""
    more = "All options of transformers.TrainingArguments work too, such as --learning_rate and --num_train_epochs."
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    arguments, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    trainer_parser = HfArgumentParser(TrainingArguments)
    trainer_parser.set_defaults(
        output_dir="outputs/semantic_segmentation",
        learning_rate=1e-3,
        num_train_epochs=10,
        logging_steps=50,
        save_strategy="no",
        remove_unused_columns=False,  # the collator takes columns that the model does not
    )
    return arguments, *trainer_parser.parse_args_into_dataclasses(others)


def load_masks(arguments: Arguments) -> DatasetDict:
    """The splits "train" and "validation" with the columns "image" and "mask"."""
    if arguments.dataset_name is None:
        return digit_scenes(range(5, 10), scenes=80)
    data = load_dataset(arguments.dataset_name)
    if "validation" not in data:
        held_out = data if "test" in data else data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=held_out["train"], validation=held_out["test"])
    columns = {arguments.image_column_name: "image", arguments.mask_column_name: "mask"}
    return data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})


def digit_scenes(digits: Sequence[int], scenes: int) -> DatasetDict:
    """Images of 2 x 2 handwritten digits, 16 x 16 pixels; the strokes of the first digit are class 1 of the masks.

    The splits "train" and "validation" have so many scenes each, made of different handwriting.
    """
    images, targets = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / images.max())).astype(np.uint8)
    masks = (pixels > 127) * (np.searchsorted(digits, targets) + 1).astype(np.uint8)[:, None, None]
    generator = np.random.default_rng(0)
    halves = np.array_split(generator.permutation(np.flatnonzero(np.isin(targets, digits))), 2)

    def split(rows: np.ndarray) -> Dataset:
        chosen = generator.choice(rows, (scenes, 2, 2))
        tiled = [parts[chosen].swapaxes(2, 3).reshape(-1, 16, 16) for parts in (pixels, masks)]
        image, mask = ([PILImage.fromarray(scene) for scene in parts] for parts in tiled)
        return Dataset.from_dict({"image": image, "mask": mask})

    return DatasetDict(train=split(halves[0]), validation=split(halves[1]))


def pretrain(folder: str, steps: int) -> None:
    """Pre-train a small SegFormer on scenes of the digits 0 to 4, and save it."""
    size = {"hidden_sizes": [32, 48, 64], "num_encoder_blocks": 3, "depths": [2, 2, 2], "decoder_hidden_size": 64}
    patches = {"patch_sizes": [3, 3, 3], "strides": [2, 2, 2], "sr_ratios": [2, 1, 1], "mlp_ratios": [2, 2, 2]}
    heads = {"num_attention_heads": [1, 2, 4], "num_labels": 6}
    model = SegformerForSemanticSegmentation(SegformerConfig(**size, **patches, **heads))
    processor = SegformerImageProcessorPil(size={"height": 16, "width": 16})
    schedule = {"max_steps": steps, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    options = {"save_strategy": "no", "per_device_train_batch_size": 32, "remove_unused_columns": False}
    arguments = TrainingArguments(folder, **schedule, **options)
    make_trainer(model, processor, digit_scenes(range(5), scenes=1000), UNLABELLED, arguments).train()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def decoder_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules behind the backbone, for `modules_to_save`."""
    names = []
    for name, module in model.named_children():
        if name in (model.base_model_prefix, "backbone") or not any(True for _ in module.parameters()):
            continue
        # PEFT takes all modules whose name ends so: "head" would also be "head.head" of DPT, a copy inside of a copy.
        parts = [f"{name}.{part}" for part, _ in module.named_children()]
        names += parts if len(parts) == 1 else [name]
    return names


def predicted_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class of each pixel of the labels. Shapes: [b, c, h', w'], [b, h, w] -> [b, h, w]"""
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over the classes of intersection / union, over all pixels of all images. Shapes: [images, h, w]"""
    known = prediction.label_ids != UNLABELLED
    return {"mean_iou": jaccard_score(prediction.label_ids[known], prediction.predictions[known], average="macro")}


def make_trainer(
    model: torch.nn.Module,
    processor: BaseImageProcessor,
    data: DatasetDict,
    unlabelled: int,
    arguments: TrainingArguments,
) -> Trainer:
    """A Trainer of a segmentation model."""

    def preprocess(rows: dict[str, list]) -> dict[str, torch.Tensor]:
        images = [image.convert("RGB") for image in rows["image"]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        # Not by the processor: those of DPT and BEiT interpolate between the numbers of the classes.
        size = pixel_values.shape[:1:-1]
        masks = np.stack([mask.resize(size, PILImage.Resampling.NEAREST) for mask in rows["mask"]]).astype(np.int64)
        masks[masks == unlabelled] = UNLABELLED
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(masks)}

    train, validation = (data[split].with_transform(preprocess) for split in ("train", "validation"))
    evaluation = {"compute_metrics": mean_iou, "preprocess_logits_for_metrics": predicted_classes}
    return Trainer(model, arguments, default_data_collator, train, validation, processor, **evaluation)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script, with arguments as on the command line; returns the metrics before and after."""
    arguments, training_arguments = parse(argv)
    set_seed(training_arguments.seed)
    base = arguments.model_name_or_path
    if base is None:
        base = f"{training_arguments.output_dir}/small_segformer"
        pretrain(base, arguments.pretraining_steps)
    data = load_masks(arguments)
    classes = {int(value) for mask in data["train"]["mask"] for value in np.unique(mask)} - {arguments.unlabelled}
    labels = {"num_labels": max(classes) + 1, "ignore_mismatched_sizes": True}
    model = AutoModelForSemanticSegmentation.from_pretrained(base, **labels)
    size = {"size": {"height": arguments.image_size, "width": arguments.image_size}} if arguments.image_size else {}
    only_resized = {"do_center_crop": False, "do_pad": False}  # which is what the masks follow
    processor = AutoImageProcessor.from_pretrained(base, backend="pil", **only_resized, **size)
    model = get_peft_model(model, TopDownConfig(r=8, modules_to_save=decoder_modules(model)))
    model.print_trainable_parameters()
    trainer = make_trainer(model, processor, data, arguments.unlabelled, training_arguments)
    trainer.add_callback(FeedbackCallback(trainer))
    initialize_feedback(model, islice(trainer.get_train_dataloader(), 8))
    metrics = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    metrics |= trainer.evaluate()
    trainer.save_model()  # model.save_pretrained(...) with the image processor, also in distributed training
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


if __name__ == "__main__":
    main()
