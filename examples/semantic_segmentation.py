"""Adapt a ViT to semantic segmentation with TOAST, and compare it with other methods in one table.

    python examples/semantic_segmentation.py
    python examples/semantic_segmentation.py --method toast toast_early --learning_rates 1e-3 3e-3 \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name mine --output_dir outputs/mine

The model is a ViT, around which a new DPT decoder is built, or any checkpoint that AutoModelForSemanticSegmentation
takes (DPT, BEiT, Data2Vec Vision, UperNet around BEiT or DINOv2). The decoder is trained with every method.

The data has an image and a mask in each row; a pixel of the mask is the number of its class. `mine` is a folder that
`load_dataset` takes (train.parquet, validation.parquet, test.parquet), or one with the folders train/images,
train/masks, validation/images and so on, where an image and its mask have the same name.

Each method is trained once with every learning rate. The best by mean IoU on the validation split is loaded again from
what was saved, and measured on the test split if there is one. Without a model and data set no network is needed: a
small ViT that knows the digits 0 to 4 learns to segment images of the digits 5 to 9.
"""

import json
import math
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from adaptation import (
    ModelArguments,
    adapt,
    print_table,
    train_and_evaluate,
)
from datasets import Dataset, DatasetDict
from image_classification import pretrain
from PIL import Image, ImageColor
from segmentation_data import UNLABELLED, MaskArguments, find_classes, labels_of, load_masks, preprocess
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    DPTConfig,
    DPTForSemanticSegmentation,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    default_data_collator,
    set_seed,
)

METHODS = ("decoder_only", "lora", "toast", "toast_early", "toast_late", "toast_lite", "full")


@dataclass
class SegmentationModelArguments(ModelArguments):
    """Which model to adapt, and how."""

    method: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "What is trained; one row of the table for each.", "choices": METHODS},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Train each method with each of them. Default: once, with --learning_rate."}
    )


Arguments: TypeAlias = tuple[SegmentationModelArguments, MaskArguments, TrainingArguments]


