"""`gates.py`: what it says of perplexities and of tokens that are those of the base model."""

from pathlib import Path

import continual
import gates
import image_gates
import offline
import pandas as pd
import pytest
import text_gates
import torch
from datasets import DatasetDict
from tables import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "gates.md"


def first_docstrings(numeric: bool) -> DatasetDict:
    """More than these tests use, so that not all of them are tokenized."""
    rows = offline.docstrings(numeric)
    return DatasetDict({split: rows[split].select(range(40)) for split in rows})


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch, library_is_small: None) -> None:
    for module in (continual, gates):
        monkeypatch.setattr(module, "docstrings", first_docstrings)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_gates_and_scales_are_measured_on_all_texts(tmp_path: Path) -> None:
    base = offline.small_llama(tmp_path / "base", steps=1, block_size=32)
    short = ["--seeds", "1", "--num_train_epochs", "1", "--max_train_blocks", "16", "--test_blocks", "4"]
    short += ["--fit_blocks", "4", "--block_size", "32", "--gates", "sequence", "--scales", "1", "0.5"]
    runs = gates.main(["--model_name_or_path", base, *short, "--output_dir", str(tmp_path)])
    methods = ["base"]
    for method in ("toast-lite-initialized", "pass2-lora"):
        methods += [method, f"{method}, then sequence gate", f"sequence gate, then {method}"]
    assert list(dict.fromkeys(runs["method"])) == [*methods, "lora-all-linear x 1", "lora-all-linear x 0.5"]
    assert set(runs["text"]) == {"numeric", "prose"}
    shares = runs.groupby("method")["same"].mean()
    assert shares["base"] == 100
    assert shares["pass2-lora"] < shares["pass2-lora, then sequence gate"] <= 100
    assert (runs["perplexity"] > 1).all()
    assert "(100 %)" in (tmp_path / "gates.md").read_text()


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_each_set_of_images_is_the_target_once(tmp_path: Path) -> None:
    base = offline.small_vit(tmp_path / "base", steps=1)
    sizes = ["--fit_images", "24", "--test_images", "8"]
    runs = image_gates.main(["--model_name_or_path", base, *sizes, "--output_dir", str(tmp_path)])
    names = ["digits", "other digits", "negatives"]
    assert [(row.target, row.set) for row in runs.itertuples()] == [
        (target, name) for target in names for name in names
    ]
    assert ((runs["is"] == "target") == (runs["target"] == runs["set"])).all()
    negatives = runs[runs["target"] == "negatives"].set_index("set")["left alone"]
    assert negatives["negatives"] < negatives["digits"]
    assert len((tmp_path / "image_gates.md").read_text().splitlines()) == 5


@pytest.mark.usefixtures("few_texts")
@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_each_text_is_the_target_once(tmp_path: Path) -> None:
    base = offline.small_llama(tmp_path / "base", steps=1, block_size=32)
    sizes = ["--fit_blocks", "16", "--test_blocks", "8", "--block_size", "32", "--targets", "3"]
    runs = text_gates.main(["--model_name_or_path", base, *sizes, "--output_dir", str(tmp_path)])
    assert list(runs["target"].unique()) == ["prose", "numeric", "code"]
    assert list(runs["set"].unique()) == ["prose", "numeric", "code", "digits"]
    assert ((runs["is"] == "target") == (runs["target"] == runs["set"])).all()
    digits = runs[runs["set"] == "digits"].set_index("target")["left alone"]
    assert (digits == 100).all()
    assert len((tmp_path / "text_gates.md").read_text().splitlines()) == 5
    assert (tmp_path / "switch.png").stat().st_size > 10_000


def test_blocks_of_two_texts_change_in_the_middle() -> None:
    first, second = ([{"input_ids": torch.full((rows, 6), value)} for rows in (8, 3)] for value in (1, 2))
    changed = text_gates.halves(first, [second[0], {"input_ids": torch.full((2, 6), 2)}])
    assert [batch["input_ids"].tolist() for batch in changed] == [[[1, 1, 1, 2, 2, 2]] * 8]


def test_page_has_what_was_measured() -> None:
    runs = pd.read_csv(RESULTS / "text_gates.csv")
    assert image_gates.table(runs) in PAGE.read_text()


def test_page_has_what_stricter_gates_leave_alone_and_what_they_cost() -> None:
    others = pd.read_csv(RESULTS / "text_gates_quantiles.csv")
    runs = pd.concat([pd.read_csv(RESULTS / "text_gates.csv").assign(quantile=0.95, fit_blocks=64), others])
    for (blocks, quantile), rows in runs.groupby(["fit_blocks", "quantile"]):
        alone = rows.groupby("is")["left alone"].agg(["mean", "min"])
        open_tokens = 100 * rows.drop_duplicates("target")["open_target"].mean()
        cells = [f"{alone['mean'][kind]:.0f} ({alone['min'][kind]:.0f})" for kind in ("reference", "unseen")]
        shown = " | ".join([f"{quantile:g}", *cells, f"{alone['mean']['target']:.0f}", f"{open_tokens:.0f}"])
        assert f"| {blocks} | {shown} |" in PAGE.read_text()


def test_page_has_what_was_measured_on_texts_that_are_alike() -> None:
    runs = pd.read_csv(RESULTS / "text_gates_near.csv")
    assert image_gates.table(runs[runs["fit_blocks"] == 64]) in PAGE.read_text()
    ranges = {}
    for blocks, rows in runs.groupby("fit_blocks"):
        news = rows[rows["set"].str.startswith("news") == rows["target"].str.startswith("news")]
        shares = news.groupby("is")["left alone"].agg(["min", "max"]).round().astype(int)
        ranges[blocks] = {kind: f"{low} to {high} %" for kind, low, high in shares.itertuples()}
        ranges[blocks]["open"] = f"{100 * rows.drop_duplicates('target')['open_target'].mean():.0f} %"
    assert ranges == {
        64: {"reference": "82 to 96 %", "target": "18 to 85 %", "unseen": "78 to 93 %", "open": "34 %"},
        256: {"reference": "94 to 100 %", "target": "38 to 89 %", "unseen": "93 to 99 %", "open": "11 %"},
    }
    text = " ".join(PAGE.read_text().split())
    assert all(share in text for of_blocks in ranges.values() for share in of_blocks.values())


def test_sets_that_are_in_no_reference_are_in_brackets() -> None:
    kinds = {"a": "target", "b": "reference", "c": "unseen"}
    runs = pd.DataFrame({"target": "a", "set": kinds.keys(), "is": kinds.values(), "left alone": [1.0, 99.0, 50.4]})
    assert image_gates.table(runs).splitlines()[-1].split("|")[2:5] == [" 1   ", " 99  ", " (50) "]
