"""Another `forward` in the place of a module's own, which can be taken away again."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .run import ThreadState


class ReplacedForward:
    """A module's `forward` on the instance, in front of the one of its class.

    An object instead of a closure, so that a deep copy of the model is bound to the copied modules.
    """

    def __init__(self, module: nn.Module, state: ThreadState) -> None:
        self.module = module
        self.state = state
        # Another library may have replaced the forward of this instance already (accelerate does, for offloading).
        self.previous: Callable | None = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.previous or type(self.module).forward)
        if self.previous is not None:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # Looked up now: FSDP2 changes the class of the module.
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put the previous forward back, also from beneath a later replacement by accelerate."""
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) is self:
                if self.previous is not None:
                    attributes[name] = self.previous
                elif name == "forward":
                    del attributes[name]
                else:
                    attributes[name] = type(self.module).forward.__get__(self.module)
