"""The model card of an adapter, `README.md`: what it is, how to load it, and how it was made.

PEFT and the Trainer write the card of an adapter by `PeftModel.create_or_update_model_card`, which asks the method for
nothing, and `push_to_hub` replaces it by one about a transformers model. `register_model_card` adds our part to
both, for TOAST adapters only.
"""

import json
import os
from dataclasses import fields
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .config import TopDownConfig
from .core.topdown_layer import TopDownLayer, belongs_to

_BEGIN = "<!-- toast_peft writes this part anew at every save, up to its end mark; all other text is kept. -->"
_END = "<!-- end of the part of toast_peft -->"
# What `push_to_hub` of transformers describes a model with that has no card.
_NOT_DESCRIBED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_TAG_OF_BASE_MODEL = "base_model:adapter:"
# What a config says that is not a choice of the user.
_FACTS = {field.name for field in fields(PeftConfig)} - {"task_type"} | {"backbone_type", "num_blocks", "hidden_size"}
_FACTS |= {"gate_is_causal", "gate_report"}
_SECTION = """{begin}

## About this adapter

It adapts {base} with [TOAST](https://arxiv.org/abs/2305.15542), a method of
[PEFT](https://github.com/huggingface/peft): the frozen model runs twice, and feedback from the first pass steers the
second one. The feedback depends on the input, so it stays a file of its own and is not merged into the model.

## How to use it

```python
{snippet}
```

Without `import toast_peft`, PEFT does not know the method and says `KeyError: 'TOPDOWN'`.

## How it was made

{adapters}

{end}"""


