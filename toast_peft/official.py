"""Checkpoints of the official code (https://github.com/bfshi/TOAST) as PEFT adapters.

The official code saves whole models. Its feedback becomes an adapter; its backbone, which was frozen, must be that of
the Hugging Face model; its classification head is copied where it fits.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn

from .config import OFFICIAL_STAGES, TopDownConfig
from .core.layers import feedback_paths
from .core.stack import Stack
from .core.topdown_layer import weight_of
from .families.convnets import ConvNetStack, StageShape
from .families.find import find_stacks
from .loading import describe_differences


@dataclass(frozen=True)
class OfficialModel:
    """One of the models of the official code.

    Args:
        model_type: the model type in transformers.
        prefix: what the names of its feedback begin with.
        normalize_features: as in [`TopDownConfig`].
        double_value_bias: as in [`TopDownConfig`].
        heads: names of heads, which may be of any shape: they are copied or compared only where they fit.
    """

    model_type: str
    prefix: str
    normalize_features: bool
    double_value_bias: bool
    heads: tuple[str, ...]


_VIT = OfficialModel(
    model_type="vit",
    prefix="enc",
    normalize_features=True,
    double_value_bias=True,
    heads=("head.last_layer.weight", "head.last_layer.bias"),
)
# Its names begin with "enc" as well; there is no Lite of it.
_CONVNEXT = replace(_VIT, model_type="convnext", double_value_bias=False)
_LLAMA = OfficialModel(
    model_type="llama",
    prefix="model",
    normalize_features=False,
    double_value_bias=False,
    heads=("lm_head.weight",),
)

# Official names of a ViT's modules -> those of transformers, in the backbone and in a block. The official code
# computes queries, keys and values with one layer.
_VIT_MODULES = {
    "enc.cls_token": ("embeddings.cls_token",),
    "enc.pos_embed": ("embeddings.position_embeddings",),
    "enc.patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "enc.norm": ("layernorm",),
}
_VIT_BLOCK_MODULES = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
# Beginnings of names of a ConvNeXt in transformers -> the official ones. `downsample_layers.0` is the stem.
_CONVNEXT_NAMES = {
    r"^embeddings\.patch_embeddings": "enc.downsample_layers.0.0",
    r"^embeddings\.layernorm": "enc.downsample_layers.0.1",
    r"^encoder\.stages\.(\d+)\.downsampling_layer": r"enc.downsample_layers.\1",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter": r"enc.stages.\1.\2.gamma",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm": r"enc.stages.\1.\2.norm",
    r"^encoder\.stages\.(\d+)\.layers": r"enc.stages.\1",
    r"^layernorm": "enc.norm",
}


def from_official_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike,
    *,
    lora_merged: bool = False,
    **config_overrides: Any,
) -> PeftModel:
    """Put the feedback of an official TOAST checkpoint onto a Hugging Face model.

    Full and Lite checkpoints of the official ViT (names beginning with `enc.`) and LLaMA (`model.`) are understood,
    and those of the official ConvNeXt (`enc.`), of which there is no Lite. The config is set to what the official code
    does, for example `double_value_bias=True` for ViT.

    Args:
        model: the base model, a ViT, ConvNeXt or LLaMA of transformers with the checkpoint's backbone.
        checkpoint: a state dict, or the path of a .safetensors, .pth, .pt or .bin file.
        lora_merged: Lite only. Official Lite checkpoints that were saved after `eval()` hold feedback layers to which
            the low-rank product has been added already; True takes it off again.
        config_overrides: fields of [`TopDownConfig`] to set otherwise. `feedback_from` and `feedback_to` are not in
            the checkpoint and must be given if they were changed in the official source.

    Returns:
        The model with the adapter.

    Raises:
        ValueError: if tensors are missing, unexpected or misshapen (one message lists them all), if the checkpoint is
            not an official one or of another kind of model, or if Lite weights look merged and `lora_merged` is
            False. The model is untouched then.

    Example:

    ```py
    >>> base = ViTForImageClassification.from_pretrained("path/to/vit", num_labels=200)
    >>> model = toast_peft.from_official_checkpoint(base, "cub_toast.pth")
    >>> model.save_pretrained("cub_toast_adapter")
    ```
    """
    tensors = _read(checkpoint)
    official = _recognize(tensors)
    config = _official_config(model, tensors, official, config_overrides)
    # Without what a ConvNet refuses: that a ViT's checkpoint does not belong on one is said below.
    stack = find_stacks(model, replace(config, double_value_bias=False))[0]
    if stack.model_type != official.model_type:
        raise ValueError(
            f"This is an official checkpoint of a {official.model_type!r} model, but the base model is a "
            f"{stack.model_type!r}."
        )
    backbone = _backbone_tensors(model, stack, official)
    _check_names_and_shapes(tensors, stack, config, backbone, official)
    tensors = _unmerged(tensors, config, lora_merged)
    _compare_backbones(tensors, backbone)
    head_fits = _head_fits(model, tensors)
    if head_fits and "modules_to_save" not in config_overrides:
        config.modules_to_save = ["classifier"]
    peft_model = get_peft_model(model, config)
    _copy_feedback(model, tensors, stack, official.prefix)
    if head_fits and "classifier" in (config.modules_to_save or []):
        _copy_head(peft_model, tensors)
    return peft_model


def _read(checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    tensors: Any
    if not isinstance(checkpoint, (str, os.PathLike)):
        tensors = checkpoint
    elif str(checkpoint).endswith(".safetensors"):
        tensors = load_file(checkpoint)
    else:
        tensors = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if isinstance(tensors, Mapping):  # the official trainer saves {"model": state dict, "optimizer": ...}
        tensors = tensors.get("model", tensors)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"The official checkpoint is a {type(tensors).__name__}; expected a state dict, a dict of tensors, or the "
            "path of a file that holds one."
        )
    return {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _recognize(tensors: dict[str, torch.Tensor]) -> OfficialModel:
    # Its feedback is of the same name as a ViT's.
    if any(name.startswith("enc.decoders.") and tensor.dim() == 4 for name, tensor in tensors.items()):
        return _CONVNEXT
    for official in (_VIT, _LLAMA):
        if any(name.startswith(f"{official.prefix}.") for name in tensors):
            return official
    raise ValueError(
        "This is not a checkpoint of the official TOAST code: no name begins with 'enc.' (ViT, ConvNeXt) or "
        f"'model.' (LLaMA). Its names begin with {sorted({name.split('.')[0] for name in tensors})}."
    )


def _official_config(
    model: nn.Module, tensors: dict[str, torch.Tensor], official: OfficialModel, overrides: dict[str, Any]
) -> TopDownConfig:
    """What the official code does for this kind of model."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A")}
    if len(ranks) > 1:
        raise ValueError(f"The checkpoint has low-rank factors of the ranks {sorted(ranks)}; expected a single one.")
    is_causal_lm = type(model).__name__.endswith("ForCausalLM")
    stage = OFFICIAL_STAGES[f"{official.model_type}-tuning"]
    if ranks:  # there is no Lite of ConvNeXt, as will be said where the names are checked
        stage = OFFICIAL_STAGES.get(f"{official.model_type}-lite", stage)
    options: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM if is_causal_lm else None,
        "r": next(iter(ranks), 0),
        "trainable_parts": stage["trainable_parts"],
        "init_weights": False,
        "init_prompt": "random",  # all weights are in the checkpoint
        "normalize_features": official.normalize_features,
        "double_value_bias": official.double_value_bias,
    } | ({"lora_alpha": 1} if ranks else {})
    return TopDownConfig(**options | overrides)


