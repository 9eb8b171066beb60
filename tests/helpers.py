"""Adapters whose effect is visible, what a model computes and is made of, and how two results are compared."""

import copy
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from toast_peft import TopDownConfig
from toast_peft.core.layers import FeedbackPath

from .kept_models import seed
from .zoo import MODELS, add_noise, inputs_of, tiny_model

_VISION_NORMS = ("layernorm", "post_layernorm")
_VALUE_PROJECTIONS = ("v_proj", ".value")
# Neither a layer of the feedback path nor one of a segmentation decoder.
_BLOCK = r"(^|(?<!path)(?<!stage)\.)layers?\.\d+$"
# What transformers calls the argument and the output that is a cache; "past_key_values" before 5.24.
CACHE = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(tf.LlamaModel.forward).parameters
)
Inputs = dict[str, torch.Tensor]

# ----------------------------------------------------------------------------------------------------------- adapters


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """The model with a TOAST adapter as users make it, in the mode that it was in."""
    training = model.training
    of_row = MODELS[type(model)].adapter if type(model) in MODELS else {}
    return get_peft_model(model, TopDownConfig(**of_row | options)).train(training)


def steered(model: nn.Module, inputs: Inputs | None = None, **options: Any) -> PeftModel:
    """The model with a TOAST adapter that has been moved away from its start, always to the same place."""
    seed(1)
    model = adapted(model, **{"init_prompt": "random"} | options)  # moved as well, so no model need run for it
    steer(model, inputs=inputs)
    return model


def steer(model: PeftModel, name: str = "default", inputs: Inputs | None = None) -> None:
    """Change the weights of an adapter by noise; turn its prompts to some features, or the mask might be zero."""
    add_noise(*(p for key, p in model.named_parameters() if "topdown_" in key and f".{name}." in key))
    active = model.active_adapter
    switches = active != name  # which walks over all modules
    if switches:
        model.set_adapter(name)
    turn_prompts(model, name, inputs)
    if switches:
        model.set_adapter(active)


def turn_prompts(model: nn.Module, name: str = "default", inputs: Inputs | None = None) -> None:
    """Turn each prompt of the active adapter to one of the features that it is compared with."""
    inputs = inputs_of(model) if inputs is None else inputs

    def turn(prompt: nn.Module, args: tuple) -> None:
        prompt.weight.copy_(args[0].flatten(0, -2)[-1])

    for path in paths_of(model):  # one after the other, as a decoder's features depend on its encoder
        with path.selection.topdown_prompt[name].register_forward_pre_hook(turn):
            output_of(model, inputs)


