"""Images and masks for semantic segmentation."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from adaptation import DataArguments, named_data, shortened
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from offline_data import digit_scenes
from PIL import Image
from transformers import BaseImageProcessor

UNLABELLED = 255  # the class that losses of segmentation models leave out


@dataclass
class MaskArguments(DataArguments):
    """Which images and masks to adapt to."""

    image_column_name: str = field(default="image", metadata={"help": "Column of the data set with the images."})
    mask_column_name: str = field(default="mask", metadata={"help": "Column of the data set with the masks."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes 0, 1, ... Default: as many numbers as the masks have."}
    )
    unlabelled: int = field(
        default=UNLABELLED, metadata={"help": "Value of pixels in the masks that are neither trained on nor counted."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the model's input. Default: that of the checkpoint."}
    )
    num_overlays: int = field(default=4, metadata={"help": "Save so many images with the prediction laid over them."})


def load_masks(arguments: MaskArguments) -> DatasetDict:
    """The data to adapt to, with the columns "image" and "mask"."""
    folder = Path(arguments.dataset_name or "")
    if arguments.dataset_name and (folder / "train" / "images").is_dir():
        return shortened(folders_of_masks(folder), arguments)
    data = named_data(arguments)
    if data is None:
        arguments.image_size = arguments.image_size or 16
        return shortened(digit_scenes(range(5, 10), scenes=80), arguments)
    columns = {arguments.image_column_name: "image", arguments.mask_column_name: "mask"}
    data = data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    return shortened(data, arguments)


def folders_of_masks(folder: Path) -> DatasetDict:
    """Images and masks in folders of their own, `train/images/1.jpg` and `train/masks/1.png`.

    Args:
        folder: has a folder for each split, "train", "validation" and, if there is one, "test".

    Raises:
        ValueError: if an image has no mask of its name.
    """
    splits = DatasetDict()
    for split in (path.name for path in sorted(folder.iterdir()) if (path / "images").is_dir()):
        images = sorted(path for path in (folder / split / "images").iterdir() if path.is_file())
        masks = {path.stem: path for path in (folder / split / "masks").iterdir()}
        missing = [str(path) for path in images if path.stem not in masks]
        if missing:
            raise ValueError(f"There is no mask in {folder / split / 'masks'} for {', '.join(missing[:3])}.")
        columns = {"image": [str(path) for path in images], "mask": [str(masks[path.stem]) for path in images]}
        splits[split] = Dataset.from_dict(columns, features=Features(image=ImageFeature(), mask=ImageFeature()))
    return splits


def find_classes(data: DatasetDict, arguments: MaskArguments) -> list[str]:
    """Names of the classes in the masks.

    Raises:
        ValueError: if a mask has a class without a name.
    """
    values = {int(value) for split in data.values() for mask in split["mask"] for value in np.unique(mask)}
    values.discard(arguments.unlabelled)
    names = arguments.class_names or [str(index) for index in range(max(values) + 1)]
    if not values <= set(range(min(len(names), UNLABELLED))):
        raise ValueError(
            f"The masks have the classes {sorted(values)}, but there are names for 0 to {len(names) - 1}, and "
            f"{UNLABELLED - 1} is the highest possible. Name the value of unlabelled pixels with --unlabelled."
        )
    return names


def preprocess(data: Dataset, processor: BaseImageProcessor, unlabelled: int) -> Dataset:
    """The data with images and masks turned into pixel values and labels when they are read."""

    def transform(rows: dict[str, list]) -> dict[str, torch.Tensor]:
        images = [image.convert("RGB") for image in rows["image"]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        # Not by the processor: those of DPT and BEiT interpolate between the numbers of the classes.
        size = pixel_values.shape[:1:-1]
        masks = [mask.resize(size, Image.Resampling.NEAREST) for mask in rows["mask"]]
        labels = np.stack([labels_of(mask, unlabelled) for mask in masks])
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(labels)}

    return data.with_transform(transform)


def labels_of(mask: Image.Image, unlabelled: int) -> np.ndarray:
    """Class of each pixel. Shape: [h, w]"""
    values = np.asarray(mask, dtype=np.int64)
    return np.where(values == unlabelled, UNLABELLED, values)