def _feedback_shapes(stack: Stack, config: TopDownConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the feedback in an official checkpoint; decoder i feeds block `feedback_to + i`."""
    d = stack.hidden_size
    feedback_from, feedback_to = config.feedback_range(len(stack.blocks))
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.prompt": (d,), f"{prefix}.top_down_transform": (d, d)}
    for index in range(feedback_from - feedback_to):
        for linear in ("linear", "linear2"):
            name = f"{prefix}.decoders.{index}.{linear}"
            if isinstance(stack, ConvNetStack):
                shapes[f"{name}.weight"] = _convolution_shape(stack.shapes[feedback_to + index], linear)
                continue
            shapes[f"{name}.weight"] = (d, d)
            if config.r > 0:
                shapes |= {f"{name}.lora_A": (config.r, d), f"{name}.lora_B": (d, config.r)}
    return shapes


def _convolution_shape(shape: StageShape, linear: str) -> tuple[int, ...]:
    if linear == "linear":
        return (shape.out_channels, shape.in_channels, shape.stride, shape.stride)
    return (shape.in_channels, shape.in_channels, 1, 1)


def _backbone_tensors(model: nn.Module, stack: Stack, official: OfficialModel) -> dict[str, torch.Tensor]:
    """The base model's own tensors under their official names."""
    own = stack.backbone.state_dict()
    if official is _LLAMA:
        named = {f"model.{name}": tensor for name, tensor in own.items()}
        head = getattr(model, "lm_head", None)
        return named if head is None else named | {"lm_head.weight": weight_of(head).detach()}
    if official is _CONVNEXT:
        return {_official_convnext_name(name): tensor for name, tensor in own.items()}
    modules: dict[str, tuple[str, ...]] = dict(_VIT_MODULES)
    for index in range(len(stack.blocks)):
        for name, parts in _VIT_BLOCK_MODULES.items():
            modules[f"enc.blocks.{index}.{name}"] = tuple(f"layers.{index}.{part}" for part in parts)
    named = {}
    for name, parts in modules.items():
        for suffix in ("", ".weight", ".bias"):
            if parts[0] + suffix in own:
                named[name + suffix] = torch.cat([own[part + suffix] for part in parts])
    return named


def _official_convnext_name(name: str) -> str:
    for beginning, official in _CONVNEXT_NAMES.items():
        name = re.sub(beginning, official, name)
    return name


def _check_names_and_shapes(
    tensors: dict[str, torch.Tensor],
    stack: Stack,
    config: TopDownConfig,
    backbone: dict[str, torch.Tensor],
    official: OfficialModel,
) -> None:
    feedback = _feedback_shapes(stack, config, official.prefix)
    optional = {name: tuple(tensor.shape) for name, tensor in backbone.items()}
    optional = {name: tuple(tensors[name].shape) for name in official.heads if name in tensors} | optional
    # The official code may hold a decoder for every block and use the first ones only.
    for name in [name for name in feedback if ".decoders.0." in name]:
        optional |= {name.replace(".0.", f".{index}.", 1): feedback[name] for index in range(len(stack.blocks))}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: shape for name, shape in optional.items() if name in found} | feedback
    problems = describe_differences(expected, found)
    if problems:
        raise ValueError("The official checkpoint does not fit the base model: " + "; ".join(problems) + ".")


