"""`compare_methods.py`: that all methods are treated alike, what each trains, and that nothing is trained twice."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import compare_methods
import fine_tuning_methods
import pytest
import torch
from comparison import Run, make_optimizer, search_points, training_step_cost
from fine_tuning_methods import HEAD_LEARNING_RATE, LEARNING_RATES, TEXT_LEARNING_RATES, add_deep_prompts, apply_method
from PIL import Image
from torch import nn
from transformers import Trainer, ViTForImageClassification, ViTImageProcessorPil

import toast_peft
from toast_peft import TopDownConfig

from .models import HIDDEN_SIZE, NUM_BLOCKS, inputs_of, tiny_model

SHORT = ["--methods", "linear", "toast-lite", "--tries", "1", "--seeds", "1", "--validation_share", "0.25"]
SHORT += ["--max_train_samples", "20", "--max_eval_samples", "24", "--num_train_epochs", "1", "--image_size", "16"]
HEAD = {"classifier.weight", "classifier.bias"}
NEW_HEAD = {"modules_to_save": ["classifier"]}


@pytest.fixture
def script(tmp_path: Path) -> Callable:
    """Runs the script with a tiny ViT of images 8 x 8."""
    base, output = tmp_path / "base", tmp_path / "comparison"
    tiny_model(ViTForImageClassification).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(base)
    arguments = ["--model_name_or_path", str(base), "--output_dir", str(output)]
    return lambda *further: compare_methods.main([*arguments, *SHORT, *further])


@pytest.fixture
def pretrained_feedback(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What TOAST was to start from, instead of which it starts anew; for each of its configs."""
    paths = []

    def config(pretrained_feedback: str | None = None, **options: object) -> TopDownConfig:
        paths.append(pretrained_feedback)
        return TopDownConfig(**options)

    monkeypatch.setattr(fine_tuning_methods, "TopDownConfig", config)
    return paths


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Number of images and learning rate of each training from now on; the third one is interrupted."""
    sizes = []
    train = Trainer.train

    def counted(trainer: Trainer) -> object:
        sizes.append((len(trainer.train_dataset), trainer.optimizer.param_groups[0]["lr"]))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return train(trainer)

    monkeypatch.setattr(Trainer, "train", counted)
    return sizes


def stored_runs(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["runs"]


def test_table_plot_and_resuming(script: Callable, trainings: list, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    with pytest.raises(KeyboardInterrupt):
        script()
    assert [entry["run"]["evaluated_on"] for entry in stored_runs(folder)] == ["validation", "test"]
    rows = script()
    # 15 images for the search, all 20 for the test; the interrupted run is repeated, the first two are not.
    linear, lite = LEARNING_RATES["linear"], LEARNING_RATES["toast-lite"]
    assert trainings == [(15, linear), (20, linear), (15, lite), (15, lite), (20, lite)]
    assert script() == rows
    assert len(trainings) == 5
    assert len(stored_runs(folder)) == 4

    lines = (folder / "comparison.md").read_text().splitlines()
    assert "over 1 seeds, with the best of 1 learning rates" in lines[0]
    assert len(lines) == 6
    for line, row, entry in zip(lines[4:], rows, stored_runs(folder)[1::2], strict=True):
        assert line.startswith(f"| {row['method']} | {row['trainable_parameters']:,} | {row['accuracy']:.3f} |")
        assert row["accuracy"] == entry["metrics"]["accuracy"]
        assert row["accuracy"] * 24 == pytest.approx(round(row["accuracy"] * 24))
    with Image.open(folder / "comparison.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24)) > 10


def test_more_seeds_and_tries_only_add_runs(script: Callable, tmp_path: Path) -> None:
    script("--methods", "linear")
    [search, first] = stored_runs(tmp_path / "comparison")
    [row] = script("--methods", "linear", "--seeds", "3")
    runs = stored_runs(tmp_path / "comparison")
    assert runs[:2] == [search, first]
    accuracies = torch.tensor([entry["metrics"]["accuracy"] for entry in runs[1:]], dtype=torch.float64)
    assert len({entry["run"]["seed"] for entry in runs[1:]}) == 3
    assert row["accuracy"] == pytest.approx(accuracies.mean().item())
    assert row["accuracy deviation"] == pytest.approx(accuracies.std().item())
    script("--methods", "linear", "--tries", "2")
    assert sum(entry["run"]["evaluated_on"] == "validation" for entry in stored_runs(tmp_path / "comparison")) == 2


def test_pretrained_feedback_is_for_one_method(
    script: Callable, pretrained_feedback: list[str | None], tmp_path: Path
) -> None:
    script("--methods", "toast")
    script("--methods", "toast", "toast-pretuned", "--pretrained_feedback", "saved")
    script("--methods", "toast", "toast-pretuned", "--pretrained_feedback", "other")
    runs = [entry["run"] for entry in stored_runs(tmp_path / "comparison")]
    assert [run["method"] for run in runs] == ["toast"] * 2 + ["toast-pretuned"] * 4
    assert pretrained_feedback == [run["pretrained_feedback"] for run in runs]
    assert pretrained_feedback == [None, None, "saved", "saved", "other", "other"]


def test_all_methods_start_from_the_same_head_and_see_the_images_in_the_same_order(
    script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, batches = [], []
    train, step = Trainer.train, Trainer.training_step

    def recorded_train(trainer: Trainer) -> object:
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        heads.append(next(p.detach().clone() for name, p in trained.items() if "classifier" in name))
        return train(trainer)

    def recorded_step(trainer: Trainer, model: nn.Module, inputs: dict, *args: object) -> torch.Tensor:
        batches.append(inputs["pixel_values"])
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(Trainer, "train", recorded_train)
    monkeypatch.setattr(Trainer, "training_step", recorded_step)
    script("--methods", "linear", "vpt-deep", "toast", "--per_device_train_batch_size", "10")
    assert len(heads) == 6  # for each method one of the search and one for the table
    assert len(batches) == 12  # with two steps each
    for records in (heads, batches):
        of_linear, of_vpt, of_toast = zip(*[iter(records)] * (len(records) // 3), strict=True)
        for linear, vpt, toast in zip(of_linear, of_vpt, of_toast, strict=True):
            assert torch.equal(vpt, linear) and torch.equal(toast, linear)
    assert not torch.equal(batches[2], batches[3])


def test_results_of_other_settings_are_refused(script: Callable) -> None:
    script("--methods", "linear")
    with pytest.raises(ValueError, match="image_size was 16, is 8; num_train_epochs was 1.0, is 2.0. Give the same"):
        script("--num_train_epochs", "2", "--image_size", "8")


def test_the_best_try_is_the_one_of_the_highest_validation_accuracy_then_lowest_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = iter([(0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.6, 0.1)])
    arguments, _, training_arguments = compare_methods.parse(["--tries", "4"])
    comparison = compare_methods.ImageComparison(arguments, training_arguments, "", {}, None, None, {})
    monkeypatch.setattr(
        comparison, "metrics", lambda run: dict(zip(("accuracy", "loss"), next(measured), strict=True))
    )
    best = comparison.search("toast")
    assert (best.learning_rate, best.weight_decay) == search_points(LEARNING_RATES["toast"], 4)[2]
    assert best.evaluated_on == "validation"


def test_all_methods_are_searched_in_the_same_way() -> None:
    points = torch.tensor(search_points(1.0, 7))
    for rate in (TEXT_LEARNING_RATES | LEARNING_RATES).values():
        tried = torch.tensor(search_points(rate, 7))
        torch.testing.assert_close(tried / torch.tensor([rate, 1.0]), points)
        assert tried[:3].tolist() == torch.tensor(search_points(rate, 3)).tolist()
    rates, decays = points.T
    assert rates[0] == 1
    assert len(set(rates.tolist())) == len(set(decays.tolist())) == 7
    assert 0.1 <= rates.min() < 0.3 and 3 < rates.max() <= 10
    assert 1e-3 <= decays.min() < 1e-2 and 0.1 < decays.max() <= 1


def test_splits_have_all_classes_and_no_image_in_common() -> None:
    _, images, _ = compare_methods.parse(["--max_train_samples", "25", "--max_eval_samples", "40"])
    data = compare_methods.load_images(replace(images, max_train_samples=None, max_eval_samples=None))
    splits = compare_methods.split(data, images, validation_share=0.4, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"search": 15, "validation": 10, "test": 40}
    for name, of_each_class in (("search", 3), ("validation", 2), ("test", 8)):
        assert sorted(splits[name]["label"]) == [label for label in range(5) for _ in range(of_each_class)]
    pixels = {name: {image.tobytes() for image in part["image"]} for name, part in splits.items()}
    assert len(pixels["search"] | pixels["validation"] | pixels["test"]) == 65
    assert pixels["search"] | pixels["validation"] <= {image.tobytes() for image in data["train"]["image"]}


def test_images_are_kept_as_the_processor_gives_them() -> None:
    _, images, _ = compare_methods.parse([])
    data = compare_methods.load_images(images)["train"]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    rows = compare_methods.load_rows(data, processor)
    assert [row["labels"] for row in rows] == list(data["label"])
    expected = processor(data[7]["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(rows[7]["pixel_values"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_train_samples", "4"], "50 images of 5 classes cannot be split .* with train_size=4 .* Change --max"),
        (["--validation_share", "0.05"], "50 images of 5 classes cannot be split .* with test_size=0.05 .* Change"),
    ],
)
def test_too_few_images(arguments: list[str], message: str) -> None:
    comparison, images, _ = compare_methods.parse(arguments)
    data = compare_methods.load_images(replace(images, max_train_samples=None))
    with pytest.raises(ValueError, match=message):
        compare_methods.split(data, images, comparison.validation_share, seed=0)


def toast_names(blocks: range, factors: tuple[str, ...] = ("",)) -> set[str]:
    path = "vit.feedback_path."
    layers = {
        f"layers.{block}.topdown_{linear}{factor}"
        for block in blocks
        for linear in ("linear1", "linear2")
        for factor in factors
    }
    return {f"{path}{part}.weight" for part in layers | {"selection.topdown_prompt", "selection.topdown_transform"}}


def names_of_base(ending: str = "") -> set[str]:
    return {name for name, _ in tiny_model(ViTForImageClassification).named_parameters() if name.endswith(ending)}


ALL = range(NUM_BLOCKS)
TRAINABLE = {
    "linear": set(),
    "full": names_of_base(),
    "bitfit": names_of_base(".bias"),
    "lora": {
        f"vit.layers.{block}.attention.{part}_proj.lora_{factor}.weight"
        for block in ALL
        for part in "qv"
        for factor in "AB"
    },
    "vpt-deep": {"prompts.weight"},
    "toast": toast_names(ALL),
    "toast-lite": toast_names(ALL, ("_A", "_B")),
    "toast-early": toast_names(range(0, 2)),
    "toast-late": toast_names(range(2, 4)),
    "toast-lite-initialized": toast_names(ALL, ("_A", "_B")),
    "toast-initialized": toast_names(ALL),
    "toast-pretuned": toast_names(ALL),
}


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_trainable_parameters(
    method: str, monkeypatch: pytest.MonkeyPatch, pretrained_feedback: list[str | None]
) -> None:
    calls = []
    monkeypatch.setattr(toast_peft, "initialize_feedback", lambda *args: calls.append(args), raising=False)
    model = apply_method(tiny_model(ViTForImageClassification), method, "batches", "saved", **NEW_HEAD)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for addition in ("base_model.model.", ".default", ".modules_to_save"):
        names = {name.replace(addition, "") for name in names}
    assert names == TRAINABLE[method] | HEAD
    assert ("saved" in pretrained_feedback) == (method == "toast-pretuned")
    assert calls == ([(model, "batches")] if method.endswith("-initialized") else [])


@pytest.mark.parametrize("method", ["linear", "lora", "toast", "bitfit"])
def test_a_new_head_has_the_same_learning_rate_with_all_methods(method: str) -> None:
    model = apply_method(tiny_model(ViTForImageClassification), method, None, **NEW_HEAD)
    groups = make_optimizer(model, Run(method, "test", 0.5, 0.25, seed=0), ["classifier"]).param_groups
    used = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert used.keys() == {id(parameter) for parameter in trained.values()}
    for name, parameter in trained.items():
        rate = HEAD_LEARNING_RATE if "classifier" in name and method != "linear" else 0.5
        assert used[id(parameter)] == (rate, 0.0 if parameter.dim() == 1 else 0.25)


def prompted_logits(model: ViTForImageClassification, prompts: torch.Tensor) -> torch.Tensor:
    """VPT-deep as in the paper: prompts after the first token, replaced in each block."""
    hidden_states = model.vit.embeddings(inputs_of(model)["pixel_values"].double())
    first, image = hidden_states[:, :1], hidden_states[:, 1:]
    for block, prompt in zip(model.vit.layers, prompts, strict=True):
        output = block(torch.cat([first, prompt.expand(len(image), -1, -1), image], dim=1))
        first, image = output[:, :1], output[:, 1 + prompt.shape[0] :]
    return model.classifier(model.vit.layernorm(first[:, 0]))


def test_deep_prompts_are_those_of_the_paper() -> None:
    model, base = (tiny_model(ViTForImageClassification).double() for _ in range(2))
    without = base(**inputs_of(base)).logits
    add_deep_prompts(model, length=3)
    prompts = model.prompts.weight
    assert prompts.shape == (NUM_BLOCKS, 3, HIDDEN_SIZE)
    logits = model(**inputs_of(model)).logits
    torch.testing.assert_close(logits, prompted_logits(base, prompts.double()), atol=1e-12, rtol=0)
    assert (logits - without).abs().max() > 1e-3
    logits.square().sum().backward()
    assert (prompts.grad.abs().amax(-1) > 0).all()


def test_no_deep_prompts_leave_the_model_as_it_is() -> None:
    model = tiny_model(ViTForImageClassification)
    expected = model(**inputs_of(model)).logits
    add_deep_prompts(model, length=0)
    assert torch.equal(model(**inputs_of(model)).logits, expected)


def test_deep_prompts_need_a_list_of_blocks() -> None:
    model = tiny_model(ViTForImageClassification)
    model.vit.layers = nn.Sequential(*model.vit.layers)
    with pytest.raises(ValueError, match="ViTForImageClassification has no list of 4 blocks; take a ViT"):
        add_deep_prompts(model)


def test_cost_of_a_training_step() -> None:
    batch = inputs_of(tiny_model(ViTForImageClassification)) | {"labels": torch.tensor([0, 1])}
    images, tokens, patches, classes = 2, 5, 4, 2
    d, mlp, patch_values = HIDDEN_SIZE, 48, 3 * 4 * 4
    head = images * d * classes
    block = images * tokens * (4 * d * d + 2 * d * mlp) + 2 * images * tokens * tokens * d
    forward = images * patches * patch_values * d + NUM_BLOCKS * block + head
    cost = {}
    for method in ("linear", "full", "lora", "toast-late"):
        model = apply_method(tiny_model(ViTForImageClassification), method, None, **NEW_HEAD)
        cost[method] = training_step_cost(model, batch)
        assert all(parameter.grad is None for parameter in model.parameters())
    # The backward of a linear probe computes the gradient of the head's weight, the features need none.
    assert cost["linear"]["flops_per_step"] == 2 * (forward + head)
    # Here the backward is twice the forward, but for the gradient of the image.
    assert cost["full"]["flops_per_step"] == 2 * (3 * forward - images * patches * patch_values * d)
    megabytes = {method: measured["activation_megabytes"] for method, measured in cost.items()}
    assert megabytes["linear"] * 20 < megabytes["toast-late"] < megabytes["lora"] < megabytes["full"]


def test_measuring_the_cost_keeps_no_tensors() -> None:
    model = tiny_model(ViTForImageClassification)
    batch = inputs_of(model) | {"labels": torch.tensor([0, 1])}
    training_step_cost(model, batch)
    gc.collect()
    before = sum(isinstance(item, torch.Tensor) for item in gc.get_objects())
    training_step_cost(model, batch)
    gc.collect()
    assert sum(isinstance(item, torch.Tensor) for item in gc.get_objects()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "toast-pretuned"], "--methods toast-pretuned needs --pretrained_feedback"),
        (["--methods", "toast", "lines"], "--methods lines is unknown; choose some of linear, full"),
        (["--learning_rate", "1e-3"], "--learning_rate and --weight_decay are chosen by the search"),
        (["--weight_decay", "0"], "--learning_rate and --weight_decay are chosen by the search"),
        (["--tries", "0"], "--tries 0 --seeds 3: both must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_methods.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_default_are_all_methods_that_can_run() -> None:
    assert compare_methods.parse([])[0].methods == [name for name in LEARNING_RATES if name != "toast-pretuned"]
    assert compare_methods.parse(["--pretrained_feedback", "saved"])[0].methods == list(LEARNING_RATES)
