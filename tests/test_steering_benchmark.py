"""`steering.py`: the mosaics, and that trainings on images and on requests are measured."""

from pathlib import Path

import offline
import steering
import torch


def test_mosaics_are_of_two_classes_and_their_tiles_are_named() -> None:
    # Each image is its class everywhere.
    rows = [{"pixel_values": torch.full((3, 8, 8), float(label)), "labels": label} for label in (0, 1, 2, 2)]
    scenes, tiles, pairs = steering.Images(rows, num_classes=3).mosaics(20, seed=0)
    assert torch.equal(scenes[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).mean((2, 3)), tiles.float())
    assert torch.equal(tiles.sort(dim=1).values, pairs.sort(dim=1).values.repeat_interleave(2, dim=1))
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_trainings_are_measured_with_four_prompts(tmp_path: Path) -> None:
    base = offline.small_vit(tmp_path / "base", steps=1)
    short = ["--seeds", "1", "--num_train_epochs", "1", "--max_train_samples", "20", "--mosaics", "6"]
    out = ["--output_dir", str(tmp_path), "--output_file", str(tmp_path / "picture.png")]
    runs = steering.main(["--model_name_or_path", base, *short, *out])
    assert list(runs["prompt"]) == ["class", "class, centred", "random", "learned"] * 2
    assert runs[steering.COLUMNS].ge(0).all(axis=None) and runs[steering.COLUMNS].le(100.1).all(axis=None)
    assert runs.set_index("prompt").loc["learned", steering.COLUMNS[0]].round(3).eq(50).all()
    assert (tmp_path / "picture.png").is_file() and (tmp_path / "steering.md").is_file()
