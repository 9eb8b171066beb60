"""Starts the prompt of a new adapter where the features of its model are, so that it is similar to most tokens.

A random prompt cuts off half of the tokens, and where the features share a direction, as they do in most models, it
may cut off all of them. That direction hardly depends on the input: the mean normalised feature of one forward with
random tokens or a noise image is similar to nearly all tokens of real data.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .collecting import collect
from .core.feature_selection import FeatureSelection
from .core.layers import feedback_paths
from .core.run import Current
from .initialization import Statistics

_NUM_TOKENS = 64
_IMAGE_SIZE = 224  # for models that take images of any size


@torch.no_grad()
def start_prompts(model: nn.Module, adapter_name: str, may_be_loaded: bool = False) -> None:
    """Set the prompts of a new adapter by one short forward, or warn that they stay random.

    The inputs are always the same and nobody else's random numbers are used: given the weights, all processes of a
    distributed training start from the same prompt.

    Args:
        model: the base model with the adapter.
        adapter_name: the adapter.
        may_be_loaded: whether PEFT may be about to load its weights, to be trained further, so that nothing is said.
    """
    statistics = [
        Statistics(backbone, path, adapter_name, with_chain=False)
        for backbone, path in feedback_paths(model)
        if adapter_name in path.selection.topdown_config
    ]
    config = statistics[0].config
    if config.init_prompt == "random" or any(collected.prompt.is_meta for collected in statistics):
        return
    try:
        open_shares = _run_once(model, statistics)
    except Exception as error:  # whatever a model raises: it may want other inputs, or be on no device
        if may_be_loaded:
            return
        warnings.warn(
            f"The prompt of the TOAST adapter {adapter_name!r} starts at random and may cut off many tokens, as "
            f"{type(model).__name__} could not run with random inputs ({error}); call `toast_peft.initialize_feedback("
            "model, dataloader)` before training, or pass `init_prompt='random'` if this is what you want.",
            stacklevel=2,
        )
        return
    for collected, open_share in zip(statistics, open_shares, strict=True):
        if config.init_weights:
            collected.prompt.copy_(collected.new_prompt())
        elif open_share < 0.5:  # turned around it opens the others
            collected.prompt.neg_()


def _run_once(model: nn.Module, statistics: list[Statistics]) -> list[float]:
    """Collect features.

    Returns:
        How much each prompt lets through as it is, from 0 to 1.

    Raises:
        Exception: if the model does not run, or the features are of no use.
    """
    # A sharded model may not run before it is prepared: the first module that runs would count as the root.
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("its weights are sharded")
    runnable = _innermost_model(model, [collected.backbone for collected in statistics])
    selections = [collected.path.selection for collected in statistics]
    with _numbers_restored(model), _active(selections, statistics[0].adapter_name):
        inputs = random_inputs(runnable)
        collect(runnable, [inputs], statistics)
        for collected in statistics:
            if collected.num_tokens == 0:
                raise RuntimeError("no token came to the feedback")
            if not 0 < float(collected.mean_feature.norm()) < float("inf"):
                raise RuntimeError("its features are zero or not finite")
        masks = [collected.path.state.current.mask for collected in statistics]
        return [_open_share(mask, "input_ids" in inputs) for mask in masks if mask is not None]


def _open_share(mask: torch.Tensor, of_sentences: bool) -> float:
    """Share of the open tokens, in sentences a third of it for their first ones.

    All sentences have the first token, and a short one little else. It decides the sign of a random prompt where the
    features share no direction, so that half of the other tokens are open with either sign.
    """
    is_open = (mask > 0).flatten(1).double()
    share = float(is_open.mean())
    return (2 * share + float(is_open[:, 0].mean())) / 3 if of_sentences else share


def _innermost_model(model: nn.Module, backbones: list[nn.Module]) -> nn.Module:
    """The smallest transformers model that has all backbones, as a head may want more inputs; or the whole model."""
    found = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and set(backbones) <= set(module.modules()):
            found = module
    return found


@contextmanager
def _active(selections: list[FeatureSelection], adapter_name: str) -> Iterator[None]:
    """Run with this adapter, whichever is active, without changing what is trained, and leave no statistics."""
    before = [(part, part._active_adapter, part._disable_adapters, part.state.current) for part in selections]
    try:
        for part in selections:
            part._active_adapter, part._disable_adapters, part.state.current = [adapter_name], False, Current()
        yield
    finally:
        for part, active, disabled, current in before:
            part._active_adapter, part._disable_adapters, part.state.current = active, disabled, current


@contextmanager
def _numbers_restored(model: nn.Module) -> Iterator[None]:
    """Put the numbers that modules hold back to what they were: Swin remembers the smallest image that it has seen."""
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, int)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


def random_inputs(model: nn.Module) -> dict[str, Any]:
    """Random inputs of the model, always the same.

    Raises:
        RuntimeError: if it is not known what the model takes.
    """
    if not isinstance(model, PreTrainedModel):
        dummy_inputs = getattr(model, "dummy_inputs", None)
        if dummy_inputs is None:
            raise RuntimeError("its inputs are not known")
        return dummy_inputs
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {model.main_input_name: _main_input(model, generator)}
    if "decoder_input_ids" in parameters:
        # As many sentences as there are inputs of the encoder: of images and sounds there is one.
        inputs["decoder_input_ids"] = _tokens(model, generator)[: len(inputs[model.main_input_name])]
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def _main_input(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    name, config = model.main_input_name, model.config
    if name == "input_ids" and hasattr(config, "vocab_size"):
        return _tokens(model, generator)
    if name == "pixel_values":  # b, channels, height, width
        size = getattr(config, "image_size", _IMAGE_SIZE)
        shape = (1, getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    elif name == "input_values":  # b, samples of a sound
        shape = (1, _NUM_TOKENS * config.inputs_to_logits_ratio)
    elif name == "input_features":  # b, mels, frames; Whisper takes no other number of frames
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise RuntimeError(f"random inputs for {type(model).__name__} are not known")
    return torch.randn(shape, generator=generator).to(model.dtype)


def _tokens(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Random sentences. They begin with the token 1, one of the special tokens of most vocabularies. Shape: [b, n]"""
    tokens = torch.randint(model.config.vocab_size, (4, _NUM_TOKENS // 4), generator=generator)
    tokens[:, 0] = 1
    return tokens
