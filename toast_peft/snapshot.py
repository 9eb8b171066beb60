"""Puts a model back to what it was, when something that changes it has failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

from torch import nn

from .core.layers import feedback_paths


class Snapshot:
    """What the modules of a model are made of at this moment: submodules, parameters, hooks, flags, other attributes.

    No tensor is copied. Injection changes none of a base model; it adds and replaces modules.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = [*model.modules(), *(path.passes for _, path in feedback_paths(model))]
        self.attributes = [(part, dict(vars(part))) for part in parts]
        values = [value for part in parts for value in vars(part).values()]
        # `nn.Module` keeps its parameters, submodules and hooks in such containers, PEFT its adapters and configs.
        self.containers = [(value, copy(value)) for value in values if isinstance(value, (dict, list, set))]
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
