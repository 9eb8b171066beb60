"""`compare_methods.py`: that all methods are treated alike, what each trains, and that nothing is trained twice."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import compare_methods
import methods
import offline
import pandas as pd
import pytest
import swap
import torch
from comparison import NEW_MODULES_LEARNING_RATE, make_optimizer, search_points
from cost import training_step_cost
from methods import METHODS, add_deep_prompts, apply_method
from PIL import Image
from torch import nn
from transformers import Trainer, ViTConfig, ViTForImageClassification

import toast_peft
from toast_peft import TopDownConfig

SHORT = ["--tries", "1", "--seeds", "1", "--validation_share", "0.25", "--num_train_epochs", "1"]
SHORT += ["--max_train_samples", "20", "--max_test_samples", "24", "--pretraining_steps", "1"]
HEAD = {"classifier.weight", "classifier.bias"}
NEW_HEAD = {"modules_to_save": ["classifier"]}
SIZE, MLP, BLOCKS = 24, 48, 4


def tiny_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": SIZE, "intermediate_size": MLP, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=2)).eval()


def batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return offline.small_vit(tmp_path_factory.mktemp("base"), steps=1)


@pytest.fixture
def compare(base: str, tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Runs the script in its smallest form."""
    return lambda *further: compare_methods.main(
        ["--model_name_or_path", base, "--output_dir", str(tmp_path), *SHORT, "--methods", *further]
    )


