"""The tables and plots of the benchmarks: what a comparison shows, and what measures of cost print."""

import copy
import json
from pathlib import Path

import cost
import decoding
import growth
import pandas as pd
import pytest
import serving
import tables
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification


def cells(markdown: str) -> list[list[str]]:
    """The cells of all tables, without the lines below their heads."""
    rows = [[cell.strip() for cell in line.strip().split("|")] for line in markdown.splitlines() if "|" in line]
    return [row for row in rows if not set("".join(row)) <= set(":-")]


def test_a_table_has_means_and_deviations_of_the_tests_only() -> None:
    costs = {"learning_rate": 0.1, "weight_decay": 0.01, "trainable_parameters": 1234}
    costs |= {"flops_per_step": 2.5e9, "activation_megabytes": 7.4, "seconds": 3.0}
    runs = pd.DataFrame(
        {"method": method, "split": split, "accuracy": accuracy} | costs
        for method, split, accuracy in (
            ("lora", "validation", 0.9),
            ("lora", "test", 0.5),
            ("lora", "test", 0.7),
            ("full", "test", 0.25),
        )
    )
    table = tables.comparison_table(runs, ["accuracy"], digits=2)
    assert list(table.index) == ["`lora`", "`full`"]
    assert list(table["accuracy"]) == ["0.60 ± 0.14", "0.25"]
    assert list(table.loc["`full`"]) == ["1,234", "0.25", "1.0e-01", "1.0e-02", "2.5", "7", "3"]


def test_decoding_is_measured_next_to_the_base_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = LlamaConfig(vocab_size=8192, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    monkeypatch.setitem(cost.MODELS, "llama-256", (LlamaForCausalLM, config))
    methods = ["lora-merged", "toast-lite-fused", "toast-lite-drafted"]
    decoding.main(["--rounds", "2", "--new_tokens", "3", "--methods", *methods])
    head, *rows = cells(capsys.readouterr().out)
    assert head[2:5] == ["a token / base", "ms for a token", "drafts that hold"]
    assert [row[1] for row in rows] == methods
    assert all(float(row[2]) > 0 and float(row[4]) == 1 for row in rows)


def test_growth_of_the_cost_is_plotted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(growth, "USUAL", {"blocks": 2, "channels": 64, "tokens": 4})
    monkeypatch.setattr(growth, "GROWTH", {"blocks": [2, 4], "tokens": [4, 64]})
    growth.main(["--output_file", str(tmp_path / "growth.svg")])
    head, *rows = cells(capsys.readouterr().out)
    assert head[2:4] == ["TOAST", "TOAST-Lite r=8"]
    assert all(1.4 < float(row[4]) < float(row[3]) < float(row[2]) < 2.3 for row in rows)
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_costs_are_measured_next_to_the_base_model_and_lora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    monkeypatch.setitem(cost.MODELS, "llama-256", (LlamaForCausalLM, config))
    options = ["--models", "llama-256", "--rounds", "2", "--batch_size", "1", "--length", "4", "--methods", "toast"]
    cost.main(
        [*options, "toast-fused", "toast-stored", "toast-closed", "free", "--output_file", str(tmp_path / "cost.json")]
    )
    head, base, lora, toast, fused, stored, closed, free = cells(capsys.readouterr().out)
    assert head[2:5] == ["forward / base", "training step / lora", "decoding / base"]
    assert head[5:-1] == ["FLOPs / base", "kernels / base", "activations kept, MB"]
    assert [base[i] for i in (1, 3, 5, 6, 7)] == ["base", "-", "1.00", "1.00", "-"]
    assert (lora[1], toast[1], fused[1], fused[3]) == ("lora", "toast", "toast-fused", "-")
    assert (stored[1], stored[2]) == ("toast-stored", "-") and float(stored[3]) > 0
    assert all(float(ratio) > 0 for ratio in toast[2:-2])
    assert (free[1], free[2], free[6]) == ("free", "-", "-") and float(free[3]) > 0
    saved = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["models"]["llama-256"]
    assert saved["toast"]["kernels / base"] > saved["toast-fused"]["kernels / base"] > 1.9
    assert (closed[1], closed[3]) == ("toast-closed", "-")
    assert saved["toast-closed"]["FLOPs / base"] == 1


def test_costs_under_autocast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    monkeypatch.setitem(cost.MODELS, "vit-small", (ViTForImageClassification, config))
    dtypes = []
    forward_time = cost.forward_time

    def recorded(model: nn.Module, inputs: dict, device: str) -> float:
        dtypes.append(model(**inputs).logits.dtype)
        return forward_time(model, inputs, device)

    monkeypatch.setattr(cost, "forward_time", recorded)
    cost.main(["--rounds", "1", "--batch_size", "1", "--methods", "toast-lite", "--autocast"])
    assert set(dtypes) == {torch.bfloat16}
    assert "vit-small, cpu, float32, autocast, median of 1 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("shape", cost.MODELS)
def test_lora_adapts_the_model_of_every_shape(shape: str) -> None:
    model_class, config = cost.MODELS[shape]
    with torch.device("meta"):
        model = cost.adapt(model_class(copy.deepcopy(config)), "lora")
    assert any("lora_B" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_serving_several_adapters_is_measured_next_to_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    monkeypatch.setitem(cost.MODELS, "llama-256", (LlamaForCausalLM, config))
    options = {"model": "llama-256", "rounds": 1, "batch_size": 4, "adapters": 2, "length": 5}
    serving.main([argument for name, value in options.items() for argument in (f"--{name}", str(value))])
    head, *rows = cells(capsys.readouterr().out)
    assert head[2:6] == ["mixed batch / one", "one after the other / one", "all at once / one", "one / base"]
    assert [row[1] for row in rows] == ["toast", "toast-lite", "lora"]
    assert all(float(cell) > 0 for row in rows for cell in row[2:6])
