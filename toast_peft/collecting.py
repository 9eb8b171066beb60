"""Runs a model over data and collects what hooks see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from .core.dropout import in_evaluation_mode
from .core.layers import FeedbackPath
from .core.run import Current
from .core.stored_pass import STORED_INPUT


class Collector(Protocol):
    """Collects something while a model runs.

    Attributes:
        path: the feedback path of the backbone that it is about.
    """

    path: FeedbackPath

    def hooks(self) -> Iterator[Any]:
        """Set the hooks."""


def collect(model: nn.Module, dataloader: Iterable[dict[str, Any]], collectors: Sequence[Collector]) -> None:
    """Run the model over the batches in evaluation mode, while the hooks are set."""
    device = device_of_inputs(model)
    with ExitStack() as stack:
        stack.enter_context(in_evaluation_mode(model.modules()))
        for hook in (hook for collected in collectors for hook in collected.hooks()):
            stack.enter_context(hook)
        if len(collectors) == 1:  # what a decoder gets depends on the feedback of its encoder
            stack.enter_context(_without_second_pass(collectors[0].path.state.current))
        for batch in dataloader:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"The dataloader gave a {type(batch).__name__}; expected dicts of model inputs. One batch goes "
                    "into a list: [batch]."
                )
            inputs = {name: x for name, x in batch.items() if name != STORED_INPUT}  # what is collected is of pass 1
            model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})


@contextmanager
def _without_second_pass(current: Current) -> Iterator[None]:
    """Inside, forwards end when the features have been there, in about half of the time."""
    current.without_second_pass = True
    try:
        yield
    finally:
        current.without_second_pass = False


def device_of_inputs(model: nn.Module) -> torch.device:
    """Where the inputs of a model have to be."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: its hooks move the inputs
