"""What a forward has let through of its tokens, to be looked at afterwards.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
"""

import threading
from typing import Any

import torch


class Kept:
    """The mask of a forward and the attention mask that it was called with."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.attention_mask: Any = None


class LastMask(threading.local):
    """The mask of the last forward, each thread its own; copies start empty.

    Only references are kept. What is computed of them is computed when somebody asks, so that a forward does not wait
    for the device.
    """

    def __init__(self) -> None:
        # In an object of their own, as in `ThreadState`.
        self.kept = Kept()

    def start(self, attention_mask: Any) -> None:
        """A forward begins. Shape of its attention mask: [b, n], or [b, cached tokens + n]; others are not used."""
        self.kept.mask, self.kept.attention_mask = None, None if _is_exporting() else attention_mask

    def keep(self, mask: torch.Tensor) -> None:
        """Keep the mask of the forward. Shape: [b, n, 1], or of a map of tokens [b, h, w, 1]"""
        if not _is_exporting():
            self.kept.mask = mask.detach()

    def statistics(self) -> dict[str, float]:
        """The share of open tokens and the mean of the mask, without tokens with `attention_mask` 0 where known.

        Returns:
            Empty if there was no forward yet.
        """
        if self.kept.mask is None:
            return {}
        mask = self.kept.mask.squeeze(-1).float()
        counted = torch.ones_like(mask)
        attention_mask = self.kept.attention_mask
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            of_tokens = attention_mask[:, -mask.shape[1] :]  # without cached tokens
            if of_tokens.shape == mask.shape:
                counted = (of_tokens != 0).to(mask)
        num_tokens = counted.sum()
        sums = torch.stack([((mask > 0) * counted).sum(), (mask * counted).sum()])
        open_tokens, mean_mask = (sums / num_tokens).tolist()
        return {"open_tokens": open_tokens, "mean_mask": mean_mask}

    def __deepcopy__(self, memo: dict) -> "LastMask":
        return LastMask()

    def __reduce__(self) -> tuple:
        return LastMask, ()


def _is_exporting() -> bool:
    """Whether torch.export traces, with tensors that hold no numbers."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
