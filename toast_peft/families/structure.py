"""Finds the stack of blocks of a transformer that has no row in `model_types.py`, by its structure.

A transformer of the transformers library is a list of blocks, each with one self-attention whose value projection has
one of a few names. What is found is what a row says, so nothing else needs to know where it is from. What structure
cannot tell is left as it is in most models: the features do not pass the final norm before the feedback starts.
"""

import logging

from torch import nn

from ..core.value_projection import input_size
from .lookup import join_names
from .model_types import Architecture, Fused

_logger = logging.getLogger(__name__)

_VALUE_PROJECTIONS = {
    *("v", "v_lin", "v_proj", "value", "value_proj", "values", "wv", "Wv", "to_v", "linear_v"),
    *("project_v", "projection_value", "value_projection", "self_attn_value_proj"),
}
# How projections that compute more than values are split, by the modelling code of all types of transformers 5.24
# that have one of the name.
FUSED_PROJECTIONS: dict[str, Fused] = {
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
_WITH_VALUES = _VALUE_PROJECTIONS | FUSED_PROJECTIONS.keys()
LATENT = {"kv_a_proj_with_mqa", "kv_b_proj", "kv_a_proj", "kv_down_proj"}
# Attention to the states of an encoder or of another modality, whose values are not of the tokens of the block.
_CROSS_ATTENTION = ("cross", "encoder_attn", "encdec", "enc_dec", "inter_attention")
# Their values go into a state that each token adds to.
_RECURRENT = ("linearattention", "lightning", "delta", "mamba", "rwkv", "xlstm", "retention", "recurrent", "shortconv")


def architectures_by_structure(
    model: nn.Module, known: dict[str, Architecture]
) -> tuple[dict[str, Architecture], dict[str, str]]:
    """Find each stack of blocks outside of the known ones.

    Args:
        model: the model to adapt.
        known: the backbones whose model type has a row, by their names.

    Returns:
        For each backbone, by its name in the model, its row; and for each list that looks like a stack and is none
        that TOAST can steer, by its name, why.
    """
    found: dict[str, Architecture] = {}
    reasons: dict[str, str] = {}
    for name, blocks in _outermost_lists(model, known):
        try:
            backbone_name, architecture = _architecture(model, name, blocks)
            if backbone_name in found:
                other = join_names(backbone_name, found.pop(backbone_name).blocks)
                raise ValueError(f"{other} and {name} are two lists of blocks in one module")
        except ValueError as error:
            reasons[name] = str(error)
        else:
            found[backbone_name] = architecture
    return found, reasons


def log_found(model: nn.Module, backbone_name: str, architecture: Architecture) -> None:
    """Say where the feedback of a model type without a row goes."""
    _logger.info(
        "TOAST found the blocks of %s by their structure: %r, with the value projection %r%s in each.",
        type(model).__name__,
        join_names(backbone_name, architecture.blocks),
        architecture.value_projection,
        f" (fused, {architecture.fused})" if architecture.fused else "",
    )


def _outermost_lists(model: nn.Module, known: dict[str, Architecture]) -> list[tuple[str, nn.ModuleList]]:
    """Lists of what has attention that are in no other such list, and in no known backbone."""
    lists: list[tuple[str, nn.ModuleList]] = []
    taken = [f"{backbone}." if backbone else "" for backbone in known]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(tuple(taken)):
            blocks = [block for block in module if block is not None]  # Informer has a convolution, or none, for each
            if any(_value_projections(block) or _without_value_projection(block) for block in blocks):
                lists.append((name, module))
                taken.append(f"{name}.")
    return lists


def _value_projections(block: nn.Module) -> list[str]:
    """Paths from a block to what its self-attention computes values with."""
    return [
        path
        for path, module in block.named_modules()
        if path.rpartition(".")[2] in _WITH_VALUES and input_size(module) > 0 and _is_in_self_attention(block, path)
    ]


def _is_in_self_attention(block: nn.Module, path: str) -> bool:
    attention = type(block.get_submodule(path.rpartition(".")[0])).__name__.lower()
    if "att" not in attention or any(part in attention for part in _RECURRENT):
        return False
    return not is_cross_attention(f"{path}.{attention}")


def is_cross_attention(name: str) -> bool:
    """Whether a module attends to the states of an encoder, or of another modality, by its name."""
    return any(part in name.lower() for part in _CROSS_ATTENTION)


def _without_value_projection(block: nn.Module) -> str | None:
    """Why the attention of a block has no layer for its values, if it has attention."""
    for path, module in block.named_modules():
        if path.rpartition(".")[2] in LATENT:
            return f"come from a latent ({path}), as in multi-head latent attention"
        if isinstance(module, nn.MultiheadAttention):
            return f"are computed by torch's nn.MultiheadAttention ({path}), which has no layer for them"
    return None


def _architecture(model: nn.Module, name: str, blocks: nn.ModuleList) -> tuple[str, Architecture]:
    """The name of the backbone that runs a list of blocks, and its row.

    Raises:
        ValueError: if it is not clear what the value projections are, or if there are none.
    """
    paths = [_value_projections(block) for block in blocks]
    _check_blocks(name, blocks, paths)
    path = next(found[0] for found in paths if found)
    backbone_name = _runs(model, name)
    inside = name[len(backbone_name) :].lstrip(".")
    backbone = model.get_submodule(backbone_name)
    return backbone_name, Architecture(inside, path, _final_norm(backbone, inside), fused=_layout(backbone, path))


def _layout(backbone: nn.Module, path: str) -> Fused | None:
    """How queries, keys and values lie in the output of a fused projection."""
    name = path.rpartition(".")[2]
    if name == "c_attn" and getattr(getattr(backbone, "config", None), "multi_query", None) is False:  # GPT-BigCode
        return "by key-value head"
    return FUSED_PROJECTIONS.get(name)


def _check_blocks(name: str, blocks: nn.ModuleList, paths: list[list[str]]) -> None:
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        raise ValueError(f"{name} is a list of lists, one for each stage; expected a list of blocks")
    missing = [_without_value_projection(block) for block in blocks]
    if any(missing):
        raise ValueError(f"the values of {name} {next(filter(None, missing))}")
    several = [found for found in paths if len(found) > 1]
    if several:
        raise ValueError(f"each of {name} has several value projections, {', '.join(several[0][:4])}")
    different = sorted({path for found in paths for path in found})
    if len(different) > 1:
        raise ValueError(f"the blocks of {name} have different value projections, {', '.join(different)}")
    if any(getattr(block, "window_size", None) or getattr(block, "num_windows", None) for block in blocks):
        raise ValueError(f"the attention in {name} sees the tokens in windows, each a row of the batch")
    if "." not in different[0]:
        raise ValueError(f"{name} is a list of attention layers; expected one of blocks that hold them")
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError(f"some blocks of {name} are one and the same module")


def _runs(model: nn.Module, name: str) -> str:
    """The name of the module that runs a list of blocks: the nearest one around it with a forward and a config."""
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)] + [""]
    with_forward = [parent for parent in parents if type(model.get_submodule(parent)).forward is not nn.Module.forward]
    with_config = [parent for parent in with_forward if hasattr(model.get_submodule(parent), "config")]
    return next(iter([*with_config, *with_forward]), "")


def _final_norm(backbone: nn.Module, blocks: str) -> str | None:
    """The one norm of the backbone that comes after its list of blocks."""
    names = [name for name, _ in backbone.named_children()]
    if blocks not in names:
        return None
    later = names[names.index(blocks) + 1 :]
    modules = {name: backbone.get_submodule(name) for name in later}
    # Of one that is trained as well, PEFT's wrapper is there.
    own = {name: getattr(module, "original_module", module) for name, module in modules.items()}
    norms = [name for name, module in own.items() if "norm" in type(module).__name__.lower()]
    return norms[0] if len(norms) == 1 else None
