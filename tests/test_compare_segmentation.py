"""`compare_segmentation.py`: the masks, the metrics, and that every kind of method can train a DPT around a ViT."""

from pathlib import Path
from types import SimpleNamespace

import compare_segmentation
import numpy as np
import offline
import pytest
import torch
from compare_segmentation import SegmentationComparison, mask_rows
from datasets import Dataset, Features, Image
from PIL.Image import fromarray
from sklearn.metrics import accuracy_score, jaccard_score
from transformers import AutoConfig, AutoModel, ViTImageProcessorPil


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return offline.small_vit(tmp_path_factory.mktemp("base"), steps=1)


def test_methods_are_compared_on_scenes_of_digits(base: str, tmp_path: Path) -> None:
    short = ["--tries", "1", "--seeds", "1", "--num_train_epochs", "1", "--max_train_samples", "10"]
    short += [
        "--max_test_samples",
        "4",
        "--image_size",
        "16",
        "--output_dir",
        str(tmp_path),
        "--model_name_or_path",
        base,
    ]
    runs = compare_segmentation.main([*short, "--methods", "linear", "lora-all-linear", "vpt-deep", "toast-lite"])
    assert list(runs["split"]) == ["validation", "test"] * 4
    assert runs[["mean IoU", "pixel accuracy"]].gt(0).all(axis=None)
    decoder = runs["trainable_parameters"][0]
    assert (runs["trainable_parameters"][2:] > decoder).all()


def test_the_metrics_are_those_of_all_pixels_with_a_class() -> None:
    generator = np.random.default_rng(0)
    predictions, labels = generator.integers(4, size=(2, 3, 8, 8))
    labels[:, :2] = compare_segmentation.UNLABELLED
    comparison = object.__new__(SegmentationComparison)
    comparison.rows, comparison.num_classes = {"test": None}, 5  # the last one is in no mask, and never predicted
    trainer = SimpleNamespace(predict=lambda rows: SimpleNamespace(label_ids=labels, predictions=predictions))
    known = labels != compare_segmentation.UNLABELLED
    assert comparison.measure(trainer, "test") == {
        "mean IoU": pytest.approx(jaccard_score(labels[known], predictions[known], average="macro")),
        "pixel accuracy": pytest.approx(accuracy_score(labels[known], predictions[known])),
    }


def test_masks_keep_their_numbers_when_images_are_resized() -> None:
    mask = np.array([[0, 7], [3, 9]], dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    data = Dataset.from_dict(
        {"image": [fromarray(mask)], "mask": [fromarray(mask)]}, Features(image=Image(), mask=Image())
    )
    [row] = mask_rows(data, ViTImageProcessorPil(size={"height": 4, "width": 4}), unlabelled=9)
    assert row["pixel_values"].shape == (3, 4, 4)
    expected = torch.tensor([[0, 7], [3, compare_segmentation.UNLABELLED]])
    assert torch.equal(row["labels"], expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_scenes_have_the_digits_of_their_masks() -> None:
    scenes = offline.digit_scenes(range(5, 10), scenes=6)
    for part in scenes.values():
        assert len(part) == 6
        for row in part:
            image, mask = np.asarray(row["image"]), np.asarray(row["mask"])
            assert image.shape == mask.shape == (16, 16)
            assert ((mask > 0) == (image > 127)).all() and mask.max() <= 5
            for quarter in mask.reshape(2, 8, 2, 8).swapaxes(1, 2).reshape(4, 64):
                assert len(set(quarter) - {0}) == 1


def test_the_vit_of_a_dpt_computes_what_the_checkpoint_does(base: str) -> None:
    model = compare_segmentation.dpt_around(base, AutoConfig.from_pretrained(base), num_labels=3).double().eval()
    vit = AutoModel.from_pretrained(base, add_pooling_layer=False).double().eval()
    pixel_values = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = vit(pixel_values).last_hidden_state
    torch.testing.assert_close(model.dpt(pixel_values).last_hidden_state, expected, atol=1e-10, rtol=0)
    assert model.config.num_labels == 3
    assert compare_segmentation.decoder_modules(model) == ["neck", "head.head", "auxiliary_head.head"]
