r"""Compare fine-tuning methods on semantic segmentation: one command, one table.

    python examples/benchmarks/compare_segmentation.py
    python examples/benchmarks/compare_segmentation.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_file train.parquet --test_file test.parquet --unlabelled 255 --image_size 256 --output_dir mine

A row of the data has an image and a mask, each of whose pixels is the number of a class. The model is a ViT, around
which a new DPT decoder is built, or any other checkpoint that AutoModelForSemanticSegmentation takes. The decoder is
trained with every method; `linear` trains nothing else. How methods are compared is told in `comparison.py`.

Without a model and data it needs no network: a small ViT that knows the digits 0 to 4 learns to segment images of 5
to 9.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from comparison import Comparison, ComparisonArguments, Rows, load_named_data, only_our_progress, parse
from datasets import Dataset
from offline import digit_scenes, small_vit
from pandas import DataFrame
from PIL.Image import Resampling
from torch.nn.functional import interpolate
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    DPTConfig,
    DPTForSemanticSegmentation,
    PreTrainedModel,
    Trainer,
    ViTConfig,
    default_data_collator,
)

UNLABELLED = 255  # the class that losses of segmentation models leave out
# What both configs have, and what decides about the weights of a ViT and what they compute.
OF_VIT_AND_DPT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
OF_VIT_AND_DPT += ("layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias")


@dataclass
class SegmentationArguments(ComparisonArguments):
    """What to compare, and on which images and masks."""

    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the model's input. Default: that of the checkpoint."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the data set with the images."})
    mask_column_name: str = field(default="mask", metadata={"help": "Column of the data set with the masks."})
    unlabelled: int = field(
        default=UNLABELLED, metadata={"help": "Value of pixels in the masks that are neither trained on nor counted."}
    )


class SegmentationComparison(Comparison):
    """A comparison of segmentation models."""

    kind = "vision"
    columns = ["mean IoU", "pixel accuracy"]
    arguments: SegmentationArguments

    def prepare(self) -> tuple[str, dict[str, Rows]]:
        """A ViT, and all images and masks decoded and preprocessed once."""
        arguments = self.arguments
        base = arguments.model_name_or_path or small_vit(self.folder / "small_vit", arguments.pretraining_steps)
        columns = {arguments.image_column_name: "image", arguments.mask_column_name: "mask"}
        data = load_named_data(arguments, columns) or digit_scenes(range(5, 10), scenes=80)
        size = arguments.image_size or (16 if arguments.model_name_or_path is None else None)
        sizes = {} if size is None else {"size": {"height": size, "width": size}}
        # Masks must follow what happens to an image, so that it is only resized.
        processor = AutoImageProcessor.from_pretrained(
            base, backend="pil", do_center_crop=False, do_pad=False, **sizes
        )
        limits = {"train": arguments.max_train_samples, "test": arguments.max_test_samples}
        limited = {name: data[name].select(range(len(data[name]))[:limit]) for name, limit in limits.items()}
        parts = limited["train"].train_test_split(arguments.validation_share, seed=arguments.seed)
        splits = {"search": parts["train"], "validation": parts["test"], "test": limited["test"]}
        rows = {name: mask_rows(part, processor, arguments.unlabelled) for name, part in splits.items()}
        labels = torch.stack([row["labels"] for part in rows.values() for row in part])
        self.num_classes = int(labels[labels != UNLABELLED].max()) + 1
        return base, rows

    def load_model(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A segmentation model with a new decoder."""
        config = AutoConfig.from_pretrained(self.base)
        if isinstance(config, ViTConfig):
            model = dpt_around(self.base, config, self.num_classes)
        else:
            model = AutoModelForSemanticSegmentation.from_pretrained(
                self.base, num_labels=self.num_classes, ignore_mismatched_sizes=True
            )
        return model, {"modules_to_save": decoder_modules(model)}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """A batch of images and masks."""
        return default_data_collator(rows)

    def measure(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Mean over the classes of intersection / union, each over all pixels, and the share of pixels that are right.

        Classes that are neither in the masks nor predicted do not count.
        """
        trainer.preprocess_logits_for_metrics = predicted_classes
        output = trainer.predict(self.rows[split])
        known = output.label_ids != UNLABELLED
        pairs = self.num_classes * output.label_ids[known] + output.predictions[known]
        confusion = np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, -1)
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        iou = hits[union > 0] / union[union > 0]
        return {"mean IoU": float(iou.mean()), "pixel accuracy": float(hits.sum() / confusion.sum())}

    def goodness(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """Mean IoU."""
        return (metrics["mean IoU"],)


def mask_rows(data: Dataset, processor: BaseImageProcessor, unlabelled: int) -> Rows:
    """All images and masks. Shapes of the pixel values and labels of a row: [3, h, w], [h, w]"""
    rows = []
    for row in data:
        [pixel_values] = processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
        # Not by the processor: those of DPT and BEiT interpolate between the numbers of the classes.
        mask = row["mask"].resize(pixel_values.shape[:0:-1], Resampling.NEAREST)
        labels = torch.from_numpy(np.asarray(mask, dtype=np.int64))
        rows.append({"pixel_values": pixel_values, "labels": labels.masked_fill(labels == unlabelled, UNLABELLED)})
    return rows


def predicted_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class of each pixel of the labels. Shapes: [b, c, h', w'], [b, h, w] -> [b, h, w]"""
    return interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


def dpt_around(name: str, vit: ViTConfig, num_labels: int) -> DPTForSemanticSegmentation:
    """A DPT whose own ViT has the weights of a plain ViT checkpoint, and a decoder in the proportions of DPT-Large.

    Raises:
        ValueError: if the checkpoint lacks weights of the ViT.
    """
    d, depth = vit.hidden_size, vit.num_hidden_layers
    config = DPTConfig(
        **{field: getattr(vit, field) for field in OF_VIT_AND_DPT},
        num_labels=num_labels,
        backbone_out_indices=[depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
        neck_hidden_sizes=[d // 4, d // 2, d, d],
        fusion_hidden_size=d // 4,
        # With the usual 0.02 the features of a narrow decoder would all but vanish on their way to its batch norm.
        initializer_range=0.02 * (1024 / d) ** 0.5,
    )
    model, loading = DPTForSemanticSegmentation.from_pretrained(
        name, config=config, key_mapping={r"^vit\.": "dpt."}, output_loading_info=True
    )
    missing = [key for key in loading["missing_keys"] if key.startswith("dpt.")]
    if missing:
        raise ValueError(f"{name} has no weights for {missing[0]} and {len(missing) - 1} other parameters of the ViT.")
    return model


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


def main(arguments: list[str] | None = None) -> DataFrame:
    """Run the script.

    Args:
        arguments: as on the command line.

    Returns:
        One row for each training. The table, which is also printed, and a plot are saved.
    """
    only_our_progress()
    defaults = {"output_dir": "outputs/segmentation"}
    return SegmentationComparison(parse(SegmentationArguments, "vision", __doc__, arguments, **defaults)).run()


if __name__ == "__main__":
    main()
