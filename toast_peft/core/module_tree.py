"""Walks over the modules of a model in the middle of a forward, where `nn.Module.modules` takes too long."""

from collections.abc import Collection

from torch import nn


def modules_inside(root: nn.Module, without: Collection[nn.Module | None] = ()) -> list[nn.Module]:
    """The module and all modules in it, each once, in no order; those in `without` and all in them are left out."""
    found: dict[nn.Module, None] = {}
    pending: list[nn.Module | None] = [root]
    while pending:
        module = pending.pop()
        if module is not None and module not in found and module not in without:
            found[module] = None
            pending.extend(module._modules.values())
    return list(found)


def is_trained(root: nn.Module, without: Collection[nn.Module | None] = ()) -> bool:
    """Whether a parameter in the module wants a gradient, besides those in the modules `without`."""
    for module in modules_inside(root, without):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
    return False
