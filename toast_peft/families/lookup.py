"""Looks around in a model: what it is, and which of its modules are of a model type that is in a table."""

from collections.abc import Collection, Mapping
from typing import Protocol, TypeVar, cast

from torch import nn


class Row(Protocol):
    """A row of a family's table."""

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether a module of this model type has the layers that the row names."""


AnyRow = TypeVar("AnyRow", bound=Row)


def model_type_of(module: nn.Module) -> str:
    """The model type in the config of the module, or else the name of its class."""
    return getattr(getattr(module, "config", None), "model_type", None) or type(module).__name__


def known_backbones(model: nn.Module, table: Mapping[str, AnyRow]) -> dict[str, AnyRow]:
    """Names of the modules that are what a row of the table describes, with the row."""
    backbones = {}
    for name, module in model.named_modules():
        row = table.get(model_type_of(module))
        if row is not None and row.is_in(module):
            backbones[name] = row
    return backbones


def find_submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path, `None` if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def blocks_at(module: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """The list of blocks, or of stages, at a path."""
    return cast(nn.ModuleList, module.get_submodule(path))


def about_patterns(wanted: Collection[str] | str) -> str:
    """A sentence to add where a regular expression has matched nothing, as it may have been meant as a name."""
    if not isinstance(wanted, str):
        return ""
    return f" A string is a regular expression for the whole name; for how names end give a list, [{wanted!r}]."


def join_names(*names: str) -> str:
    """Names of modules inside of each other as one; the outermost may be empty."""
    return ".".join(name for name in names if name)
