"""The example scripts and the demo, each in a very short run: they train, write their metrics and save what loads."""

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import custom_model
import datasets
import demo
import image_classification
import language_modeling
import pretraining_feedback
import prompt_from_text
import pytest
import semantic_segmentation
import text_classification
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

pytestmark = pytest.mark.usefixtures("library_is_small")
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
SCRIPTS = (
    image_classification,
    language_modeling,
    text_classification,
    semantic_segmentation,
    pretraining_feedback,
    custom_model,
    prompt_from_text,
)
NAMES = sorted([*(script.__name__ for script in SCRIPTS), "instruction_tuning"])
SHORT = ["--pretraining_steps", "2", "--max_steps", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]


def run(script: ModuleType, output: Path, *options: str) -> dict[str, float]:
    """Run a script; what it returns is also in the file, and it has saved an adapter."""
    metrics = script.main([*SHORT, "--output_dir", str(output), *options])
    assert json.loads((output / "all_results.json").read_text()) == metrics
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "TOPDOWN"
    return metrics


def assert_loads_and_steers(base: nn.Module, output: Path, inputs: dict[str, torch.Tensor]) -> None:
    """The adapter of a script fits the base model, and has learned something."""
    model = PeftModel.from_pretrained(base, output)
    assert model.peft_config["default"].r == 8
    with torch.no_grad():
        adapted = model(**inputs)["logits"]
        inputs = {name: x for name, x in inputs.items() if name != "topdown_prompt"}
        with model.disable_adapter():
            assert (adapted - model(**inputs)["logits"]).abs().max() > 1e-5


@pytest.fixture
def data_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps what `load_dataset` stores out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------- all scripts


