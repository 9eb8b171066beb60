"""Finds the stacks of blocks in a model, and in each block the value projection that receives feedback."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..config import TopDownConfig
from ..core.layers import FeedbackPath
from ..core.stack import Stack
from ..core.two_passes import TwoPasses
from ..core.value_projection import ValueColumns, input_size, output_size
from .lookup import about_patterns, blocks_at, find_submodule, join_names, known_backbones, model_type_of
from .model_types import ARCHITECTURES, UNSUITABLE, UNSUITABLE_AS_A_WHOLE, Architecture
from .structure import FUSED_PROJECTIONS, LATENT, architectures_by_structure, is_cross_attention, log_found

# The last part of the name of layers that compute something else than values.
_NO_VALUE_PROJECTIONS = {
    *("q", "q_lin", "q_proj", "queries", "query", "query_proj", "to_q", "wq"),
    *("k", "k_lin", "k_proj", "key", "key_proj", "keys", "to_k", "wk"),
    *("o", "o_proj", "out_lin", "out_proj", "output", "to_out", "wo"),
    *("c_fc", "c_proj", "down_proj", "fc1", "fc2", "gate_proj", "up_proj"),
}


@dataclass(kw_only=True)
class TransformerStack(Stack):
    """The blocks of a transformer.

    Args:
        value_columns: where the values are in the output of fused projections, `None` for those of values only.
        value_projections: for each block that receives feedback its value projection.
    """

    value_columns: ValueColumns | None
    value_projections: dict[int, nn.Module]

    @property
    def hidden_size(self) -> int:
        """Number of channels of the hidden states."""
        return input_size(next(iter(self.value_projections.values())))

    def _new_feedback_path(self) -> FeedbackPath:
        return FeedbackPath(self.value_projections[max(self.value_projections)])

    def _new_passes(self, path: FeedbackPath, model: nn.Module) -> TwoPasses:
        return TwoPasses(self, path, model, self.value_columns)


def find_transformer_stacks(model: nn.Module, config: TopDownConfig) -> list[TransformerStack]:
    """Find the blocks and value projections that `config` is about. Touches nothing.

    An encoder-decoder model has two stacks, each with a feedback path of its own. A vision-language model has two as
    well, of which the language model gets feedback unless `target_modules` names those of the vision tower.

    Args:
        model: the model to adapt.
        config: its `target_modules`, `exclude_modules`, `layers_to_transform`, `feedback_from`, `feedback_to` count.

    Returns:
        The stacks, with the value projections of the blocks that receive feedback only.

    Raises:
        ValueError: if the model type is unknown and no value projections are named, if the named modules are not one
            value projection in each block of one stack, or if no block is left.
    """
    _refuse_unsuitable(model, UNSUITABLE_AS_A_WHOLE)
    known = known_backbones(model, ARCHITECTURES)
    found, reasons = architectures_by_structure(model, known)
    if config.target_modules is None:
        stacks = _stacks_by_architecture(model, known | found, reasons)
        for name in found:
            if any(stack.backbone is model.get_submodule(name) for stack in stacks):
                log_found(model, name, found[name])
    else:
        stacks = _stacks_by_target_modules(model, known | found, config)
    for stack in stacks:
        _check_that_it_can_run_twice(model, stack)
    names = [name for stack in stacks for name in stack.names]
    stacks = [_select_blocks(stack, config) for stack in stacks]
    if config.exclude_modules and not any(stack.excluded for stack in stacks):
        raise ValueError(
            f"`exclude_modules={config.exclude_modules!r}` matches none of the value projections, {_some(names)}; "
            "expected names or a regular expression of some of them."
        )
    return stacks


def _stacks_by_architecture(
    model: nn.Module, known: dict[str, Architecture], reasons: dict[str, str]
) -> list[TransformerStack]:
    known, reasons = _wanted(model, known, reasons)
    if not known or (reasons and _is_encoder_decoder(model)):
        for module in model.modules():
            _refuse_unsuitable(module)
        why = (
            "; ".join(reasons.values()) or "no list of blocks has a layer with one of the names that such layers have"
        )
        raise ValueError(
            f"TOAST finds no value projections in {type(model).__name__} (model type {model_type_of(model)!r}): {why}"
            ". If one linear layer in each block computes the values of its attention, and nothing else, name these "
            "layers, for example by target_modules=['v_proj'] or a regular expression."
        )
    if len(known) > 1 and not _is_encoder_decoder(model):
        first = min(known)
        blocks = re.escape(join_names(first, known[first].blocks))
        example = rf"{blocks}\..*{known[first].value_projection.rpartition('.')[2]}"
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks: {sorted(known)}. Choose one with `target_modules`, "
            f"for example target_modules=r'{example}'."
        )
    stacks = []
    for backbone_name, architecture in known.items():
        prefix = join_names(backbone_name, architecture.blocks)
        names = {
            join_names(prefix, str(index), architecture.value_projection): index
            for index, block in enumerate(blocks_at(model, prefix))
            if find_submodule(block, architecture.value_projection) is not None
        }
        stacks.append(_make_stack(model, backbone_name, prefix, architecture, names))
    return stacks


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _wanted(
    model: nn.Module, chosen: dict[str, Architecture], reasons: dict[str, str]
) -> tuple[dict[str, Architecture], dict[str, str]]:
    """Of several stacks those of the language model, which transformers calls the decoder, and of its encoder."""
    getters = ["get_encoder", "get_decoder"] if _is_encoder_decoder(model) else ["get_decoder"]
    parts = [getattr(model, getter)() for getter in getters if hasattr(model, getter)]
    parts = [part for part in parts if isinstance(part, PreTrainedModel) and part is not model]
    if not parts or _has_two_towers(model, parts[-1]):
        return chosen, reasons
    inside = {module for part in parts for module in part.modules()}
    lists = {name: model.get_submodule(join_names(name, row.blocks)) for name, row in chosen.items()}
    stacks = {name: row for name, row in chosen.items() if lists[name] in inside}
    return stacks, {name: why for name, why in reasons.items() if model.get_submodule(name) in inside}


def _has_two_towers(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether text and images meet at the end only, as in CLIP, so that neither is the language model of the other."""
    holders = [module for module in model.modules() if getattr(module, "text_model", None) is decoder]
    return bool(holders) and not (isinstance(model, PreTrainedModel) and model.can_generate())


