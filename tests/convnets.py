"""Tiny ConvNets with random weights, adapters on them, and TOAST for them a second time, from the formulas.

As `models.py` and `reference.py` for transformers.
"""

import math
from contextlib import ExitStack
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig

from .models import adapted, add_noise

NUM_STAGES = 4
_WIDTHS = {"hidden_sizes": [8, 12, 12, 20], "depths": [1, 1, 2, 1], "num_labels": 5}
_OUT = {"out_features": ["stage2", "stage4"]}
_RESNET = _WIDTHS | {"embedding_size": 6}
_REGNET = _WIDTHS | {"embedding_size": 6, "groups_width": 4}
# Model class -> its config class, the options of the config, and those of the adapter.
MODELS: dict[type, tuple[type, dict[str, Any], dict[str, Any]]] = {
    tf.ConvNextForImageClassification: (tf.ConvNextConfig, _WIDTHS, {}),
    tf.ConvNextModel: (tf.ConvNextConfig, _WIDTHS, {}),
    tf.ConvNextBackbone: (tf.ConvNextConfig, _WIDTHS | _OUT, {"normalize_features": False}),
    tf.ConvNextV2ForImageClassification: (tf.ConvNextV2Config, _WIDTHS, {}),
    tf.ConvNextV2Backbone: (tf.ConvNextV2Config, _WIDTHS | _OUT, {"normalize_features": False}),
    tf.ResNetForImageClassification: (tf.ResNetConfig, _RESNET, {}),
    tf.ResNetModel: (tf.ResNetConfig, _RESNET | {"layer_type": "basic", "downsample_in_first_stage": True}, {}),
    tf.ResNetBackbone: (tf.ResNetConfig, _RESNET | _OUT, {}),
    tf.RegNetForImageClassification: (tf.RegNetConfig, _REGNET, {}),
    tf.RegNetModel: (tf.RegNetConfig, _REGNET | {"layer_type": "x"}, {}),
}
CLASSIFIERS = [cls for cls in MODELS if cls.__name__.endswith("ForImageClassification")]
CONVNEXT_AND_RESNET = [tf.ConvNextForImageClassification, tf.ResNetForImageClassification]
RANGES = {
    "full": {},
    "early": {"feedback_from": 2},
    "late": {"feedback_to": 2},
    "middle": {"feedback_from": 3, "feedback_to": 1},
}
VARIANTS = RANGES | {
    "lite": {"r": 4},
    "lite random": {"r": 4, "init_weights": False},
    "lite early": {"r": 4, "feedback_from": 3},
}
ODD_SIZE = (70, 49)  # the total stride is 32


def tiny_model(model_class: type, **options: Any) -> nn.Module:
    """A ConvNet in eval mode with random weights and running statistics, always the same."""
    torch.manual_seed(0)
    config_class, defaults, _ = MODELS[model_class]
    model = model_class(config_class(**defaults | options))
    add_noise(*model.parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.2)
    return model.eval()


def images(size: tuple[int, int] = (64, 64), batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(batch_size, 3, *size, generator=generator)}


def steered(model: nn.Module, **options: Any) -> PeftModel:
    """The model with an adapter away from its start, and its prompt turned to some features."""
    torch.manual_seed(1)
    model = adapted(model, **MODELS[type(model)][2] | options)
    move_adapter(model)
    return model


@torch.no_grad()
def move_adapter(model: PeftModel) -> None:
    first, _ = model.active_peft_config.feedback_range(NUM_STAGES)
    outputs = []
    hook = parts_of(model)[1][first - 1].register_forward_hook(lambda _, args, output: outputs.append(output))
    with hook, model.disable_adapter():
        model(**images())
    for name, parameter in model.named_parameters():
        if f"topdown_prompt.{model.active_adapter}" in name:
            parameter.copy_(outputs[0].mean((0, 2, 3)))
        elif "topdown_" in name and f".{model.active_adapter}." in name:
            add_noise(parameter)


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Stem and stages."""
    named = dict(model.named_modules())
    [stages] = [module for name, module in named.items() if name.endswith("encoder.stages")]
    [stem] = [m for name, m in named.items() if name.split(".")[-1] == "embeddings" or is_resnet_stem(m)]
    return stem, stages


def is_resnet_stem(module: nn.Module) -> bool:
    return type(module).__name__ in ("ResNetEmbeddings", "RegNetEmbeddings")


def first_tensor(output: Any) -> torch.Tensor:
    """Logits or the last hidden states; of a Backbone the last feature map."""
    return output.feature_maps[-1] if hasattr(output, "feature_maps") else output[0]


# -------------------------------------------------------------------------------------------------- the formulas again


def entries_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose input the feedback is added to."""
    stem, stages = parts_of(model)
    return [stem, *stages[1:]]


