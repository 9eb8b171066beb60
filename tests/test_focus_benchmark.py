"""`focus.py` and `mask_shares.py`: their formulas, and that what there is of each method is measured."""

from pathlib import Path
from types import SimpleNamespace

import focus
import mask_shares
import offline
import pandas as pd
import pytest
import relevance
import steering
import torch
from compare_segmentation import UNLABELLED
from methods import apply_method
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

IMAGES = [{"pixel_values": torch.full((3, 8, 8), float(label)), "labels": label} for label in (0, 1, 2, 2, 3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return offline.small_vit(tmp_path_factory.mktemp("base"), steps=1)


def small_vit(method: str) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_labels=3))
    for parameter in vit.parameters():  # so that attention and features differ
        nn.init.normal_(parameter, std=0.3)
    model = apply_method(vit, method, modules_to_save=["classifier"]).eval()
    for name, parameter in model.named_parameters():
        if "linear2" in name:  # starts as zero, without feedback
            nn.init.normal_(parameter, std=0.3)
    return model


# ------------------------------------------------------------------------------------------------------------ mosaics


def test_mosaics_have_two_tiles_of_the_target_and_two_of_other_classes() -> None:
    scenes, is_target, targets = focus.mosaics_of_a_target(steering.Images(IMAGES, num_classes=4), 60, seed=0)
    classes = scenes[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).mean((2, 3))
    assert torch.equal(is_target, classes == targets[:, None])
    assert (is_target.sum(1) == 2).all()
    assert set(targets.tolist()) == set(classes[~is_target].tolist()) == {0, 1, 2, 3}
    others = classes[~is_target].reshape(60, 2)
    assert 0 < (others[:, 0] == others[:, 1]).sum() < 60  # drawn independently of each other


def test_focus_is_the_share_of_the_positive_relevance_on_the_target() -> None:
    relevance_map = torch.tensor([[3.0, 1, 0, 2], [0, 0, -9, 0], [5, 0, 0, 1], [0, 0, 0, 0]])
    maps = torch.stack([relevance_map, torch.ones(4, 4), -torch.ones(4, 4)])
    is_target = torch.tensor([[True, False, False, True]] * 3)
    found = relevance.focus(maps, is_target)
    assert found[:2].tolist() == pytest.approx([(4 + 1) / 12, 0.5])
    assert found[2].isnan()


