"""Starts a new adapter from the feedback of a saved one."""

import torch
from peft.utils import load_peft_weights
from torch import nn

from .config import TopDownConfig

_FACTORS = ("_A.", "_B.")


@torch.no_grad()
def start_from_pretrained(model: nn.Module, adapter_name: str, config: TopDownConfig) -> None:
    """Copy the feedback of the adapter `config.pretrained_feedback` into a new one.

    Only feedback is copied, no head that was saved with it. Feedback of blocks outside of the new adapter's loop is
    left out. Low-rank factors start as those of a new adapter unless the saved one has them too.

    Args:
        model: the base model with the new adapter.
        adapter_name: its name.
        config: its config.

    Raises:
        ValueError: if the saved adapter is of another method or base model, or lacks what the new one needs.
    """
    saved = TopDownConfig.from_pretrained(config.pretrained_feedback)
    _check_same_base_model(saved, config)
    weights = load_peft_weights(config.pretrained_feedback, device="cpu")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    wanted = {
        name.replace(f".{adapter_name}", ""): parameter
        for name, parameter in model.named_parameters()
        if "topdown_" in name and f".{adapter_name}." in name
    }
    if saved.r == 0:
        wanted = {name: p for name, p in wanted.items() if not any(factor in name for factor in _FACTORS)}
    problems = [
        f"{name} of shape {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name not in weights or weights[name].shape != parameter.shape
    ]
    if problems:
        raise ValueError(
            f"The adapter {config.pretrained_feedback!r} (r={saved.r}, feedback from {saved.feedback_from} to "
            f"{saved.feedback_to}) cannot start one with r={config.r}, feedback from {config.feedback_from} to "
            f"{config.feedback_to}; it lacks: {', '.join(problems)}."
        )
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])


def _check_same_base_model(saved: TopDownConfig, config: TopDownConfig) -> None:
    names = ("backbone_type", "num_blocks", "hidden_size")
    different = [name for name in names if getattr(saved, name) != getattr(config, name)]
    if different:
        raise ValueError(
            f"`pretrained_feedback={config.pretrained_feedback!r}` does not fit the base model: "
            + "; ".join(
                f"it was made for {name}={getattr(saved, name)!r}, the model has {getattr(config, name)!r}"
                for name in different
            )
            + "."
        )
