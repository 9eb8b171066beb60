"""The load of an adapter: its weights are checked against the model, and a load that fails is undone."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_feedback import FLOATS, is_in_base_feedback
from .config import TopDownConfig
from .core.gate import Gate
from .core.layers import paths_with
from .core.stack import Stack
from .core.topdown_layer import belongs_to, version_of
from .snapshot import Snapshot

SAVED_PREFIX = "base_model.model."  # before each name in a file that PEFT has saved


class Load:
    """An adapter on its way into a model: from before the injection until PEFT has loaded its weights.

    Args:
        before: the model before the injection.

    Attributes:
        stacks: what the two passes run over, found before the model is changed.
        copied: weights that came from another adapter, by the names of the parameters, until PEFT has chosen the
            dtype of these: copying may have rounded them.
    """

    def __init__(self, before: Snapshot) -> None:
        self.before = before
        self.stacks: Sequence[Stack] = ()
        self.copied: dict[str, torch.Tensor] = {}
        self._waiting: nn.Module | None = None  # the model, while PEFT is still to load weights into it
        self._modules: list[nn.Module] = []
        self._versions: list[tuple[nn.Parameter, int]] = []

    def wait_for_weights(self, model: nn.Module, adapter_name: str) -> None:
        """The adapter is in the model, and PEFT will load its weights."""
        parameters = [p for name, p in model.named_parameters() if belongs_to(adapter_name, name)]
        self._waiting, self._modules = model, list(model.modules())
        self._versions = [(parameter, version_of(parameter)) for parameter in parameters]

    @property
    def is_over(self) -> bool:
        """Whether nothing is to come any more."""
        return self._waiting is None and not self.copied

    def undo(self) -> bool:
        """Take the adapter out again, unless it has been trained or set by other means, or others added, meanwhile.

        Returns:
            Whether it was.
        """
        if self._waiting is None:
            return False
        is_as_added = list(map(id, self._modules)) == list(map(id, self._waiting.modules()))
        is_untouched = is_as_added and all(version_of(parameter) == version for parameter, version in self._versions)
        if is_untouched:
            self.before.restore()
        return is_untouched


def read_weights(config: TopDownConfig) -> dict[str, torch.Tensor] | None:
    """The weights that PEFT will load for a config that was just read, before it changes the model.

    Returns:
        The weights by their names in the file; `None` if it is not known where the config is from, or if it has got
        other options since, for a new adapter.

    Raises:
        ValueError: if they cannot be read or are of another rank than the config. A damaged config may ask for layers
            that do not fit into memory.
    """
    if config.saved_adapter is None or config.pretrained_feedback or not config.saved_adapter.is_of(config):
        return None
    weights = config.saved_adapter.read_weights()
    _check_rank(weights, ".topdown_linear1_A", "r", config.r)
    _check_rank(weights, ".topdown_pass2_A", "pass2_r", config.pass2_r if config.pass2_target_modules else 0)
    return weights


def _check_rank(weights: dict[str, torch.Tensor], factor: str, option: str, rank: int) -> None:
    ranks = {tuple(tensor.shape[:1]) for name, tensor in weights.items() if factor in name}
    if rank > 0 and ranks != {(rank,)}:
        found = sorted(size for rank in ranks for size in rank) or "none"
        raise ValueError(
            f"The config of the TOAST adapter says `{option}={rank}`, but the ranks of the factors in its file are "
            f"{found}; expected the same. One of the two files is damaged or of another adapter."
        )


def by_names_of_parameters(
    model: nn.Module, adapter_name: str, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights as they are in a file, by the names of what they are for; others, and second ones, keep their names."""
    parameters = (name for name, _ in model.named_parameters() if belongs_to(adapter_name, name))
    names = {BaseTuner._remove_adapter_name_from_key(name, adapter_name): name for name in parameters}
    names |= _names_of_other_modules(model, adapter_name)
    names = {SAVED_PREFIX + saved: name for saved, name in names.items()}
    found = {}
    for saved, tensor in weights.items():
        name = names.get(saved, saved.removeprefix(SAVED_PREFIX))
        found[saved if name in found else name] = tensor
    return found


