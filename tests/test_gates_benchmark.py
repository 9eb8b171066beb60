"""`gates.py`: what it says of perplexities and of tokens that are those of the base model."""

from pathlib import Path

import gates
import offline
import pytest


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
