"""TOAST for ConvNets a second time, from the formulas, as `reference.py` for transformers."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from toast_peft import TopDownConfig

from ..zoo import NUM_BLOCKS


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Stem and stages."""
    named = dict(model.named_modules())
    [stages] = [module for name, module in named.items() if name.endswith("encoder.stages")]
    [stem] = [m for name, m in named.items() if name.split(".")[-1] == "embeddings" or is_resnet_stem(m)]
    return stem, stages


def is_resnet_stem(module: nn.Module) -> bool:
    return type(module).__name__ in ("ResNetEmbeddings", "RegNetEmbeddings")


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
    first, last = config.feedback_range(NUM_BLOCKS)
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
    if norm is not None and first == NUM_BLOCKS:
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