def check_weights(
    model: nn.Module, adapter_name: str, config: TopDownConfig, weights: dict[str, torch.Tensor]
) -> None:
    """Check what PEFT is about to load, which it does not strictly.

    Without this a missing weight would stay random, and a weight with the name of a base parameter would replace it.
    Embeddings may be among the weights: PEFT saves them with an adapter if their size was changed.

    Args:
        model: the model with the adapter.
        adapter_name: its name.
        config: its config, which says what is not in its own file.
        weights: the weights by the names of the parameters; those of a gate may get one that they were saved without.

    Raises:
        ValueError: if weights are missing or are for nothing, have another shape or dtype, or are not finite.
    """
    for prefix, gate in _gates_of(model, adapter_name).items():
        gate.complete(weights, prefix)
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    expected = {name for name in targets if belongs_to(adapter_name, name) and not is_in_base_feedback(config, name)}
    expected |= set(_names_of_other_modules(model, adapter_name).values())
    embeddings = _prefixes_of_embeddings(model)
    # PEFT saves them under other names as well, which it does not load.
    of_embeddings = {name for name in weights.keys() - expected if name.startswith(embeddings)}
    expected |= of_embeddings & targets.keys()
    found = {name: weights[name] for name in weights.keys() - (of_embeddings - targets.keys())}
    shapes = _shapes(found) | _shapes(targets)
    problems = describe_differences({name: shapes.get(name, ()) for name in expected}, _shapes(found))
    for name in sorted(expected & found.keys() & targets.keys()):
        problems += _problems_with_values(name, found[name], targets[name])
    if problems:
        raise ValueError(
            f"The weights of the TOAST adapter {adapter_name!r} do not fit its config and this model: "
            f"{'; '.join(problems)}. Load it into the model it was made for; if it was, save or download it again."
        )


def _gates_of(model: nn.Module, adapter_name: str) -> dict[str, Gate]:
    """The gates of an adapter, by what the names of their parameters begin with."""
    gates = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, Gate)}
    return {prefix: gate for prefix, gate in gates.items() if belongs_to(adapter_name, prefix)}


def note_causality(model: nn.Module, adapter_name: str, config: TopDownConfig) -> None:
    """Put into a config what the gates were loaded with; not everything that loads an adapter calls its modules."""
    paths = [path for _, path in paths_with(model, adapter_name) if adapter_name in path.selection.topdown_gate]
    gates = {path.passes.backbone_forward.blocks_name: path.selection.topdown_gate[adapter_name] for path in paths}
    known = {name: bool(gate.is_causal) for name, gate in gates.items() if gate.is_causal is not None}
    config.gate_is_causal = {**(config.gate_is_causal or {}), **known} or None


def describe_differences(expected: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """What differs between two sets of named shapes, in words; empty if nothing does."""
    problems = []
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{what}: {', '.join(sorted(names))}")
    shapes = [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    return problems + shapes


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _names_of_other_modules(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in a file and in the model of what `modules_to_save` and `trainable_token_indices` train.

    PEFT wants them all in the file. Trained tokens of one adapter it wants from every adapter.
    """
    return {
        f"{name}.{saved}": f"{name}.{loaded}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for saved, loaded in module.adapter_state_dict_load_map(adapter_name).items()
    }


def _prefixes_of_embeddings(model: Any) -> tuple[str, ...]:
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # no model of transformers, or one without token embeddings
        return ()
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is layer for layer in embeddings))


def _problems_with_values(name: str, tensor: torch.Tensor, target: torch.Tensor) -> list[str]:
    dtypes = FLOATS if target.is_floating_point() else (target.dtype,)
    if tensor.dtype not in dtypes or tensor.layout != torch.strided:
        return [f"{name} is a {tensor.layout} tensor of {tensor.dtype}, expected {', '.join(map(str, dtypes))}"]
    # As large as the parameter takes it. Parameters of half precision become float32 ones before they are loaded.
    values = tensor.to(torch.promote_types(target.dtype, torch.float32)) if target.is_floating_point() else tensor
    finite = values.isfinite()
    return [] if finite.all() else [f"{name} has {int((~finite).sum())} of {finite.numel()} values not finite"]
