"""The mathematics of TOAST.

    features x of pass 1 --> m = clamp(cos(x, prompt), 0, 1) --> z_L = (m * x) @ transform       feature selection
                                                                  |
    block L-1   td = linear2(z)  <--  z = linear1(z_L)           <-+                              feedback path
    block L-2   td = linear2(z)  <--  z = linear1(z of block L-1)
       ...
    pass 2, in each block:  v = W (h + td) + b;  queries and keys see h

TOAST-Lite: `linear(z) = W z + (lora_alpha / r) B A z` with `W` fixed. Pre-tuning: `linear1` of each block learns to
compute the input of the block from its output.

Source: https://arxiv.org/abs/2305.15542; official code https://github.com/bfshi/TOAST,
`visual_classification/src/models/vit/vit_top_down.py` and `language_generation/models/llama_top_down.py`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - r: rank of TOAST-Lite
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

Map = Callable[[torch.Tensor], torch.Tensor]  # a linear layer, [b, n, d] -> [b, n, d]


def token_mask(x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """How much of each token is selected, `m = clamp(cos(x, prompt), 0, 1)`.

    Args:
        x: features of pass 1. Shape: [b, n, d]
        prompt: the task prompt, of which only the direction counts. Shape: [d]

    Returns:
        Weights in [0, 1]. Shape: [b, n, 1]
    """
    # As the official code: an eps of 1e-12 on each norm, which float16 does not have. And not a matmul, which
    # autocast would run in low precision.
    dtype = torch.promote_types(prompt.dtype, torch.float32)
    cosine = F.normalize(x.to(dtype), dim=-1) * F.normalize(prompt.to(dtype), dim=-1)
    return cosine.sum(-1, keepdim=True).clamp(0, 1).to(x.dtype)


def select(x: torch.Tensor, mask: torch.Tensor, transform: Map) -> torch.Tensor:
    """Feature selection, tokens and then channels: `z_L = (m * x) @ transform`.

    Args:
        x: features of pass 1. Shape: [b, n, d]
        mask: weights of the tokens. Shape: [b, n, 1]
        transform: the channel transform.

    Returns:
        What the feedback path starts from. Shape: [b, n, d]
    """
    return transform(mask * x)


def step_down(z: torch.Tensor, linear1: Map, linear2: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of the feedback path: `z_l = linear1(z_{l+1})`, `td_l = linear2(z_l)`.

    Args:
        z: of the block above, or what was selected. Shape: [b, n, d]
        linear1: goes down to the block.
        linear2: gives the block its feedback.

    Returns:
        z for the block below, and the feedback td. Shapes: [b, n, d], [b, n, d]
    """
    z = linear1(z)
    return z, linear2(z)


def low_rank(z: torch.Tensor, a: Map, b: Map, scaling: float) -> torch.Tensor:
    """What TOAST-Lite adds to a fixed matrix, `scaling * B A z` with `scaling = lora_alpha / r`.

    Args:
        z: Shape: [b, n, d]
        a: the factor `A`, to [b, n, r].
        b: the factor `B`, back to [b, n, d].
        scaling: a number.
    """
    return b(a(z)) * scaling


def steer(h: torch.Tensor, td: torch.Tensor) -> torch.Tensor:
    """Top-down attention: what a value projection sees in pass 2, `h + td`. Shape of all: [b, n, d]"""
    return h + td


def reconstruction_error(block_input: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """A block's part of the variational loss, `(linear1(output) - input)^2`, to be averaged. Shape: [b, n, d]"""
    return (reconstructed - block_input).square()
