"""Puts a model back to what it was, when something that changes it has failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .core.layers import FeedbackPath

_KINDS = (dict, list, set)


class Snapshot:
    """What the modules of a model are made of at this moment: submodules, parameters, hooks, flags, other attributes.

    No tensor is copied. Injection changes none of a base model; it adds and replaces modules.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        passes = [part.passes for part in modules if isinstance(part, FeedbackPath)]
        self.attributes = [(part, dict(vars(part))) for part in (*modules, *passes)]
        values = [value for _, attributes in self.attributes for value in attributes.values()]
        # `nn.Module` keeps its parameters, submodules and hooks in such containers, PEFT its adapters and configs. A
        # module has ten of them, and `copy.copy` takes several times as long.
        self.containers = [(value, kind(value)) for value in values for kind in _KINDS if isinstance(value, kind)]
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back, in place: a hook's handle holds on to the dict that the hook is in."""
        for part, attributes in self.attributes:
            vars(part).clear()
            vars(part).update(attributes)
        for container, content in self.containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self.requires_grad:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad


@contextmanager
def restored_on_failure(snapshot: Snapshot) -> Iterator[None]:
    """Whatever fails inside, a keyboard interrupt as well, leaves the model as the snapshot has it."""
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
