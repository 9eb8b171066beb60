"""What README and docs say that can be checked: their code runs, their numbers are those that were measured.

A Python block after the line `<!-- runs -->` is executed, the blocks of a page one after the other, with tiny models
and a few rows in place of what they download. `python -m tests.test_docs` prints the table of model types.
"""

import ast
import re
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import transformers as tf
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import toast_peft
from toast_peft import OFFICIAL_STAGES, TopDownConfig
from toast_peft.families.convnets import CONVNETS
from toast_peft.families.hierarchies import HIERARCHIES
from toast_peft.families.model_types import ARCHITECTURES

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
}
README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]
BENCHMARKS = ROOT / "examples" / "benchmarks"
BLOCK = re.compile(r"(<!-- runs -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks_that_run(page: str) -> list[str]:
    return [code for mark, code in BLOCK.findall(page) if mark]


# -------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if BLOCK.search(page)])
def test_python_is_python_and_imports_what_there_is(name: str) -> None:
    for _, code in BLOCK.findall(PAGES[name]):
        for node in ast.walk(ast.parse(code, name)):
            if isinstance(node, ast.ImportFrom) and node.module == "toast_peft":
                assert {alias.name for alias in node.names} <= set(toast_peft.__all__)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "toast_peft." in page])
def test_public_names_exist(name: str) -> None:
    used = re.findall(r"(?<![/\w])toast_peft\.(\w+)\(", PAGES[name])
    assert set(used) <= set(toast_peft.__all__)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "TopDownConfig" in page])
def test_options_and_stages_exist(name: str) -> None:
    """Also in the sentences between the code."""
    for stage, arguments in re.findall(r"TopDownConfig(\.official_stage|\.for_images)?\(([^()]*)\)", PAGES[name]):
        assert set(re.findall(r"(\w+)=", arguments)) <= set(TopDownConfig.__dataclass_fields__)
        if stage == ".official_stage":
            assert ast.literal_eval(arguments.split(",")[0]) in OFFICIAL_STAGES


TEXT = "once upon a time there was a small cat . why is the sky blue ? it saw big red house and said so"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def tiny_tokenizer(*args: Any, **kwargs: Any) -> tf.PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *dict.fromkeys(TEXT.split())]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    names |= {"model_input_names": ["input_ids", "attention_mask"], "chat_template": CHAT_TEMPLATE}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = _SIZES | {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_vit(*args: Any, **options: Any) -> tf.PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(**_SIZES, image_size=8, patch_size=4, **options))


def tiny_llama(*args: Any, **options: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_TEXT, num_key_value_heads=2, **options))


def tiny_bert(*args: Any, **options: Any) -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**_TEXT, **options))


def tiny_segformer(*args: Any, ignore_mismatched_sizes: bool, **options: Any) -> tf.PreTrainedModel:
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**sizes, decoder_hidden_size=16, **options))


def tiny_processor(*args: Any, **options: Any) -> tf.BaseImageProcessor:
    return tf.ViTImageProcessorPil(size={"height": 8, "width": 8})


def a_few_rows(name: str, split: str) -> datasets.Dataset:
    if name == "uoft-cs/cifar10":
        pixels = np.random.default_rng(0).integers(0, 255, (16, 12, 12, 3), np.uint8)
        images = [Image.fromarray(image) for image in pixels]
        return datasets.Dataset.from_dict({"img": images, "label": list(range(8)) * 2})
    if name == "trl-lib/Capybara":
        conversation = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
        return datasets.Dataset.from_dict({"messages": [conversation] * 16})
    if name == "stanfordnlp/sst2":
        return datasets.Dataset.from_dict({"sentence": [TEXT] * 16, "label": [0, 1] * 8})
    assert name == "roneneldan/TinyStories"
    return datasets.Dataset.from_dict({"text": [TEXT] * 16})


@pytest.fixture
def nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, made in (
        (tf.AutoModelForImageClassification, tiny_vit),
        (tf.AutoModelForCausalLM, tiny_llama),
        (tf.AutoModelForSequenceClassification, tiny_bert),
        (tf.AutoModelForSemanticSegmentation, tiny_segformer),
        (tf.AutoImageProcessor, tiny_processor),
        (tf.AutoTokenizer, tiny_tokenizer),
    ):
        monkeypatch.setattr(owner, "from_pretrained", made)
    monkeypatch.setattr(datasets, "load_dataset", a_few_rows)


