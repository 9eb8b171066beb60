"""Semantic segmentation: TOAST below the decoders of Hugging Face, and the example script."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import segmentation_data
import semantic_segmentation
import torch
import transformers as tf
from offline_data import digit_scenes
from PIL import Image
from semantic_segmentation import UNLABELLED, MeanIoU
from sklearn.metrics import jaccard_score
from torch import nn

from .models import NUM_BLOCKS, VARIANTS, adapted, add_noise, assert_same, inputs_of, output_of, steered
from .reference import reference_forward

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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_starts_as_no_op(name: str, variant: str) -> None:
    base = tiny_model(name)
    expected = output_of(base)
    assert torch.equal(output_of(adapted(base, **VARIANTS[variant])), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_output_is_that_of_the_formulas(name: str, variant: str) -> None:
    base = tiny_model(name).double()
    model = steered_in_float64(base, **VARIANTS[variant])
    inputs = {"pixel_values": inputs_of(base)["pixel_values"].double()}
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


@pytest.mark.parametrize("variant", ["full", "lite", "early", "late"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_adapter_and_the_decoder(name: str, variant: str) -> None:
    base = tiny_model(name)
    decoder = semantic_segmentation.decoder_modules(base)
    model = steered(base, **VARIANTS[variant], modules_to_save=decoder)
    model.train()(**inputs_of(model), labels=torch.randint(0, 5, (2, 8, 8))).loss.backward()
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


def test_a_plain_vit_becomes_a_dpt(tmp_path: Path) -> None:
    vit = tf.ViTForImageClassification(tf.ViTConfig(**_VIT))
    add_noise(*vit.parameters())
    vit.eval().save_pretrained(tmp_path / "vit")
    vit.vit.save_pretrained(tmp_path / "bare_vit")
    expected = vit.vit(**inputs_of(vit), output_hidden_states=True).hidden_states
    for name in ("vit", "bare_vit"):
        model = semantic_segmentation.load_model(str(tmp_path / name), ["sky", "road"]).eval()
        assert isinstance(model, tf.DPTForSemanticSegmentation)
        assert model.config.id2label == {0: "sky", 1: "road"}
        torch.testing.assert_close(model.dpt(**inputs_of(vit), output_hidden_states=True).hidden_states, expected)
        model.save_pretrained(tmp_path / "dpt")
        saved = semantic_segmentation.load_model(str(tmp_path / "dpt"), ["sky", "road"]).eval()
        assert_same(output_of(saved), output_of(model))


def test_a_checkpoint_without_all_weights_of_the_vit(tmp_path: Path) -> None:
    model = tf.ViTModel(tf.ViTConfig(**_VIT))
    weights = {key: tensor for key, tensor in model.state_dict().items() if "v_proj" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="has no weights for dpt.encoder.layer.* and 7 other parameters of the ViT"):
        semantic_segmentation.load_model(str(tmp_path), ["sky", "road"])


def test_a_segmentation_checkpoint_keeps_its_decoder(tmp_path: Path) -> None:
    base = tiny_model("beit")
    base.save_pretrained(tmp_path)
    same, other = (semantic_segmentation.load_model(str(tmp_path), list("abcde")[:count]) for count in (5, 3))
    assert_same(output_of(same.eval()), output_of(base))
    assert output_of(other.eval()).shape[1] == 3


# --------------------------------------------------------------------------------------------------- metric and data


def test_mean_iou_is_that_of_all_pixels() -> None:
    """Of three batches together; class 3 is nowhere, class 2 only in predictions."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 2, (2, 4, 4), generator=generator) for _ in range(3)]
    predictions = [torch.randint(0, 3, (2, 4, 4), generator=generator) for _ in range(3)]
    labels[1][0] = UNLABELLED
    metric = MeanIoU(["sky", "road", "car", "pole"])
    for _ in range(2):  # and again from zero
        batches = [tf.EvalPrediction(*parts) for parts in zip(predictions, labels, strict=True)]
        results = [metric(batch, compute_result=batch is batches[-1]) for batch in batches]
        known = torch.cat(labels) != UNLABELLED
        truth, predicted = torch.cat(labels)[known], torch.cat(predictions)[known]
        assert results[:2] == [{}, {}]
        assert results[2]["mean_iou"] == pytest.approx(jaccard_score(truth, predicted, average="macro"))
        assert results[2]["pixel_accuracy"] == pytest.approx((truth == predicted).double().mean().item())
        assert set(results[2]) == {"mean_iou", "pixel_accuracy", "iou_sky", "iou_road", "iou_car"}
        assert results[2]["iou_car"] == 0


