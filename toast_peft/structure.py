"""Finds the stack of blocks of a transformer that has no row in `architectures.py`, by its structure.

A transformer of the transformers library is a list of blocks, each with one self-attention whose value projection has
one of a few names. What is found is what a row says, so nothing else needs to know where it is from. What structure
cannot tell is left as it is in most models: the features do not pass the final norm before the feedback starts.
"""

import logging
from collections import Counter
from typing import Any

from torch import nn

from .architectures import Architecture
from .value_projection import input_size, output_size

_logger = logging.getLogger(__name__)

_VALUE_PROJECTIONS = {
    *("v", "v_lin", "v_proj", "value", "value_proj", "values", "wv", "Wv", "to_v", "linear_v"),
    *("project_v", "projection_value", "value_projection", "self_attn_value_proj"),
}
# How projections that compute more than values are split, by the modelling code of all types of transformers 5.24
# that have one of the name.
_FUSED_PROJECTIONS = {
    "c_attn": "one after the other",
    "in_proj": "by key-value head",  # DeBERTa
    "kv_proj": "keys and values",
    "qkv": "one after the other",
    "qkv_linear": "one after the other",
    "qkv_proj": "one after the other",
    "query_key_value": "by key-value head",
    "to_kv": "keys and values",
    "Wqkv": "one after the other",
}
_LATENT = {"kv_a_proj_with_mqa", "kv_b_proj", "kv_a_proj", "kv_down_proj"}
# Attention to the states of an encoder or of another modality, whose values are not of the tokens of the block.
_CROSS_ATTENTION = ("cross", "encoder_attn", "encdec", "enc_dec", "inter_attention")
# Their values go into a state that each token adds to.
_RECURRENT = ("linearattention", "lightning", "delta", "mamba", "rwkv", "xlstm", "retention", "recurrent", "shortconv")


def architectures_by_structure(
    model: nn.Module, known: dict[str, Architecture]
) -> tuple[dict[str, Architecture], list[str]]:
    """Find each stack of blocks outside of the known ones.

    Args:
        model: the model to adapt.
        known: the backbones whose model type has a row, by their names.

    Returns:
        For each backbone its row, by the name of the backbone in the model; and of each list that looks like a stack
        and is none that TOAST can steer, a sentence that says why.
    """
    found: dict[str, Architecture] = {}
    reasons: list[str] = []
    for name, blocks in _outermost_lists(model, known):
        try:
            architecture = _architecture(model, name, blocks)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if architecture is None:
            continue
        backbone_name, row = architecture
        if backbone_name in found:
            other = f"{backbone_name}.{found.pop(backbone_name).blocks}".lstrip(".")
            reasons.append(f"{other} and {name} are two lists of blocks in one module")
            continue
        found[backbone_name] = row
    return found, reasons


def log_found(model: nn.Module, backbone_name: str, architecture: Architecture) -> None:
    """Say where the feedback of a model type without a row goes."""
    _logger.info(
        "TOAST found the blocks of %s by their structure: %r, with the value projection %r%s in each.",
        type(model).__name__,
        f"{backbone_name}.{architecture.blocks}".lstrip("."),
        architecture.value_projection,
        f" (fused, {architecture.fused})" if architecture.fused else "",
    )


def _outermost_lists(model: nn.Module, known: dict[str, Architecture]) -> list[tuple[str, nn.ModuleList]]:
    """Lists that are in no other list that has value projections, and in no known backbone."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = [f"{other}." for other, _ in lists] + [f"{backbone}." if backbone else "" for backbone in known]
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(other) for other in inside):
            if any(_value_projections(block) for block in module):
                lists.append((name, module))
    return lists


def _value_projections(block: nn.Module) -> list[str]:
    """Paths from a block to all that its self-attention may compute values with."""
    paths = []
    for path, module in block.named_modules():
        parent, _, name = path.rpartition(".")
        attention = type(block.get_submodule(parent)).__name__.lower()
        if name not in _VALUE_PROJECTIONS and name not in _FUSED_PROJECTIONS or input_size(module) is None:
            continue
        around = path.lower()
        if "att" not in attention or any(part in attention for part in _RECURRENT):
            continue
        if not any(part in around or part in attention for part in _CROSS_ATTENTION):
            paths.append(path)
    return paths


def _architecture(model: nn.Module, name: str, blocks: nn.ModuleList) -> tuple[str, Architecture] | None:
    paths = [_value_projections(block) for block in blocks]
    several = next((found for found in paths if len(found) > 1), None)
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        raise ValueError(f"{name} is a list of lists, one for each stage")
    if several is not None:
        raise ValueError(f"each block of {name} has several value projections: {', '.join(several)}")
    counted = Counter(found[0] for found in paths if found)
    if len(counted) > 1:
        raise ValueError(f"the blocks of {name} have different value projections: {', '.join(sorted(counted))}")
    [path] = counted
    if "." not in path:
        raise ValueError(f"{name} is a list of attention layers; expected one of blocks that hold them")
    projections = [block.get_submodule(path) for block, found in zip(blocks, paths, strict=True) if found]
    if len(set(map(id, projections))) < len(projections):
        raise ValueError(f"some blocks of {name} are the same module")
    backbone_name = _runs(model, name)
    backbone = model.get_submodule(backbone_name)
    fused = _FUSED_PROJECTIONS.get(path.rpartition(".")[2])
    row = Architecture(
        name[len(backbone_name) :].lstrip("."),
        path,
        _final_norm(backbone, name[len(backbone_name) :].lstrip("."), input_size(projections[0])),
        fused=fused,
        has_cache=True,
    )
    return backbone_name, row


def _runs(model: nn.Module, name: str) -> str:
    """The name of the module that runs a list of blocks: the nearest one around it that has a forward."""
    while name:
        name = name.rpartition(".")[0]
        if type(model.get_submodule(name)).forward is not nn.Module.forward:
            return name
    return name


def _final_norm(backbone: nn.Module, blocks: str, size: int) -> str | None:
    """The one norm of the backbone that comes after its list of blocks."""
    names = [name for name, _ in backbone.named_children()]
    if blocks not in names:
        return None
    later = names[names.index(blocks) + 1 :]
    norms = [name for name in later if "norm" in type(backbone.get_submodule(name)).__name__.lower()]
    return norms[0] if len(norms) == 1 else None