def trained_everywhere(model: type | nn.Module, **options: Any) -> PeftModel:
    """`steered`, and other trained modules changed as well."""
    model = steered(tiny_model(model) if isinstance(model, type) else model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or "trainable_tokens" in name:
                parameter.add_(0.1)
    return model


def paths_of(model: nn.Module) -> list[FeedbackPath]:
    """The feedback paths, from the input to the output."""
    return [module for module in model.modules() if isinstance(module, FeedbackPath)]


def parts_in(folder: Path) -> set[str]:
    """Which parts of the feedback a saved adapter has in its file."""
    names = load_file(folder / "adapter_model.safetensors")
    return {name.split("topdown_")[1].split(".")[0] for name in names if "topdown_" in name}


def without_randomness(model: nn.Module) -> nn.Module:
    """The model with all rates of dropout zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.config.layerdrop = 0.0
    return model


# --------------------------------------------------------------------------------------------- what a model computes


def output_of(model: nn.Module, inputs: Inputs | None = None) -> torch.Tensor:
    """Logits, or the last hidden states of a bare backbone, without a graph."""
    with torch.no_grad():
        return first_tensor(model(**inputs_of(model) if inputs is None else inputs))


def first_tensor(output: Any) -> torch.Tensor:
    """Logits or the last hidden states; of a Backbone the last feature map."""
    return output.feature_maps[-1] if hasattr(output, "feature_maps") else output[0]


def loss_of(model: Callable, inputs: Inputs | None = None) -> torch.Tensor:
    """A smooth loss that every output element has a part in."""
    output = first_tensor(model(**inputs_of(model) if inputs is None else inputs))
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return (output * weights).sum().tanh() + output.square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients of all trainable parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def features_of(model: nn.Module, inputs: Inputs, first: int) -> torch.Tensor:
    """Hidden states after block `first - 1`, in ViT-like models after the final norm as well."""
    outputs = []
    with blocks_of(model)[first - 1].register_forward_hook(lambda module, args, output: outputs.append(output)):
        model(**inputs)
    features = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if model.main_input_name != "pixel_values":
        return features
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] in _VISION_NORMS)(features)


def feedback_of(model: nn.Module, inputs: Inputs | None = None) -> list[dict[int, torch.Tensor]]:
    """What a forward adds, for each feedback path and block."""
    found: list[dict[int, torch.Tensor]] = []
    with ExitStack() as hooks:
        for path in paths_of(model):
            found.append({})
            record = lambda path, args, td, kept=found[-1]: kept.update(td)  # noqa: E731
            hooks.enter_context(path.register_forward_hook(record))
        output_of(model, inputs)
    return found


# -------------------------------------------------------------------------------------------- what a model is made of


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks, from the input to the output."""
    return [module for name, module in model.named_modules() if re.search(_BLOCK, name)]


def value_projections_of(model: nn.Module) -> list[nn.Module]:
    """The value projection of each block."""
    return [
        next(m for name, m in block.named_modules() if name.endswith(_VALUE_PROJECTIONS)) for block in blocks_of(model)
    ]


@contextmanager
def counted_block_calls(model: nn.Module) -> Iterator[Counter]:
    """How often each block really ran: counts the calls of its MLP, which a skipped block does not make."""
    calls: Counter = Counter()
    handles = [
        block.mlp.register_forward_hook(lambda *_, index=index: calls.update([index]))
        for index, block in enumerate(blocks_of(model))
    ]
    yield calls
    for handle in handles:
        handle.remove()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is made of: modules, attributes, hooks, flags, adapters, and a copy of all weights."""
    state = {
        f"{name}: {key}": _content(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    return {"modules": state, "requires_grad": requires_grad, "weights": weights}


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _content(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [_content(entry) for entry in value]
    return value if isinstance(value, (str, int, float, set)) else id(value)


# ------------------------------------------------------------------------------------------------------- comparisons


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Equal but for rounding, relative to the largest entry.

    For tensors computed from other memory, or where other parameters require a gradient: torch may choose another
    kernel then. `torch.equal` is for the same weights and inputs only.
    """
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[expected.dtype]
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * largest, msg=lambda text: f"{name}\n{text}")


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding, relative to the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest.item(), msg=name)


def assert_same_generation(found: Any, expected: Any) -> None:
    """The same tokens, and the same logits but for rounding."""
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def assert_state_is(model: nn.Module, before: dict[str, Any]) -> None:
    """Everything is as it was when `state_of` was called, down to the last bit."""
    now = state_of(model)
    for part in ("modules", "requires_grad"):
        assert now[part].keys() == before[part].keys()
        assert [key for key in before[part] if now[part][key] != before[part][key]] == []
    weights = now["weights"]
    assert list(weights) == list(before["weights"])
    for name, (dtype, tensor) in before["weights"].items():
        assert weights[name][0] == dtype and torch.equal(weights[name][1], tensor), name


@contextmanager
def leaves_untouched(model: nn.Module) -> Iterator[None]:
    """All modules, attributes, hooks and weights are those that were there before, and so is the output."""
    output, before = output_of(model), state_of(model)
    yield
    assert_state_is(model, before)
    assert torch.equal(output_of(model), output)


# ------------------------------------------------------------------------------------- what other packages can do here


def refusal_of_transformers() -> str:
    """What transformers' own `add_adapter` says to a LoRA; empty if it takes one."""
    try:
        tiny_model(tf.LlamaForCausalLM).add_adapter(LoraConfig(target_modules=["v_proj"]))
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


# For tests of transformers' `add_adapter` and `load_adapter`: some of its releases want a PEFT that is not out yet.
_REFUSAL = refusal_of_transformers()
takes_adapters = pytest.mark.skipif(_REFUSAL != "", reason=f"transformers refuses any adapter, LoRA alike: {_REFUSAL}")


@functools.cache
def compiles_copies() -> bool:
    """Whether torch.compile can trace `copy.copy`, by which the two passes see a cache; older versions cannot."""
    try:
        torch.compile(lambda cache: copy.copy(cache).layers, fullgraph=True, backend="eager")(tf.DynamicCache())
    except torch._dynamo.exc.Unsupported:
        return False
    return True
