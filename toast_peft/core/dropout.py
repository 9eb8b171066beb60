"""Pass 1 runs without dropout, whatever kind it is: of elements, of whole branches (stochastic depth) or of blocks, or
the noise of NEFTune.

Its features are then those of inference also in training, and it uses up no random numbers: pass 2 draws what the base
model would draw, so that an adapter that starts as a no-op starts as the base model in training mode as well.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from transformers.modeling_layers import GradientCheckpointingLayer

from .module_tree import modules_inside
from .value_projection import input_size

_NEFTUNE = "neftune_noise_alpha"  # an embedding with it adds noise to its output, by a hook of transformers
# Parts of the names that transformers gives to what is random in training: `attn_pdrop`, `layerdrop`,
# `drop_path_rate`, `router_jitter_noise`; DINOv3 moves its positions.
_RANDOM = re.compile(r"drop|jitter|pos_embed_(rescale|shift)")


def has_dropout(backbone: nn.Module) -> bool:
    """Whether a pass over the backbone in its present mode is random; what is in the feedback path is in neither."""
    if not backbone.training:
        return False
    for module in modules_inside(backbone, without=(backbone._modules.get("feedback_path"),)):
        if (isinstance(module, _DropoutNd) and module.p > 0) or _NEFTUNE in module.__dict__:
            return True
    # Attention, blocks and backbones call functions with a rate that they have from the config.
    config = getattr(backbone, "config", None)
    if config is None:
        return True
    return any(_is_positive(value) for name, value in config.__dict__.items() if _RANDOM.search(name))


def _is_positive(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_positive(item) for item in value)
    return isinstance(value, (int, float)) and value > 0


@contextmanager
def in_evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules are in evaluation mode, but for linear layers, which are in training mode.

    To these it is all the same, but for one of bitsandbytes with 4 bits on a CPU: when it first runs in evaluation
    mode, it packs its weights for good and has no gradient from then on.
    """
    modules = [module for module in modules if module.training == (input_size(module) == 0)]
    for module in modules:
        module.training = not module.training
    try:
        yield
    finally:
        for module in modules:
            module.training = not module.training


@contextmanager
def dropout_off(*roots: nn.Module, checkpointed: bool = False) -> Iterator[None]:
    """Inside, the modules and all in them are in evaluation mode; but norms that use the batch go on doing so.

    Args:
        roots: the modules.
        checkpointed: leave out blocks with gradient checkpointing, which is a matter of training mode as well; their
            checkpointed calls switch dropout off themselves.
    """
    modules = [module for root in roots for module in modules_inside(root) if not isinstance(module, _NormBase)]
    if checkpointed:
        modules = [m for m in modules if not (isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing)]
    with in_evaluation_mode(modules):
        yield


@contextmanager
def pass_without_dropout(backbone: nn.Module, checkpointed: bool) -> Iterator[None]:
    """Inside, a pass over the backbone is not random and uses up no random numbers.

    Some models draw them, on the CPU, for blocks that they do not leave out either. A compiled forward keeps them.

    Args:
        backbone: the module that runs the blocks.
        checkpointed: whether blocks with gradient checkpointing are checkpointed in this pass.
    """
    with nullcontext() if torch.compiler.is_compiling() else torch.random.fork_rng(devices=[]):
        with dropout_off(backbone, checkpointed=checkpointed):
            yield
