"""Which tokens are padding, told from the attention mask of a backbone, in whichever form it gets it.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - m: number of tokens that these may see, of which those in a key-value cache come before these
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# What is added to the attention to a token that is not to be seen is at most this: older models add -10000.
_HIDDEN = -5000.0


def own_tokens(
    mask: Any, shape: Sequence[int], has_cache: bool = False, num_cached: int | torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which tokens are not padding.

    Args:
        mask: an attention mask, or one for each kind of attention. Shape: [b, m]; or [b, heads, n, m], added to the
            attention or boolean, where heads, b and n may be 1
        shape: of the tokens: b and n, or b, h and w of a map.
        has_cache: whether tokens in a key-value cache may be before these.
        num_cached: how many are; `None` if that is to be told from the mask.

    Returns:
        Shape: [b, n]; `None` if there is no mask

    Raises:
        ValueError: if it is a mask of other tokens or of another kind.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    num_rows, num_tokens = shape[0], torch.Size(shape[1:]).numel()
    _check(mask, num_rows, num_tokens, has_cache)
    if mask.shape == (num_rows, num_tokens):
        return mask != 0
    seen = _seen(mask)
    columns = torch.arange(num_tokens, device=mask.device)
    if has_cache:
        columns = columns + (_num_cached(seen, num_tokens) if num_cached is None else num_cached)
    # A token that is not padding sees itself.
    of_tokens = seen.expand(num_rows, num_tokens, -1)
    return of_tokens.gather(2, columns.expand(num_rows, -1).unsqueeze(-1)).squeeze(-1)


def _check(mask: Any, num_rows: int, num_tokens: int, has_cache: bool) -> None:
    """Raise a ValueError if a mask has no entry for each of the tokens."""
    found = f"is of the type {type(mask).__name__}"
    if isinstance(mask, torch.Tensor):
        found = f"has the shape {list(mask.shape)}"
        is_for_rows = mask.dim() in (2, 4) and mask.shape[0] in (1, num_rows)
        is_for_tokens = mask.dim() != 4 or mask.shape[2] in (1, num_tokens)
        if is_for_rows and is_for_tokens:
            num_more = mask.shape[-1] - num_tokens
            if num_more == 0 or (num_more > 0 and (has_cache or mask.dim() == 4)):
                return
    raise ValueError(
        f"`attention_mask` {found}, and the features of pass 1 are of {num_rows} rows of {num_tokens} tokens; the "
        "TOAST adapter expected [rows, tokens], to leave out padding. Give such a mask, or none."
    )


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Which tokens are seen by each. Shape: [b, n, m], or [b, 1, m] for all alike"""
    if mask.dim() == 2:
        return (mask != 0).unsqueeze(1)
    mask = mask[:, 0]
    return mask > _HIDDEN if mask.is_floating_point() else mask != 0


def _num_cached(seen: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """How many tokens are before these: the last one sees itself, and nothing of what a static cache has room for.

    Shape: [b, n, m] -> []
    """
    columns = torch.arange(seen.shape[-1], device=seen.device)
    last = (seen[:, -1].any(0) * columns).amax()
    return (last + 1 - num_tokens).clamp(min=0)