def _unmerged(tensors: dict[str, torch.Tensor], config: TopDownConfig, lora_merged: bool) -> dict[str, torch.Tensor]:
    products = {
        name.removesuffix("lora_A") + "weight": tensors[name.removesuffix("A") + "B"].double() @ tensor.double()
        for name, tensor in tensors.items()
        if name.endswith(".lora_A")
    }
    scaling = config.lora_alpha / max(config.r, 1)
    if lora_merged:
        return tensors | {name: tensors[name] - scaling * product for name, product in products.items()}
    if _looks_merged(tensors, products, scaling):
        raise ValueError(
            "The feedback layers of this Lite checkpoint already contain their low-rank products (the official code "
            "saves them so after `eval()`); adding them again would be wrong. Pass lora_merged=True to take them off."
        )
    return tensors


def _looks_merged(tensors: dict[str, torch.Tensor], products: dict[str, torch.Tensor], scaling: float) -> bool:
    """Whether the weights contain `scaling` times the products, well beyond what chance would give."""
    inner = sum(float((tensors[name].double() * product).sum()) for name, product in products.items())
    squares = sum(float(product.square().sum()) for product in products.values())
    if squares == 0:
        return False
    variance = sum(float(tensors[name].double().square().mean() * p.square().sum()) for name, p in products.items())
    return inner / squares > scaling / 2 and inner / math.sqrt(variance) > 6


def _compare_backbones(tensors: dict[str, torch.Tensor], backbone: dict[str, torch.Tensor]) -> None:
    different = [
        name
        for name, own in backbone.items()
        if name in tensors and not torch.allclose(tensors[name].float(), own.float().cpu(), rtol=1e-2, atol=1e-4)
    ]
    if different:
        warnings.warn(
            f"The backbone in the official checkpoint differs from the base model in {len(different)} tensors, for "
            f"example {different[0]}. The feedback was trained for the other backbone; load that one as base model.",
            stacklevel=3,
        )


def _head_fits(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    if "head.last_layer.weight" not in tensors:
        return False
    head, shape = getattr(model, "classifier", None), list(tensors["head.last_layer.weight"].shape)
    own = list(head.weight.shape) if isinstance(head, nn.Linear) else None
    if own != shape:
        warnings.warn(f"The head of the checkpoint, {shape}, is left out: the model's is {own}.", stacklevel=3)
    return own == shape


@torch.no_grad()
def _copy_feedback(model: nn.Module, tensors: dict[str, torch.Tensor], stack: Stack, prefix: str) -> None:
    [(_, path)] = [pair for pair in feedback_paths(model) if pair[0] is stack.backbone]
    weight_of(path.selection.topdown_prompt["default"]).copy_(tensors[f"{prefix}.prompt"])
    weight_of(path.selection.topdown_transform["default"]).copy_(tensors[f"{prefix}.top_down_transform"])
    _, feedback_to = path.selection.topdown_config["default"].feedback_range(len(stack.blocks))
    for block, layer in path.layers_of("default"):
        for official, own in (("linear", "topdown_linear1"), ("linear2", "topdown_linear2")):
            name = f"{prefix}.decoders.{block - feedback_to}.{official}"
            for of_checkpoint, suffix in (("weight", ""), ("lora_A", "_A"), ("lora_B", "_B")):
                if f"{name}.{of_checkpoint}" in tensors:
                    container: nn.ModuleDict = getattr(layer, own + suffix)
                    weight_of(container["default"]).copy_(tensors[f"{name}.{of_checkpoint}"])


@torch.no_grad()
def _copy_head(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    head = model.get_base_model().get_submodule("classifier.modules_to_save.default")
    for name in ("weight", "bias"):
        if f"head.last_layer.{name}" in tensors:
            head.get_parameter(name).copy_(tensors[f"head.last_layer.{name}"])
