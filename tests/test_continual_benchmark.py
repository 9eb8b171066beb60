"""`continual.py`: what it measures after each task, and that closed adapters leave the base model as it was."""

from collections.abc import Iterator
from pathlib import Path

import continual
import offline
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict

from .helpers import paths_of

pytestmark = pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "continual.md").read_text()
TASKS = ["numeric", "code", "digits"]
ORDER = [("base", 0)]
ORDER += [(method, after) for method in ("one LoRA", "one LoRA + replay") for after in (1, 2, 3)]
ORDER += [("LoRA of each task, oracle", after) for after in (1, 2, 3)]
ROUTED = ["gated adapters", "gated adapters, refitted"]
ORDER += [(name + by, after) for after in (1, 2, 3) for name in ROUTED for by in (", oracle", "")]


def few_docstrings(numeric: bool) -> DatasetDict:
    """In place of those of the library, which take seconds to collect."""
    texts = [
        f"{i} + {i} = {2 * i}, {i} * {i} = {i * i}" if numeric else "Return a copy of it. " * i for i in range(40)
    ]
    return Dataset.from_dict({"text": texts}).train_test_split(0.5, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Has a base model, and gets the tables."""
    path = tmp_path_factory.mktemp("continual")
    with pytest.MonkeyPatch.context() as patch:
        for module in (continual, offline):
            patch.setattr(module, "docstrings", few_docstrings)
        offline.small_llama(path / "small_llama", steps=1, block_size=32)
        yield path


@pytest.fixture(scope="module")
def runs(folder: Path) -> pd.DataFrame:
    short = ["--block_size", "32", "--max_train_blocks", "8", "--fit_blocks", "8", "--test_blocks", "4"]
    return continual.main([*short, "--num_train_epochs", "1", "--refit_gates", "--output_dir", str(folder)])


def test_source_and_tasks_so_far_are_measured_after_each(runs: pd.DataFrame, folder: Path) -> None:
    measured = {key: list(group["text"]) for key, group in runs.groupby(["method", "after"], sort=False)}
    assert list(measured) == ORDER
    for (_, after), texts in measured.items():
        assert texts == ["prose", *TASKS[: after or None]]
    assert (runs["perplexity"] > 1).all()
    assert len(pd.read_csv(folder / "runs.csv")) == len(runs)


def test_tables(runs: pd.DataFrame, folder: Path) -> None:
    perplexities, costs, gates = (folder / "continual.md").read_text().strip().split("\n\n")
    assert len(perplexities.splitlines()) == 2 + len(ORDER)
    assert [line.split("|")[1].strip() for line in costs.splitlines()[2:]] == ROUTED
    last = runs[runs["after"] == 3].set_index(["method", "text"])["perplexity"]
    assert f"{last['gated adapters', 'code'] / last['gated adapters, oracle', 'code']:.3f}" in costs
    assert len(gates.splitlines()) == 2 + len(ROUTED) * len(TASKS)


def test_oracle_leaves_the_source_alone(runs: pd.DataFrame) -> None:
    of_source = runs[runs["text"] == "prose"].set_index("method")["perplexity"]
    by_oracle = of_source[of_source.index.str.endswith("oracle")]
    assert len(by_oracle) == 9 and set(by_oracle) == {of_source["base"]}
    assert (of_source["one LoRA"] != of_source["base"]).all()


def test_all_gates_closed_is_the_base_model(folder: Path) -> None:
    arguments = continual.Arguments(
        block_size=32, max_train_blocks=8, fit_blocks=8, test_blocks=4, num_train_epochs=1, output_dir=str(folder)
    )
    study = continual.ContinualTexts(arguments)
    base = continual.measure(study.load(), study.rows["prose"]["test"][:4])["perplexity"]
    *_, (after, model) = study.trained_apart("pass2-lora")
    study.fit_gates(model, after, refitted=False)
    model.base_model.set_adapter(TASKS)
    assert continual.measure(model, study.rows["digits"]["test"][:4])["digits_mean_gate"] > 0
    for gate in paths_of(model)[0].selection.topdown_gate.values():
        torch.nn.init.constant_(gate.threshold, 2.0)
    assert continual.measure(model, study.rows["prose"]["test"][:4])["perplexity"] == base


def test_replay_is_half_as_many_blocks_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(continual, "train", lambda model, rows, **settings: trained.append(rows))
    study = continual.ContinualTexts(continual.Arguments(block_size=32, max_train_blocks=8, output_dir=str(folder)))
    study.train(None, "digits", ["prose", "code"])
    study.train(None, "digits", [])
    new = study.rows["digits"]["train"][:8]
    assert trained == [[*new, *study.rows["prose"]["train"][:2], *study.rows["code"]["train"][:2]], new]


def test_page_has_what_was_measured() -> None:
    for table in continual.tables(pd.read_csv(ROOT / "examples/benchmarks/results/continual.csv")).split("\n\n"):
        assert table in PAGE


def test_page_has_what_was_measured_of_strictness() -> None:
    runs = pd.read_csv(ROOT / "examples/benchmarks/results/continual_quantiles.csv")
    cells = runs.set_index(["method", "quantile", "text"])["perplexity"].unstack(sort=False)
    refitted, oracle = cells.loc["gated adapters, refitted"], cells.loc["gated adapters, refitted, oracle"]
    assert list(refitted.index) == [0.98, 0.95, 0.9, 0.8]
    for quantile, row in refitted.iterrows():
        shown = [f"{value:.4g} ({value / oracle.loc[quantile, text]:.3f})" for text, value in row.items()]
        assert f"| {quantile} | {' | '.join(shown)} |" in PAGE