def write_folder(folder: Path, values: list[int]) -> None:
    """Two images of 6 x 4 pixels in each split, with masks that have the values in vertical stripes."""
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        stripes = np.repeat(np.array(values, dtype=np.uint8), 6 // len(values))
        lines = ["file_name,mask_file_name"]
        for index in range(2):
            Image.new("RGB", (6, 4), (40 * index, 80, 120)).save(folder / split / f"image_{index}.png")
            Image.fromarray(np.tile(stripes, (4, 1))).save(folder / split / f"mask_{index}.png")
            lines.append(f"image_{index}.png,mask_{index}.png")
        (folder / split / "metadata.csv").write_text("\n".join(lines))


def test_folders_of_images_and_masks(tmp_path: Path, data_cache: None) -> None:
    write_folder(tmp_path / "data", [0, 9, 2])
    _, arguments, _ = semantic_segmentation.parse(["--dataset_name", str(tmp_path / "data"), "--unlabelled", "9"])
    data = segmentation_data.load_masks(arguments)
    assert set(data) == {"train", "validation", "test"}
    assert segmentation_data.find_classes(data, arguments) == ["0", "1", "2"]
    processor = tf.ViTImageProcessorPil(size={"height": 8, "width": 12}, resample=Image.Resampling.BICUBIC)
    row = segmentation_data.preprocess(data["train"], processor, arguments.unlabelled)[0]
    assert row["pixel_values"].shape == (3, 8, 12)
    # Enlarged, but no class in between.
    assert torch.equal(row["labels"], torch.tensor([0, UNLABELLED, 2]).repeat_interleave(4).expand(8, 12))


def test_masks_with_a_class_without_name(tmp_path: Path, data_cache: None) -> None:
    write_folder(tmp_path / "data", [0, 9, 2])
    _, arguments, _ = semantic_segmentation.parse(
        ["--dataset_name", str(tmp_path / "data"), "--class_names", "a", "b"]
    )
    data = segmentation_data.load_masks(arguments)
    with pytest.raises(ValueError, match=r"classes \[0, 2, 9\], but there are names for 0 to 1"):
        segmentation_data.find_classes(data, arguments)


def test_processors_that_crop_are_refused(tmp_path: Path) -> None:
    tf.CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has do_center_crop=True"):
        semantic_segmentation.load_processor(str(tmp_path), None)


def test_masks_of_the_offline_scenes() -> None:
    data = digit_scenes(range(5, 10), scenes=6)
    for split in data.values():
        for row in split:
            mask = np.asarray(row["mask"])
            assert mask.shape == (16, 16) and len(split) == 6
            for quarter in (mask[:8, :8], mask[:8, 8:], mask[8:, :8], mask[8:, 8:]):
                assert len(set(quarter.flat) - {0}) == 1
            assert ((mask > 0) == (np.asarray(row["image"]) > 127)).all()


# --------------------------------------------------------------------------------------------------------- the script


def test_table_overlays_and_reloading(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ["--pretraining_steps", "5", "--max_train_samples", "8", "--max_eval_samples", "8"]
    arguments = [*small, "--num_train_epochs", "1", "--disable_tqdm", "True", "--output_dir", str(tmp_path)]
    methods = ["decoder_only", "toast_early"]
    rows = semantic_segmentation.main([*arguments, "--method", *methods, "--learning_rates", "1e-6", "1e-2"])
    heads, *lines = capsys.readouterr().out.splitlines()[-3:]
    assert heads.split() == "method learning rate trainable parameters validation mIoU test mIoU seconds".split()
    for line, row, method in zip(lines, rows, methods, strict=True):
        assert line.split()[0] == row["method"] == method
        assert f"{row['eval_mean_iou']:.4f}  " in line and f"{row['test_mean_iou']:.4f}  " in line
        tried = row["eval_mean_iou_of_learning_rates"]
        assert set(tried) == {"1e-06", "0.01"}
        # As it was measured in training, though from the saved files.
        assert row["eval_mean_iou"] == max(tried.values()) == tried[str(row["learning_rate"])]
        saved = Path(row["saved_in"])
        overlays = [Image.open(saved / "overlays" / f"{index}.png") for index in range(4)]
        assert all(overlay.size == (32, 16) and len(overlay.getcolors()) > 2 for overlay in overlays)
        kind = "adapter" if method == "toast_early" else "model"
        again = ["--method", method, f"--{kind}_name_or_path", str(saved), "--do_train", "False"]
        [reloaded] = semantic_segmentation.main([*arguments, *again])
        for metric in ("eval_mean_iou", "test_mean_iou", "eval_loss"):
            assert reloaded[metric] == row[metric]
    assert rows[1]["trainable_parameters"] > rows[0]["trainable_parameters"]
    assert [row["method"] for row in json.loads((tmp_path / "comparison.json").read_text())] == methods


def test_a_result_that_is_not_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"learning_rate": 1e-3, "saved_in": "there", "eval_mean_iou": 0.5, "eval_loss": 1.0}
    comparison = object.__new__(semantic_segmentation.Comparison)
    comparison.model_arguments, _, comparison.training_arguments = semantic_segmentation.parse([])
    monkeypatch.setattr(comparison, "train", lambda method, rate: trained)
    monkeypatch.setattr(comparison, "evaluate", lambda saved: {"eval_loss": 1.1})
    with pytest.raises(RuntimeError, match="there: the loss was 1.0, but is 1.1 after reloading"):
        comparison.measure("toast")


def test_without_training_there_is_one_method(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        semantic_segmentation.parse(["--do_train", "False"])
    assert "--do_train False evaluates one saved result" in capsys.readouterr().err


def test_images_and_masks_in_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / split / kind).mkdir(parents=True)
            for index in range(count):
                image = Image.new(mode, (4, 4), index if mode == "L" else (index, 0, 0))
                image.save(tmp_path / split / kind / f"{index}.png")
    _, arguments, _ = semantic_segmentation.parse(["--dataset_name", str(tmp_path)])
    data = segmentation_data.load_masks(arguments)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "validation": 2}
    row = data["train"][2]
    assert row["image"].getpixel((0, 0)) == (2, 0, 0) and row["mask"].getpixel((0, 0)) == 2
    (tmp_path / "train" / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match="no mask in .*masks for .*1.png"):
        segmentation_data.load_masks(arguments)
