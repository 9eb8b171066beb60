"""The fine-tuning methods that all benchmarks compare.

Each trains what is new in the model as well: the head of a classifier, the decoder of a segmentation model. With the
same seed all start from the same head and see the data in the same order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import toast_peft
from toast_peft import TopDownConfig
from toast_peft.gate_fitting import Batches

PROMPT_LENGTH = 10
# What transformers calls these projections, in most models, in older ones, and in GPT-2, where the keys are in it too.
QUERIES_AND_VALUES = ["q_proj", "v_proj", "query", "value", "c_attn"]
MLP = ["gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


class Method(NamedTuple):
    """A row of the table of methods.

    Args:
        vision, text: learning rate for Adam that the search is centred on, for image models and causal language
            models; `None` if it is not for these.
        config: makes the PEFT config; `None` for a method without an adapter.
        replay: how many examples of the reference are trained on as well, relative to those of the target.
        encoder: as `vision`, for encoders that classify texts.
    """

    vision: float | None
    text: float | None
    config: Callable[..., PeftConfig] | None = None
    replay: float = 0.0
    encoder: float | None = None


_lora = partial(LoraConfig, r=8, lora_alpha=16)
_lora_all_linear = partial(_lora, target_modules="all-linear")
_oft = partial(OFTConfig, target_modules="all-linear")
_lite = partial(TopDownConfig, r=8)
_output = partial(TopDownConfig, feedback_to_output=True)
_second_pass = partial(TopDownConfig, r=1, trainable_parts=["pass2"], pass2_target_modules="all-linear")
_pass2_lora = {"pass2_r": 8, "pass2_lora_alpha": 16}
_pass2_lora_biases = _pass2_lora | {"pass2_bias": "all"}
METHODS = {
    "linear": Method(1e-2, None, encoder=1e-2),
    "full": Method(5e-5, 1.6e-4, encoder=1.5e-4),
    "bitfit": Method(3e-3, None, encoder=3e-3),
    "vpt-deep": Method(1e-2, None),
    "lora": Method(2e-3, 5e-3, partial(_lora, target_modules=QUERIES_AND_VALUES), encoder=3e-3),
    "lora-mlp": Method(None, 1.5e-3, partial(_lora, target_modules=MLP)),
    "lora-all-linear": Method(2e-3, 1.5e-3, _lora_all_linear, encoder=1e-3),
    "lora-all-linear-biases": Method(2e-3, None, partial(_lora_all_linear, bias="all")),
    "lora-all-linear-replay": Method(None, 1.5e-3, _lora_all_linear, replay=0.5),
    "oft": Method(None, 1.5e-3, _oft),
    "pass2-lora": Method(2e-3, 1.5e-3, partial(_second_pass, **_pass2_lora)),
    "pass2-lora-gated": Method(None, 1.5e-3, partial(_second_pass, gate="sequence", **_pass2_lora)),
    "pass2-biases": Method(3e-3, None, partial(_second_pass, pass2_r=0, pass2_bias="all")),
    "pass2-lora-biases": Method(2e-3, None, partial(_second_pass, **_pass2_lora_biases), encoder=1e-3),
    "toast": Method(2e-4, 3e-3, TopDownConfig, encoder=3e-3),
    "toast-initialized": Method(2e-4, 3e-3, TopDownConfig),
    "toast-output-initialized": Method(None, 3e-3, _output),
    "toast-output-gated-initialized": Method(None, 3e-3, partial(_output, gate="sequence")),
    "toast-pretuned": Method(2e-4, 3e-3, TopDownConfig),
    "toast-early": Method(2e-4, 3e-3, partial(TopDownConfig, feedback_from=0.5)),
    "toast-late": Method(2e-4, 3e-3, partial(TopDownConfig, feedback_to=0.5)),
    "toast-lite": Method(1e-3, 1e-2, _lite, encoder=3e-3),
    "toast-lite-initialized": Method(1e-3, 1e-2, _lite, encoder=3e-3),
    "toast-lite-pass2-lora-biases": Method(1e-3, None, TopDownConfig.for_images, encoder=1e-3),
    "toast-lite-transform-8": Method(1e-3, 1e-2, partial(_lite, transform_r=8)),
    "toast-lite-early": Method(1e-3, 1e-2, partial(_lite, feedback_from=0.5)),
    "toast-lite-late": Method(1e-3, 1e-2, partial(_lite, feedback_to=0.5)),
}


def apply_method(
    model: PreTrainedModel,
    name: str,
    batches: DataLoader | None = None,
    pretrained_feedback: str | None = None,
    reference: dict[str, Batches] | None = None,
    **options: Any,
) -> nn.Module:
    """Make a model ready for training with a method.

    Args:
        model: the base model; it is changed.
        name: one of `METHODS`.
        batches: training batches, for a method that starts from the data.
        pretrained_feedback: the saved TOAST adapter that "toast-pretuned" starts from.
        reference: batches of what a gate is to leave alone, by the names of their domains; for a method with a gate.
        options: `task_type` and `modules_to_save` of the PEFT config; the latter is also what the methods without an
            adapter train besides what is theirs.

    Returns:
        A PEFT model, or for the methods without an adapter the model itself.
    """
    if config := METHODS[name].config:
        if name == "toast-pretuned":
            options["pretrained_feedback"] = pretrained_feedback
        config = config(**options)
        if getattr(config, "target_modules", None) == "all-linear" and config.modules_to_save:
            # What is trained as a whole needs no adapter.
            config.exclude_modules = rf"(.*\.)?({'|'.join(config.modules_to_save)})(\..*)?"
        model = get_peft_model(model, config)
        if name.endswith("-initialized"):
            toast_peft.initialize_feedback(model, batches)
        if getattr(config, "gate", None) is not None:
            toast_peft.fit_gate(model, batches, reference)
        return model
    model.requires_grad_(name == "full")
    for new in options.get("modules_to_save", []):
        model.get_submodule(new).requires_grad_(True)
    if name == "bitfit":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad |= parameter_name.endswith(".bias")
    if name == "vpt-deep":
        add_deep_prompts(model)
    return model


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