def register_model_card() -> None:
    """Let PEFT write our section into the card of each TOAST adapter. To be called once."""
    write, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    def update(model: PeftModel, folder: str | os.PathLike[str], location: str | os.PathLike[str]) -> None:
        tags = _write_section(model, folder, location)
        write(model, os.fspath(folder))
        _add_tags(folder, tags)

    @wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike[str]) -> None:
        if self.peft_type == PeftType("TOPDOWN"):
            update(self, output_dir, location=output_dir)
        else:
            write(self, os.fspath(output_dir))

    @wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # The last moment before the upload, and the first that knows the repository.
        if self.peft_type == PeftType("TOPDOWN"):
            update(self, working_dir, location=repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    # Ours call what they replace; PEFT has no other place for the card of a method.
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
    PeftModel._upload_modified_files = upload_modified_files  # type: ignore[method-assign, assignment]


def _write_section(model: PeftModel, folder: str | os.PathLike[str], location: str | os.PathLike[str]) -> set[str]:
    """Put our section into the card of the folder, for adapters at `location`; the tags that it had are returned."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else None
    if card is None or _is_empty_form(card):
        tags = card.data.get("tags") if card else []
        card = ModelCard(f"---\nlibrary_name: peft\n---\n\n# TOAST adapter for {_described(model.get_base_model())}\n")
        card.data["tags"] = tags
    card.text = _with_section(card.text, _section(model, location))
    card.save(path)
    return {tag for tag in card.data.get("tags") or [] if not tag.startswith(_TAG_OF_BASE_MODEL)}


def _is_empty_form(card: ModelCard) -> bool:
    if _NOT_DESCRIBED not in card.text:
        return False
    form = ModelCard.from_template(ModelCardData(), model_description=_NOT_DESCRIBED)
    return card.text.split() == form.text.split()


def _add_tags(folder: str | os.PathLike[str], tags: set[str]) -> None:
    # PEFT has replaced those that were there by its own.
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    card.data.tags = sorted({"peft", "toast", "topdown"} | tags | set(card.data.tags or []))
    card.save(path)


def _with_section(text: str, section: str) -> str:
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + section + after if begin and end else f"{text.rstrip()}\n\n{section}\n\n"


def _section(model: PeftModel, location: str | os.PathLike[str]) -> str:
    return _SECTION.format(
        begin=_BEGIN,
        base=_described(model.get_base_model()),
        snippet=loading_snippet(model, location),
        adapters="\n".join(_adapter_line(model, name) for name in _adapters_of(model)),
        end=_END,
    )


def _adapters_of(model: PeftModel) -> list[str]:
    """Not those of another method that the base model may have."""
    return [name for name, config in model.peft_config.items() if config.peft_type == PeftType("TOPDOWN")]


def _described(base: nn.Module) -> str:
    return f"`{getattr(base, 'name_or_path', '') or type(base).__name__}`"


# ------------------------------------------------------------------------------------------------------ how to use it


def loading_snippet(model: PeftModel, location: str | os.PathLike[str]) -> str:
    """Python code that loads an adapter on its base model.

    Args:
        model: a model with TOAST adapters.
        location: where they are saved, a folder or an id on the Hub.

    Returns:
        The code. It loads the adapter "default", or the active one; each of the others is in a folder of its own name.
    """
    name = "default" if "default" in _adapters_of(model) else model.active_adapter
    subfolder = "" if name == "default" else f", subfolder={_quoted(name)}"
    imported, base = _base_model_code(model.get_base_model(), model.peft_config[name].revision, name)
    return "\n".join(
        [
            "import toast_peft  # makes PEFT know the method",
            "from peft import PeftModel",
            *imported,
            "",
            f"base = {base}",
            "# The folder it was saved to, or the id of its repository on the Hub.",
            f"model = PeftModel.from_pretrained(base, {_quoted(os.fspath(location))}{subfolder})",
        ]
    )


def _base_model_code(base: nn.Module, revision: str | None, adapter_name: str) -> tuple[list[str], str]:
    """The import and the expression that make the base model; a comment where they are not known."""
    path = getattr(base, "name_or_path", "")
    loader = _loader_of(base)
    if not path or loader is None:
        return [], f"...  # the {type(base).__name__} that the adapter was made for"
    arguments = [_quoted(path)]
    if revision:
        arguments.append(f"revision={_quoted(revision)}")
    num_labels = getattr(base.config, "num_labels", None)
    if _has_trained_head(base, adapter_name, num_labels):  # the checkpoint has none, or another one
        arguments += [f"num_labels={num_labels}", "ignore_mismatched_sizes=True"]
    return [f"from transformers import {loader}"], f"{loader}.from_pretrained({', '.join(arguments)})"


def _loader_of(base: nn.Module) -> str | None:
    """The class of transformers that loads the base model: an Auto class, else its own."""
    if not isinstance(base, PreTrainedModel):
        return None
    # An Auto class goes by the checkpoint. For a part of another model, such as a tower of CLIP, it may be the whole.
    found = [] if base.config.base_config_key else _auto_classes_of(base)
    # Where several fit, the one of the same task as the class, rather than one for models of many tasks.
    task = type(base).__name__.rpartition("For")[2]
    vague = ("AutoModelForPreTraining", "AutoModelForMultimodalLM")
    found.sort(key=lambda name: (name != f"AutoModelFor{task}", name in vague))
    own = type(base).__name__
    return found[0] if found else own if getattr(transformers, own, None) is type(base) else None


def _auto_classes_of(base: PreTrainedModel) -> list[str]:
    classes = {name: member for name, member in vars(modeling_auto).items() if name.startswith("AutoModel")}
    # Compared with None: whether a mapping is empty would import every model of transformers.
    mappings = {name: member._model_mapping for name, member in classes.items() if member._model_mapping is not None}
    config_class = type(base.config)
    return [
        name for name, mapping in mappings.items() if config_class in mapping and mapping[config_class] is type(base)
    ]


def _has_trained_head(base: nn.Module, adapter_name: str, num_labels: int | None) -> bool:
    """Whether a module that was trained besides the feedback computes the labels."""
    parameters = _saved_parameters(base, adapter_name)
    return any(p.shape[:1] == (num_labels,) for name, p in parameters.items() if ".modules_to_save." in name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------- how it was made


def _adapter_line(model: PeftModel, adapter_name: str) -> str:
    base = model.get_base_model()
    parameters = _saved_parameters(base, adapter_name)
    fixed = {
        f"{name}.{part}.{adapter_name}."
        for name, module in base.named_modules()
        if isinstance(module, TopDownLayer)
        for part in module.frozen_peft_weight_names.get(adapter_name, ())
    }
    trained = sum(_size(p) for name, p in parameters.items() if not any(name.startswith(part) for part in fixed))
    megabytes = sum(_size(p) * p.element_size() for p in parameters.values()) / 1e6
    size = f"{megabytes:.1f} MB" if megabytes >= 1 else f"{1e3 * megabytes:.1f} kB"
    config = cast(TopDownConfig, model.peft_config[adapter_name])
    line = (
        f"- `{adapter_name}`: `TopDownConfig({options_of(config)})`, {trained:,} trained parameters, {size} of weights"
    )
    return line if config.gate is None else f"{line}; {described_gate(config)}"


def _saved_parameters(base: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The feedback of an adapter, and what was trained besides it."""
    wrappers = [name for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if belongs_to(adapter_name, name)
        or (f".{adapter_name}." in f"{name}." and any(name.startswith(f"{wrapper}.") for wrapper in wrappers))
    }


def _size(parameter: nn.Parameter) -> int:
    # With ZeRO-3 of DeepSpeed a parameter is empty here and says so.
    return parameter.numel() or getattr(parameter, "ds_numel", 0)


def options_of(config: TopDownConfig) -> str:
    """Those that differ from the defaults, as arguments."""
    defaults = TopDownConfig()
    changed = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _FACTS}
    changed = {name: value for name, value in changed.items() if value != getattr(defaults, name)}
    return ", ".join(f"{name}={_plain(value)!r}" for name, value in changed.items())


def described_gate(config: TopDownConfig) -> str:
    """What a gate is, and how well it separates."""
    if config.gate_report is None:
        return f"its {config.gate} gate is not fitted, and so open everywhere"
    return f"its {config.gate} gate: " + ", ".join(f"{name} {value:.3f}" for name, value in config.gate_report.items())


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    # PEFT adds the names of heads to `modules_to_save` once more whenever it loads an adapter.
    return list(dict.fromkeys(value)) if isinstance(value, list) else value
