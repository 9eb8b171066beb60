"""Semantic segmentation: TOAST below the decoders of Hugging Face, and the example script."""

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import semantic_segmentation
import torch
import transformers as tf
from peft import PeftModel
from PIL import Image
from semantic_segmentation import UNLABELLED
from torch import nn

from .golden.reference import reference_forward
from .helpers import adapted, output_of, steered
from .zoo import NUM_BLOCKS, VARIANTS, add_noise, images, with_variants

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
_BEIT = _VIT | {"out_indices": [1, 2, 3, 4], "drop_path_rate": 0.0, "use_relative_position_bias": True}
_DINOV2 = {name: value for name, value in _VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
_UPERNET = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "pool_scales": [1, 2]}

# Each with the module of the decoder that gets the features of four blocks.
MODELS = {
    "dpt": (
        tf.DPTForSemanticSegmentation,
        lambda: tf.DPTConfig(
            **_VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
        ),
        "neck",
    ),
    "beit": (tf.BeitForSemanticSegmentation, lambda: tf.BeitConfig(**_BEIT, use_mean_pooling=False), "fpn"),
    "beit_without_norm": (tf.BeitForSemanticSegmentation, lambda: tf.BeitConfig(**_BEIT), "fpn"),
    "data2vec": (
        tf.Data2VecVisionForSemanticSegmentation,
        lambda: tf.Data2VecVisionConfig(**_BEIT, use_mean_pooling=False),
        None,
    ),
    "upernet_beit": (
        tf.UperNetForSemanticSegmentation,
        lambda: tf.UperNetConfig(backbone_config=tf.BeitConfig(**_BEIT, use_mean_pooling=False), **_UPERNET),
        "decode_head",
    ),
    "upernet_dinov2": (
        tf.UperNetForSemanticSegmentation,
        lambda: tf.UperNetConfig(
            backbone_config=tf.Dinov2Config(**_DINOV2, out_indices=[1, 2, 3, 4], reshape_hidden_states=True),
            **_UPERNET,
        ),
        "decode_head",
    ),
}
REPRESENTATIVES = ["dpt", "upernet_dinov2"]
DECODER_FEATURES = [name for name, (_, _, decoder) in MODELS.items() if decoder is not None]


def tiny_model(name: str) -> nn.Module:
    """A segmentation model in eval mode with random weights, always the same."""
    torch.manual_seed(0)
    model_class, config, _ = MODELS[name]
    config = config()
    config.num_labels = 5
    model = model_class(config)
    add_noise(*model.parameters())
    return model.eval()


def features_for_decoder(model: nn.Module, name: str, base: nn.Module | None = None) -> list[torch.Tensor]:
    """What the decoder is given in a forward, which must call it once."""
    calls = []
    decoder = (base or model).get_submodule(MODELS[name][2])
    with decoder.register_forward_pre_hook(lambda _, a, kw: calls.append([*a, *kw.values()][0]), with_kwargs=True):
        output_of(model)
    [features] = calls
    return list(features)


@pytest.fixture
def data_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps what `load_dataset` stores out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------ TOAST and decoders


@pytest.mark.parametrize(("name", "variant"), with_variants(MODELS, VARIANTS, REPRESENTATIVES))
def test_starts_as_no_op(name: str, variant: str) -> None:
    base = tiny_model(name)
    expected = output_of(base)
    assert torch.equal(output_of(adapted(base, **VARIANTS[variant])), expected)


