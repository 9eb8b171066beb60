"""Starts a new adapter from the feedback of a saved one."""

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import nn

from .config import TopDownConfig
from .feedback import belongs_to

_FACTORS = ("_A.", "_B.")


def start_from_pretrained(model: nn.Module, adapter_name: str, config: TopDownConfig) -> dict[str, torch.Tensor]:
    """Copy the feedback of the adapter `config.pretrained_feedback` into a new one, and clear this option.

    Only feedback is copied, no head that was saved with it. Feedback of blocks outside of the new adapter's loop is
    left out. Low-rank factors start as those of a new adapter unless the saved one has them too.

    Args:
        model: the base model with the new adapter.
        adapter_name: its name.
        config: its config; what is saved of it will say that its weights are all in the file.

    Returns:
        The weights that were copied, by the names of the parameters.

    Raises:
        ValueError: if the saved adapter is of another method or base model, or lacks what the new one needs.
    """
    saved = PeftConfig.from_pretrained(config.pretrained_feedback)
    _check_same_base_model(saved, config)
    weights = load_peft_weights(config.pretrained_feedback, device="cpu")
    wanted = {name: p for name, p in model.named_parameters() if belongs_to(adapter_name, name)}
    if saved.r == 0:
        wanted = {name: p for name, p in wanted.items() if not any(factor in name for factor in _FACTORS)}
    found = {name: weights.get("base_model.model." + _without(adapter_name, name)) for name in wanted}
    problems = [
        f"{_without(adapter_name, name)} of shape {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if found[name] is None or found[name].shape != parameter.shape
    ]
    if problems:
        raise ValueError(
            f"The adapter {config.pretrained_feedback!r} ({_described(saved)}) cannot start one with "
            f"{_described(config)}; it lacks: {', '.join(problems)}."
        )
    copy_weights(model, found)
    config.pretrained_feedback, config.init_weights = None, False
    return found


@torch.no_grad()
def copy_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of these names."""
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)


def _without(adapter_name: str, name: str) -> str:
    """The name of a parameter as it is saved, without that of the adapter."""
    before, _, after = name.rpartition(f".{adapter_name}.")
    return f"{before}.{after}"


def _described(config: TopDownConfig) -> str:
    ranges = "feedback in encoder and decoder"
    if isinstance(config.num_blocks, int):
        first, last = config.feedback_range(config.num_blocks)
        ranges = f"feedback from block {first} to {last}"
    return f"r={config.r}, {ranges}"


def _check_same_base_model(saved: PeftConfig, config: TopDownConfig) -> None:
    if not isinstance(saved, TopDownConfig):
        raise ValueError(
            f"`pretrained_feedback={config.pretrained_feedback!r}` is a {saved.peft_type} adapter; expected TOAST."
        )
    different = [name for name in ("backbone_type", "num_blocks") if getattr(saved, name) != getattr(config, name)]
    if different:
        raise ValueError(
            f"`pretrained_feedback={config.pretrained_feedback!r}` does not fit the base model: "
            + "; ".join(
                f"it was made for {name}={getattr(saved, name)!r}, the model has {getattr(config, name)!r}"
                for name in different
            )
            + "."
        )
