"""Another method in the place of a module's own, in most cases its `forward`, which can be taken away again."""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, ClassVar

from torch import nn

from .run import ThreadState


class ReplacedForward:
    """A module's `forward` on the instance, in front of the one of its class.

    An object instead of a closure, so that a deep copy of the model is bound to the copied modules.

    Attributes:
        method: the name of the method.
    """

    method: ClassVar[str] = "forward"

    def __init__(self, module: nn.Module, state: ThreadState) -> None:
        self.module = module
        self.state = state
        # Another library may have replaced the forward of this instance already (accelerate does, for offloading).
        self.previous: Callable | None = module.__dict__.get(self.method)
        module.__dict__[self.method] = self

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.previous or getattr(type(self.module), self.method))
        if self.previous is not None:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """Where the method is written, which torch.export asks for."""
        code: CodeType = inspect.unwrap(self.previous or getattr(type(self.module), self.method)).__code__
        return code

    def signature_with(self, name: str) -> inspect.Signature:
        """The signature with one more argument, as transformers' Trainer drops the inputs that are not in it."""
        signature = ReplacedForward.__signature__.__get__(self)
        parameters = list(signature.parameters.values())
        index = next((i for i, p in enumerate(parameters) if p.kind == p.VAR_KEYWORD), len(parameters))
        added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        return signature.replace(parameters=[*parameters[:index], added, *parameters[index:]])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # Looked up now: FSDP2 changes the class of the module.
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put the previous forward back, also from beneath a later replacement by accelerate."""
        attributes = self.module.__dict__
        for name in (self.method, "_old_forward"):
            if attributes.get(name) is self:
                if self.previous is not None:
                    attributes[name] = self.previous
                elif name == self.method:
                    del attributes[name]
                else:
                    attributes[name] = type(self.module).forward.__get__(self.module)
