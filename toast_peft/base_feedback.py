"""Keeps the fixed matrices of TOAST-Lite once for many adapters: in the full adapter that they started from.

A pre-trained path of a model can so be one repository, and the adapters that start from it small files that name it.
"""

import hashlib
import re

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .config import TopDownConfig
from .core.topdown_layer import belongs_to

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be saved in


def read_weights(path: str, revision: str | None, subfolder: str | None) -> tuple[dict[str, torch.Tensor], str | None]:
    """The weights of a saved adapter. Only `safetensors` are read, which cannot hold code.

    Args:
        path: a folder, or a Hub id.
        revision: branch, tag or commit of the latter.
        subfolder: folder in it.

    Returns:
        The weights by their names as `name_in_file` gives them, and the commit if they are from the Hub.

    Raises:
        OSError: if there is no such file.
        safetensors.SafetensorError: if it is damaged.
        ValueError: if its feedback is not made of finite numbers.
    """
    file = cached_file(path, SAFETENSORS_WEIGHTS_NAME, revision=revision, subfolder=subfolder or "")
    if file is None:
        raise OSError(f"{path!r} has no {SAFETENSORS_WEIGHTS_NAME}")
    weights = {_canonical(name.removeprefix("base_model.model.")): tensor for name, tensor in load_file(file).items()}
    unusable = [name for name, tensor in weights.items() if ".topdown_" in name and not _is_usable(tensor)]
    if unusable:
        raise ValueError(
            f"The TOAST adapter {path!r} has weights with NaN, Inf or of a dtype other than float16, bfloat16, "
            f"float32 and float64: {', '.join(unusable)}; expected a trained adapter."
        )
    return weights, extract_commit_hash(file, None)


def _is_usable(tensor: torch.Tensor) -> bool:
    return tensor.dtype in FLOATS and bool(tensor.isfinite().all())


def name_in_file(adapter_name: str, name: str) -> str:
    """The name of a parameter of an adapter among the weights that `read_weights` gives."""
    before, _, after = name.rpartition(f".{adapter_name}.")
    return _canonical(f"{before}.{after}")


def _canonical(name: str) -> str:
    # A hierarchical transformer marks the layer that its chain starts at; it may go on from there in another adapter.
    return re.sub(r"(\.layers\.\d+)_start\.", r"\1.", name)


def sha256_of(weights: dict[str, torch.Tensor]) -> str:
    """A hash of names, dtypes, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_in_base_feedback(config: TopDownConfig, name: str) -> bool:
    """Whether a parameter is not in the adapter's file, but in that of its `base_feedback`."""
    return config.base_feedback is not None and is_fixed_matrix(name)


def is_fixed_matrix(name: str) -> bool:
    """Whether a parameter of a Lite adapter, with or without the adapter's name in its own, is never trained."""
    return re.search(r"\.topdown_linear[12]\.", name) is not None


def read_base_feedback(config: TopDownConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """The fixed matrices of an adapter from its `base_feedback`.

    Args:
        config: the config of the adapter.
        names: of the matrices, as they are saved.

    Raises:
        ValueError: if the reference is not one to follow, if there is nothing to be read, or if that is not what the
            adapter was trained with.
    """
    _check_reference(config)
    where = (str(config.base_feedback), config.base_feedback_revision, config.base_feedback_subfolder)
    described = " ".join(
        f"{name}={value!r}"
        for name, value in zip(("base_feedback", "revision", "subfolder"), where, strict=True)
        if value
    )
    try:
        weights, _ = read_weights(*where)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"This TOAST adapter needs the matrices of another one, {described}, which could not be read; put it "
            f"there, or set `base_feedback` of the config to where it is and pass this config. ({error})"
        ) from error
    found = {name: weights[name] for name in names if name in weights}
    if not found or sha256_of(found) != config.base_feedback_sha256:
        raise ValueError(
            f"This TOAST adapter needs the matrices of another one, {described}, but that has others than those it "
            f"was trained with (SHA-256 {sha256_of(found)}, expected {config.base_feedback_sha256}); find the right "
            "revision, and set `base_feedback_revision` of the config to it."
        )
    return found


def load_base_feedback(model: nn.Module, adapter_name: str, config: TopDownConfig) -> dict[str, torch.Tensor]:
    """Copy the fixed matrices of a new adapter from its `base_feedback`.

    Args:
        model: the base model with the new adapter.
        adapter_name: its name.
        config: its config.

    Returns:
        The weights that were copied, by the names of the parameters.

    Raises:
        ValueError: if they cannot be had, as `read_base_feedback`.
    """
    parameters = {
        name_in_file(adapter_name, name): (name, parameter)
        for name, parameter in model.named_parameters()
        if belongs_to(adapter_name, name) and is_in_base_feedback(config, name)
    }
    found = read_base_feedback(config, list(parameters))
    different = [name for name, (_, p) in parameters.items() if name not in found or found[name].shape != p.shape]
    if different:
        raise ValueError(
            f"`base_feedback={config.base_feedback!r}` does not fit the base model: it lacks {', '.join(different)} "
            "of the right shape; expected the model that the adapter was trained on."
        )
    weights = {parameters[name][0]: tensor for name, tensor in found.items()}
    for name in weights:
        module = model.get_submodule(name.rpartition(".")[0])
        if module.weight.is_meta:  # `low_cpu_mem_usage=True`; the others are loaded later
            module.to_empty(device="cpu")
    copy_weights(model, weights)
    return weights


@torch.no_grad()
def copy_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of these names."""
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)


def _check_reference(config: TopDownConfig) -> None:
    """What was downloaded must not make loading look around on this machine."""
    path, subfolder = config.base_feedback, config.base_feedback_subfolder
    if config.reference_in_file != (path, subfolder):  # of an adapter in a local folder, or set in code
        return
    parts = [part for names in (subfolder, config.base_feedback_revision) if names for part in names.split("/")]
    if not (_is_hub_id(str(path)) and all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts)):
        raise ValueError(
            f"The file of a TOAST adapter names {path!r} (subfolder {subfolder!r}) as its `base_feedback`; expected a "
            "Hub id, as the adapter is not in a local folder. If it is right, set `base_feedback` of "
            "`TopDownConfig.from_pretrained(...)` to where it is on this machine and pass this config."
        )


def _is_hub_id(path: str) -> bool:
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True
