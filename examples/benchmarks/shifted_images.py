r"""Make two sets of images that are unlike the photographs of ImageNet, as parquet files for `compare_methods.py`.

    python examples/benchmarks/shifted_images.py --camvid_folder folder_of_camvid --output_dir outputs/shifted_images

- digits: all 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, ten classes; 1,000 are the test split
- street_crops: crops of 48 x 48 pixels from the street scenes of CamVid, of which one class has at least 60 %. Of each
  scene and class there is at most one crop, the one with the largest share; scenes are in one split only.

`folder_of_camvid` has train.parquet and test.parquet with the columns "image" and "mask", a class in each pixel.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cost import HelpFormatter
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, concatenate_datasets, load_dataset
from numpy.lib.stride_tricks import sliding_window_view
from offline import digits
from transformers import HfArgumentParser

SIZE, STRIDE, SHARE = 48, 12, 0.6
# Those of CamVid, by their numbers, that are large enough for such crops.
CLASSES = {0: "sky", 1: "building", 3: "road", 4: "pavement", 5: "tree", 8: "car"}


@dataclass
class Arguments:
    """What to make."""

    camvid_folder: str = field(metadata={"help": "Folder with train.parquet and test.parquet of CamVid."})
    output_dir: str = field(default="outputs/shifted_images", metadata={"help": "Folder for the two sets."})


def all_digits() -> DatasetDict:
    """All handwritten digits, 1,000 of them as the split "test"."""
    parts = digits(range(10), examples_per_class=10)
    return concatenate_datasets(list(parts.values())).train_test_split(1000, stratify_by_column="label", seed=0)


def street_crops(scenes: Dataset) -> Dataset:
    """For each scene and class the crop with the largest share of the class, if that is large enough."""
    columns: dict[str, list] = {"image": [], "label": []}
    for scene in scenes:
        masks = sliding_window_view(np.asarray(scene["mask"]), (SIZE, SIZE))[::STRIDE, ::STRIDE]
        for label, number in enumerate(CLASSES):
            shares = (masks == number).mean(axis=(2, 3))
            if shares.max() >= SHARE:
                top, left = (STRIDE * int(place) for place in np.unravel_index(shares.argmax(), shares.shape))
                columns["image"].append(scene["image"].crop((left, top, left + SIZE, top + SIZE)))
                columns["label"].append(label)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES.values()))})
    return Dataset.from_dict(columns, features).shuffle(seed=0)


def main(arguments: list[str] | None = None) -> dict[str, DatasetDict]:
    """Make and save both sets.

    Args:
        arguments: as on the command line.

    Returns:
        The sets by their names, with the splits "train" and "test" and the columns "image" and "label".
    """
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    [parsed] = parser.parse_args_into_dataclasses(arguments)
    files = {split: str(Path(parsed.camvid_folder) / f"{split}.parquet") for split in ("train", "test")}
    scenes = load_dataset("parquet", data_files=files)
    sets = {
        "digits": all_digits(),
        "street_crops": DatasetDict({split: street_crops(scenes[split]) for split in files}),
    }
    for name, splits in sets.items():
        folder = Path(parsed.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, images in splits.items():
            images.to_parquet(str(folder / f"{split}.parquet"))
        print(f"{folder}: {', '.join(f'{len(images)} for {split}' for split, images in splits.items())}")
    return sets


if __name__ == "__main__":
    main()
