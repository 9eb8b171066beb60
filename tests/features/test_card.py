"""The model card of an adapter: its code runs, it says what was made and how, and what others wrote in it stays."""

import ast
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from huggingface_hub.utils import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.utils import hub

from toast_peft import TopDownConfig
from toast_peft.card import _loader_of, loading_snippet

from ..helpers import adapted, output_of, steered, trained_everywhere
from ..zoo import MODELS, inputs_of, tiny_model
from .test_trainer import new_model, trainer_for

ROOT = Path(__file__).parents[2]
# Model class -> the Auto class that its checkpoints are loaded with, and options of the adapter.
ON_CHECKPOINTS = {
    tf.ViTForImageClassification: ("AutoModelForImageClassification", {"modules_to_save": ["classifier"]}),
    tf.LlamaForCausalLM: ("AutoModelForCausalLM", {"task_type": "CAUSAL_LM", "r": 2}),
    tf.LlamaForSequenceClassification: ("AutoModelForSequenceClassification", {"task_type": "SEQ_CLS"}),
}
_RUN_SNIPPETS = """
import sys
import torch
from huggingface_hub import ModelCard

for index, folder in enumerate(sys.argv[1:]):
    code = ModelCard.load(folder + "/README.md").text.split("```python\\n")[1].split("```")[0]
    if index == 0:  # nothing of ours is imported yet
        try:
            exec(code.replace("import toast_peft", ""))
        except KeyError as error:
            print(type(error).__name__ + ": " + str(error))
    names = {}
    exec(code, names)
    with torch.no_grad():
        torch.save(names["model"](**torch.load(folder + "/inputs.pt")).logits, folder + "/logits.pt")
"""


