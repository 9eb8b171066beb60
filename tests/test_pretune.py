"""The pre-tuning example: it learns, resumes, and gives an adapter that others start from."""

import json
from pathlib import Path

import image_classification
import language_modeling
import pretune
import pytest
import torch
import transformers as tf
from offline_data import handwritten_digits
from peft import get_peft_model
from safetensors.torch import load_file

from toast_peft import TopDownConfig

OPTIONS = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
OPTIONS += ["--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small models of the examples, hardly pre-trained."""
    folder = tmp_path_factory.mktemp("bases")
    image_classification.pretrain(folder / "images", steps=2)
    language_modeling.pretrain(folder / "text", steps=2, block_size=32)
    return folder


def run(modality: str, bases: Path, folder: Path, *options: str) -> list[dict[str, float]]:
    """Pre-tune, and what was logged."""
    arguments = ["--modality", modality, "--model_name_or_path", str(bases / modality), "--block_size", "32"]
    pretune.main([*arguments, *OPTIONS, "--output_dir", str(folder), *options])
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("modality", ["images", "text"])
def test_learns_and_resumes(modality: str, bases: Path, tmp_path: Path) -> None:
    # Weighted so that in these few steps the chain learns from it, and not from what the feedback does to the output.
    weight = ("--variational_weight", "10")
    logs = run(modality, bases, tmp_path / "whole", *weight)
    assert logs[-1]["variational_loss"] < 0.9 * logs[0]["variational_loss"]
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    run(modality, bases, tmp_path / "resumed", *weight, "--resume_from_checkpoint", checkpoint)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all("topdown_" in name for name in whole)
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, msg=name)
    start = get_peft_model(load(modality, bases), TopDownConfig(pretrained_feedback=str(tmp_path / "whole")))
    for name, weights in whole.items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
        assert torch.equal(start.get_base_model().get_parameter(name), weights)


def load(modality: str, bases: Path) -> tf.PreTrainedModel:
    auto = tf.AutoModelForCausalLM if modality == "text" else tf.AutoModelForImageClassification
    return auto.from_pretrained(bases / modality)


def test_without_labels_the_output_stays(bases: Path, tmp_path: Path) -> None:
    """Self-distillation holds the output with feedback at that of the model without."""
    run("images", bases, tmp_path, "--learning_rate", "1e-2")
    model = load("images", bases)
    adapted = get_peft_model(load("images", bases), TopDownConfig(pretrained_feedback=str(tmp_path)))
    adapted.get_base_model().classifier.load_state_dict(model.classifier.state_dict())
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(adapted.eval()(images).logits, model.eval()(images).logits, rtol=0.05, atol=0.05)


def test_images_with_labels(bases: Path, tmp_path: Path) -> None:
    data = handwritten_digits(range(5, 10), examples_per_class=8)
    data["train"].to_parquet(tmp_path / "data" / "train.parquet")
    options = ["--dataset_name", str(tmp_path / "data"), "--label_column_name", "label", "--image_size", "16"]
    run("images", bases, tmp_path / "out", *options)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
