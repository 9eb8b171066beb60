"""Walks over the modules of a model in the middle of a forward, where `nn.Module.modules` takes too long."""

from collections.abc import Collection

import torch
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


def device_of(root: nn.Module) -> torch.device:
    """Where the parameters of a module are, which has some."""
    pending: list[nn.Module | None] = [root]
    while True:
        module = pending.pop()
        if module is not None:
            for parameter in module._parameters.values():
                if parameter is not None:
                    return parameter.device
            pending.extend(module._modules.values())


def to_device_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of any shape, where the module is. Blocks, and with them feedback layers, may be on several devices.

    Raises:
        RuntimeError: if the module has no weights, as after a failed load with `low_cpu_mem_usage`.
    """
    device = device_of(module)
    if device.type != "meta":
        return tensor.to(device)
    is_offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())  # its own hook will fetch the weights
    if tensor.device.type != "meta" and not is_offloaded:
        raise RuntimeError(
            "The TOAST adapter has no weights: it was made with `low_cpu_mem_usage=True` and none were loaded, or "
            "loading them has failed. Load it again, or take it away with `delete_adapter`."
        )
    return tensor


def is_trained(root: nn.Module, without: Collection[nn.Module | None] = ()) -> bool:
    """Whether a parameter in the module wants a gradient, besides those in the modules `without`."""
    for module in modules_inside(root, without):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
    return False
