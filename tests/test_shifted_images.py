"""`shifted_images.py`: what the crops show, and that no scene is in both splits."""

from pathlib import Path

import numpy as np
import shifted_images
from datasets import Dataset, Features, Image
from PIL.Image import fromarray

SKY, POLE, ROAD = 0, 2, 3


def scene(rows_of_road: int, shade: int) -> dict[str, object]:
    """Sky of a shade above a black road, beside three columns of a pole."""
    mask = np.full((60, 72), SKY, dtype=np.uint8)
    mask[60 - rows_of_road :] = ROAD
    mask[:, :3] = POLE
    image = np.where(mask == ROAD, 0, shade).astype(np.uint8)
    return {"image": fromarray(np.stack([image] * 3, axis=-1)), "mask": fromarray(mask)}


def save(path: Path, scenes: list[dict[str, object]]) -> None:
    columns = {name: [row[name] for row in scenes] for name in ("image", "mask")}
    Dataset.from_dict(columns, Features({"image": Image(), "mask": Image()})).to_parquet(str(path))


def test_crops_are_of_the_class_and_digits_are_all_there(tmp_path: Path) -> None:
    save(tmp_path / "train.parquet", [scene(36, shade=100), scene(0, shade=101)])
    save(tmp_path / "test.parquet", [scene(60, shade=200)])
    sets = shifted_images.main(["--camvid_folder", str(tmp_path), "--output_dir", str(tmp_path / "sets")])
    crops = {split: list(images) for split, images in sets["street_crops"].items()}
    names = sets["street_crops"]["train"].features["label"].names
    found = {
        split: sorted((names[row["label"]], int(np.asarray(row["image"]).max())) for row in rows)
        for split, rows in crops.items()
    }
    # In the first scene 36 of 48 rows of the lowest crop are road; of sky no crop has more than half.
    assert found == {"train": [("road", 100), ("sky", 101)], "test": [("road", 0)]}
    assert all(row["image"].size == (48, 48) for rows in crops.values() for row in rows)
    [road] = [row for row in crops["train"] if names[row["label"]] == "road"]
    assert (np.asarray(road["image"]) == 0).mean() == 36 / 48
    assert {split: len(images) for split, images in sets["digits"].items()} == {"train": 797, "test": 1000}
    assert (tmp_path / "sets" / "digits" / "test.parquet").exists()