def _stacks_by_target_modules(
    model: nn.Module, known: dict[str, Architecture], config: TopDownConfig
) -> list[TransformerStack]:
    # The index of a block is taken from its place in the stack, not from a pattern in its name as PEFT does, which
    # needs a name before the list and finds none on a bare ViTModel.
    pattern = replace(config, layers_to_transform=None, exclude_modules=None)
    matched = [name for name, _ in model.named_modules() if name and check_target_module_exists(pattern, name)]
    matched = [name for name in matched if not _inside_another(name, matched)]
    found = {name: _list_of_blocks(model, name) for name in matched}
    lists = {name: blocks for name, blocks in found.items() if blocks is not None}
    outside = [name for name in matched if name not in lists]
    if not matched or outside or (len(set(lists.values())) > 1 and not _is_encoder_decoder(model)):
        raise ValueError(
            f"`target_modules={config.target_modules!r}` matches {_some(matched)} in {type(model).__name__}; expected "
            "the value projections of one stack of blocks (an nn.ModuleList or nn.Sequential)"
            + (f", but {_some(outside)} are in none." if outside else ".")
            + ("" if matched else about_patterns(config.target_modules or ()) + " Without it they are looked for.")
        )
    stacks = []
    for blocks_name in dict.fromkeys(lists.values()):
        names = {
            name: int(name[len(blocks_name) + 1 :].split(".")[0]) for name in matched if lists[name] == blocks_name
        }
        backbone_name, architecture = _backbone_of(blocks_name, known)
        _check_list_of_blocks(model, blocks_name)
        _check_value_projections(names, config, architecture)
        _check_what_they_compute(model, names, config, blocks_name, architecture)
        stacks.append(_make_stack(model, backbone_name, blocks_name, architecture, names))
    return stacks


