"""`compare_forgetting.py`: which texts are trained on and measured, and what the perplexities are."""

import gzip
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import compare_forgetting
import offline
import optuna
import pytest
import torch
from compare_forgetting import ForgettingArguments, ForgettingComparison
from datasets import Dataset
from methods import METHODS, apply_method
from optuna.trial import TrialState
from scaling import Strength
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

TEXTS = {
    "train": [f"{number} is the number {number} and not {number + 1}." for number in range(40)],
    "test": [f"{number} is the number {number} and not {number + 1}." for number in range(40, 50)],
    "source": ["Once upon a time there was a little bear."] * 12,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return offline.small_llama(tmp_path_factory.mktemp("base"), steps=1, block_size=16)


@pytest.fixture
def arguments(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a short run with compressed files, and with a small LLaMA that is hardly pre-trained."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, texts in TEXTS.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    named = [part for name in TEXTS for part in (f"--{name}_file", str(tmp_path / f"{name}.jsonl.gz"))]
    short = "--tries 1 --seeds 1 --block_size 16 --num_train_epochs 1 --per_device_eval_batch_size 5".split()
    return ["--model_name_or_path", base, "--output_dir", str(tmp_path / "out"), *named, *short]


def prepared(arguments: list[str]) -> ForgettingComparison:
    return ForgettingComparison(compare_forgetting.parse(ForgettingArguments, "text", None, arguments))


def perplexity(model: torch.nn.Module, texts: list[str], block_size: int) -> float:
    """Computed here: of all tokens but the first of each block."""
    tokens = torch.tensor([token for text in texts for token in ByT5Tokenizer(extra_ids=0)(text)["input_ids"]])
    blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
    with torch.no_grad():
        logits = model.eval()(input_ids=blocks).logits
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), blocks[:, 1:]).item())


def test_what_is_trained_on_and_measured(arguments: list[str]) -> None:
    comparison = prepared([*arguments, "--methods", "lora"])
    measured = comparison.of_base_model()
    model = AutoModelForCausalLM.from_pretrained(comparison.base)
    assert measured == {
        f"{name} perplexity": pytest.approx(perplexity(model, TEXTS[texts], block_size=16), rel=1e-5)
        for name, texts in (("target", "test"), ("source", "source"))
    }
    tokenizer = ByT5Tokenizer(extra_ids=0)
    read = {
        name: tokenizer.decode([token for row in rows for token in row["input_ids"]])
        for name, rows in comparison.rows.items()
    }
    assert set(read) == {"search", "validation", "train", "test", "source"}
    for text in TEXTS["train"][1:]:  # of the last text in a split the end may be cut off
        assert (text in read["search"]) + (text in read["validation"]) <= 1
    assert sum(text in read["search"] or text in read["validation"] for text in TEXTS["train"]) >= 37
    assert read["train"] == read["search"] + read["validation"]
    assert all(text in read["test"] for text in TEXTS["test"][:-1])


def test_the_table_has_the_perplexities_of_target_and_source(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    runs = compare_forgetting.main([*arguments, "--methods", "lora", "toast-lite"])
    assert list(runs["method"]) == ["lora"] * 2 + ["toast-lite"] * 2
    assert list(runs["split"]) == ["validation", "test"] * 2
    printed = capsys.readouterr().out
    assert "Base model: target perplexity" in printed
    for _, run in runs[runs["split"] == "test"].iterrows():
        [line] = [line for line in printed.splitlines() if line.startswith(f"| `{run['method']}` ")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[3:5] == [f"{run['target perplexity']:.3f}", f"{run['source perplexity']:.3f}"]


def test_every_method_is_tested_at_every_strength(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    runs = compare_forgetting.main([*arguments, "--methods", "full", "toast-lite", "--scales", "1", "0.5", "0"])
    tested = runs[runs["split"] == "test"].set_index("method")
    printed = capsys.readouterr().out
    base = re.findall(r"[\d.]+(?=,|$)", printed.partition("Base model: ")[2].splitlines()[0])
    for method, run in tested.iterrows():
        lines = [line.split("|") for line in printed.splitlines() if line.startswith(f"| `{method}` ")]
        assert [line[2].strip() for line in lines[1:]] == ["1", "0.5", "0"]
        for place, column in enumerate(["target perplexity", "source perplexity"]):
            assert run[f"{column} at 1"] == run[column] != run[f"{column} at 0.5"]
            assert run[f"{column} at 0"] == pytest.approx(float(base[place]), rel=1e-4)
            assert lines[2][3 + place].strip() == f"{run[f'{column} at 0.5']:.3f}"
    assert (Path(arguments[3]) / "scales.md").read_text() in printed


@pytest.mark.parametrize("method", ["full", "lora", "toast-lite"])
@torch.no_grad()
def test_strength_leads_from_the_base_model_to_the_trained_one(base: str, method: str) -> None:
    inputs = {"input_ids": torch.arange(3, 13).view(1, -1)}
    model = apply_method(AutoModelForCausalLM.from_pretrained(base), method, task_type="CAUSAL_LM").eval()
    strength = Strength(model, new_modules=[])
    logits = [model(**inputs).logits]
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
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


def test_the_best_try_has_the_lowest_perplexity_of_the_target() -> None:
    tries = [
        {"target perplexity": target, "source perplexity": source} for target, source in ((4, 1), (2, 9), (3, 0.5))
    ]
    comparison = object.__new__(ForgettingComparison)
    assert max(tries, key=comparison.goodness) == tries[1]


@pytest.mark.parametrize("loss", [math.nan, 1000.0])
def test_a_training_that_diverged_is_the_worst_try(loss: float) -> None:
    comparison = object.__new__(ForgettingComparison)
    comparison.rows = {"validation": None, "source": None}
    metrics = comparison.measure(SimpleNamespace(evaluate=lambda rows: {"eval_loss": loss}), "validation")
    assert metrics == {"target perplexity": math.inf, "source perplexity": math.inf}
    study = optuna.create_study(storage="sqlite://", direction="maximize")
    study.optimize(lambda trial: comparison.goodness(metrics)[0], n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE


def test_methods_for_images_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_forgetting.main(["--methods", "linear"])
    possible = [name for name, method in METHODS.items() if method.text and name != "toast-pretuned"]
    assert f"--methods linear cannot run; choose some of {', '.join(possible)}." in capsys.readouterr().err


def test_the_default_texts_are_docstrings_of_other_modules() -> None:
    numeric, prose = (offline.docstrings(numeric) for numeric in (True, False))
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