def run_page(name: str) -> dict[str, Any]:
    """Execute the marked blocks of a page, with a few steps of training on the CPU; returns the names they define."""
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks_that_run(PAGES[name]):
        short = re.sub(r"max_steps=\d+", "max_steps=2", code.replace('("outputs"', '("outputs", use_cpu=True'))
        exec(compile(short, name, "exec"), names)
    return names


@pytest.mark.usefixtures("nothing_is_downloaded")
def test_script_of_the_readme_trains_saves_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("README.md")
    assert (tmp_path / "toast-adapter" / "adapter_model.safetensors").is_file()
    assert names["model"].feedback_statistics()["open_tokens"] > 0.5
    assert "trainable params: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The prompt of the TOAST adapter")
@pytest.mark.usefixtures("nothing_is_downloaded")
@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md" and blocks_that_run(PAGES[name])])
def test_page_runs_and_leaves_an_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "from trl" in PAGES[name]:
        pytest.importorskip("trl", reason="needs Python 3.11")
    monkeypatch.chdir(tmp_path)
    names = run_page(name)
    assert any(".feedback_path." in parameter for parameter, _ in names["model"].named_parameters())
    if any("toast-adapter" in code for code in blocks_that_run(PAGES[name])):
        assert (tmp_path / "toast-adapter" / "adapter_model.safetensors").is_file()


def test_printed_number_of_parameters_is_that_of_the_real_model() -> None:
    base = tf.ViTForImageClassification(tf.ViTConfig(num_labels=10))
    model = get_peft_model(base, TopDownConfig(r=8, modules_to_save=["classifier"]))
    trainable, total = model.get_nb_trainable_parameters()
    assert f"# trainable params: {trainable:,} || all params: {total:,} || " in README


# --------------------------------------------------------------------------------------------------------- sentences


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_option_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", PAGES["docs/options.md"].split("## ")[0]))
    own = set(TopDownConfig.__dataclass_fields__) - set(TopDownConfig.__mro__[1].__dataclass_fields__)
    filled_in = {name for name in own if "Filled in" in TopDownConfig.__dataclass_fields__[name].metadata["help"]}
    assert own - filled_in <= explained


def test_every_official_stage_is_named() -> None:
    assert {stage for stage in OFFICIAL_STAGES if f"`{stage}`" not in PAGES["docs/options.md"]} == set()


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    named = re.findall(r"(?<![\w/])(?:toast_peft|examples|tests|docs)/[\w./*-]*\w", PAGES[name])
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_architecture_names_files_that_exist() -> None:
    there = [path.as_posix() for folder in ("toast_peft", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"[\w/]+\.py\b", PAGES["docs/architecture.md"]))
    assert {file for file in named if not any(path.endswith(f"/{file}") for path in there)} == set()


def test_architecture_names_every_file() -> None:
    files = {path.name for path in (ROOT / "toast_peft").rglob("*.py")} - {"__init__.py"}
    assert {file for file in files if file not in PAGES["docs/architecture.md"]} == set()