def test_every_example_is_tested() -> None:
    notebook_and_demo = {"demo", "quickstart"}
    found = {path.stem for pattern in ("*.py", "*.ipynb") for path in FOLDER.glob(pattern)}
    assert found - notebook_and_demo == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_file_that_imports_no_sibling(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    siblings = {path.stem for path in FOLDER.iterdir()}
    assert "toast_peft" in imported
    assert not {module.split(".")[0] for module in imported} & siblings


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_is_about_our_own_options(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.parse(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70
    assert "--pretraining_steps" in text and "TrainingArguments" in text and "--weight_decay" not in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_options_of_the_trainer_work_and_misspelt_ones_are_refused(script: ModuleType) -> None:
    _, arguments = script.parse(["--weight_decay", "0.5", "--pretraining_steps", "7"])
    assert arguments.weight_decay == 0.5
    with pytest.raises(ValueError, match="--lerning_rate"):
        script.parse(["--pretraining_steps", "7", "--lerning_rate", "1"])


# ------------------------------------------------------------------------------------------------------------ images


def test_image_classification(tmp_path: Path) -> None:
    stored = ["--store_features", str(tmp_path / "features")]
    metrics = run(image_classification, tmp_path, "--max_steps", "30", "--max_eval_samples", "64", *stored)
    assert (tmp_path / "features" / "features.json").is_file()
    assert metrics["eval_loss"] < metrics["before_loss"]
    base, processor = image_classification.load_model(str(tmp_path / "small_vit"), list("56789"))
    data = image_classification.handwritten_digits(range(5, 10), examples_per_class=2)
    inputs = processor([image.convert("RGB") for image in data["train"]["image"]], return_tensors="pt")
    assert_loads_and_steers(base, tmp_path, inputs)


def test_images_from_a_folder_and_a_model_of_ones_own(tmp_path: Path, data_cache: None) -> None:
    image_classification.pretrain(tmp_path / "vit", steps=1)
    digits = image_classification.handwritten_digits(range(2), examples_per_class=8)
    for split, rows in digits.items():
        for index, row in enumerate(rows.select(range(16))):
            folder = tmp_path / "data" / split / f"digit {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    own = ["--model_name_or_path", str(tmp_path / "vit"), "--dataset_name", str(tmp_path / "data")]
    run(image_classification, tmp_path / "out", *own)
    base, _ = image_classification.load_model(str(tmp_path / "vit"), ["digit 0", "digit 1"])
    assert_loads_and_steers(base, tmp_path / "out", {"pixel_values": torch.randn(2, 3, 8, 8)})


def test_images_from_parquet_files(tmp_path: Path, data_cache: None) -> None:
    rows = image_classification.handwritten_digits(range(5, 10), examples_per_class=4)["train"]
    rows = rows.cast_column("label", datasets.Value("int64")).rename_columns({"image": "img", "label": "digit"})
    rows.to_parquet(tmp_path / "train.parquet")
    columns = ["--image_column_name", "img", "--label_column_name", "digit"]
    arguments, _ = image_classification.parse(["--train_file", str(tmp_path / "train.parquet"), *columns])
    data = image_classification.load_images(arguments)
    assert set(data["train"].column_names) == {"image", "label"}
    assert {split: len(data[split]) for split in data} == {"train": 18, "validation": 2}
    assert data["train"].features["label"].names == ["0", "1", "2", "3", "4"]


def test_nothing_is_held_out_for_validation_if_there_is_a_test_split(tmp_path: Path, data_cache: None) -> None:
    digits = image_classification.handwritten_digits(range(5, 10), examples_per_class=4)
    digits["train"].to_parquet(tmp_path / "train.parquet")
    digits["validation"].to_parquet(tmp_path / "test.parquet")
    arguments, _ = image_classification.parse(["--dataset_name", str(tmp_path), "--max_eval_samples", "10"])
    data = image_classification.load_images(arguments)
    assert list(data["train"]["label"]) == list(digits["train"]["label"])
    assert list(data["validation"]["label"]) == list(digits["validation"]["label"])[:10]


def test_digits_are_balanced_and_turned() -> None:
    data = image_classification.handwritten_digits(range(5, 10), examples_per_class=10)
    assert data["train"].features["label"].names == ["5", "6", "7", "8", "9"]
    assert sorted(data["train"]["label"]) == [label for label in range(5) for _ in range(10)]
    turned = image_classification.handwritten_digits(range(2), examples_per_class=1, orientations=8)["train"]
    assert sorted(turned["label"]) == list(range(16))
    assert len({image.tobytes() for image in turned["image"]}) == 16


def test_segmentation(tmp_path: Path) -> None:
    metrics = run(semantic_segmentation, tmp_path)
    assert 0 <= metrics["eval_mean_iou"] <= 1 and metrics["eval_mean_iou"] != metrics["before_mean_iou"]
    base = tf.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "small_segformer")
    assert_loads_and_steers(base, tmp_path, {"pixel_values": torch.randn(2, 3, 16, 16)})


def test_custom_model(tmp_path: Path) -> None:
    metrics = run(custom_model, tmp_path)
    assert metrics["eval_loss"] != metrics["before_loss"]
    base = custom_model.pretrained_model(tmp_path / "pretrained.safetensors")
    assert_loads_and_steers(base, tmp_path, {"patches": torch.randn(2, 16, 4)})


def test_prompt_from_text(tmp_path: Path) -> None:
    metrics = run(prompt_from_text, tmp_path, "--scenes", "128", "--max_steps", "2")
    assert metrics["eval_loss"] != metrics["before_loss"] and 0 <= metrics["eval_accuracy_new_words"] <= 1
    base = tf.SiglipForImageClassification.from_pretrained(tmp_path / "small_siglip", num_labels=4)
    scenes = prompt_from_text.Scenes(2, for_training=False, requests=[3])
    assert scenes[0]["input_ids"].tolist() == scenes[1]["input_ids"].tolist()
    request = {"topdown_prompt": torch.randn(2, 64)}
    assert_loads_and_steers(base, tmp_path, {"pixel_values": scenes.pixels} | request)


# ------------------------------------------------------------------------------------------------------------- texts


def test_language_modeling(tmp_path: Path) -> None:
    short = ["--block_size", "32", "--max_train_samples", "40", "--max_eval_samples", "20", "--max_steps", "6"]
    metrics = run(language_modeling, tmp_path, *short, "--store_features", str(tmp_path / "features"))
    assert (tmp_path / "features" / "features.json").is_file()
    assert metrics["eval_perplexity"] < metrics["before_perplexity"]
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small_llama")
    assert_loads_and_steers(base, tmp_path, {"input_ids": torch.arange(16).view(2, 8)})


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".csv"])
def test_texts_from_files(suffix: str, tmp_path: Path, data_cache: None) -> None:
    lines = [f"text {index}" for index in range(20)]
    rows = {".txt": lines, ".csv": ["text", *lines]}.get(suffix, [json.dumps({"text": line}) for line in lines])
    file = tmp_path / f"texts{suffix}"
    with gzip.open(file, "wt") if suffix.endswith(".gz") else file.open("w") as stream:
        stream.write("\n".join(rows))
    arguments, _ = language_modeling.parse(["--train_file", str(file), "--max_train_samples", "5"])
    data = language_modeling.load_texts(arguments)
    assert len(data["train"]) == 5 and len(data["validation"]) == 2
    assert set(data["train"]["text"]) | set(data["validation"]["text"]) < set(lines)


