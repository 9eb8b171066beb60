"""Starts a new adapter from the feedback of a saved one."""

from copy import copy
from typing import cast

import torch
from peft import PeftConfig
from peft.utils import PeftType
from safetensors import SafetensorError
from torch import nn

from .base_feedback import copy_weights, is_fixed_matrix, name_in_file, read_base_feedback, read_weights, sha256_of
from .config import TopDownConfig
from .core.feature_selection import FeatureSelection
from .core.gate import Gate
from .core.layers import FeedbackLayer
from .core.output_feedback import OutputFeedback
from .core.second_pass_lora import SecondPassLora
from .core.topdown_layer import TopDownLayer, weight_of

_OF_THE_OUTPUTS = (SecondPassLora, OutputFeedback)  # these start anew
_LINEARS = ("topdown_linear1", "topdown_linear2")


def start_from_pretrained(model: nn.Module, adapter_name: str, config: TopDownConfig) -> dict[str, torch.Tensor]:
    """Give a new adapter the feedback of the adapter `config.pretrained_feedback`, and clear this option.

    The new adapter computes the same feedback. If both are Lite and of the same rank, it goes on from the factors of
    the saved one. Else its matrices become `W + (lora_alpha / r) * B A` of the saved one, and its factors, if it has
    any, start as those of a new adapter.

    Only feedback to the values is copied, neither that to the output nor LoRA of pass 2 nor a head that was saved with
    it. Feedback of blocks outside of the new adapter's loop is left out.

    Args:
        model: the base model with the new adapter.
        adapter_name: its name.
        config: its config; it will say which weights have to be in the file when the adapter is saved.

    Returns:
        The weights that were copied, by the names of the parameters.

    Raises:
        ValueError: if the saved adapter is of another method or base model, or lacks what the new one needs.
    """
    saved = _read_config(config)
    weights, commit = _read(saved, config)
    of_adapter = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, TopDownLayer) and _parts(layer, adapter_name)
    }
    layers = {name: layer for name, layer in of_adapter.items() if not isinstance(layer, _OF_THE_OUTPUTS)}
    found = _find(weights, layers, adapter_name, saved, config)
    for layer in of_adapter.values():
        _prepare(layer, adapter_name, keeps_identity=_goes_on(saved, config) and saved.init_weights)
    started = {
        f"{name}.{part}.{adapter_name}.weight": tensor
        for name, layer in layers.items()
        for part, tensor in _started(layer, adapter_name, found[name], saved, config).items()
    }
    copy_weights(model, started)
    fixed = {name_in_file(adapter_name, name): started[name] for name in started if is_fixed_matrix(name)}
    _describe_weights(config, saved, commit, fixed)
    return started


def _read_config(config: TopDownConfig) -> TopDownConfig:
    """The config of the saved adapter, if the new one can start from it."""
    path, where = str(config.pretrained_feedback), {"subfolder": config.pretrained_subfolder}
    try:
        saved: PeftConfig = TopDownConfig.from_pretrained(path, revision=config.pretrained_revision, **where)
    except ValueError as error:
        raise ValueError(
            f"`pretrained_feedback={path!r}` could not be read; expected the path or Hub id of a saved TOAST adapter. "
            f"({error})"
        ) from error
    if not isinstance(saved, TopDownConfig):  # PEFT makes it of the class that the file names
        raise ValueError(
            f"`pretrained_feedback={path!r}` is a {PeftType(saved.peft_type).value} adapter; expected a TOAST one."
        )
    _check_fits(saved, config)
    return saved


def _parts(layer: TopDownLayer, adapter_name: str) -> dict[str, nn.Module]:
    """What an adapter has in a layer, by the names of the containers; a gate is for the data it was fitted to."""
    containers = {name: getattr(layer, name) for name in layer.adapter_layer_names if name != "topdown_gate"}
    return {name: container[adapter_name] for name, container in containers.items() if adapter_name in container}


def _goes_on(saved: TopDownConfig, config: TopDownConfig) -> bool:
    """Whether the new adapter starts with the factors of the saved one."""
    return 0 < saved.r == config.r


def _read(saved: TopDownConfig, config: TopDownConfig) -> tuple[dict[str, torch.Tensor], str | None]:
    path = str(config.pretrained_feedback)
    try:
        weights, commit = read_weights(path, config.pretrained_revision, config.pretrained_subfolder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights of `pretrained_feedback={path!r}` could not be read; expected a TOAST adapter as "
            f"`save_pretrained` writes it, with safetensors. ({error})"
        ) from error
    if saved.base_feedback is not None:
        factors = [name for name in weights if ".topdown_linear" in name and "_A." in name]
        weights |= read_base_feedback(saved, [name.replace("_A.", ".") for name in factors])
    return weights, commit