def _backbone_of(blocks_name: str, known: dict[str, Architecture]) -> tuple[str, Architecture | None]:
    """The name of the module that runs the blocks: what the model type says, or the module that they are in."""
    for backbone_name, architecture in known.items():
        if join_names(backbone_name, architecture.blocks) == blocks_name:
            return backbone_name, architecture
    return blocks_name.rpartition(".")[0], None


def _inside_another(name: str, matched: list[str]) -> bool:
    """Whether the module is a part of another match, as `v_proj.base_layer` of a `v_proj` that LoRA has wrapped."""
    return any(name.startswith(other + ".") for other in matched)


def _list_of_blocks(model: nn.Module, name: str) -> str | None:
    """The name of the outermost list that the module is in, so that lists inside of blocks do not count."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    for kind in (nn.ModuleList, nn.Sequential):
        found = next((parent for parent in parents if isinstance(model.get_submodule(parent), kind)), None)
        if found is not None:
            return found
    return None


def _check_list_of_blocks(model: nn.Module, blocks_name: str) -> None:
    if any(isinstance(block, nn.ModuleList) for block in blocks_at(model, blocks_name)):
        raise ValueError(
            f"TOAST does not support {type(model).__name__}: {blocks_name} is a list of lists, one for each stage; "
            "expected a list of blocks."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "no module"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_value_projections(names: dict[str, int], config: TopDownConfig, architecture: Architecture | None) -> None:
    fused = [name for name in names if name.rpartition(".")[2] in {*FUSED_PROJECTIONS, *LATENT}]
    if fused and not (architecture and architecture.fused):
        raise ValueError(
            f"`target_modules={config.target_modules!r}` matches {_some(fused)}, which compute queries or keys as "
            "well as values. TOAST steers the values only, and does not know where they are in the output of these."
        )
    crossing = [name for name in names if is_cross_attention(name)]
    if crossing:
        raise ValueError(
            f"`target_modules={config.target_modules!r}` matches {_some(crossing)}, which attend to the states of an "
            "encoder; expected the value projections of self-attention."
        )
    for index in sorted(set(names.values())):
        in_block = [name for name, block in names.items() if block == index]
        if len(in_block) > 1:
            raise ValueError(
                f"`target_modules={config.target_modules!r}` matches {len(in_block)} modules in block {index} "
                f"({_some(in_block)}); expected only its value projection, for example target_modules=['v_proj']."
            )


def _check_what_they_compute(
    model: nn.Module, names: dict[str, int], config: TopDownConfig, blocks_name: str, architecture: Architecture | None
) -> None:
    """Refuse what does not compute values, by what is known of the model type or else by its name."""
    for name, index in names.items():
        projection = "" if architecture is None else architecture.value_projection
        known = f"{blocks_name}.{index}.{projection}"
        if projection and find_submodule(model, known) is not None:  # its blocks are those of the model type
            computes_values, expected = name == known, f"{projection!r} of each block"
        else:
            computes_values = name.rpartition(".")[2] not in _NO_VALUE_PROJECTIONS
            expected = "the layer of each block that computes the values of its attention, for example ['v_proj']"
        if not computes_values:
            raise ValueError(
                f"`target_modules={config.target_modules!r}` matches {name}, which does not compute values; expected "
                f"{expected}."
            )


def _refuse_unsuitable(module: nn.Module, reasons: Mapping[str, str] = UNSUITABLE) -> None:
    model_type = model_type_of(module)
    if model_type in reasons:
        raise ValueError(f"TOAST does not support the model type {model_type!r}: {reasons[model_type]}.")


def _check_that_it_can_run_twice(model: nn.Module, stack: TransformerStack) -> None:
    """Refuse models that the two passes would get wrong, as far as that can be seen before they run."""
    names = stack.blocks_name.split(".")
    around = [model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1)]
    _refuse_unsuitable(next((module for module in around if hasattr(module, "config")), model))
    hidden_size = getattr(getattr(stack.backbone, "config", None), "hidden_size", None)
    for index, projection in stack.value_projections.items():
        width = input_size(projection)
        if isinstance(hidden_size, int) and width not in (0, hidden_size):
            raise ValueError(
                f"TOAST does not support {type(model).__name__}: the value projection of block {index} takes {width} "
                f"channels and not the {hidden_size} of the hidden states, so they are not what it projects."
            )


def _make_stack(
    model: nn.Module,
    backbone_name: str,
    blocks_name: str,
    architecture: Architecture | None,
    names: dict[str, int],
) -> TransformerStack:
    backbone = model.get_submodule(backbone_name)
    return TransformerStack(
        backbone=backbone,
        blocks=blocks_at(model, blocks_name),
        blocks_name=blocks_name,
        final_norm=architecture.final_norm if architecture else None,
        normalize_features=architecture is not None and architecture.normalize_features,
        model_type=model_type_of(backbone),
        has_cache=_has_cache(backbone, architecture),
        value_columns=_value_columns(backbone, architecture, model, next(iter(names))),
        value_projections={index: model.get_submodule(name) for name, index in names.items()},
        names=names,
    )


def _has_cache(backbone: nn.Module, architecture: Architecture | None) -> bool:
    return architecture is None or architecture.has_cache or getattr(backbone.config, "is_decoder", False)


def _value_columns(
    backbone: nn.Module, architecture: Architecture | None, model: nn.Module, name: str
) -> ValueColumns | None:
    """Where the values are in a fused projection, whose other columns are queries and keys.

    Raises:
        ValueError: if it has not the size that its heads have together.
    """
    if architecture is None or architecture.fused is None:
        return None
    projection = model.get_submodule(name)
    size = output_size(projection)
    if architecture.fused == "keys and values":
        return ValueColumns(parts=1, columns=size // 2)
    config = getattr(backbone, "config", None)
    query_heads: int = getattr(config, "num_attention_heads", 0) or getattr(config, "num_heads", 0)
    head_size: int = getattr(config, "head_dim", 0) or getattr(config, "hidden_size", 0) // max(query_heads, 1)
    key_value_heads = (size // max(head_size, 1) - query_heads) // 2
    fits = key_value_heads > 0 and (query_heads + 2 * key_value_heads) * head_size == size
    if not fits and architecture.fused == "one after the other" and size == 3 * input_size(projection):
        return ValueColumns(parts=1, columns=size // 3)
    if not fits:
        raise ValueError(
            f"{name} gives {size} channels, which is not what {query_heads} queries with as many or fewer keys and "
            f"values of {head_size} channels each need; name a layer that computes only values with `target_modules`."
        )
    if architecture.fused == "by key-value head":
        return ValueColumns(parts=key_value_heads, columns=head_size)
    return ValueColumns(parts=1, columns=key_value_heads * head_size)


def _select_blocks(stack: TransformerStack, config: TopDownConfig) -> TransformerStack:
    """Keep the value projections of the blocks that receive feedback."""
    first, last = config.feedback_range(len(stack.blocks))
    chosen = config.layers_to_transform
    chosen = [chosen] if isinstance(chosen, int) else chosen
    outside = [index for index in chosen or [] if not last <= index < first]
    if outside:
        raise ValueError(
            f"`layers_to_transform` names the blocks {outside}, but the feedback runs from block {first - 1} down to "
            f"block {last} of {len(stack.blocks)}."
        )
    excluded = {name for name in stack.names if _is_excluded(config, name)}
    names = {
        name: index
        for name, index in stack.names.items()
        if last <= index < first and (chosen is None or index in chosen) and name not in excluded
    }
    if not names:
        raise ValueError(
            f"No block is left to receive feedback: `target_modules={config.target_modules!r}`, "
            f"`exclude_modules={config.exclude_modules!r}`, `layers_to_transform={config.layers_to_transform!r}`, "
            f"blocks {last} to {first - 1}."
        )
    projections = {index: stack.value_projections[index] for index in sorted(names.values())}
    for name, index in names.items():
        if input_size(projections[index]) == 0:
            raise ValueError(f"{name} is a {type(projections[index]).__name__}; expected a linear layer.")
    return replace(stack, names=names, value_projections=projections, excluded=excluded)


def _is_excluded(config: TopDownConfig, name: str) -> bool:
    if not config.exclude_modules:
        return False
    only_excluded = replace(
        config,
        target_modules=config.exclude_modules,
        exclude_modules=None,
        layers_to_transform=None,
        modules_to_save=None,
    )
    return bool(check_target_module_exists(only_excluded, name))
