"""Models that are built once in a process: others are made of what was kept of the first, in a tenth of the time."""

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Kept(NamedTuple):
    """What is kept of a model.

    Args:
        pickled: the model without its tensors.
        tensors: these.
        random: the state of the random numbers after the model was built.
    """

    pickled: bytes
    tensors: list[torch.Tensor]
    random: torch.Tensor


_KEPT: dict[str, Kept | None] = {}
_MOST_MODELS = 200  # at a time
_MOST_NUMBERS = 2_000_000  # of one


def remade(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """The model that `build` makes, always another one; random numbers go on as if it had been built.

    Args:
        build: sets the seed itself.
        name: says all that the model depends on.
    """
    kept = _KEPT.get(name)
    if kept is not None:
        torch.default_generator.set_state(kept.random)
        return _Unpickler(kept).load()
    model = build()
    if name not in _KEPT:
        while len(_KEPT) >= _MOST_MODELS:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[name] = _keep(model)
    return model


def _keep(model: nn.Module) -> Kept | None:
    """`None` if it is large, or cannot be pickled, as with parametrised weights."""
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_NUMBERS:
        return None
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)
    try:
        pickler.dump(model)
    except (AttributeError, RuntimeError, TypeError, pickle.PicklingError):
        return None
    tensors = [tensor.detach().clone() for tensor in pickler.tensors]
    for kept, tensor in zip(tensors, pickler.tensors, strict=True):
        kept.requires_grad = tensor.requires_grad
    return Kept(file.getvalue(), tensors, torch.default_generator.get_state())


class _Pickler(pickle.Pickler):
    """Leaves tensors out: they are pickled by their place in a list."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.tensors: list[torch.Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[int, bool] | None:
        if not isinstance(value, torch.Tensor):
            return None
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise TypeError(f"{type(value)} is kept by no list of plain tensors")
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.places[id(value)], isinstance(value, nn.Parameter)


class _Unpickler(pickle.Unpickler):
    """Puts copies of the tensors in; one that is in several places is one tensor there again."""

    def __init__(self, kept: Kept) -> None:
        super().__init__(io.BytesIO(kept.pickled))
        self.kept = kept
        self.copies: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: tuple[int, bool]) -> torch.Tensor:
        place, is_parameter = pid
        if place not in self.copies:
            tensor = self.kept.tensors[place]
            copy = tensor.detach().clone()
            self.copies[place] = (
                nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy.requires_grad_(tensor.requires_grad)
            )
        return self.copies[place]


def seed(number: int) -> None:
    """As `torch.manual_seed` on a CPU, which without a GPU takes a millisecond to note where it was called."""
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)