@pytest.fixture
def pretrained_feedback(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What TOAST was to start from, instead of which it starts anew; for each of its configs."""
    paths = []

    def config(pretrained_feedback: str | None = None, **options: object) -> TopDownConfig:
        paths.append(pretrained_feedback)
        return TopDownConfig(**options)

    for name in ("toast", "toast-pretuned"):
        monkeypatch.setitem(methods.METHODS, name, METHODS[name]._replace(config=config))
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


def test_an_interrupted_comparison_goes_on_where_it_was(
    compare: Callable, trainings: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare("linear", "toast-lite")
    runs = compare("linear", "toast-lite")
    # 15 images for the search, all 20 for the test; the interrupted run is repeated, the first two are not.
    linear, lite = METHODS["linear"].vision, METHODS["toast-lite"].vision
    assert trainings == [(15, linear), (20, linear), (15, lite), (15, lite), (20, lite)]
    pd.testing.assert_frame_equal(compare("linear", "toast-lite"), runs)
    assert len(trainings) == 5
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "runs.csv"), runs)

    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert "\n".join(lines) in capsys.readouterr().out
    for line, (_, run) in zip(lines[2:], runs[runs["split"] == "test"].iterrows(), strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        expected = [f"`{run['method']}`", f"{run['trainable_parameters']:,}", f"{run['accuracy']:.3f}"]
        assert cells[1:4] == expected
        assert run["accuracy"] * 24 == pytest.approx(round(run["accuracy"] * 24))
    with Image.open(tmp_path / "comparison.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24)) > 10


def test_more_seeds_and_tries_only_add_trainings(compare: Callable, trainings: list) -> None:
    first = compare("linear")
    trainings += [None]  # of the following none is interrupted
    more = compare("linear", "--seeds", "3", "--tries", "2")
    assert len(trainings) == 3 + 3
    assert first["learning_rate"][0] == more["learning_rate"][0]
    assert list(more["split"]) == ["validation"] * 2 + ["test"] * 3
    assert list(more["seed"]) == [42, 42, 42, 43, 44]


@pytest.mark.parametrize("method", ["toast-late", "pass2-lora-biases"])
def test_stored_features_change_no_result(method: str, compare: Callable, tmp_path: Path) -> None:
    measured = [
        compare(method, "--output_dir", str(tmp_path / name), *options)[["accuracy", "loss"]]
        for name, options in (("plain", []), ("stored", ["--store_features", str(tmp_path / "features")]))
    ]
    pd.testing.assert_frame_equal(*measured, rtol=1e-4)
    assert {path.name for path in (tmp_path / "features" / method).iterdir()} == {"search", "train"}


def test_trainings_of_other_settings_are_refused(compare: Callable, pretrained_feedback: list[str | None]) -> None:
    compare("toast", "toast-pretuned", "--pretrained_feedback", "saved")
    assert pretrained_feedback == [None, None, "saved", "saved"]
    compare("toast", "--pretrained_feedback", "other")
    with pytest.raises(
        ValueError, match="of toast-pretuned, validation .* pretrained_feedback was 'saved', is 'other'"
    ):
        compare("toast", "toast-pretuned", "--pretrained_feedback", "other")
    with pytest.raises(
        ValueError, match=r"num_train_epochs was 1.0, is 2.0\. Give the same ones .* another --output_dir"
    ):
        compare("toast", "--num_train_epochs", "2")
    assert len(pretrained_feedback) == 4


def test_all_methods_start_from_the_same_head_and_see_the_images_in_the_same_order(
    compare: Callable, monkeypatch: pytest.MonkeyPatch
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
    compare("linear", "vpt-deep", "toast", "--per_device_train_batch_size", "10")
    assert (len(heads), len(batches)) == (6, 12)  # for each method a search and a test, with two steps each
    for records in (heads, batches):
        third = len(records) // 3
        for linear, vpt, toast in zip(records[:third], records[third : 2 * third], records[2 * third :], strict=True):
            assert torch.equal(vpt, linear) and torch.equal(toast, linear)
    assert not torch.equal(batches[2], batches[3])


def test_the_best_try_has_the_highest_validation_accuracy_then_the_lowest_loss(
    compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([(0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.6, 0.1), (0.4, 1.0)])
    cost = {"trainable_parameters": 1, "flops_per_step": 1, "activation_megabytes": 1.0, "seconds": 1.0}
    monkeypatch.setattr(
        compare_methods.ImageComparison,
        "train",
        lambda *args: dict(zip(("accuracy", "loss"), next(measured), strict=True)) | cost,
    )
    runs = compare("toast", "--tries", "4")
    assert runs["learning_rate"][4] == search_points(METHODS["toast"].vision, 4)[2]["learning_rate"]
    assert list(runs["split"]) == ["validation"] * 4 + ["test"]


def test_all_methods_are_searched_over_two_decades_in_the_same_way() -> None:
    points = pd.DataFrame(search_points(1.0, 7))
    for rate in (rate for method in METHODS.values() for rate in method[:2] + (method.encoder,) if rate):
        tried = pd.DataFrame(search_points(rate, 7))
        pd.testing.assert_frame_equal(tried / [rate, 1], points)
        pd.testing.assert_frame_equal(tried[:3], pd.DataFrame(search_points(rate, 3)))
    rates, decays = points["learning_rate"], points["weight_decay"]
    assert rates[0] == 1
    assert rates.nunique() == decays.nunique() == 7
    assert 0.1 < rates.min() < 0.2 and 5 < rates.max() < 10
    assert 1e-3 < decays.min() < 3e-3 and 0.3 < decays.max() < 1


def test_splits_have_all_classes_and_no_image_in_common() -> None:
    limits = ["--max_train_samples", "25", "--max_test_samples", "40", "--validation_share", "0.4"]
    arguments = compare_methods.parse(compare_methods.ImageComparisonArguments, "vision", None, limits)
    data = compare_methods.load_images(arguments)
    assert data["train"].features["label"].names == ["5", "6", "7", "8", "9"]
    splits = compare_methods.split(data, arguments)
    assert {name: len(part) for name, part in splits.items()} == {"search": 15, "validation": 10, "test": 40}
    for name, of_each_class in (("search", 3), ("validation", 2), ("test", 8)):
        assert sorted(splits[name]["label"]) == [label for label in range(5) for _ in range(of_each_class)]
    pixels = {name: {image.tobytes() for image in part["image"]} for name, part in splits.items()}
    assert len(pixels["search"] | pixels["validation"] | pixels["test"]) == 65
    assert pixels["search"] | pixels["validation"] <= {image.tobytes() for image in data["train"]["image"]}


def test_images_of_a_file_are_read_with_the_columns_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = offline.digits(range(3), examples_per_class=4)["train"].rename_columns({"image": "img", "label": "digit"})
    rows.to_parquet(tmp_path / "train.parquet")
    named = ["--train_file", str(tmp_path / "train.parquet"), "--test_file", str(tmp_path / "train.parquet")]
    named += ["--image_column_name", "img", "--label_column_name", "digit"]
    arguments = compare_methods.parse(compare_methods.ImageComparisonArguments, "vision", None, named)
    data = compare_methods.load_images(arguments)
    assert set(data) == {"train", "test"}
    assert list(data["test"]["label"]) == list(rows["digit"])


def toast_names(blocks: range, factors: tuple[str, ...] = ("",), of_transform: tuple[str, ...] = ("",)) -> set[str]:
    layers = {
        f"layers.{block}.topdown_{linear}{factor}"
        for block in blocks
        for linear in ("linear1", "linear2")
        for factor in factors
    }
    transform = {f"selection.topdown_transform{factor}" for factor in of_transform}
    parts = layers | transform | {"selection.topdown_prompt"}
    return {f"vit.feedback_path.{part}.weight" for part in parts}


def oft_names(layers: list[str]) -> set[str]:
    return {f"vit.layers.{block}.{layer}.oft_R.weight" for block in range(BLOCKS) for layer in layers}


def lora_names(layers: list[str]) -> set[str]:
    return {
        f"vit.layers.{block}.{layer}.lora_{factor}.weight"
        for block in range(BLOCKS)
        for layer in layers
        for factor in "AB"
    }


def pass2_names(layers: list[str], parts: Sequence[str] = "AB") -> set[str]:
    return {
        f"vit.feedback_path.second_pass.{block}-{layer.replace('.', '-')}-pass2.topdown_pass2_{part}.weight"
        for block in range(BLOCKS)
        for layer in layers
        for part in parts
    }


def names_of_base(ending: str = "") -> set[str]:
    return {name for name, _ in tiny_vit().named_parameters() if name.endswith(ending)}


ATTENTION, MLP_LAYERS = [f"attention.{part}_proj" for part in "qkvo"], ["mlp.fc1", "mlp.fc2"]
ALL_LINEAR = [*ATTENTION, *MLP_LAYERS]
OUTPUT = {"vit.feedback_path.to_output.topdown_output.weight"}
ALL, EARLY, LATE, LITE = range(BLOCKS), range(2), range(2, BLOCKS), ("_A", "_B")
TRAINABLE = {
    "linear": set(),
    "full": names_of_base(),
    "bitfit": names_of_base(".bias"),
    "vpt-deep": {"prompts.weight"},
    "lora": lora_names([ATTENTION[0], ATTENTION[2]]),
    "lora-mlp": lora_names(MLP_LAYERS),
    "lora-all-linear": lora_names(ALL_LINEAR),
    "lora-all-linear-biases": lora_names(ALL_LINEAR) | names_of_base(".bias"),
    "lora-all-linear-replay": lora_names(ALL_LINEAR),
    "oft": oft_names(ALL_LINEAR),
    "pass2-lora": pass2_names(ALL_LINEAR),
    "pass2-lora-gated": pass2_names(ALL_LINEAR),
    "pass2-biases": pass2_names(ALL_LINEAR, ["bias"]),
    "pass2-lora-biases": pass2_names(ALL_LINEAR, ["A", "B", "bias"]),
    "toast": toast_names(ALL),
    "toast-initialized": toast_names(ALL),
    "toast-output-initialized": toast_names(ALL) | OUTPUT,
    "toast-output-gated-initialized": toast_names(ALL) | OUTPUT,
    "toast-pretuned": toast_names(ALL),
    "toast-early": toast_names(EARLY),
    "toast-late": toast_names(LATE),
    "toast-lite": toast_names(ALL, LITE),
    "toast-lite-initialized": toast_names(ALL, LITE),
    "toast-lite-pass2-lora-biases": toast_names(ALL, LITE) | pass2_names(ALL_LINEAR, ["A", "B", "bias"]),
    "toast-lite-transform-8": toast_names(ALL, LITE, LITE),
    "toast-lite-early": toast_names(EARLY, LITE),
    "toast-lite-late": toast_names(LATE, LITE),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_own_parameters_and_the_new_head(
    method: str, monkeypatch: pytest.MonkeyPatch, pretrained_feedback: list[str | None]
) -> None:
    calls, fits = [], []
    monkeypatch.setattr(toast_peft, "initialize_feedback", lambda *args: calls.append(args))
    monkeypatch.setattr(toast_peft, "fit_gate", lambda *args: fits.append(args))
    model = apply_method(tiny_vit(), method, "batches", "saved", reference="reference", **NEW_HEAD)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for addition in ("base_model.model.", ".base_layer", ".default", ".modules_to_save"):
        names = {name.replace(addition, "") for name in names}
    assert names == TRAINABLE[method] | HEAD
    assert ("saved" in pretrained_feedback) == (method == "toast-pretuned")
    assert calls == ([(model, "batches")] if method.endswith("-initialized") else [])
    assert fits == ([(model, "batches", "reference")] if "-gated" in method else [])


@pytest.mark.parametrize("method", ["lora", "toast", "bitfit"])
def test_a_new_head_has_the_same_learning_rate_with_all_methods(method: str) -> None:
    model = apply_method(tiny_vit(), method, **NEW_HEAD)
    groups = make_optimizer(model, 0.5, 0.25, ["classifier"]).param_groups
    used = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert used.keys() == {id(parameter) for parameter in trained.values()}
    for name, parameter in trained.items():
        rate = NEW_MODULES_LEARNING_RATE if "classifier" in name else 0.5
        assert used[id(parameter)] == (rate, 0.0 if parameter.dim() == 1 else 0.25)


def test_deep_prompts_are_those_of_the_paper() -> None:
    model, base = (tiny_vit().double() for _ in range(2))
    pixel_values = batch()["pixel_values"].double()
    add_deep_prompts(model, length=3)
    prompts = model.prompts.weight
    assert prompts.shape == (BLOCKS, 3, SIZE)
    hidden_states = base.vit.embeddings(pixel_values)
    first, image = hidden_states[:, :1], hidden_states[:, 1:]
    for block, prompt in zip(base.vit.layers, prompts.double(), strict=True):  # after the first token, as in the paper
        output = block(torch.cat([first, prompt.expand(len(image), -1, -1), image], dim=1))
        first, image = output[:, :1], output[:, 1 + prompt.shape[0] :]
    expected = base.classifier(base.vit.layernorm(first[:, 0]))
    logits = model(pixel_values).logits
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert (logits - base(pixel_values).logits).abs().max() > 1e-3
    logits.square().sum().backward()
    assert (prompts.grad.abs().amax(-1) > 0).all()


def test_deep_prompts_need_a_list_of_blocks() -> None:
    model = tiny_vit()
    model.vit.layers = nn.Sequential(*model.vit.layers)
    with pytest.raises(ValueError, match="ViTForImageClassification has no list of 4 blocks; take a ViT"):
        add_deep_prompts(model)


def test_cost_of_a_training_step() -> None:
    images, tokens, patches, classes, patch_values = 2, 5, 4, 2, 3 * 4 * 4
    head = images * SIZE * classes
    block = images * tokens * (4 * SIZE * SIZE + 2 * SIZE * MLP) + 2 * images * tokens * tokens * SIZE
    forward = images * patches * patch_values * SIZE + BLOCKS * block + head
    cost = {}
    for method in ("linear", "full", "lora", "toast-late"):
        model = apply_method(tiny_vit(), method, **NEW_HEAD)
        cost[method] = training_step_cost(model, batch())
        assert all(parameter.grad is None for parameter in model.parameters())
    # The backward of a linear probe computes the gradient of the head's weight, the features need none.
    assert cost["linear"]["flops_per_step"] == 2 * (forward + head)
    # Here the backward is twice the forward, but for the gradient of the image.
    assert cost["full"]["flops_per_step"] == 2 * (3 * forward - images * patches * patch_values * SIZE)
    megabytes = {method: measured["activation_megabytes"] for method, measured in cost.items()}
    assert megabytes["linear"] * 20 < megabytes["toast-late"] < megabytes["lora"] < megabytes["full"]


def test_measuring_the_cost_keeps_no_tensors() -> None:
    model, inputs = tiny_vit(), batch()
    training_step_cost(model, inputs)
    gc.collect()
    before = sum(isinstance(item, torch.Tensor) for item in gc.get_objects())
    training_step_cost(model, inputs)
    gc.collect()
    assert sum(isinstance(item, torch.Tensor) for item in gc.get_objects()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "toast-pretuned"], "--pretrained_feedback is needed for toast-pretuned"),
        (["--methods", "toast", "lines"], "--methods lines cannot run; choose some of linear, full"),
        (["--tries", "0"], "--tries 0 --seeds 3: both must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_methods.main(arguments)
    assert message in capsys.readouterr().err


def test_the_default_are_all_methods_that_can_run() -> None:
    def chosen(*arguments: str) -> list[str]:
        return compare_methods.parse(compare_methods.ImageComparisonArguments, "vision", None, list(arguments)).methods

    possible = [name for name, method in METHODS.items() if method.vision is not None]
    assert chosen() == [name for name in possible if name != "toast-pretuned"]
    assert chosen("--pretrained_feedback", "saved") == possible


def test_help_fits_on_two_screens(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_methods.main(["--help"])
    printed = capsys.readouterr().out
    assert "    python examples/benchmarks/compare_methods.py\n" in printed
    assert len(printed.splitlines()) < 100


def test_the_swap_test_has_a_column_for_each_feedback(base: str, tmp_path: Path) -> None:
    """Without feedback it is the base model with the trained head, which other features cannot change."""
    runs = swap.main(["--model_name_or_path", base, "--output_dir", str(tmp_path), *SHORT, "--methods", "toast-lite"])
    tested = runs[runs["split"] == "test"]
    assert tested[swap.SwapComparison.columns].notna().all(axis=None)
    header = (tmp_path / "comparison.md").read_text().splitlines()[0]
    assert all(column in header for column in ("of the next image", "of the mean", "without feedback"))
