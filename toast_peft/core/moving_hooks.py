"""Hooks on a module that stay in its place when another method wraps it."""

from abc import ABC, abstractmethod

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle


class MovingHooks(ABC):
    """Hooks on a module, or on what comes into its place.

    Args:
        module: the module.

    Attributes:
        module: what the hooks are on now.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.handles = self._hang_on(module)

    @abstractmethod
    def _hang_on(self, module: nn.Module) -> list[RemovableHandle]: ...

    def move_to(self, module: nn.Module) -> None:
        """Take the hooks to the module that comes into the place of the other one."""
        self.remove()
        self.module = module
        self.handles = self._hang_on(module)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _stay_in_place(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Move the hooks of a module to what is put in its place: a wrapper of LoRA, or what it has wrapped.

    On the wrapped layer they would give the feedback to the layer alone and not to what LoRA adds to it.
    """
    replaced = parent._modules.get(name)
    if replaced is None or module is None or replaced is module:
        return
    for hook in list(replaced._forward_hooks.values()):
        hooks = getattr(hook, "__self__", None)
        if isinstance(hooks, MovingHooks):
            hooks.move_to(module)


# torch calls it whenever a module becomes a child of another one. So nothing need be looked for at each forward, and a
# model that is compiled right after LoRA has been put on it is traced with the hooks where they belong.
register_module_module_registration_hook(_stay_in_place)
