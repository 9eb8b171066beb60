"""`compare_texts.py`: that methods are compared on texts, and what is trained in an encoder."""

from pathlib import Path

import compare_texts
import methods
import offline
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

pytestmark = pytest.mark.usefixtures("library_is_small")
SHORT = ["--tries", "1", "--seeds", "1", "--num_train_epochs", "1", "--pretraining_steps", "1"]
SHORT += ["--max_train_samples", "20", "--max_test_samples", "20", "--validation_share", "0.25"]
ENCODER = [name for name, method in methods.METHODS.items() if method.encoder is not None]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, library_is_small: None) -> Path:
    """A folder with the default model, as if it had been pre-trained."""
    folder = tmp_path_factory.mktemp("outputs")
    offline.small_bert(folder / "small_bert", steps=1)
    return folder


def test_methods_are_compared_on_docstrings(outputs: Path) -> None:
    compared = ["linear", "bitfit", "toast-lite-pass2-lora-biases"]
    runs = compare_texts.main([*SHORT, "--output_dir", str(outputs), "--methods", *compared])
    assert list(runs["split"]) == ["validation", "test"] * 3
    assert runs["accuracy"].between(0, 1).all()
    head = 5 * 64 + 5
    assert runs["trainable_parameters"][0] == head and (runs["trainable_parameters"][2:] > head).all()
    pd.testing.assert_frame_equal(pd.read_csv(outputs / "runs.csv"), runs)


@pytest.mark.parametrize("method", ENCODER)
def test_every_method_trains_the_head_of_an_encoder_and_starts_with_the_logits_of_the_base(method: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, **size)).eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])}
    expected = model(**inputs).logits
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    adapted = methods.apply_method(model, method, [inputs], **options).eval()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert sum("classifier" in name for name in trained) == 2
    assert (len(trained) == 2) == (method == "linear")
    assert not any("lora" in name for name in trained if "classifier" in name)
    torch.testing.assert_close(adapted(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_rows_are_texts_with_their_class_and_batches_are_padded(outputs: Path, tmp_path: Path) -> None:
    arguments = [*SHORT, "--model_name_or_path", str(outputs / "small_bert"), "--output_dir", str(tmp_path)]
    arguments += ["--max_length", "9", "--methods", "linear"]
    parsed = compare_texts.parse(compare_texts.TextComparisonArguments, "encoder", None, arguments)
    comparison = compare_texts.TextComparison(parsed)
    assert {name: len(rows) for name, rows in comparison.rows.items()} == {
        "search": 15,
        "validation": 5,
        "test": 20,
        "train": 20,
    }
    lengths = [len(row["input_ids"]) for row in comparison.rows["test"]]
    assert lengths == sorted(lengths) and lengths[-1] == 9
    assert sorted(row["labels"] for row in comparison.rows["validation"]) == [0, 1, 2, 3, 4]
    batch = comparison.collate([{"input_ids": [2, 7, 3], "labels": 1}, {"input_ids": [2, 7, 8, 3], "labels": 0}])
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0], [2, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_docstrings_of_packages_are_those_of_five_classes() -> None:
    data = offline.package_docstrings(60, 40)
    assert data["train"].features["label"].names == sorted(offline.PACKAGES)
    assert {name: len(part) for name, part in data.items()} == {"train": 60, "test": 40}
    assert set(data["train"]["label"]) == set(range(5))
    assert not set(data["train"]["text"]) & set(data["test"]["text"])
