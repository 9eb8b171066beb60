"""TOAST a second time, from the formulas and with hooks on a plain base model, to compare the package with.

It shares nothing with the package but the weights of the adapter, and both passes are in the graph.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig

from ..helpers import features_of, value_projections_of
from ..zoo import HIDDEN_SIZE, NUM_BLOCKS


def reference_forward(
    base: nn.Module,
    adapted: PeftModel,
    inputs: dict[str, Any],
    topdown_prompt: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """The output of `adapted`, computed with `base`, a copy of its base model.

    Args:
        base: gets the gradients of base parameters.
        adapted: gives the config and the feedback weights, and gets their gradients.
        inputs: the model's inputs.
        topdown_prompt: takes the place of the learned prompt. Shape: [d] or [b, d]
        options: given to pass 2 only.
    """
    config = adapted.active_peft_config
    feedback = reference_feedback(base, adapted, inputs, topdown_prompt)
    with ExitStack() as hooks:
        for index, value_projection in enumerate(value_projections_of(base)):
            if index in feedback:
                hooks.enter_context(value_projection.register_forward_pre_hook(_add_to_input(feedback[index])))
                if config.double_value_bias:
                    hooks.enter_context(value_projection.register_forward_hook(lambda m, _, value: value + m.bias))
        return base(**inputs, **options)


class ReferenceModel(nn.Module):
    """The reference as a model, without parameters of its own."""

    def __init__(self, base: nn.Module, model: PeftModel) -> None:
        super().__init__()
        self.__dict__.update(base=base, model=model)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return reference_forward(self.base, self.model, inputs)


def reference_feedback(
    base: nn.Module, adapted: PeftModel, inputs: dict[str, Any], topdown_prompt: torch.Tensor | None = None
) -> dict[int, torch.Tensor]:
    """What is added to the input of each value projection."""
    config = adapted.active_peft_config
    name = adapted.active_adapter
    weights = dict(adapted.named_parameters())
    prefix = next(key for key in weights if f"topdown_prompt.{name}" in key).removesuffix(
        f"selection.topdown_prompt.{name}.weight"
    )
    first = NUM_BLOCKS if config.feedback_from is None else config.feedback_from
    x = features_of(base, inputs, first)
    prompt = weights[f"{prefix}selection.topdown_prompt.{name}.weight"] if topdown_prompt is None else topdown_prompt
    prompt = prompt if prompt.dim() == 1 else prompt[:, None, :]
    mask = F.cosine_similarity(x, prompt.expand_as(x), dim=-1).clamp(0, 1)
    z = (mask.unsqueeze(-1) * x) @ weights[f"{prefix}selection.topdown_transform.{name}.weight"]
    feedback = {}
    for index in range(first - 1, config.feedback_to - 1, -1):
        part = f"{prefix}layers.{index}.topdown_"
        if not any(key.startswith(part) for key in weights):
            continue  # not one of the chosen blocks: no link of the chain
        z = z @ _matrix(weights, f"{part}linear1", name, config, torch.eye(HIDDEN_SIZE)).T
        feedback[index] = z @ _matrix(weights, f"{part}linear2", name, config, torch.zeros(1)).T
    return feedback


def _matrix(
    weights: dict[str, nn.Parameter], part: str, name: str, config: TopDownConfig, fixed: torch.Tensor
) -> torch.Tensor:
    """Weight of a feedback layer, W + (lora_alpha / r) B A; without W, W is what `init_weights=True` fixes it to."""
    matrix = weights.get(f"{part}.{name}.weight", fixed)
    if config.r == 0:
        return matrix
    product = weights[f"{part}_B.{name}.weight"] @ weights[f"{part}_A.{name}.weight"]
    return matrix.to(product.dtype) + config.lora_alpha / config.r * product


def _add_to_input(td: torch.Tensor) -> Callable:
    return lambda module, args: (args[0] + td.to(args[0].dtype), *args[1:])
