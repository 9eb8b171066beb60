"""What the README says that can be checked."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from toast_peft import TopDownConfig
from toast_peft.architectures import ARCHITECTURES, CONVOLUTIONAL_ARCHITECTURES, HIERARCHICAL_ARCHITECTURES

from .models import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "examples" / "results"
IMAGES = ("dtd10", "flowers5", "cifar10")


def test_printed_parameters() -> None:
    """The first example, with a model of the same shape."""
    base = ViTForImageClassification(ViTConfig(num_labels=10))
    model = get_peft_model(base, TopDownConfig(r=8, modules_to_save=["classifier"]))
    trainable, total = model.get_nb_trainable_parameters()
    assert f"# trainable params: {trainable:,} || all params: {total:,} || " in README


def test_first_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """It trains, with a tiny model and random images in place of what it downloads."""
    config = ViTConfig(**MODELS[ViTForImageClassification][1], num_labels=10)
    images = [Image.fromarray(rows) for rows in np.random.default_rng(0).integers(0, 255, (16, 12, 12, 3), np.uint8)]
    data = datasets.Dataset.from_dict({"img": images, "label": list(range(8)) * 2})
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    for owner, function, result in (
        (transformers.AutoModelForImageClassification, "from_pretrained", ViTForImageClassification(config)),
        (transformers.AutoImageProcessor, "from_pretrained", processor),
        (datasets, "load_dataset", data),
    ):
        monkeypatch.setattr(owner, function, lambda *args, result=result, **kwargs: result)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    exec(
        re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0].replace('"outputs"', '"outputs", use_cpu=True'), names
    )
    assert (tmp_path / "toast-adapter" / "adapter_model.safetensors").is_file()
    assert names["model"].feedback_statistics()["open_tokens"] > 0.5
    assert "trainable params: " in capsys.readouterr().out


def test_every_option_is_explained() -> None:
    options = set(re.findall(r"`(\w+)`", README.split("## Options")[1].split("## ")[0]))
    own = set(TopDownConfig.__dataclass_fields__) - set(TopDownConfig.__mro__[1].__dataclass_fields__)
    filled_in = {name for name in own if "Filled in" in TopDownConfig.__dataclass_fields__[name].metadata["help"]}
    assert own - filled_in <= options


def supported_models() -> str:
    """The table of the README; `python -m tests.test_readme` prints it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for model_type, row in sorted(ARCHITECTURES.items()):
        values = f"`{row.value_projection}`" + (" (fused)" if row.fused else "")
        start = f"after `{row.final_norm}`" if row.normalize_features else "after the last block"
        rows.setdefault((values, start), []).append(f"`{model_type}`")
    for model_type, row in sorted(HIERARCHICAL_ARCHITECTURES.items()):
        start = f"after `{row.final_norm}`" if row.normalize_features else "after the last block"
        rows.setdefault((f"`{row.value_projection}`, through all stages", start), []).append(f"`{model_type}`")
    for model_type, row in sorted(CONVOLUTIONAL_ARCHITECTURES.items()):
        compared = f", compared after `{row.final_norm}`" if row.final_norm else ""
        rows.setdefault(("ConvNet: input of each stage", f"after the last stage{compared}"), []).append(
            f"`{model_type}`"
        )
    lines = [f"| {', '.join(types)} | {values} | {start} |" for (values, start), types in rows.items()]
    head = ["| model type | value projection in a block | feedback starts |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def test_supported_models() -> None:
    assert supported_models() in README


def test_example_of_a_custom_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(
        r"```python\n(.*?)```", README.split("### A model of your own")[1].split("## ")[0], re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "example"}
    exec(example, names)
    trained = {
        name for name, p in names["model"].named_parameters() if "modules_to_save" in name or "topdown_" in name
    }
    assert any(".blocks." not in name and "feedback_path.layers.3" in name for name in trained)
    assert (tmp_path / "toast-adapter" / "adapter_model.safetensors").is_file()


def measured_on_test(results: str) -> dict[str, list[dict[str, float]]]:
    """What was measured on the test split, for each method with all seeds."""
    stored = json.loads((RESULTS / results).read_text())["runs"]
    measured: dict[str, list[dict[str, float]]] = {}
    for entry in stored:
        if entry["run"]["evaluated_on"] == "test":
            measured.setdefault(entry["run"]["method"], []).append(entry["metrics"])
    return measured


def with_deviation(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def comparison_of_images() -> str:
    """The table of accuracies in the README, the best mean first."""
    measured = {name: measured_on_test(f"comparison_{name}.json") for name in IMAGES}
    rows = {}
    for method, runs in measured["dtd10"].items():
        accuracies = [[100 * run["accuracy"] for run in measured[name][method]] for name in IMAGES]
        overall = mean(map(mean, accuracies))
        cells = [f"`{method}`", f"{runs[0]['trainable_parameters']:,}", *map(with_deviation, accuracies)]
        cells += [f"{overall:.1f}", f"{runs[0]['flops_per_step'] / 1e9:.1f}"]
        cells += [f"{runs[0]['activation_megabytes']:.0f}", f"{mean(run['seconds'] for run in runs):.0f}"]
        rows[f"| {' | '.join(cells)} |"] = overall
    head = ["method", "trainable parameters", *IMAGES, "mean", "GFLOPs / step", "activations kept, MB", "seconds"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *sorted(rows, key=rows.get, reverse=True)])


def comparison_of_texts() -> str:
    """The table of perplexities in the README, the best one of the target first."""
    rows = {}
    for method, runs in measured_on_test("forgetting_tinyshakespeare.json").items():
        columns = [[run[f"{name} perplexity"] for run in runs] for name in ("target", "source")]
        cells = [f"`{method}`", f"{runs[0]['trainable_parameters']:,}", *map(with_deviation, columns)]
        rows[f"| {' | '.join(cells)} |"] = mean(columns[0])
    head = "| method | trainable parameters | target perplexity | source perplexity |\n|---|---|---|---|"
    return "\n".join([head, *sorted(rows, key=rows.get)])


@pytest.mark.parametrize("table", [comparison_of_images, comparison_of_texts])
def test_tables_are_what_was_measured(table: Callable[[], str]) -> None:
    assert table() in README


if __name__ == "__main__":
    print(supported_models(), comparison_of_images(), comparison_of_texts(), sep="\n\n")
