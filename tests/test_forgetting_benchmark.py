"""`forgetting.py`: which texts are trained on and measured, what the numbers are, and what is chosen at a limit."""

import gzip
import json
import math
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import forgetting
import offline
import optuna
import pandas as pd
import pytest
import torch
from datasets import Dataset
from forgetting import ForgettingArguments, ForgettingComparison
from methods import METHODS, apply_method
from optuna.trial import TrialState
from scaling import Strength
from tables import CHANGES, at_every_strength, choice_at_limit, limit_table
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

BLOCK = 16
TEXTS = {
    "train": [f"{number} is the number {number} and not {number + 1}." for number in range(40)],
    "test": [f"{number} is the number {number} and not {number + 1}." for number in range(40, 50)],
    "story": [f"Once upon a time there was a little bear called {name * 2}." for name in "abcdefghijklmnop"],
}


def write(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder / f"{name}.jsonl.gz")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, library_is_small: None) -> str:
    return offline.small_llama(tmp_path_factory.mktemp("base"), steps=1, block_size=BLOCK)


@pytest.fixture
def arguments(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a short run with a small LLaMA that is hardly pre-trained; one source is a file, the other a folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    named = []
    for name in ("train", "test"):
        rows = [{"text": text} for text in TEXTS[name]]
        named += [f"--{name}_file", write(tmp_path / "numbers", name, rows)]
        write(tmp_path / "sums", name, [{"question": f"{text} + 1?", "answer": f"{text}!"} for text in TEXTS[name]])
    stories = write(tmp_path / "texts", "stories", [{"text": text} for text in TEXTS["story"]])
    named += ["--sources", stories, str(tmp_path / "sums"), "--reference", stories]
    short = ["--tries", "1", "--seeds", "1", "--num_train_epochs", "1", "--per_device_eval_batch_size", "5"]
    sizes = ["--block_size", str(BLOCK), "--max_train_samples", "30", "--max_test_samples", "6"]
    return ["--model_name_or_path", base, "--output_dir", str(tmp_path / "out"), *named, *short, *sizes]


def prepared(arguments: list[str]) -> ForgettingComparison:
    return ForgettingComparison(forgetting.parse(ForgettingArguments, "text", None, arguments))


def read(rows: list[dict[str, list[int]]]) -> str:
    return ByT5Tokenizer(extra_ids=0).decode([token for row in rows for token in row["input_ids"]])


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Computed here: of all tokens but the first of each block."""
    blocks = torch.tensor([row["input_ids"] for row in rows])
    logits = model.eval()(input_ids=blocks).logits
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), blocks[:, 1:]).item())


def test_what_is_trained_on_and_measured(arguments: list[str]) -> None:
    comparison = prepared([*arguments, "--methods", "lora", "--validation_share", "0.2"])
    rows, sources = comparison.rows, comparison.sources
    assert {name: len(of) for name, of in rows.items()} == {"search": 24, "validation": 6, "train": 30, "test": 6}
    assert rows["train"] == rows["search"] + rows["validation"]
    assert "".join(text + "</s>" for text in TEXTS["train"]).startswith(read(rows["train"]))  # in their order
    assert read(rows["test"]).startswith(TEXTS["test"][0])
    assert list(sources) == ["stories", "sums"]
    assert "0 is the number 0 and not 1. + 1?\n0 is the number 0 and not 1.!" in read(sources["sums"]["search"])
    assert comparison.reference == {"stories": sources["stories"]["search"]}
    model = AutoModelForCausalLM.from_pretrained(comparison.base)
    for split, measured in comparison.of_base_model.items():
        expected = {"target": rows[split]} | {name: of[split] for name, of in sources.items()}
        assert measured == {
            f"{name} perplexity": pytest.approx(perplexity(model, of), rel=1e-5) for name, of in expected.items()
        }


def test_gate_and_replay_see_the_reference_only(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = prepared([*arguments, "--methods", "lora-all-linear-replay", "pass2-lora-gated"])
    trained, fitted = [], []
    train = forgetting.Trainer.train

    def recorded(trainer: forgetting.Trainer) -> object:
        trained.append(trainer.train_dataset)
        return train(trainer)

    monkeypatch.setattr(forgetting.Trainer, "train", recorded)
    monkeypatch.setattr("toast_peft.fit_gate", lambda model, batches, reference: fitted.append(reference))
    point = {"learning_rate": 1e-3, "weight_decay": 0.0, "seed": 0}
    comparison.train("lora-all-linear-replay", "validation", **point)
    rows, stories = comparison.rows["search"], comparison.reference["stories"]
    assert trained[0] == [*rows, *stories[: len(rows) // 2]] and not fitted
    comparison.train("pass2-lora-gated", "validation", **point)
    [reference] = fitted
    [[name, batches]] = reference.items()
    assert name == "stories"
    assert sum(len(batch["input_ids"]) for batch in batches) == len(stories)


@pytest.mark.filterwarnings("ignore:The gate of the TOAST adapter")
def test_the_choice_at_the_limit_is_printed_and_stored(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    methods = ["full", "toast-output-gated-initialized"]
    runs = forgetting.main([*arguments, "--methods", *methods, "--scales", "0.5", "0"])
    assert list(runs["method"]) == [method for method in methods for _ in range(2)]  # one search, and one test of it
    printed, folder = capsys.readouterr().out, Path(arguments[3])
    base = dict(re.findall(r"(\w+) perplexity ([\d.]+)", printed.partition("Base model: ")[2]))
    assert list(base) == ["target", "stories", "sums"]
    tested = runs[runs["split"] == "test"].set_index("method")
    for method, run in tested.iterrows():
        for name, of_base in base.items():
            assert run[f"{name} perplexity at 0"] == pytest.approx(float(of_base), rel=1e-3)
            assert (0 <= run[f"{name} unchanged"] <= 100) == ("gated" in method)
        relative = [run[f"{name} perplexity"] / float(base[name]) for name in ("stories", "sums")]
        assert run["mean change"] == pytest.approx(50 * sum(relative) - 100, abs=0.1)
        assert run["largest change"] == pytest.approx(100 * max(relative) - 100, abs=0.1)
        assert run["forgetting"] == pytest.approx(math.log(math.prod(relative)) / 2, abs=1e-3)
        assert run["mean change at 0"] == pytest.approx(0, abs=1e-3)
    assert (folder / "limits.md").read_text() in printed
    assert (folder / "frontier.png").stat().st_size > 10_000
    pd.testing.assert_frame_equal(limit_table(pd.read_csv(folder / "runs.csv"), 1.0), limit_table(runs, 1.0))


# Split, learning rate, and target perplexity, mean and largest change, at full and at half strength.
RUNS = [
    ("validation", 0.1, 10, 3, 5, 20, 1, 4),
    ("validation", 0.2, 30, 2, 2, 40, 0, 1),
    ("validation", 0.3, 1, 9, 9, 1, 9, 9),
    ("test", 0.1, 11, 0, 0, 24, 5, 5),
    ("test", 0.1, 11, 0, 0, 26, 7, 7),
    ("test", 0.2, 31, 1, 1, 41, 1, 1),
]


def runs_of(rows: list[tuple]) -> pd.DataFrame:
    measured = ["target perplexity", *CHANGES]
    columns = ["split", "learning_rate", *measured, *(f"{name} at 0.5" for name in measured)]
    return pd.DataFrame(rows, columns=columns).assign(method="lora", forgetting=0.0)


def test_a_row_for_each_training_and_strength() -> None:
    runs = pd.DataFrame([{"seed": 1, "loss": 2.0, "loss at 0.5": 3.0, "loss at 2": 4.0}, {"seed": 2, "loss": 5.0}])
    points = at_every_strength(runs).dropna()
    expected = [(1, 4.0, 2.0), (1, 2.0, 1.0), (2, 5.0, 1.0), (1, 3.0, 0.5)]
    assert list(points.itertuples(index=False, name=None)) == expected


def test_the_choice_is_the_best_within_the_limit_or_what_changes_least() -> None:
    points = pd.DataFrame({"target perplexity": [5.0, 4.0, 3.0], "mean change": [0.2, 0.9, 1.1]})
    assert choice_at_limit(points, 1.0)["target perplexity"] == 4
    assert choice_at_limit(points, 2.0)["target perplexity"] == 3
    assert choice_at_limit(points, 0.1)["target perplexity"] == 5
    assert choice_at_limit(points.assign(other=[2.0, 3.0, 1.0]), 1.0, "other")["target perplexity"] == 3


def test_the_validation_chooses_rate_and_strength_and_the_tests_are_shown() -> None:
    runs = runs_of(RUNS)
    [row] = limit_table(runs, 1.0).to_dict("records")
    assert (row["alpha"], row["learning rate"]) == ("0.5", "1.0e-01")
    assert (row["target perplexity"], row["mean change, %"]) == ("25.0 ± 1.4", "6.0 ± 1.4")
    assert limit_table(runs, 5.0)["alpha"].item() == "1"
    [row] = limit_table(runs, 1.0, "largest change").to_dict("records")
    assert (row["alpha"], row["learning rate"], row["target perplexity"]) == ("0.5", "2.0e-01", "41.0")
    assert limit_table(runs[:-1], 1.0, "largest change")["learning rate"].item() == "1.0e-01"  # of the tested ones


def test_the_best_at_both_limits_is_tested() -> None:
    comparison = object.__new__(ForgettingComparison)
    rows = runs_of(RUNS[:3]).to_dict("records")
    tries = [SimpleNamespace(number=number, user_attrs=row) for number, row in enumerate(rows)]
    for limit, numbers in ((1.0, [0, 1]), (5.0, [0]), (9.0, [2])):
        comparison.arguments = ForgettingArguments(max_change=limit)
        assert [trial.number for trial in comparison.chosen(tries)] == numbers


def test_changes_of_the_sources() -> None:
    measured = forgetting.changes({"one": (10.0, 11.0), "two": (100.0, 70.0)})
    assert measured == {
        "mean change": pytest.approx(-10),
        "largest change": pytest.approx(10),
        "forgetting": pytest.approx(math.log(1.1 * 0.7) / 2),
    }
    diverged = forgetting.changes({"one": (10.0, math.inf), "two": (100.0, 100.0)})
    assert set(diverged.values()) == {math.inf}


@pytest.mark.parametrize("method", ["full", "lora", "oft", "toast-lite-initialized"])
@torch.no_grad()
def test_strength_leads_from_the_base_model_to_the_trained_one(base: str, method: str) -> None:
    inputs = {"input_ids": torch.arange(3, 13).view(1, -1)}
    model = AutoModelForCausalLM.from_pretrained(base)
    model = apply_method(model, method, [inputs], task_type="CAUSAL_LM").eval()
    strength = Strength(model, new_modules=[])
    logits = [model(**inputs).logits]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "prompt" not in name:  # one that turns away from all tokens gives no feedback
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits.append(model(**inputs).logits)
    with pytest.raises(KeyError), strength.at(0.25):
        scaled = model(**inputs).logits
        raise KeyError
    assert torch.equal(model(**inputs).logits, logits[1])
    assert not any(torch.allclose(scaled, other) for other in logits)
    with strength.at(0.0):
        torch.testing.assert_close(model(**inputs).logits, logits[0])


def test_strength_without_an_adapter_is_a_place_between_weights_and_leaves_new_modules_alone() -> None:
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    strength = Strength(model, new_modules=["head"])
    for parameter in model.parameters():
        parameter.data.fill_(3.0)
    with strength.at(0.25):
        assert (model["body"].weight == 1.5).all() and (model["body"].bias == 1.5).all()
        assert (model["head"].weight == 3).all()
    assert all((parameter == 3).all() for parameter in model.parameters())


def test_the_best_try_has_the_lowest_perplexity_within_the_limit_at_some_strength() -> None:
    tries = [
        {
            "target perplexity": target,
            "mean change": change,
            "target perplexity at 0.5": 8.0,
            "mean change at 0.5": half,
        }
        for target, change, half in ((4.0, 9.0, 2.0), (7.0, 0.5, 0.0), (3.0, 9.0, 0.5), (1.0, 9.0, 1.5))
    ]
    comparison = object.__new__(ForgettingComparison)
    comparison.arguments = ForgettingArguments(max_change=1.0)
    assert sorted(tries, key=comparison.goodness) == [tries[index] for index in (0, 3, 2, 1)]


@pytest.mark.parametrize("loss", [math.nan, 1000.0])
def test_a_training_that_diverged_is_the_worst_try(loss: float) -> None:
    comparison = object.__new__(ForgettingComparison)
    comparison.arguments = ForgettingArguments()
    comparison.rows, comparison.sources = {"validation": None}, {"story": {"validation": None}}
    comparison.of_base_model = {"validation": {"story perplexity": 2.0}}
    metrics = comparison.measure(SimpleNamespace(evaluate=lambda rows: {"eval_loss": loss}), "validation")
    assert set(metrics.values()) == {math.inf} and len(metrics) == 5
    study = optuna.create_study(storage="sqlite://", direction="maximize")
    study.optimize(lambda trial: comparison.goodness(metrics)[0], n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE


def test_methods_for_images_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        forgetting.main(["--methods", "linear"])
    possible = [name for name, method in METHODS.items() if method.text and name != "toast-pretuned"]
    assert f"--methods linear cannot run; choose some of {', '.join(possible)}." in capsys.readouterr().err


def test_the_default_texts_are_docstrings_of_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "LIBRARY", Path(sysconfig.get_path("stdlib")))  # all of it
    numeric, prose = (offline.docstrings.__wrapped__(numeric) for numeric in (True, False))
    assert any("Decimal" in text for text in numeric["train"]["text"])
    texts = [text for data in (numeric, prose) for part in data.values() for text in part["text"]]
    assert len(set(texts)) > 1000 and len(texts) - len(set(texts)) < 10


def test_a_tokenizer_that_marks_the_start_of_texts_gets_no_other_marks() -> None:
    texts = Dataset.from_dict({"text": ["ab", "c d"]})
    byte_rows = offline.token_rows(texts, ByT5Tokenizer(extra_ids=0), block_size=3)
    assert [row["input_ids"] for row in byte_rows] == [[100, 101, 1], [102, 35, 103]]  # the last 1 is left over
    letters = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(["<s>", "</s>", "ab", "c", "d"])}, "d")
    )
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    ended = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    assert [row["input_ids"] for row in offline.token_rows(texts, ended, 2)] == [[2, 1], [3, 4]]
    letters.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    marked = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    assert [row["input_ids"] for row in offline.token_rows(texts, marked, 2)] == [[0, 2], [0, 3]]
