"""The example scripts and the demo, in their smallest form."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import demo
import image_classification
import language_modeling
import pytest
from adaptation import named_data
from offline_data import handwritten_digits, library_docstrings

IMAGES = ["--pretraining_steps", "150", "--num_train_epochs", "10", "--max_eval_samples", "64"]
TEXT = ["--pretraining_steps", "150", "--max_steps", "20", "--block_size", "64", "--max_eval_samples", "64"]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all runs, so that each base model is pre-trained once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def data_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps what `load_dataset` stores out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run_and_reload(script: Any, arguments: list[str], output: Path) -> tuple[dict, dict]:
    """The metrics of a training run, and those of evaluating what it saved."""
    arguments = [*arguments, "--output_dir", str(output), "--disable_tqdm", "True"]
    trained = script.main(arguments)
    saved_as = "adapter" if (output / "adapter_config.json").exists() else "model"
    return trained, script.main([*arguments, f"--{saved_as}_name_or_path", str(output), "--do_train", "False"])


@pytest.mark.parametrize("method", ["linear_probe", "lora", "toast", "toast_lite", "full"])
def test_image_classification(method: str, output_dir: Path) -> None:
    trained, reloaded = run_and_reload(
        image_classification, [*IMAGES, "--method", method], output_dir / "images" / method
    )
    # Not the loss, which a few confident mistakes raise while more and more images are recognised.
    assert trained["eval_accuracy"] > trained["before_accuracy"] + 0.2
    assert reloaded["eval_loss"] == trained["eval_loss"]
    assert reloaded["eval_accuracy"] == trained["eval_accuracy"]
    saved = {path.name for path in (output_dir / "images" / method).iterdir()}
    assert ADAPTER_FILES <= saved if method not in ("linear_probe", "full") else "model.safetensors" in saved


@pytest.mark.parametrize("method", ["lora", "toast", "toast_lite", "full"])
def test_language_modeling(method: str, output_dir: Path) -> None:
    trained, reloaded = run_and_reload(language_modeling, [*TEXT, "--method", method], output_dir / "text" / method)
    assert trained["eval_perplexity"] < trained["before_perplexity"]
    assert reloaded["eval_perplexity"] == trained["eval_perplexity"]
    saved = {path.name for path in (output_dir / "text" / method).iterdir()}
    assert ADAPTER_FILES <= saved if method != "full" else "model.safetensors" in saved


def test_a_linear_probe_is_not_for_text(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        language_modeling.main(["--method", "linear_probe"])
    assert "--method linear_probe is not for text" in capsys.readouterr().err


def test_images_from_a_folder(output_dir: Path, tmp_path: Path, data_cache: None) -> None:
    digits = handwritten_digits(range(2), examples_per_class=20)
    for split, rows in digits.items():
        for index, row in enumerate(rows.select(range(40))):
            folder = tmp_path / "data" / split / f"digit {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    metrics, reloaded = run_and_reload(
        image_classification, [*IMAGES, "--dataset_name", str(tmp_path / "data")], output_dir / "images" / "folder"
    )
    assert metrics["eval_accuracy"] > metrics["before_accuracy"] + 0.2
    assert reloaded["eval_loss"] == metrics["eval_loss"]
    config = json.loads((output_dir / "images" / "folder" / "adapter_config.json").read_text())
    assert config["peft_type"] == "TOPDOWN"


def test_images_from_parquet_files(tmp_path: Path, data_cache: None) -> None:
    rows = handwritten_digits(range(5, 10), examples_per_class=4)["train"].cast_column(
        "label", datasets.Value("int64")
    )
    rows = rows.rename_columns({"image": "img", "label": "digit"})
    rows.to_parquet(tmp_path / "train.parquet")
    _, arguments, _ = image_classification.parse(
        ["--train_file", str(tmp_path / "train.parquet"), "--image_column_name", "img", "--label_column_name", "digit"]
    )
    data = image_classification.load_images(arguments)
    assert set(data["train"].column_names) == {"image", "label"}
    assert len(data["train"]) == 18
    assert len(data["validation"]) == 2
    assert data["train"].features["label"].names == ["0", "1", "2", "3", "4"]


def test_nothing_is_held_out_for_validation_if_there_is_a_test_split(tmp_path: Path, data_cache: None) -> None:
    digits = handwritten_digits(range(5, 10), examples_per_class=4)
    digits["train"].to_parquet(tmp_path / "train.parquet")
    digits["validation"].to_parquet(tmp_path / "test.parquet")
    _, arguments, _ = image_classification.parse(["--dataset_name", str(tmp_path)])
    data = named_data(arguments)
    assert {split: list(rows["label"]) for split, rows in data.items()} == {
        split: list(rows["label"]) for split, rows in digits.items()
    }


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_texts_from_a_file(suffix: str, output_dir: Path, tmp_path: Path, data_cache: None) -> None:
    lines = [" ".join(text.split()) for text in library_docstrings(numeric=True)["train"]["text"][:60]]
    text_file = tmp_path / f"texts.{suffix}"
    text_file.write_text("\n".join(json.dumps({"text": line}) if suffix == "jsonl" else line for line in lines))
    files = ["--train_file", str(text_file), "--validation_file", str(text_file)]
    metrics, reloaded = run_and_reload(language_modeling, [*TEXT, *files], output_dir / "text" / suffix)
    assert metrics["eval_perplexity"] < metrics["before_perplexity"]
    assert reloaded["eval_perplexity"] == metrics["eval_perplexity"]


def test_without_names_the_data_is_offline_data() -> None:
    _, arguments, _ = image_classification.parse([])
    assert named_data(arguments) is None
    data = image_classification.load_images(arguments)
    assert data["train"].features["label"].names == ["5", "6", "7", "8", "9"]
    assert sorted(data["train"]["label"]) == [label for label in range(5) for _ in range(10)]


def test_the_two_sets_of_docstrings_and_their_splits_are_disjoint() -> None:
    numeric, other = library_docstrings(numeric=True), library_docstrings(numeric=False)
    splits = [set(data[split]["text"]) for data in (numeric, other) for split in ("train", "validation")]
    assert all(len(split) > 50 for split in splits)
    assert not splits[0] & splits[1]
    assert not splits[2] & splits[3]
    assert any(">>> ExtendedContext." in text for text in splits[0])


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = language_modeling.byte_level_tokenizer()
    text = "é 日本\n\t>>> 1 + 1"
    assert len(tokenizer) == 258
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_demo_table(output_dir: Path, capsys: pytest.CaptureFixture) -> None:
    task = demo.Task("text", language_modeling.main, "perplexity", ("toast",), ())
    [row] = demo.compare(task, output_dir, (*TEXT, "--disable_tqdm", "True"))
    assert row[:4] == ("text", "toast", "147,584", "perplexity")
    assert float(row[5]) < float(row[4])
    demo.print_table([row])
    assert "147,584" in capsys.readouterr().out


def test_demo_fails_if_a_result_is_not_reproduced(tmp_path: Path) -> None:
    results = iter([{"eval_accuracy": 0.5, "eval_loss": 1.0}, {"eval_accuracy": 0.5, "eval_loss": 1.0 + 1e-15}])
    task = demo.Task("images", lambda arguments: next(results), "accuracy", ("toast",), ())
    with pytest.raises(SystemExit, match="eval_loss was 1.0, but is 1.000000000000001 after reloading"):
        demo.compare(task, tmp_path, ())


def test_nothing_is_written_outside_of_the_output_folder(output_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    script = Path(image_classification.__file__)
    environment = os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(script.parents[1])}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    arguments = [*IMAGES, "--output_dir", str(output_dir / "images" / "subprocess")]
    completed = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert "eval_accuracy" in completed.stdout
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["home"]
