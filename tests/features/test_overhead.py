"""What a forward does besides running the model twice: kernels and Python calls. They may fall, and not rise."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as tf
from cost import Kernels
from torch import nn

import toast_peft

from ..helpers import adapted
from ..zoo import inputs_of

# As deep as ViT-S and a small Llama, and narrow: how much is computed does not count here.
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 12}
MODELS: dict[type, Callable[[], nn.Module]] = {
    tf.ViTForImageClassification: lambda: tf.ViTForImageClassification(
        tf.ViTConfig(**SHAPE, image_size=32, patch_size=8)
    ),
    tf.LlamaForCausalLM: lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=99)),
}


def kernels(function: Callable[[], object]) -> int:
    with Kernels() as mode:
        function()
    return mode.number


def python_calls(function: Callable[[], object]) -> int:
    number = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return number


def besides_two_passes(model_class: type, count: Callable, train: bool, **options: Any) -> int:
    numbers = []
    for is_adapted in (False, True):
        model = MODELS[model_class]().eval().requires_grad_(False)
        inputs = inputs_of(model) | ({"use_cache": False} if model.can_generate() else {})
        model = (adapted(model, **options) if is_adapted else model).train(train)

        def forward(model: nn.Module = model, inputs: dict[str, Any] = inputs) -> None:
            with torch.set_grad_enabled(train):
                model(**inputs)

        forward()
        numbers.append(count(forward))
    return numbers[1] - 2 * numbers[0]


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("options", "number"), [({}, 48), ({"r": 4}, 108)], ids=["full", "lite"])
@pytest.mark.parametrize("model_class", MODELS)
def test_kernels(model_class: type, options: dict[str, Any], number: int, train: bool) -> None:
    """Of a block: linear1, linear2 and h + td, in Lite 8. Nine select tokens, and two channels."""
    assert besides_two_passes(model_class, kernels, train, **options) <= number


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("options", "number"), [({}, 900), ({"r": 4}, 1210)], ids=["full", "lite"])
@pytest.mark.parametrize("model_class", MODELS)
def test_python_calls(model_class: type, options: dict[str, Any], number: int, train: bool) -> None:
    """About 70 for each block, half of them those of torch for the two linear layers and the hooks."""
    assert besides_two_passes(model_class, python_calls, train, **options) <= number + train * 80


FILES = {
    "model.py",
    *(f"core/{name}.py" for name in ("model_forward", "replaced_forward", "backbone_forward", "block_forward", "run")),
    *(f"core/{name}.py" for name in ("active_adapters", "layers", "feature_selection", "topdown_layer", "feedback")),
    "core/value_projection.py",
}


def test_forward_enters_no_file_of_what_the_adapter_does_not_use() -> None:
    """Whoever follows a plain forward reads these files and no others."""
    model = adapted(MODELS[tf.ViTForImageClassification]()).eval()
    inputs, package, found = inputs_of(model), Path(toast_peft.__file__).parent, set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and package in path.parents:
            found.add(path.relative_to(package).as_posix())

    with torch.no_grad():
        model(**inputs)
        sys.setprofile(note)
        try:
            model(**inputs)
        finally:
            sys.setprofile(None)
    assert found == FILES