def reference_forward(base: nn.Module, model: PeftModel, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """The output of `model`, computed with `base`, a copy of its base model; both passes are in the graph."""
    feedback = reference_feedback(base, model, inputs)
    with ExitStack() as hooks:
        for index, td in feedback.items():
            add = lambda module, args, td=td: (args[0] + td,)  # noqa: E731
            hooks.enter_context(entries_of(base)[index].register_forward_pre_hook(add))
        return base(**inputs, **options)


def reference_feedback(base: nn.Module, model: PeftModel, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    config, name = model.active_peft_config, model.active_adapter
    weights = {key.split("feedback_path.")[-1]: value for key, value in model.named_parameters()}
    first, last = config.feedback_range(NUM_STAGES)
    entered, left = {}, {}
    with ExitStack() as hooks:
        for i, (entry, stage) in enumerate(zip(entries_of(base), parts_of(base)[1], strict=True)):
            hooks.enter_context(entry.register_forward_pre_hook(lambda _, args, i=i: entered.update({i: args[0]})))
            hooks.enter_context(stage.register_forward_hook(lambda *a, i=i: left.update({i: a[2]})))
        base(**inputs)
    x = left[first - 1]
    norm = next((m for n, m in base.named_modules() if n in ("layernorm", "convnext.layernorm")), None)
    norm = next((m for n, m in base.named_modules() if n == "convnextv2.layernorm"), norm)
    compared = x.permute(0, 2, 3, 1)
    if norm is not None and first == NUM_STAGES:
        compared = F.layer_norm(compared, compared.shape[-1:], norm.weight, norm.bias, norm.eps)
    prompt = weights[f"selection.topdown_prompt.{name}.weight"]
    mask = F.cosine_similarity(compared, prompt.expand_as(compared), dim=-1).clamp(0, 1)
    transform = weights[f"selection.topdown_transform.{name}.weight"]
    z = torch.einsum("bchw,bhw,cd->bdhw", x, mask, transform)
    feedback = {}
    for i in range(first - 1, last - 1, -1):
        stride = 2 ** round(math.log2(entered[i].shape[2] / left[i].shape[2]))
        linear1, linear2 = reference_weights(weights, i, name, config, (z.shape[1], entered[i].shape[1], stride))
        z = torch.einsum("bchw,cdij->bdhiwj", z, linear1).flatten(4, 5).flatten(2, 3)
        z = cropped_or_filled(z, entered[i])
        feedback[i] = torch.einsum("bchw,dc->bdhw", z, linear2)
    return feedback


def reference_weights(
    weights: dict[str, nn.Parameter], i: int, name: str, config: TopDownConfig, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear1` of the shape [c, c', s, s] and `linear2` [c', c']."""
    part, dtype = f"layers.{i}.topdown_", next(iter(weights.values())).dtype
    linear1 = weights.get(f"{part}linear1.{name}.weight", folded_identity(*shape, dtype=dtype))
    linear2 = weights.get(f"{part}linear2.{name}.weight", torch.zeros(shape[1], shape[1], 1, 1, dtype=dtype))[
        ..., 0, 0
    ]
    if config.r == 0:
        return linear1, linear2
    a1, b1, a2, b2 = (
        weights[f"{part}{f}.{name}.weight"] for f in ("linear1_A", "linear1_B", "linear2_A", "linear2_B")
    )
    scale = config.lora_alpha / config.r
    linear1 = linear1 + scale * torch.einsum("rc,rdij->cdij", a1[..., 0, 0], b1)
    return linear1, linear2 + scale * b2[..., 0, 0] @ a2[..., 0, 0]


def folded_identity(channels: int, to: int, s: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.zeros(channels, to, s, s, dtype=dtype)
    for i in range(channels):
        weight[i, i % to] = min(1.0, math.sqrt(to / channels))
    return weight


def cropped_or_filled(z: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    fitted = z.new_zeros(*z.shape[:2], *like.shape[2:])
    h, w = (min(a, b) for a, b in zip(z.shape[2:], like.shape[2:], strict=True))
    fitted[..., :h, :w] = z[..., :h, :w]
    return fitted