def _find(
    weights: dict[str, torch.Tensor],
    layers: dict[str, TopDownLayer],
    adapter_name: str,
    saved: TopDownConfig,
    config: TopDownConfig,
) -> dict[str, dict[str, torch.Tensor]]:
    """For each layer of the new adapter what the saved one has there, by the names of the containers."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    lacking = []
    for layer_name, layer in layers.items():
        found[layer_name] = {}
        for part, shape in _saved_shapes(layer, adapter_name, saved).items():
            name = name_in_file(adapter_name, f"{layer_name}.{part}.{adapter_name}.weight")
            if name in weights and weights[name].shape == shape:
                found[layer_name][part] = weights[name]
            else:
                lacking.append(f"{name} of shape {list(shape)}")
    if lacking:
        raise ValueError(
            f"The adapter {config.pretrained_feedback!r} ({_described(saved)}) cannot start one with "
            f"{_described(config)}; it lacks: {', '.join(lacking)}."
        )
    return found


def _saved_shapes(layer: TopDownLayer, adapter_name: str, saved: TopDownConfig) -> dict[str, torch.Size]:
    parts = _parts(layer, adapter_name)
    if isinstance(layer, FeedbackLayer):
        has_matrices = saved.r == 0 or not saved.init_weights
        parts = {name: parts[name] for name in _LINEARS if has_matrices}
        if saved.r > 0:
            with torch.device("meta"):
                parts |= layer.new_factors(saved.r)
    return {name: weight_of(part).shape for name, part in parts.items()}


def _prepare(layer: TopDownLayer, adapter_name: str, keeps_identity: bool) -> None:
    """Make the new adapter's parts real (`low_cpu_mem_usage=True` does not), and those that it is to have."""
    parts = _parts(layer, adapter_name)
    if any(weight_of(part).is_meta for part in parts.values()):
        for part in parts.values():
            part.to_empty(device="cpu")
        if isinstance(layer, FeedbackLayer):
            layer.reset_parameters(adapter_name, init_weights=True)
        elif isinstance(layer, _OF_THE_OUTPUTS):
            layer.reset_parameters(adapter_name)
        elif isinstance(layer, FeatureSelection) and adapter_name in layer.topdown_gate:
            gate = cast(Gate, layer.topdown_gate[adapter_name])
            gate.to_empty(device="cpu")
            gate.reset_parameters()
        layer._move_adapter_to_device_of_base_layer(adapter_name)
    if isinstance(layer, FeedbackLayer) and keeps_identity:
        for linear in _LINEARS:
            del getattr(layer, linear)[adapter_name]


def _started(
    layer: TopDownLayer,
    adapter_name: str,
    found: dict[str, torch.Tensor],
    saved: TopDownConfig,
    config: TopDownConfig,
) -> dict[str, torch.Tensor]:
    """The weights of a layer of the new adapter; factors that are not among them stay as they are."""
    if not isinstance(layer, FeedbackLayer) or saved.r == 0:
        return found
    if _goes_on(saved, config):
        ratio = saved.lora_alpha / config.lora_alpha
        factors = {name: tensor for name, tensor in found.items() if name.endswith("_B")}
        return found | {name: _rounded(ratio * B.double(), B) for name, B in factors.items()}
    is_transposed = isinstance(layer.topdown_linear1[adapter_name], nn.ConvTranspose2d)
    started = {}
    for linear in _LINEARS:
        A, B = found[f"{linear}_A"].double(), found[f"{linear}_B"].double()
        equation = "ro...,ri->io..." if is_transposed and linear == "topdown_linear1" else "or...,ri->oi..."
        product = torch.einsum(equation, B, A.flatten(1))
        fixed = found[linear].double() if linear in found else torch.zeros_like(product)
        if linear == "topdown_linear1" and linear not in found:
            layer.init_identity(fixed)
        started[linear] = _rounded(fixed + saved.lora_alpha / saved.r * product, found[f"{linear}_B"])
    return started


def _rounded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def _describe_weights(
    config: TopDownConfig, saved: TopDownConfig, commit: str | None, fixed: dict[str, torch.Tensor]
) -> None:
    """Say in the config of the new adapter what has to be in its file, and where the rest is."""
    config.init_weights = _goes_on(saved, config) and saved.init_weights
    given = copy(config)
    config.clear_pretrained()
    if given.share_pretrained_feedback:
        config.base_feedback = given.pretrained_feedback
        config.base_feedback_revision = commit or given.pretrained_revision
        config.base_feedback_subfolder = given.pretrained_subfolder
        config.base_feedback_sha256 = sha256_of(fixed)


def _described(config: TopDownConfig) -> str:
    ranges = "feedback in encoder and decoder"
    if isinstance(config.num_blocks, int):
        first, last = config.feedback_range(config.num_blocks)
        ranges = f"feedback from block {first} to {last}"
    return f"r={config.r}, transform_r={config.transform_r}, {ranges}"


def _check_fits(saved: TopDownConfig, config: TopDownConfig) -> None:
    different = [name for name in ("backbone_type", "num_blocks") if getattr(saved, name) != getattr(config, name)]
    if different:
        raise ValueError(
            f"`pretrained_feedback={config.pretrained_feedback!r}` does not fit the base model: "
            + "; ".join(
                f"it was made for {name}={getattr(saved, name)!r}, the model has {getattr(config, name)!r}"
                for name in different
            )
            + "."
        )
    for name in ("normalize_features", "double_value_bias", "feedback_scale"):
        trained_with, given = getattr(saved, name), getattr(config, name)
        if trained_with != given:
            raise ValueError(
                f"`pretrained_feedback={config.pretrained_feedback!r}` was trained with `{name}={trained_with!r}` and "
                f"would do something else with `{name}={given!r}`; pass `{name}={trained_with!r}`."
            )
    if config.share_pretrained_feedback and saved.r > 0:
        raise ValueError(
            f"`share_pretrained_feedback=True` needs a full adapter, but {config.pretrained_feedback!r} has "
            f"`r={saved.r}`; leave it out to store everything in the new adapter."
        )
