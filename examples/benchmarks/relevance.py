"""Relevance maps of a vision transformer, and two ways to judge them: focus, and deletion or insertion of patches.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens; the patches are the last ones
    - h, w: rows and columns of patches
    - d: hidden size
    - c: number of prompts
    - s: number of steps of a curve
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import toast_peft
from toast_peft.explanation.attention import attention_rollout
from toast_peft.requested_prompt import Features

Inputs = dict[str, Any]


def on_patches(values: torch.Tensor, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What belongs to the patches, where they lie. Shape: [b, n, ...] -> [b, h, w, ...]"""
    rows, columns = (size // model.config.patch_size for size in inputs["pixel_values"].shape[-2:])
    return values[:, -rows * columns :].unflatten(1, (rows, columns))


def grad_cam(model: nn.Module, inputs: Inputs, classes: torch.Tensor) -> torch.Tensor:
    """Grad-CAM of the first norm of the last block, after which the class token does not look at patches again.

    Formula: `relu(sum_d a_d * mean over the patches of dlogit / da_d)`, with `a` the output of the norm. With TOAST
    it is that of pass 2.

    Source: Selvaraju et al., https://arxiv.org/abs/1610.02391; the layer is that of the ViT example of
    https://github.com/jacobgil/pytorch-grad-cam

    Args:
        model: a ViT of transformers, with or without an adapter.
        inputs: of its forward.
        classes: whose logits are explained. Shape: [b]

    Returns:
        Shape: [b, h, w]

    Raises:
        ValueError: if the model has no such norm.
    """
    norms = [module for name, module in model.named_modules() if name.endswith(".layernorm_before")]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no `layernorm_before`; Grad-CAM is for the ViT of transformers.")
    outputs = []

    def start_of_gradients(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with torch.enable_grad(), norms[-1].register_forward_hook(start_of_gradients):
        logits = model(**inputs).logits.gather(1, classes[:, None].to(model.device))
    # The norm runs in both passes of TOAST.
    [gradients] = torch.autograd.grad(logits.sum(), outputs[-1])
    activations, gradients = (on_patches(values, model, inputs) for values in (outputs[-1].detach(), gradients))
    return (activations * gradients.mean((1, 2), keepdim=True)).sum(-1).relu().cpu()


@torch.no_grad()
def rollout(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Attention rollout of the class token, https://arxiv.org/abs/2005.00928. The model keeps eager attention.

    Returns:
        Shape: [b, h, w]
    """
    model.set_attn_implementation("eager")  # no other one returns what the attentions are
    attentions = [attention.float().cpu().numpy() for attention in model(**inputs, output_attentions=True).attentions]
    return of_class_token(attention_rollout(attentions), model, inputs)


def feedback_maps(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """What TOAST has to show: its mask, how much more the last block attends to a patch, and the rollout of pass 2.

    Returns:
        Shape of each: [b, h, w]
    """
    explanation = toast_peft.explain(model, inputs)
    first, second = (of_pass.attentions for of_pass in (explanation.first, explanation.second))
    change = of_class_token(second[-1].mean(1) - first[-1].mean(1), model, inputs)
    return {
        "mask": on_patches(torch.from_numpy(explanation.mask), model, inputs),
        "change of attention": change.relu(),
        "rollout": of_class_token(attention_rollout(second), model, inputs),
    }


@torch.no_grad()
def requested_masks(model: nn.Module, inputs: Inputs, prompts: torch.Tensor) -> torch.Tensor:
    """The masks with each of some prompts as `topdown_prompt`, of one pass 1.

    Args:
        model: has a TOAST adapter.
        inputs: of its forward.
        prompts: Shape: [c, d]

    Returns:
        Shape: [b, h, w, c]
    """
    features, _ = Features(model).of(inputs)
    similarity = F.normalize(features, dim=-1) @ F.normalize(prompts, dim=-1).T
    return on_patches(similarity.clamp(0, 1).cpu(), model, inputs)


def of_class_token(matrix: np.ndarray, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The row of the class token. Shape: [b, n, n] -> [b, h, w]"""
    return on_patches(torch.from_numpy(matrix[:, 0]), model, inputs)


def focus(relevance: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """The share of the positive relevance that is on the tiles of the target class.

    Source: Arias-Duart et al., Focus! Rating XAI Methods and Finding Biases, https://arxiv.org/abs/2109.15035

    Args:
        relevance: of mosaics of 2 x 2 tiles. Shape: [b, h, w]
        is_target: which tiles are of the class. Shape: [b, 4]

    Returns:
        From 0 to 1; NaN where nothing is relevant. Shape: [b]
    """
    of_tiles = relevance.clamp(min=0).unflatten(2, (2, -1)).unflatten(1, (2, -1)).sum((2, 4)).flatten(1)
    return (of_tiles * is_target).sum(1) / of_tiles.sum(1)


@torch.no_grad()
def curve(
    model: nn.Module, inputs: Inputs, classes: torch.Tensor, relevance: torch.Tensor, steps: int, inserted: bool
) -> torch.Tensor:
    """The probability of a class while the most relevant patches are deleted from the image, or inserted into nothing.

    A deleted patch is zero, the mean colour that the image processor subtracts.

    Source: Petsiuk et al., RISE, https://arxiv.org/abs/1806.07421

    Args:
        model: the classifier.
        inputs: of its forward, with `pixel_values`.
        classes: Shape: [b]
        relevance: Shape: [b, h, w]
        steps: in how many equal steps all patches are deleted or inserted.
        inserted: whether they are inserted.

    Returns:
        From no patch to all of them. Shape: [b, s + 1]
    """
    pixels = inputs["pixel_values"]
    rank = relevance.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).reshape_as(relevance)
    patch = pixels.shape[-1] // relevance.shape[-1]
    rank = rank.repeat_interleave(patch, 1).repeat_interleave(patch, 2).to(pixels.device)[:, None]
    probabilities = []
    for step in range(steps + 1):
        is_kept = (rank < relevance[0].numel() * step / steps) == inserted
        logits = model(**inputs | {"pixel_values": pixels * is_kept}).logits
        probabilities.append(logits.softmax(-1).gather(1, classes[:, None].to(logits.device))[:, 0].cpu())
    return torch.stack(probabilities, dim=1)


def area(probabilities: torch.Tensor) -> torch.Tensor:
    """The area under curves, from 0 to 1. Shape: [b, s + 1] -> [b]"""
    return torch.trapezoid(probabilities, dx=1 / (probabilities.shape[1] - 1))
