"""Helpers of the tests that run on a GPU as well.

Models are made on the CPU, so that their weights are the same everywhere.
"""

from typing import Any

import torch
import transformers as tf
from torch import nn

from ..helpers import assert_same
from ..zoo import inputs_of as inputs_on_cpu

VIT, LLAMA = tf.ViTForImageClassification, tf.LlamaForCausalLM
PRECISIONS = [torch.float32, torch.bfloat16]
CHANGES = {"pass2_target_modules": "all-linear", "pass2_r": 2, "pass2_bias": "all"}


def inputs_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Its inputs, where it is and in its dtype."""
    return on_device_of(model, inputs_on_cpu(model, **options))


def on_device_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def without_cache(model: nn.Module, **options: Any) -> dict[str, Any]:
    return inputs_of(model, **options) | ({"use_cache": False} if model.can_generate() else {})


def assert_same_in_float32(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of another device or compiled: some norms, and all rotary embeddings, compute in float32 by other kernels."""
    assert_same(found.cpu().float(), expected.cpu().float())


def is_on(device: str, model: nn.Module) -> bool:
    return {tensor.device.type for tensor in model.state_dict().values()} == {device}