def on_checkpoint(model_class: type, folder: Path, **options: object) -> PeftModel:
    """An adapter with an effect, on a base model that was loaded from a folder; a trained head has other labels."""
    tiny_model(model_class).save_pretrained(folder)
    labels = {"num_labels": 5, "ignore_mismatched_sizes": True} if "Classification" in model_class.__name__ else {}
    model = steered(model_class.from_pretrained(folder, **labels).eval(), **options)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def code_in(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Replaces the Hub: cards by repository that are there, and those that are uploaded, by "uploaded"."""
    cards, load = {}, ModelCard.load.__func__

    def upload(operations: list, **_: object) -> None:
        [card] = [operation for operation in operations if operation.path_in_repo == "README.md"]
        cards["uploaded"] = Path(card.path_or_fileobj).read_text(encoding="utf-8")

    def load_from_hub(cls: type, location: object, **options: object) -> ModelCard:
        if Path(location).is_file():
            return load(cls, location, **options)
        if location not in cards:
            raise EntryNotFoundError(location)
        return cls(cards[location])

    api = MagicMock(create_commit=upload)
    api.create_repo.side_effect = lambda repo_id, **_: MagicMock(repo_id=repo_id)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(ModelCard, "load", classmethod(load_from_hub))
    yield cards


# ----------------------------------------------------------------------------------------------------------- the code


@pytest.mark.slow
def test_code_of_the_card_runs_and_gives_the_same_logits(tmp_path: Path) -> None:
    """In a process of its own, which also sees the error that the card explains."""
    folders, expected = [], []
    for model_class, (_, options) in ON_CHECKPOINTS.items():
        folder = tmp_path / model_class.__name__
        model = on_checkpoint(model_class, folder / "base", **options)
        model.save_pretrained(folder)
        inputs = inputs_of(model)
        torch.save(inputs, folder / "inputs.pt")
        folders.append(str(folder))
        expected.append(output_of(model, inputs))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _RUN_SNIPPETS, *folders]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "KeyError: 'TOPDOWN'"
    for folder, logits in zip(folders, expected, strict=True):
        torch.testing.assert_close(torch.load(f"{folder}/logits.pt"), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", ON_CHECKPOINTS)
def test_code_names_the_auto_class_and_the_number_of_labels(model_class: type, tmp_path: Path) -> None:
    auto_class, options = ON_CHECKPOINTS[model_class]
    code = loading_snippet(on_checkpoint(model_class, tmp_path / "base", **options), "me/adapter")
    labels = ", num_labels=5, ignore_mismatched_sizes=True" if "Classification" in auto_class else ""
    assert code.startswith("import toast_peft")
    assert f"from transformers import {auto_class}\n" in code
    assert f'{auto_class}.from_pretrained("{tmp_path}/base"{labels})\n' in code
    assert code.endswith('PeftModel.from_pretrained(base, "me/adapter")')


@pytest.mark.parametrize(
    ("model_class", "loader"),
    [
        (tf.ViTModel, "AutoModel"),
        (tf.GPT2LMHeadModel, "AutoModelForCausalLM"),
        (tf.T5ForConditionalGeneration, "AutoModelForSeq2SeqLM"),
        (tf.WhisperForConditionalGeneration, "AutoModelForSpeechSeq2Seq"),
        (tf.LlavaForConditionalGeneration, "AutoModelForImageTextToText"),
        (tf.DPTForSemanticSegmentation, "AutoModelForSemanticSegmentation"),
        (tf.DeiTForImageClassificationWithTeacher, "DeiTForImageClassificationWithTeacher"),
        (tf.CLIPVisionModel, "CLIPVisionModel"),
    ],
)
def test_class_that_loads_the_base_model(model_class: type, loader: str) -> None:
    """An Auto class where it always gives this class; a vision tower may be in the checkpoint of a whole CLIP."""
    assert _loader_of(tiny_model(model_class)) == loader


@pytest.mark.parametrize("model_class", MODELS)
def test_class_that_loads_the_base_model_gives_its_class(model_class: type) -> None:
    base = tiny_model(model_class)
    loader = getattr(tf, _loader_of(base))
    assert loader is model_class or loader._model_mapping[type(base.config)] is model_class


def test_code_of_an_adapter_with_another_name_finds_its_folder(tmp_path: Path) -> None:
    base = tiny_model(tf.ViTModel)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(tf.AutoModel.from_pretrained(tmp_path / "base"), TopDownConfig(r=2), adapter_name="mine")
    model.save_pretrained(tmp_path)
    names = {}
    exec(code_in(card_of(tmp_path).text), names)
    assert names["model"].peft_config["default"].r == 2


def test_base_model_without_a_checkpoint_is_left_to_the_reader() -> None:
    model = adapted(tiny_model(tf.ViTModel))
    code = loading_snippet(model, "adapter")
    assert "base = ...  # the ViTModel that the adapter was made for" in code and ast.parse(code)


def test_plain_module_has_a_card(tmp_path: Path) -> None:
    blocks = nn.Sequential(*(nn.Sequential(OrderedDict(values=nn.Linear(4, 4))) for _ in range(2)))
    base = nn.Sequential(OrderedDict(blocks=blocks, head=nn.Linear(4, 2)))
    adapted(base, target_modules=["values"], modules_to_save=["head"]).save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "# TOAST adapter for `Sequential`" in text and ast.parse(code_in(text))


# ---------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("model_class", ON_CHECKPOINTS)
def test_metadata(model_class: type, tmp_path: Path) -> None:
    on_checkpoint(model_class, tmp_path / "base", **ON_CHECKPOINTS[model_class][1]).save_pretrained(tmp_path)
    data = card_of(tmp_path).data
    assert data.library_name == "peft" and data.base_model == str(tmp_path / "base")
    base_tag = f"base_model:adapter:{tmp_path / 'base'}"
    assert data.tags == [base_tag, "peft", "toast", "topdown", "transformers"]
    assert data.pipeline_tag == ("text-generation" if model_class is tf.LlamaForCausalLM else None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"r": 4, "init_weights": False}, "r=4, init_weights=False"),
        ({"trainable_parts": ["prompt", "linear2"]}, "trainable_parts=['prompt', 'linear2']"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS', modules_to_save=['classifier', 'score']"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices=[3, 5]"),
    ],
    ids=["full", "lite", "parts", "head", "tokens"],
)
def test_options_and_sizes(options: dict, said: str, tmp_path: Path) -> None:
    """Also when the adapter has been loaded for inference, where nothing is trained."""
    model = adapted(tiny_model(tf.LlamaForSequenceClassification), **options)
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in load_file(tmp_path / "adapter_model.safetensors").values()) / 1000
    line = f"- `default`: `TopDownConfig({said})`, {model.get_nb_trainable_parameters()[0]:,} trained parameters, "
    assert f"{line}{size:.1f} kB of weights\n" in card_of(tmp_path).text
    loaded = PeftModel.from_pretrained(tiny_model(tf.LlamaForSequenceClassification), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert f"{line}{size:.1f} kB of weights\n" in card_of(tmp_path / "again").text


def test_several_adapters_are_all_described(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTModel), r=2)
    model.add_adapter("other", TopDownConfig(r=3))
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "- `default`: `TopDownConfig(r=2)`" in text and "- `other`: `TopDownConfig(r=3)`" in text


def test_adapters_of_another_method_are_not_described(tmp_path: Path) -> None:
    base = get_peft_model(tiny_model(tf.ViTModel), LoraConfig(target_modules=["q_proj"]), "lora").base_model.model
    adapted(base, r=2).save_pretrained(tmp_path)
    assert re.findall("- `(.*)`: `", card_of(tmp_path).text) == ["default"]


def test_copied_model_writes_the_same_card(tmp_path: Path) -> None:
    model = trained_everywhere(tf.ViTForImageClassification, modules_to_save=["classifier"])
    texts = []
    for saved in (model, deepcopy(model)):
        saved.save_pretrained(tmp_path)
        texts.append((tmp_path / "README.md").read_text(encoding="utf-8"))
        (tmp_path / "README.md").unlink()
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------- beside what others write


def test_text_and_tags_of_the_user_are_kept_and_ours_is_renewed(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTModel), r=2)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    card.text = "# My adapter\n\nFor birds.\n" + card.text.split("\n", 2)[2] + "\n\n## Limits\n\nOnly birds.\n"
    card.data.tags.append("birds")
    card.save(tmp_path / "README.md")
    model = adapted(tiny_model(tf.ViTModel), r=4)
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert text.startswith("# My adapter\n\nFor birds.\n") and "## Limits\n\nOnly birds." in text
    assert "TopDownConfig(r=4)" in text and "TopDownConfig(r=2)" not in text
    assert text.count("## How to use it") == 1 and "birds" in card_of(tmp_path).data.tags


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    model = adapted(tiny_model(tf.ViTModel))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text(encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before


def test_card_of_somebody_else_gets_our_part_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Hello.\n", encoding="utf-8")
    adapted(tiny_model(tf.ViTModel)).save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert text.lstrip().startswith("Hello.") and "## How to use it" in text


def test_card_of_lora_is_left_to_peft(tmp_path: Path) -> None:
    get_peft_model(tiny_model(tf.ViTModel), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Model Card for Model ID" in text and "toast" not in text.lower()


def test_push_to_hub_uploads_our_card(uploaded: dict[str, str]) -> None:
    """PushToHubMixin of transformers would replace it by that of a transformers model."""
    adapted(tiny_model(tf.ViTModel), r=2).push_to_hub("me/adapter", tags=["mine"])
    card = ModelCard(uploaded["uploaded"])
    assert card.data.library_name == "peft" and {"mine", "toast"} <= set(card.data.tags)
    assert card.text.lstrip().startswith("# TOAST adapter for") and "More Information Needed" not in card.text
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card.text


def test_push_to_hub_keeps_the_text_of_the_card_there(uploaded: dict[str, str]) -> None:
    uploaded["me/adapter"] = "---\ntags:\n- birds\n---\n\n# Birds\n\nMine.\n"
    adapted(tiny_model(tf.ViTModel), r=2).push_to_hub("me/adapter")
    card = ModelCard(uploaded["uploaded"])
    assert card.text.lstrip().startswith("# Birds\n\nMine.") and "TopDownConfig(r=2)" in card.text
    assert {"birds", "toast"} <= set(card.data.tags)


def test_push_to_hub_keeps_a_form_that_was_filled_in(uploaded: dict[str, str]) -> None:
    model = adapted(tiny_model(tf.ViTModel), r=2)
    form = hub.create_and_tag_model_card("me/other").content
    uploaded["me/adapter"] = form.replace("- **License:** [More Information Needed]", "- **License:** mine")
    model.push_to_hub("me/adapter")
    assert "- **License:** mine" in uploaded["uploaded"] and "TopDownConfig(r=2)" in uploaded["uploaded"]


def test_push_to_hub_of_lora_is_left_alone(uploaded: dict[str, str]) -> None:
    get_peft_model(tiny_model(tf.ViTModel), LoraConfig(target_modules=["v_proj"])).push_to_hub("me/adapter")
    assert ModelCard(uploaded["uploaded"]).data.library_name == "transformers"


def test_card_of_the_trainer_has_metrics_and_our_part(tmp_path: Path) -> None:
    trainer = trainer_for(new_model(tf.ViTForImageClassification), tmp_path, max_steps=2, eval_steps=1, save_steps=2)
    trainer.train()
    trainer.save_model()
    assert "TopDownConfig(modules_to_save=['classifier'])" in card_of(tmp_path).text
    trainer.create_model_card()
    card = card_of(tmp_path)
    loss = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    assert f"- Loss: {loss:.4f}" in card.text and "learning_rate: 0.01" in card.text
    assert "TopDownConfig(modules_to_save=['classifier'])" in card.text and "import toast_peft" in card.text
    assert card.data.library_name == "peft" and {"toast", "generated_from_trainer"} <= set(card.data.tags)
    assert "toast" in card_of(tmp_path / "checkpoint-2").data.tags