@pytest.mark.parametrize(("name", "variant"), with_variants(MODELS, VARIANTS, REPRESENTATIVES))
def test_output_is_that_of_the_formulas(name: str, variant: str) -> None:
    base = tiny_model(name).double()
    model = steered_in_float64(base, **VARIANTS[variant])
    inputs = {"pixel_values": images(8, 8)["pixel_values"].double()}
    with torch.no_grad():
        expected = reference_forward(base, model, inputs).logits
    assert not torch.allclose(expected, output_of(base, inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-10, atol=1e-10)


def steered_in_float64(base: nn.Module, **options: Any) -> nn.Module:
    """TOAST on a copy of the base model, with weights that are the same as in `steered` of a float32 model."""
    return steered(copy.deepcopy(base).float(), **options).double()


@pytest.mark.parametrize(("variant", "first"), [("full", 0), ("early", 0), ("late", 2), ("middle", 1)])
@pytest.mark.parametrize("name", DECODER_FEATURES)
def test_decoder_gets_the_features_of_pass_2(name: str, variant: str, first: int) -> None:
    """Those of the blocks below the feedback are the base model's, also where pass 2 leaves these blocks out."""
    base = tiny_model(name)
    plain = features_for_decoder(base, name)
    model = steered(copy.deepcopy(base), **VARIANTS[variant])
    features = features_for_decoder(model, name, model.get_base_model())
    assert len(features) == len(plain) == NUM_BLOCKS
    of_block = range(-1, NUM_BLOCKS - 1) if _takes_inputs_of_blocks(name) else range(NUM_BLOCKS)
    for block, steered_map, plain_map in zip(of_block, features, plain, strict=True):
        assert torch.equal(steered_map, plain_map) == (block < first), block


@pytest.mark.parametrize(
    ("name", "variant"), with_variants(MODELS, ["full", "lite", "early", "late"], REPRESENTATIVES)
)
def test_gradients_reach_the_adapter_and_the_decoder(name: str, variant: str) -> None:
    base = tiny_model(name)
    decoder = semantic_segmentation.decoder_modules(base)
    model = steered(base, **VARIANTS[variant], modules_to_save=decoder)
    model.train()(**images(8, 8), labels=torch.randint(0, 5, (2, 8, 8))).loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all("topdown_" in key or ".modules_to_save." in key for key in grads)
    # A decoder that takes the inputs of the blocks does not see what the last block does with its feedback.
    unseen = f"layers.{NUM_BLOCKS - 1}.topdown_linear2" if _takes_inputs_of_blocks(name) else "none"
    of_adapter = [grad for key, grad in grads.items() if "topdown_" in key and unseen not in key]
    assert of_adapter and all(grad is not None and grad.any() for grad in of_adapter)
    # Every module of the decoder; DPT has some parameters that it does not use.
    for part in decoder:
        of_part = [grad for key, grad in grads.items() if f".{part}.modules_to_save." in key]
        assert any(grad is not None and grad.any() for grad in of_part), part


def _takes_inputs_of_blocks(name: str) -> bool:
    """The `out_indices` of these two models count the embeddings as 1."""
    return name.startswith(("beit", "data2vec"))


@pytest.mark.parametrize("name", MODELS)
def test_everything_behind_the_backbone_is_a_decoder_module(name: str) -> None:
    model = tiny_model(name)
    decoder = semantic_segmentation.decoder_modules(model)
    prefix = model.base_model_prefix or "backbone"
    outside = [key for key, _ in model.named_parameters() if not key.startswith(f"{prefix}.")]
    assert outside and all(any(key.startswith(f"{part}.") for part in decoder) for key in outside)
    matched = [key for key, _ in model.named_modules() if any(key.endswith(part) for part in decoder)]
    assert not any(key.startswith(f"{other}.") for key in matched for other in matched)


# --------------------------------------------------------------------------------------------------- metric and data


def test_mean_iou_is_over_all_pixels_with_a_label() -> None:
    """Class 3 is nowhere and does not count, class 2 is only predicted and counts as 0."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (6, 4, 4), generator=generator)
    labels[1] = UNLABELLED
    predictions = torch.randint(0, 3, (6, 4, 4), generator=generator)
    known = labels != UNLABELLED
    overlaps = []
    for index in range(3):
        truth, predicted = (labels == index) & known, (predictions == index) & known
        overlaps.append(((truth & predicted).sum() / (truth | predicted).sum()).item())
    metrics = semantic_segmentation.mean_iou(tf.EvalPrediction(predictions.numpy(), labels.numpy()))
    assert metrics == {"mean_iou": pytest.approx(sum(overlaps) / 3)}
    assert overlaps[2] == 0


def write_folder(folder: Path, values: list[int]) -> None:
    """Two images of 6 x 4 pixels in each split, with masks that have the values in vertical stripes."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        stripes = np.repeat(np.array(values, dtype=np.uint8), 6 // len(values))
        lines = ["file_name,mask_file_name"]
        for index in range(2):
            Image.new("RGB", (6, 4), (40 * index, 80, 120)).save(folder / split / f"image_{index}.png")
            Image.fromarray(np.tile(stripes, (4, 1))).save(folder / split / f"mask_{index}.png")
            lines.append(f"image_{index}.png,mask_{index}.png")
        (folder / split / "metadata.csv").write_text("\n".join(lines))


def test_masks_are_resized_with_their_images_but_not_interpolated(tmp_path: Path, data_cache: None) -> None:
    write_folder(tmp_path / "data", [0, 9, 2])
    arguments, trainer_arguments = semantic_segmentation.parse(["--dataset_name", str(tmp_path / "data"), "--use_cpu"])
    data = semantic_segmentation.load_masks(arguments)
    assert set(data) == {"train", "validation"}
    processor = tf.ViTImageProcessorPil(size={"height": 8, "width": 12}, resample=Image.Resampling.BICUBIC)
    row = semantic_segmentation.make_trainer(nn.Linear(1, 1), processor, data, 9, trainer_arguments).train_dataset[0]
    assert row["pixel_values"].shape == (3, 8, 12)
    assert torch.equal(row["labels"], torch.tensor([0, UNLABELLED, 2]).repeat_interleave(4).expand(8, 12))


def test_masks_of_the_offline_scenes() -> None:
    data = semantic_segmentation.digit_scenes(range(5, 10), scenes=6)
    for split in data.values():
        assert len(split) == 6
        for row in split:
            mask = np.asarray(row["mask"])
            assert mask.shape == (16, 16)
            for quarter in (mask[:8, :8], mask[:8, 8:], mask[8:, :8], mask[8:, 8:]):
                assert len(set(quarter.flat) - {0}) == 1
            assert ((mask > 0) == (np.asarray(row["image"]) > 127)).all()


@pytest.mark.parametrize("name", ["dpt", "beit"])
def test_the_example_adapts_a_model_and_data_of_ones_own(name: str, tmp_path: Path, data_cache: None) -> None:
    tiny_model(name).save_pretrained(tmp_path / "base")
    tf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    write_folder(tmp_path / "data", [0, 9, 2])
    own = [
        "--model_name_or_path",
        str(tmp_path / "base"),
        "--dataset_name",
        str(tmp_path / "data"),
        "--unlabelled",
        "9",
    ]
    options = ["--max_steps", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
    metrics = semantic_segmentation.main([*own, *options, "--output_dir", str(tmp_path / "out")])
    assert 0 <= metrics["eval_mean_iou"] <= 1
    model_class, _, _ = MODELS[name]
    base = model_class.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert output_of(model.eval()).shape[1] == 3