def literals(path: Path) -> Iterator[str]:
    """The strings of a file, those over several lines and with braces as one, `…` in place of the braces."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"{\w*}", "…", node.value)


def test_explained_messages_are_those_of_the_code() -> None:
    text = PAGES["docs/troubleshooting.md"]
    messages = [*re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE), *re.findall(r"The warning `(.*?)`", text)]
    said = "\n".join(text for path in (ROOT / "toast_peft").rglob("*.py") for text in literals(path))
    assert len(messages) > 10
    assert [message for message in messages if message.removesuffix("…") not in said] == []


def model_types_with_a_row() -> str:
    """The table of model types."""
    rows: dict[tuple[str, str], list[str]] = {}

    def add(model_type: str, values: str, start: str) -> None:
        rows.setdefault((values, start), []).append(f"`{model_type}`")

    for model_type, row in sorted(ARCHITECTURES.items()):
        fused = " (fused)" if row.fused else ""
        add(model_type, f"`{row.value_projection}`{fused}", start_of_feedback(row))
    for model_type, row in sorted(HIERARCHIES.items()):
        add(model_type, f"`{row.value_projection}`, through all stages", start_of_feedback(row))
    for model_type, row in sorted(CONVNETS.items()):
        compared = f", compared after `{row.final_norm}`" if row.final_norm else ""
        add(model_type, "ConvNet: input of each stage", f"after the last stage{compared}")
    lines = [f"| {', '.join(types)} | {values} | {start} |" for (values, start), types in rows.items()]
    head = ["| model type | value projection in a block | feedback starts |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def start_of_feedback(row: Any) -> str:
    return f"after `{row.final_norm}`" if row.normalize_features else "after the last block"


def test_all_model_types_with_a_row_are_in_the_table() -> None:
    assert model_types_with_a_row() in PAGES["docs/custom_models.md"]


# ----------------------------------------------------------------------------------------------------------- numbers


# The script beside the results makes the tables of them.
TABLES = runpy.run_path(str(BENCHMARKS / "tables.py"))


def in_markdown(table: pd.DataFrame) -> list[str]:
    head, *rows = [[table.index.name or "method", *table.columns], *table.itertuples()]
    lines = [" | ".join(map(str, row)) for row in (head, *rows)]
    lines = [f"| {line} |" for line in lines]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def segmentation() -> pd.DataFrame:
    runs = pd.read_csv(BENCHMARKS / "results" / "segmentation_camvid.csv")
    forms = {"trainable_parameters": "{:,}", "learning_rate": "{}"}
    forms |= dict.fromkeys(["eval_mean_iou", "test_mean_iou", "test_pixel_accuracy"], "{:.3f}")
    return pd.DataFrame({name: runs[name].map(form.format) for name, form in forms.items()}).set_axis(
        runs["method"].map("`{}`".format)
    )


FORGETTING = {change: partial(TABLES["forgetting"], change) for change in TABLES["CHANGES"]}
OTHERS = [
    partial(TABLES["forgetting"], change, name) for name in TABLES["LEARNED"][1:] for change in TABLES["CHANGES"]
]


FIVE_SETS = partial(TABLES["images"], TABLES["FIVE_SETS"])


@pytest.mark.parametrize("table", [TABLES["images"], FIVE_SETS, TABLES["texts"], *FORGETTING.values(), *OTHERS])
def test_tables_are_what_was_measured(table: Callable[[], pd.DataFrame]) -> None:
    assert "\n".join(in_markdown(table())) in RESULTS


ELSEWHERE = {"focus": "focus", "curves": "focus", "mask_shares": "focus", "steering": "steering"}
ELSEWHERE |= {"continual_images": "continual", "routing": "continual"}


@pytest.mark.parametrize(("name", "page"), ELSEWHERE.items())
def test_tables_of_other_pages_are_what_was_measured(name: str, page: str) -> None:
    assert "\n".join(in_markdown(TABLES[name]())) in PAGES[f"docs/{page}.md"]


def test_table_of_segmentation_is_what_was_measured() -> None:
    assert "\n".join(in_markdown(segmentation())[1:]) in RESULTS


def reached(table: Callable[[], pd.DataFrame]) -> pd.Series:
    """The rounded target perplexities of a table, and the lowest of those under a gate if there are any."""
    cells = table()["target perplexity"].rename(lambda name: name.strip("`"))
    values = cells.str.split().str[0].astype(float).round().astype(int)
    gated = values[values.index.str.contains("-gated")]
    return values if gated.empty else pd.concat([values, pd.Series({"gated": gated.min()})])


def test_readme_sums_up_what_was_measured_on_images() -> None:
    readme, mean = " ".join(README.split()), FIVE_SETS()["mean"].rename(lambda name: name.strip("`"))
    best = mean[mean.index.str.contains("toast|pass2")].astype(float).idxmax()
    assert best == "toast-lite-pass2-lora-biases"
    assert f"({mean[best]} %) was level with LoRA on all linear layers ({mean['lora-all-linear']} %)" in readme
    plain = f"plain TOAST lower ({mean['toast']}, Lite {mean['toast-lite']} %)"
    assert f"and BitFit ({mean['bitfit']} %), {plain}" in readme


def test_readme_sums_up_what_was_measured() -> None:
    mean, largest = map(reached, FORGETTING.values())
    readme = " ".join(README.split())
    assert f"to {largest['gated']} with a gate, to {largest['full']} with full fine-tuning and" in readme
    assert f"to {largest['lora-all-linear']} with LoRA on all linear layers" in readme
    assert f"full fine-tuning ({mean['full']}), OFT ({mean['oft']}), TOAST with" in readme
    assert f"feedback to the output ({mean['toast-output-initialized']}) and LoRA" in readme
    assert f"on all linear layers ({mean['lora-all-linear']}), scaled down" in readme
    assert f"than what is gated ({mean['gated']})" in readme
    longer = reached(OTHERS[0])
    lora, toast = longer["lora-all-linear"], longer["toast-output-initialized"]
    assert f"LoRA is still at {lora}, and TOAST with feedback to the output at {toast}." in readme


if __name__ == "__main__":
    print(model_types_with_a_row())