def parse(arguments: list[str] | None = None) -> Arguments:
    """The arguments of the script, from the command line if not given."""
    parser = HfArgumentParser((SegmentationModelArguments, MaskArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        output_dir="outputs/segmentation",
        do_train=True,
        do_eval=True,
        learning_rate=3e-3,
        num_train_epochs=10,
        batch_eval_metrics=True,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        # The forward of a PEFT model without a task type takes any arguments, so the Trainer cannot find these out.
        remove_unused_columns=False,
        label_names=["labels"],
    )
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(arguments)
    if len(model_arguments.method) > 1 and not training_arguments.do_train:
        parser.error("--do_train False evaluates one saved result; name its --method.")
    return model_arguments, data_arguments, training_arguments


# ------------------------------------------------------------------------------------------------------------ model


def load_model(name: str, classes: list[str]) -> PreTrainedModel:
    """A segmentation model for the classes, its decoder new as far as the checkpoint has none that fits."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, ViTConfig):
        return dpt_around(name, config, labels)
    return AutoModelForSemanticSegmentation.from_pretrained(name, ignore_mismatched_sizes=True, **labels)


def dpt_around(name: str, vit: ViTConfig, labels: dict[str, dict]) -> DPTForSemanticSegmentation:
    """A DPT whose own ViT has the weights of a plain ViT checkpoint, and a decoder in the proportions of DPT-Large.

    Raises:
        ValueError: if the checkpoint lacks weights of the ViT.
    """
    same = {field: value for field, value in vit.to_dict().items() if field in _OF_VIT_AND_DPT}
    d, depth = vit.hidden_size, vit.num_hidden_layers
    config = DPTConfig(
        **same,
        **labels,
        backbone_out_indices=[depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
        neck_hidden_sizes=[d // 4, d // 2, d, d],
        fusion_hidden_size=d // 4,
        # With the usual 0.02 the features of a narrow decoder would all but vanish on their way to its batch norm.
        initializer_range=0.02 * (1024 / d) ** 0.5,
    )
    renamed, loading = DPTForSemanticSegmentation.from_pretrained(
        name, config=config, key_mapping={r"^vit\.": "dpt."}, output_loading_info=True
    )
    missing = [key for key in loading["missing_keys"] if key.startswith("dpt.")]
    if missing:
        raise ValueError(f"{name} has no weights for {missing[0]} and {len(missing) - 1} other parameters of the ViT.")
    model = DPTForSemanticSegmentation(config)  # `renamed` would give its parameters the old names when it is saved
    model.load_state_dict(renamed.state_dict())
    return model


_OF_VIT_AND_DPT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)


def decoder_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules behind the backbone, for `modules_to_save`."""
    names = []
    for name, module in model.named_children():
        if name in (model.base_model_prefix, "backbone") or not any(True for _ in module.parameters()):
            continue
        # PEFT takes all modules whose name ends so: "head" would also be "head.head" of DPT, a copy inside of a copy.
        inner = [f"{name}.{part}" for part, _ in module.named_children()]
        names += inner if len(inner) == 1 else [name]
    return names


def load_processor(name: str, image_size: int | None) -> BaseImageProcessor:
    """The processor of a checkpoint.

    Raises:
        ValueError: if it does more to an image than to resize it, which the masks would have to follow.
    """
    options = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    processor = AutoImageProcessor.from_pretrained(name, backend="pil", **options)
    for name_of_step in ("do_center_crop", "do_pad"):
        if getattr(processor, name_of_step, False):
            raise ValueError(f"The image processor of {name} has {name_of_step}=True; expected one that only resizes.")
    return processor


# ------------------------------------------------------------------------------------------------------- evaluation


class MeanIoU:
    """Mean over the classes of intersection / union, each summed over all pixels of all images.

    Args:
        classes: names of the classes. Those that are neither in the masks nor predicted do not count.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.confusion = 0

    def __call__(self, batch: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add a batch; after the last one return the metrics and start again. Shape of both parts: [b, h, w]"""
        labels, predictions = batch.label_ids.numpy(force=True), batch.predictions.numpy(force=True)
        known = labels != UNLABELLED
        self.confusion += confusion_matrix(labels[known], predictions[known], labels=range(len(self.classes)))
        if not compute_result:
            return {}
        confusion, self.confusion = self.confusion, 0
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        iou = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
        of_classes = {f"iou_{name}": float(iou[i]) for i, name in enumerate(self.classes) if union[i] > 0}
        accuracy = float(hits.sum() / confusion.sum())
        return {"mean_iou": float(np.nanmean(iou)), "pixel_accuracy": accuracy, **of_classes}


def predicted_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class of each pixel of the labels. Shapes: [b, c, h', w'], [b, h, w] -> [b, h, w]"""
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


def overlay(image: Image.Image, classes: np.ndarray, num_classes: int) -> Image.Image:
    """The image with each pixel tinted in the colour of its class; unlabelled ones turn dark."""
    colours = [ImageColor.getrgb(f"hsv({360 * index // num_classes}, 100%, 100%)") for index in range(num_classes)]
    palette = np.zeros((UNLABELLED + 1, 3), dtype=np.uint8)
    palette[:num_classes] = colours
    return Image.blend(image.convert("RGB"), Image.fromarray(palette[classes]), 0.5)


@torch.no_grad()
def save_overlays(
    model: nn.Module, processor: BaseImageProcessor, data: Dataset, arguments: MaskArguments, folder: Path
) -> None:
    """Save the first images of the data, on the left with the mask and on the right with the prediction laid over."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    num_classes = model.config.num_labels
    for index, row in enumerate(data.select(range(min(arguments.num_overlays, len(data))))):
        labels = labels_of(row["mask"], arguments.unlabelled)
        inputs = processor(row["image"].convert("RGB"), return_tensors="pt").to(device)
        [predicted] = predicted_classes(model(**inputs).logits, torch.from_numpy(labels)[None]).numpy(force=True)
        width, height = row["image"].size
        picture = Image.new("RGB", (2 * width, height))
        picture.paste(overlay(row["image"], labels, num_classes), (0, 0))
        picture.paste(overlay(row["image"], predicted, num_classes), (width, 0))
        picture.save(folder / f"{index}.png")


# ------------------------------------------------------------------------------------------------------- comparison


class Comparison:
    """One model and data set, on which methods are trained and measured.

    Args:
        base: the checkpoint to adapt.
        data: with the splits "train", "validation" and perhaps "test".
        arguments: those of the script.
    """

    def __init__(
        self,
        base: str,
        data: DatasetDict,
        arguments: tuple[SegmentationModelArguments, MaskArguments, TrainingArguments],
    ) -> None:
        self.base = base
        self.data = data
        self.model_arguments, self.data_arguments, self.training_arguments = arguments
        self.classes = find_classes(data, self.data_arguments)
        self.processor = load_processor(base, self.data_arguments.image_size)

    def measure(self, method: str) -> dict[str, Any]:
        """Train a method with each learning rate, and measure the best result once more as it was saved.

        Raises:
            RuntimeError: if what was saved is not what was trained.
        """
        if not self.training_arguments.do_train:
            adapter = self.model_arguments.adapter_name_or_path
            return {"method": method, "saved_in": adapter or self.base} | self.evaluate(adapter or self.base)
        rates = self.model_arguments.learning_rates or [self.training_arguments.learning_rate]
        tries = [self.train(method, rate) for rate in rates]
        best = max(tries, key=lambda metrics: metrics["eval_mean_iou"])
        tried = {str(metrics["learning_rate"]): metrics["eval_mean_iou"] for metrics in tries}
        reloaded = self.evaluate(best["saved_in"])
        before, after = best["eval_loss"], reloaded["eval_loss"]
        if not math.isclose(before, after, rel_tol=1e-3):
            raise RuntimeError(f"{best['saved_in']}: the loss was {before}, but is {after} after reloading.")
        return best | {"eval_mean_iou_of_learning_rates": tried} | reloaded

    def train(self, method: str, learning_rate: float) -> dict[str, Any]:
        """Train a method, save the result, and measure it on the validation split."""
        arguments = copy(self.training_arguments)
        arguments.output_dir = str(Path(arguments.output_dir) / method / f"{learning_rate:g}")
        arguments.learning_rate = learning_rate
        set_seed(arguments.seed)  # the same new decoder for every method
        model = load_model(self.base, self.classes)
        options = {"trainable": True, "modules_to_save": decoder_modules(model)}
        model = adapt(model, replace(self.model_arguments, method=method), **options)
        metrics = train_and_evaluate(self.trainer(model, arguments))
        return {"method": method, "learning_rate": learning_rate, "saved_in": arguments.output_dir, **metrics}

    def evaluate(self, saved: str) -> dict[str, Any]:
        """Load a saved adapter or model, measure it on all splits but the training one, and save overlays."""
        is_adapter = (Path(saved) / "adapter_config.json").exists()
        model = load_model(self.base if is_adapter else saved, self.classes)
        if is_adapter:
            arguments = replace(self.model_arguments, adapter_name_or_path=saved)
            model = adapt(model, arguments, trainable=False)
        trainer = self.trainer(model, self.training_arguments)
        metrics = trainer.evaluate()
        last = "test" if "test" in self.data else "validation"
        if last == "test":
            metrics |= trainer.evaluate(self.inputs("test"), metric_key_prefix="test")
        folder = Path(saved) / "overlays"
        save_overlays(trainer.model.eval(), self.processor, self.data[last], self.data_arguments, folder)
        return metrics

    def trainer(self, model: nn.Module, arguments: TrainingArguments) -> Trainer:
        """A Trainer of a segmentation model."""
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=self.inputs("train"),
            eval_dataset=self.inputs("validation"),
            data_collator=default_data_collator,
            compute_metrics=MeanIoU(self.classes),
            preprocess_logits_for_metrics=predicted_classes,
            processing_class=self.processor,
        )

    def inputs(self, split: str) -> Dataset:
        """A split as the model takes it."""
        return preprocess(self.data[split], self.processor, self.data_arguments.unlabelled)


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What was measured, one row for each method."""
    heads = ("method", "learning rate", "trainable parameters", "validation mIoU", "test mIoU", "seconds")
    keys = ("method", "learning_rate", "trainable_parameters", "eval_mean_iou", "test_mean_iou", "train_runtime")
    formats = ("", "g", ",", ".4f", ".4f", ".1f")
    cells = [
        tuple(format(row[key], how) if key in row else "-" for key, how in zip(keys, formats, strict=True))
        for row in rows
    ]
    return [heads, *cells]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        For each method the metrics of its best learning rate: `eval_mean_iou`, `test_mean_iou`, and others.
    """
    model_arguments, data_arguments, training_arguments = parsed = parse(arguments)
    set_seed(training_arguments.seed)
    output = Path(training_arguments.output_dir)
    base = model_arguments.model_name_or_path
    if base is None:
        base = output / "small_vit"
        if not (base / "model.safetensors").exists():
            pretrain(base, model_arguments.pretraining_steps)
    comparison = Comparison(str(base), load_masks(data_arguments), parsed)
    rows = []
    for method in model_arguments.method:
        rows.append(comparison.measure(method))
        if training_arguments.do_train:
            (output / "comparison.json").write_text(json.dumps(rows, indent=1))
    print_table(table(rows))
    return rows


if __name__ == "__main__":
    main()
