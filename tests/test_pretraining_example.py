"""The pre-training example: it learns, resumes, and gives an adapter that others start from."""

import json
from pathlib import Path

import datasets
import image_classification
import language_modeling
import pretraining_feedback
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import load_file

from toast_peft import TopDownConfig

OPTIONS = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
OPTIONS += ["--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "3", "--task_steps", "4"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, library_is_small: None) -> Path:
    """The small models of the examples, hardly pre-trained, and images with labels."""
    folder = tmp_path_factory.mktemp("bases")
    image_classification.pretrain(folder / "images", steps=2)
    language_modeling.pretrain(folder / "text", steps=2, block_size=32)
    digits = image_classification.handwritten_digits(range(5, 10), examples_per_class=8)
    digits["train"].to_parquet(folder / "data" / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def streams_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets waits for its threads whenever a stream is not read to its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def run(modality: str, bases: Path, folder: Path, *options: str) -> dict[str, float]:
    """Pre-train the feedback of a model."""
    arguments = ["--model_name_or_path", str(bases / modality), "--block_size", "32"]
    if modality == "images":
        arguments += ["--dataset_name", str(bases / "data"), "--image_column_name", "image"]
    return pretraining_feedback.main([*arguments, *OPTIONS, "--output_dir", str(folder), *options])


def load(modality: str, bases: Path) -> tf.PreTrainedModel:
    auto = tf.AutoModelForCausalLM if modality == "text" else tf.AutoModelForImageClassification
    return auto.from_pretrained(bases / modality)


@pytest.mark.parametrize("modality", ["images", "text"])
def test_a_resumed_pre_training_gives_the_same_adapter_from_which_others_start(
    modality: str, bases: Path, tmp_path: Path
) -> None:
    metrics = run(modality, bases, tmp_path / "whole")
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = [entry["variational_loss"] for entry in state["log_history"] if "variational_loss" in entry]
    assert len(losses) == 6 and losses[-1] == pytest.approx(metrics["variational_loss"])
    options = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")]
    if modality == "text":  # a small task, as only the first run is asked for that of the docstrings
        (tmp_path / "task.txt").write_text("one and one is two\n" * 20)
        options += ["--train_file", str(tmp_path / "task.txt")]
    run(modality, bases, tmp_path / "resumed", *options)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert any("classifier" in name for name in whole) == (modality == "images")
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, msg=name)
    start = get_peft_model(load(modality, bases), TopDownConfig(pretrained_feedback=str(tmp_path / "whole")))
    for name in (name for name in whole if "topdown_" in name):
        own = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
        assert torch.equal(start.get_base_model().get_parameter(own), whole[name])


def test_a_task_is_adapted_to_from_the_pre_trained_feedback(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("\n".join(f"{number} + {number} = {2 * number}" for number in range(200)))
    metrics = run("text", bases, tmp_path / "out", "--train_file", str(tmp_path / "task.txt"))
    assert metrics["eval_perplexity"] < metrics["before_perplexity"]
    adapter = load_file(tmp_path / "out" / "task" / "adapter_model.safetensors")
    assert adapter and all("topdown_" in name for name in adapter)


def test_images_of_another_size_are_pre_trained_on_without_a_task(bases: Path, tmp_path: Path) -> None:
    metrics = run("images", bases, tmp_path, "--image_size", "16")
    assert list(metrics) == ["variational_loss"] and metrics["variational_loss"] > 0
    assert not (tmp_path / "task").exists()
