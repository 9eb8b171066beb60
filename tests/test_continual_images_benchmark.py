"""`continual_images.py`: what it measures after each task, whose head is trained, and who chooses it."""

from pathlib import Path

import continual_images
import offline
import pandas as pd
import pytest
import tables
import torch
from heads import Heads, heads_of
from torch import nn

from .helpers import paths_of

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
SOURCE, *TASKS = SETS = ["digits", "negatives", "on their side", "pale"]
ORDER = [(method, after) for method in ("heads alone", "one LoRA", "one LoRA + replay") for after in (1, 2, 3)]
ORDER += [("LoRA of each task, oracle", after) for after in (1, 2, 3)]
ORDER += [(name + by, after) for after in (1, 2, 3) for name in tables.ROUTED for by in (", oracle", "")]
SHORT = {"max_train_images": 16, "fit_images": 16, "test_images": 40, "num_train_epochs": 1}
SHORT |= {"per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a base model, and gets the tables."""
    path = tmp_path_factory.mktemp("continual_images")
    offline.small_vit(path / "small_vit", steps=30, with_head=True)
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> pd.DataFrame:
    short = [str(part) for name, value in SHORT.items() for part in (f"--{name}", value)]
    return continual_images.main([*short, "--refit_gates", "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def study(folder: Path) -> continual_images.ContinualImages:
    return continual_images.ContinualImages(continual_images.Arguments(**SHORT, output_dir=str(folder)))


def test_source_and_tasks_so_far_are_measured_after_each(runs: pd.DataFrame, folder: Path) -> None:
    measured = {key: list(group["set"]) for key, group in runs.groupby(["method", "after"], sort=False)}
    assert list(measured) == ORDER
    for (_, after), sets in measured.items():
        assert sets == SETS[: 1 + after]
    assert len(pd.read_csv(folder / "runs.csv")) == len(runs)


def test_tables(runs: pd.DataFrame, folder: Path) -> None:
    accuracies, routing = (folder / "continual_images.md").read_text().strip().split("\n\n")
    assert len(accuracies.splitlines()) == 2 + len(ORDER)
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in routing.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[name, of] for name in tables.ROUTED for of in SETS]
    last = runs[runs["after"] == 3].set_index(["method", "set"])
    for name, of, *cells in rows:
        oracle, routed = last.loc[f"{name}, oracle", of], last.loc[name, of]
        measured = [oracle["accuracy"], *routed[["accuracy", "accuracy by gates", "right head"]]]
        assert cells[:4] == [f"{value:.1f}" for value in measured]


def test_oracle_and_heads_alone_leave_the_source_alone(runs: pd.DataFrame) -> None:
    of_source = runs[runs["set"] == SOURCE].set_index("method")
    alone = of_source.index.str.endswith("oracle") | (of_source.index == "heads alone")
    assert (of_source["unchanged"][alone] == 100).all()
    assert (of_source["unchanged"][of_source.index.str.startswith("one LoRA")] == 0).all()
    assert of_source["gate of pale"][alone].isna().all()


def test_first_lora_is_the_same_whatever_its_name(runs: pd.DataFrame) -> None:
    first = runs[(runs["after"] == 1) & (runs["set"] == TASKS[0])].set_index("method")
    measured = ["accuracy", "same prediction"]
    assert list(first.loc["one LoRA", measured]) == list(first.loc["LoRA of each task, oracle", measured])


def test_only_the_head_of_the_task_is_trained(study: continual_images.ContinualImages) -> None:
    model = study.load()
    before = {name: head.weight.clone() for name, head in heads_of(model).of.items()}
    study.train(model, TASKS[1], replayed=[SOURCE, TASKS[0]])
    changed = [name for name, head in heads_of(model).of.items() if not torch.equal(head.weight, before[name])]
    assert changed == [TASKS[1]]


def test_closed_gates_leave_all_to_the_base_model(study: continual_images.ContinualImages) -> None:
    *_, (after, model) = study.trained_apart("pass2-lora")
    model.base_model.set_adapter(TASKS)
    assert study.measure(model, TASKS[0])["unchanged"] < 100
    for gate in paths_of(model)[0].selection.topdown_gate.values():
        nn.init.constant_(gate.threshold, 2.0)
    measured = study.measure(model, SOURCE)
    assert measured["unchanged"] == measured["right head"] == 100
    assert measured["accuracy by gates"] == measured["accuracy"]
    assert study.measure(model, TASKS[0])["right head"] == 0


def test_loss_is_that_of_the_own_head() -> None:
    heads = Heads({"two": nn.Linear(4, 2), "three": nn.Linear(4, 3)})
    features = torch.randn(2, 4)
    outputs = type("Outputs", (), {"logits": heads(features)})
    expected = [heads.of["three"](features[:1]), heads.of["two"](features[1:])]
    losses = [nn.functional.cross_entropy(logits, torch.tensor([1])) for logits in expected]
    torch.testing.assert_close(heads.loss(outputs, torch.tensor([3, 1])), sum(losses) / 2)


def test_files_are_read(tmp_path: Path) -> None:
    for name, images in continual_images.offline_sets().items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            images[split].select(range(20)).to_parquet(str(tmp_path / name / f"{split}.parquet"))
    source, *tasks = (str(tmp_path / name / "train.parquet") for name in SETS)
    sets = continual_images.load_sets(source, tasks)
    assert list(sets) == SETS
    assert {split: len(images) for split, images in sets[SOURCE].items()} == {"train": 10, "test": 10}
    assert sets["pale"]["test"].features["label"].names == [str(digit) for digit in range(10)]