def test_the_two_sets_of_docstrings_and_their_splits_are_disjoint() -> None:
    numeric, other = (language_modeling.library_docstrings(numeric=numeric) for numeric in (True, False))
    splits = [set(data[split]["text"]) for data in (numeric, other) for split in ("train", "validation")]
    assert all(len(split) > 50 for split in splits)
    assert not splits[0] & splits[1]
    assert not splits[2] & splits[3]
    assert any(">>> ExtendedContext." in text for text in splits[0])


def test_the_tokens_of_the_small_llama_are_bytes(tmp_path: Path) -> None:
    language_modeling.pretrain(tmp_path, steps=1, block_size=8)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    text = "é 日本\n\t>>> 1 + 1"
    assert len(tokenizer) == 257
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_text_classification(tmp_path: Path) -> None:
    metrics = run(text_classification, tmp_path, "--max_length", "16", "--max_eval_samples", "32")
    assert metrics["eval_loss"] != metrics["before_loss"]
    base = text_classification.load_model(str(tmp_path / "small_modernbert"), sorted(text_classification.PACKAGES))
    assert_loads_and_steers(base, tmp_path, {"input_ids": torch.arange(5, 21).view(2, 8)})


def test_labelled_texts_from_files(tmp_path: Path, data_cache: None) -> None:
    rows = [json.dumps({"sentence": f"text {index}", "kind": "ab"[index % 2]}) for index in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:6]))
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "test.jsonl")]
    columns = ["--text_column_name", "sentence", "--label_column_name", "kind"]
    arguments, _ = text_classification.parse([*files, *columns])
    data = text_classification.load_texts(arguments)
    assert {split: len(data[split]) for split in data} == {"train": 20, "validation": 6}
    assert data["train"].features["label"].names == ["a", "b"]
    assert data["validation"][1] == {"text": "text 1", "label": 1}


# -------------------------------------------------------------------------------------------------------------- demo


def test_the_demo_adapts_saves_and_reloads(tmp_path: Path) -> None:
    options = [*SHORT, "--block_size", "32", "--max_train_samples", "40", "--max_eval_samples", "20"]
    task = demo.texts([*options, "--max_steps", "6", "--output_dir", str(tmp_path)])
    row = demo.adapt(task, "TOAST-Lite", *demo.TEXT_METHODS["TOAST-Lite"])
    assert list(row) == ["task", "method", "trainable parameters", "metric", "before", "after", "seconds"]
    assert row["metric"] == "perplexity" and float(row["after"]) < float(row["before"])


@pytest.mark.parametrize("method", ["linear probe", "TOAST-Lite"])
def test_the_demo_fails_if_a_result_is_not_reproduced(method: str, tmp_path: Path) -> None:
    task = demo.images([*SHORT, "--max_eval_samples", "16", "--output_dir", str(tmp_path)])
    row = demo.adapt(task, method, *demo.IMAGE_METHODS[method])
    assert row["metric"] == "accuracy"
    with pytest.raises(SystemExit, match=r"the loss was 0\.125, but is .* after reloading"):
        demo.check_reloaded(task, tmp_path / method, method != "linear probe", expected=0.125)


def test_nothing_is_written_outside_of_the_output_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    output = tmp_path / "output"
    options = [*SHORT, "--max_eval_samples", "64", "--output_dir", str(output)]
    command = [sys.executable, str(FOLDER / "image_classification.py"), *options]
    completed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert "eval_accuracy" in completed.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"home", "output"} and not any(home.iterdir())
