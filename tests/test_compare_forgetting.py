"""`compare_forgetting.py`: which texts are trained on and measured, and what the perplexities are."""

import gzip
import json
import math
from pathlib import Path

import compare_forgetting
import pytest
import torch
from compare_forgetting import COLUMNS
from comparison import search_points
from fine_tuning_methods import TEXT_LEARNING_RATES
from language_modeling import blocks_of_tokens, byte_level_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .models import tiny_model

TEXTS = {
    "train": [f"{number} is the number {number} and not {number + 1}." for number in range(40)],
    "test": [f"{number} is the number {number} and not {number + 1}." for number in range(40, 50)],
    "source": ["Once upon a time there was a little bear."] * 12,
}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Those of a short run with a tiny LLaMA and compressed files."""
    base = tmp_path / "base"
    set_seed(0)
    tiny_model(LlamaForCausalLM, vocab_size=258).save_pretrained(base)
    byte_level_tokenizer().save_pretrained(base)
    for name, texts in TEXTS.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    files = {"train_file": "train", "validation_file": "test", "source_file": "source"}
    named = [part for option, name in files.items() for part in (f"--{option}", str(tmp_path / f"{name}.jsonl.gz"))]
    short = "--tries 1 --seeds 1 --block_size 16 --num_train_epochs 1 --per_device_eval_batch_size 5".split()
    return ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out"), *named, *short]


def perplexity(model: LlamaForCausalLM, texts: list[str], block_size: int) -> float:
    """Computed here: of all tokens but the first of each block."""
    tokenizer = byte_level_tokenizer()
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(tokens[: len(tokens) // block_size * block_size]).view(-1, block_size)
    with torch.no_grad():
        logits = model.eval()(input_ids=blocks).logits
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), blocks[:, 1:]).item())


def test_perplexities_of_the_base_model(arguments: list[str]) -> None:
    comparison = compare_forgetting.prepare(*compare_forgetting.parse(arguments))
    measured = comparison.of_base_model()
    model, _ = comparison.load_model()
    expected = [perplexity(model, TEXTS[name], block_size=16) for name in ("test", "source")]
    assert list(measured) == COLUMNS
    assert list(measured.values()) == pytest.approx(expected, rel=1e-5)


def test_splits_share_no_text(arguments: list[str]) -> None:
    comparison = compare_forgetting.prepare(*compare_forgetting.parse(arguments))
    tokenizer = byte_level_tokenizer()
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


def test_table(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = compare_forgetting.main([*arguments, "--methods", "lora", "toast-lite"])
    assert [row["method"] for row in rows] == ["lora", "toast-lite"]
    printed = capsys.readouterr().out
    assert "| target perplexity | source perplexity |" in printed
    assert "Base model: target perplexity" in printed
    for row in rows:
        assert f"| {row['target perplexity']:.3f} | {row['source perplexity']:.3f} |" in printed
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [entry["run"]["evaluated_on"] for entry in runs] == ["validation", "test"] * 2
    assert compare_forgetting.main([*arguments, "--methods", "lora", "toast-lite"]) == rows


@pytest.mark.parametrize("method", TEXT_LEARNING_RATES)
def test_the_best_try_has_the_lowest_perplexity_of_the_target(
    method: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_from = ["--pretrained_feedback", "saved", "--tries", "3"]
    comparison = compare_forgetting.prepare(*compare_forgetting.parse([*arguments, *start_from]))
    measured = iter([(4.0, 1.0), (2.0, 9.0), (3.0, 0.5)])
    monkeypatch.setattr(comparison, "metrics", lambda run: dict(zip(COLUMNS, next(measured), strict=True)))
    best = comparison.search(method)
    assert (best.learning_rate, best.weight_decay) == search_points(TEXT_LEARNING_RATES[method], 3)[1]
    assert best.pretrained_feedback == ("saved" if method == "toast-pretuned" else None)


def test_a_method_for_images_only(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_forgetting.parse(["--methods", "linear"])
    assert "--methods linear is unknown; choose some of full, lora, toast" in capsys.readouterr().err


def test_a_tokenizer_that_marks_the_start_of_texts_gets_no_other_marks() -> None:
    tokenizer = byte_level_tokenizer()
    ended = blocks_of_tokens(tokenizer, 3)({"text": ["ab", "", "cd"]})["input_ids"]
    a, b, c, d = tokenizer("abcd")["input_ids"]
    end = tokenizer.eos_token_id
    assert ended == [[a, b, end], [end, c, d]]
    marked = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|padding|>")
    template = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", marked.bos_token_id)])
    marked.backend_tokenizer.post_processor = template
    start = marked.bos_token_id
    assert blocks_of_tokens(marked, 3)({"text": ["ab", "cd"]})["input_ids"] == [[start, a, b], [start, c, d]]
