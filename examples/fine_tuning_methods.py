"""The methods that the comparisons compare: what each of them trains in an image classifier or a language model.

In a classifier all train the new head as well. With the same seed they all start from the same head and see the data
in the same order. A linear probe could be trained on stored features; here it runs the model in each step, as the
others do.
"""

import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import toast_peft
from toast_peft import TopDownConfig

# The learning rates, for Adam, that the comparisons search around: of image classifiers and of language models.
LEARNING_RATES = {
    "linear": 1e-2,
    "full": 5e-5,
    "bitfit": 3e-3,
    "lora": 2e-3,
    "vpt-deep": 1e-2,
    "toast": 2e-4,
    "toast-initialized": 2e-4,
    "toast-pretuned": 2e-4,
    "toast-early": 2e-4,
    "toast-late": 2e-4,
    "toast-lite": 1e-3,
    "toast-lite-initialized": 1e-3,
}
TEXT_LEARNING_RATES = {
    "full": 1.6e-4,
    "lora": 5e-3,
    "toast": 3e-3,
    "toast-initialized": 3e-3,
    "toast-pretuned": 3e-3,
    "toast-early": 3e-3,
    "toast-late": 3e-3,
    "toast-lite": 1e-2,
    "toast-lite-initialized": 1e-2,
}
# Of a new head, with every method. The linear probe searches around its own.
HEAD_LEARNING_RATE = 3e-3
PROMPT_LENGTH = 10


class DeepPrompts(nn.Module):
    """VPT-deep (https://arxiv.org/abs/2203.12119): learned tokens in the input of each block, dropped from its output.

    They come after the tokens of the image, not after the first one as in the paper; as the blocks do not know the
    positions of tokens this is the same.

    Args:
        blocks: the transformer blocks; they map hidden states of shape [b, n, d] to such of the same shape.
        length: number of prompt tokens of each block.
        hidden_size: d.
        patch_values: number of values in an image patch, for the scale of the initial prompts.
    """

    def __init__(self, blocks: nn.ModuleList, length: int, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (patch_values + hidden_size))  # as the official code
        self.weight = nn.Parameter(torch.empty(len(blocks), length, hidden_size).uniform_(-bound, bound))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: (self.append(args[0], index), *args[1:]))
            block.register_forward_hook(lambda block, args, output: self.remove(output))

    def append(self, hidden_states: torch.Tensor, index: int) -> torch.Tensor:
        """The hidden states with the prompts of a block. Shape: [b, n, d] -> [b, n + length, d]"""
        prompts = self.weight[index].to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
        return torch.cat([hidden_states, prompts], dim=1)

    def remove(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states without prompts. Shape: [b, n + length, d] -> [b, n, d]"""
        return hidden_states[:, : hidden_states.shape[1] - self.weight.shape[1]]


def add_deep_prompts(model: PreTrainedModel, length: int = PROMPT_LENGTH) -> None:
    """Add VPT-deep to a ViT as its submodule `prompts`.

    Raises:
        ValueError: if the model has no list of transformer blocks.
    """
    config = model.config
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    blocks = next((module for module in lists if len(module) == config.num_hidden_layers), None)
    if blocks is None:
        raise ValueError(
            f"vpt-deep: {type(model).__name__} has no list of {config.num_hidden_layers} blocks; take a ViT, or "
            "leave this method out of --methods."
        )
    patch_values = config.num_channels * config.patch_size**2
    model.prompts = DeepPrompts(blocks, length, config.hidden_size, patch_values).to(model.device)


def apply_method(
    model: PreTrainedModel, method: str, batches: DataLoader, pretrained_feedback: str | None = None, **options: Any
) -> nn.Module:
    """Make a model ready for training with a method.

    Args:
        model: the base model; it is changed.
        method: one of `LEARNING_RATES` or `TEXT_LEARNING_RATES`.
        batches: training batches, for a method that starts from the data.
        pretrained_feedback: the saved TOAST adapter that "toast-pretuned" starts from.
        options: `task_type` and `modules_to_save` of the PEFT config; the latter is also what the methods without an
            adapter train besides what is theirs.

    Returns:
        A PEFT model, or for the methods without an adapter the model itself.
    """
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **options))
    if method.startswith("toast"):
        model = get_peft_model(model, TopDownConfig(**options, **_toast_options(method, pretrained_feedback)))
        if method.endswith("-initialized"):
            toast_peft.initialize_feedback(model, batches)
        return model
    if method != "full":
        model.requires_grad_(False)
        for name in options["modules_to_save"]:
            model.get_submodule(name).requires_grad_(True)
    if method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad |= name.endswith(".bias")
    if method == "vpt-deep":
        add_deep_prompts(model)
    return model


def _toast_options(method: str, pretrained_feedback: str | None) -> dict[str, Any]:
    return {
        "toast": {},
        "toast-early": {"feedback_from": 0.5},
        "toast-late": {"feedback_to": 0.5},
        "toast-initialized": {},
        "toast-pretuned": {"pretrained_feedback": pretrained_feedback},
        "toast-lite": {"r": 8},
        "toast-lite-initialized": {"r": 8},
    }[method]
