"""What the files of an adapter say about it, without its base model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME

from ..card import described_gate, options_of
from ..config import TopDownConfig

_PARTS = ("prompt", "transform", "linear1", "linear2", "pass2", "output", "gate")
_LAST = ("linear2", "pass2", "output")  # what has to be more than zero, of two factors B
_OTHER = "modules saved as a whole"


@dataclass
class Description:
    """What an adapter is.

    Args:
        adapter: its folder or id.
        base_model: the one that its config names.
        made_for: model type, number of blocks and hidden size.
        options: those that differ from the defaults.
        parameters: number of values by part of the adapter.
        bytes: of all weights.
        problems: what makes it useless.
        notes: what should be known.
    """

    adapter: str
    base_model: str | None
    made_for: dict[str, Any]
    options: str
    parameters: dict[str, int]
    bytes: int
    problems: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self)

    def as_text(self) -> str:
        """For people."""
        made_for = ", ".join(f"{name} {value}" for name, value in self.made_for.items())
        lines = [
            f"TOAST adapter {self.adapter}",
            f"  base model  {self.base_model or 'not named'} ({made_for})",
            f"  options     TopDownConfig({self.options})",
            f"  weights     {sum(self.parameters.values()):,} values, {self.bytes / 1e6:.2f} MB",
        ]
        lines += [f"    {part:<10}{number:>14,}" for part, number in self.parameters.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def read_config(adapter: str) -> TopDownConfig:
    """The config of a saved adapter.

    Raises:
        ValueError: if it is of another method, or there is none.
    """
    if Path(adapter).is_dir() and not Path(adapter, CONFIG_NAME).is_file():
        others = sorted(str(file.parent) for file in Path(adapter).glob(f"*/{CONFIG_NAME}"))
        raise ValueError(
            f"The folder {adapter!r} has no {CONFIG_NAME}; expected the folder of an adapter. In it there are "
            f"{others or 'none'}."
        )
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, TopDownConfig):
        raise ValueError(
            f"{adapter!r} is an adapter of the method {PeftType(config.peft_type).value}; expected one of TOAST."
        )
    return TopDownConfig.from_pretrained(adapter)  # which knows where it was read from


def read_weights(config: TopDownConfig) -> dict[str, torch.Tensor]:
    """The saved weights, by their names in the file."""
    assert config.saved_adapter is not None  # it has just been read
    return config.saved_adapter.read_weights()


def describe(adapter: str) -> Description:
    """Read the config and the weights of an adapter.

    Raises:
        ValueError: if it is none of TOAST, or its files are damaged.
    """
    config = read_config(adapter)
    weights = read_weights(config)
    return Description(
        adapter=adapter,
        base_model=config.base_model_name_or_path,
        made_for={
            "model type": config.backbone_type,
            "blocks": config.num_blocks,
            "hidden size": config.hidden_size,
        },
        options=options_of(config),
        parameters=_sizes(weights),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        problems=not_finite(weights),
        notes=_notes(config, weights),
    )


def _part_of(name: str) -> str:
    _, found, rest = name.partition("topdown_")
    return next((part for part in _PARTS if rest.startswith(part)), _OTHER) if found else _OTHER


def _sizes(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, tensor in weights.items():
        sizes[_part_of(name)] += tensor.numel()
    return {part: sizes[part] for part in (*_PARTS, _OTHER) if part in sizes}


def not_finite(weights: dict[str, torch.Tensor]) -> list[str]:
    """A sentence if there are weights that are no numbers."""
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    return [f"{len(bad)} of {len(weights)} weights are NaN or infinite, the first is {bad[0]}."] if bad else []


def _notes(config: TopDownConfig, weights: dict[str, torch.Tensor]) -> list[str]:
    """Whether there is feedback at all: the last matrix of each block decides, of two factors B."""
    last = [w for name, w in weights.items() if _part_of(name) in _LAST and "_A." not in name]
    is_zero = config.base_feedback is None and not any(bool(tensor.any()) for tensor in last)
    notes = ["its feedback is zero, as before training: the model is the base model."] if last and is_zero else []
    return [*notes, *([] if config.gate is None else [described_gate(config)])]
