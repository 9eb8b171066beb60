"""Several heads in place of that of a classifier: one for what it knows, and one for each task that is learned."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Heads(nn.Module):
    """Heads in place of one: the logits are those of all classes, one head after the other.

    Args:
        heads: by the names of their sets.

    Attributes:
        set_of_class: the number of the set of each class. Shape: [classes]
    """

    set_of_class: torch.Tensor

    def __init__(self, heads: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.of = nn.ModuleDict(heads)
        sizes = torch.tensor([head.out_features for head in heads.values()])
        self.register_buffer("set_of_class", torch.arange(len(heads)).repeat_interleave(sizes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Shape: [b, d] -> [b, classes]"""
        return torch.cat([head(features) for head in self.of.values()], dim=-1)

    def chosen(self, logits: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """Logits with those of one head only, the others minus infinity. Shapes: [b, classes], [b] -> [b, classes]"""
        return logits.masked_fill(self.set_of_class != sets[:, None], -torch.inf)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of each image under the head of its set."""
        return F.cross_entropy(self.chosen(outputs.logits, self.set_of_class[labels]), labels)


def heads_of(model: nn.Module) -> Heads:
    """The heads of a model, with adapters or without."""
    [heads] = [module for module in model.modules() if isinstance(module, Heads)]
    return heads