# --------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("method", ["linear", "toast"])
def test_grad_cam_is_that_of_gradients_by_differences(method: str) -> None:
    model = small_vit(method).double()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    classes = torch.tensor([2, 0])
    norm = [module for name, module in model.named_modules() if name.endswith("layernorm_before")][-1]
    passes = 2 if method == "toast" else 1
    added = torch.zeros(16, dtype=torch.float64)
    calls: list[torch.Tensor] = []

    def add_to_patches_of_the_last_pass(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(output)
        return output + F.pad(added.expand(16, -1), (0, 0, 1, 0)) if len(calls) % passes == 0 else output

    weights = torch.zeros(2, 16, dtype=torch.float64)
    with torch.no_grad(), norm.register_forward_hook(add_to_patches_of_the_last_pass):
        for channel in range(16):
            logits = []
            for step in (1e-5, -1e-5):
                added[channel] = step
                logits.append(model(**inputs).logits[[0, 1], classes])
            added[channel] = 0
            weights[:, channel] = (logits[0] - logits[1]) / 2e-5 / 16  # the mean over 16 patches
        calls.clear()
        model(**inputs)
    expected = (calls[-1][:, 1:] * weights[:, None]).sum(-1).relu().reshape(2, 4, 4)
    assert expected.gt(0).any()
    torch.testing.assert_close(relevance.grad_cam(model, inputs, classes), expected, atol=1e-7, rtol=1e-6)


def test_grad_cam_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no `layernorm_before`"):
        relevance.grad_cam(nn.Linear(1, 1), {}, torch.tensor([0]))


def test_rollout_of_pass_1_is_that_of_the_base_model() -> None:
    model = small_vit("toast")
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    maps = relevance.feedback_maps(model, inputs)
    assert {name: tuple(found.shape) for name, found in maps.items()} == dict.fromkeys(
        ["mask", "change of attention", "rollout"], (2, 4, 4)
    )
    assert all(found.ge(0).all() and found.gt(0).any() for found in maps.values())
    without = relevance.feedback_maps(model, inputs | {"topdown_prompt": torch.zeros(16)})
    assert not without["mask"].any() and not without["change of attention"].any()
    torch.testing.assert_close(relevance.rollout(model.get_base_model(), inputs), maps["rollout"])
    with model.disable_adapter():
        torch.testing.assert_close(relevance.rollout(model, inputs), without["rollout"])


def test_requested_masks_are_those_of_given_prompts() -> None:
    model = small_vit("toast")
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    prompts = torch.randn(3, 16)
    given = [relevance.feedback_maps(model, inputs | {"topdown_prompt": prompt})["mask"] for prompt in prompts]
    torch.testing.assert_close(relevance.requested_masks(model, inputs, prompts), torch.stack(given, dim=-1))


# ------------------------------------------------------------------------------------------------------------- curves


class BrightPatch(nn.Module):
    """The probability of class 1 is 0.9 while the patch at the top left is there, and else 0.5."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        is_there = pixel_values[:, 0, 0, 0]
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(is_there), is_there * torch.tensor(9.0).log()], 1))


@pytest.mark.parametrize(("best_first", "place"), [(True, 0), (False, 3)])
def test_curves_of_a_model_that_sees_one_patch(best_first: bool, place: int) -> None:
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    relevance_map = torch.tensor([[[4.0, 2], [3, 1]]]) * (1 if best_first else -1)
    curves = {
        inserted: relevance.curve(BrightPatch(), inputs, torch.tensor([1]), relevance_map, 4, inserted)
        for inserted in (False, True)
    }
    inserted = [0.5] * (place + 1) + [0.9] * (4 - place)
    deleted = [0.9] * (place + 1) + [0.5] * (4 - place)
    assert curves[True][0].tolist() == pytest.approx(inserted)
    assert curves[False][0].tolist() == pytest.approx(deleted)
    assert relevance.area(curves[True]).item() == pytest.approx(sum(inserted[:-1] + inserted[1:]) / 8)


# --------------------------------------------------------------------------------------------------- masks of classes


def test_enrichment_is_the_share_of_the_mask_over_that_of_the_pixels() -> None:
    labels = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, UNLABELLED, UNLABELLED]]])
    fractions = mask_shares.class_fractions(labels, (2, 2), num_classes=3)
    assert fractions[0, 0, 0].tolist() == [0.75, 0.25, 0]
    assert fractions[0, 1, 1].tolist() == [0.5, 0, 0]
    found = mask_shares.enrichment(torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]), fractions)
    # The mask has 1 on class 1 and 0.75 on class 0; of the 14 labelled pixels these have 5 and 9.
    assert found[:2].tolist() == pytest.approx([0.75 / 1.75 / (9 / 14), 1 / 1.75 / (5 / 14)])
    assert found[2].isnan()


# ------------------------------------------------------------------------------------------------------------- scripts


def test_maps_of_all_methods_are_measured(base: str, tmp_path: Path) -> None:
    short = ["--seeds", "1", "--num_train_epochs", "1", "--max_train_samples", "20", "--mosaics", "6", "--curves", "4"]
    methods = ["--methods", "linear", "lora-all-linear", "toast-lite"]
    runs = focus.main(["--model_name_or_path", base, *short, *methods, "--output_dir", str(tmp_path)])
    of_toast = ["Grad-CAM", "mask", "change of attention", "rollout", "mask, requested", "random"]
    assert list(runs["relevance"]) == ["Grad-CAM", "rollout"] * 2 + of_toast
    assert runs["accuracy"].between(0, 100).all() and runs["focus"].dropna().between(0, 100).all()
    areas = runs.set_index("method")[["deletion", "insertion"]]
    assert areas.loc["toast-lite"].gt(0).all(axis=None) and areas.loc["linear"].isna().all(axis=None)
    assert "| `toast-lite`" in (tmp_path / "focus.md").read_text()
    assert pd.read_csv(tmp_path / "runs.csv").shape == runs.shape


def test_masks_of_classes_are_measured(base: str, tmp_path: Path) -> None:
    short = ["--seeds", "1", "--num_train_epochs", "1", "--max_train_samples", "10", "--max_test_samples", "4"]
    options = ["--model_name_or_path", base, "--image_size", "16", "--output_dir", str(tmp_path)]
    names = ["none", "five", "six", "seven", "eight", "nine"]
    runs = mask_shares.main([*options, *short, "--class_names", *names])
    assert list(runs["class"]) == names
    assert runs["pixels"].sum() == pytest.approx(100, abs=1e-3)
    for column in ("start", "trained"):
        assert (runs[column] * runs["pixels"]).sum() == pytest.approx(100, abs=1e-3)
    assert "| five " in (tmp_path / "mask_shares.md").read_text()
