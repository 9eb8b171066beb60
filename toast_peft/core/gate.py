"""The gate: whether an input is what the adapter is for, told by pass 1 before anything is changed.

    y_t = normalise(prior + sum of normalise(x_u) over the tokens u <= t of the row)     "sequence"; over all u in a
                                                                                         model whose tokens see those
                                                                                         after them
    y_t = normalise(x_t)                                                                 "token"
    g_t = clamp((cos(y_t, direction) - threshold) / width, 0, 1)

The prior is what some tokens of the reference would add. So a row is taken for one of the reference until it has shown
enough of something else, and a few odd tokens at its beginning open nothing.

The gate multiplies the mask, `(g * m * x) @ transform`, and so all that the adapter does. Where it is zero, so is the
feedback, and pass 2 computes what pass 1 has computed. `toast_peft.fit_gate` finds prior, direction, threshold and
width in closed form; they are not trained, and gradients are those of a constant factor.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .active_adapters import Rows
from .padding import own_tokens

if TYPE_CHECKING:
    from .running_sum import RunningSum

_CAUSAL = {None: -1.0, False: 0.0, True: 1.0}  # `is_causal` as a number


class Tokens(NamedTuple):
    """What a sequence gate has to know of the tokens of a forward, besides their features.

    Args:
        own: which are not padding, `None` if all. Shape: [b, n]
        starts: in a row of several texts, which tokens are the first of one; `None` for one text. Shape: [b, n]
        sums: the sum of the features up to each of them, those in the key-value cache included; `None` if there is no
            cache. Shape: [b, n, d]
    """

    own: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    sums: torch.Tensor | None = None

    def of_rows(self, rows: Rows) -> "Tokens":
        """Those of some rows of the batch."""
        return Tokens(*(None if x is None else rows.of(x) for x in self))


def sequence_features(x: torch.Tensor, tokens: Tokens, is_causal: bool) -> torch.Tensor:
    """The sum of the normalised features of a row, up to each token or of all.

    Args:
        x: features of pass 1. Shape: [b, n, d]
        tokens: what else is known of the tokens.
        is_causal: whether a token sees only those before it.

    Returns:
        Shape: [b, n, d], or [b, 1, d] if each token sees all
    """
    if tokens.sums is not None:
        return tokens.sums if is_causal else tokens.sums[:, -1:]
    steps = steps_of(x, tokens.own)
    if not is_causal:
        return steps.sum(1, keepdim=True)
    sums = steps.cumsum(1)
    return sums if tokens.starts is None else sums - _before_the_text(sums, tokens.starts)


def steps_of(x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """What each token adds to the sum, nothing if it is padding. Shapes: [b, n, d], [b, n] -> [b, n, d]"""
    steps = F.normalize(precise(x.detach()), dim=-1)
    return steps if own is None else steps * own.unsqueeze(-1)


def _before_the_text(sums: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The sum before the text that a token belongs to. Shapes: [b, n, d], [b, n] -> [b, n, d]"""
    positions = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, positions, 0).cummax(dim=1).values  # of its text
    return F.pad(sums, (0, 0, 1, 0)).gather(1, first.unsqueeze(-1).expand_as(sums))


class Gate(nn.Module):
    """How far the gate is open for each token, from 0 to 1. Before it is fitted it is open everywhere.

    Args:
        hidden_size: d.
        is_running: whether it looks at a row up to a token, and not at the token alone.
        is_causal: whether tokens of the model see only those before them; else it looks at the whole row. `None` as
            long as nobody knows, which makes no difference to a gate that is open everywhere.

    Attributes:
        direction: what tells the target from the reference. Shape: [d]
        threshold: the cosine up to which it is closed. Shape: [1], as what is sharded cannot be a scalar
        width: how much further it takes to be fully open. Shape: [1]
        prior: what the sum over a row starts from; `None` if it looks at tokens alone. Shape: [d]
        causal: `is_causal` as a number, to be saved and loaded with the others; a forward does not read it, as it
            would have to wait for the device. `None` if it looks at tokens alone. Shape: [1]
    """

    def __init__(self, hidden_size: int, is_running: bool, is_causal: bool | None = None) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.direction = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.threshold = nn.Parameter(torch.empty(1), requires_grad=False)
        self.width = nn.Parameter(torch.empty(1), requires_grad=False)
        self.prior = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if is_running else None
        self.causal = nn.Parameter(torch.empty(1), requires_grad=False) if is_running else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Open it for all."""
        for parameter in self.parameters():
            parameter.zero_()
        self.threshold.fill_(-1.0)
        self.width.fill_(1.0)
        self.set_causal(self.is_causal)

    @torch.no_grad()
    def set_causal(self, is_causal: bool | None) -> None:
        """Set whether tokens see only those before them, for forwards and for the file."""
        self.is_causal = is_causal
        if self.causal is not None:
            self.causal.fill_(_CAUSAL[is_causal])

    def complete(self, weights: dict[str, torch.Tensor], prefix: str) -> None:
        """Put `causal` among its weights if they were saved without it: what the config of their adapter says.

        Args:
            weights: weights of a model or of an adapter, which get one more.
            prefix: what the names of those of this gate begin with.

        Raises:
            ValueError: if it is not known, as the config is that of an adapter which had no fitted gate before.
        """
        direction = weights.get(f"{prefix}direction")
        if self.causal is None or direction is None or f"{prefix}causal" in weights:
            return
        if self.is_causal is None and direction.any():
            raise ValueError(
                f"The weights of the fitted gate of a TOAST adapter were saved without {prefix}causal; expected it, "
                "as it is not known here whether tokens see later ones. Load the adapter into the base model, by "
                "`PeftModel.from_pretrained`, which reads that from its config, and save it again."
            )
        weights[f"{prefix}causal"] = torch.tensor([_CAUSAL[self.is_causal]])

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        self.complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        causal = state_dict.get(f"{prefix}causal")
        # A shard may be empty; a gate is what it was when its model was sharded.
        if causal is not None and causal.numel() == 1 and not causal.is_meta and not isinstance(causal, DTensor):
            self.is_causal = None if causal < 0 else bool(causal > 0.5)

    def compared(self, features: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What is compared with the direction, `y` before it is normalised, in float32 at least.

        Args:
            features: features of pass 1. Shape: [b, n, d]; of a map of tokens [b, h, w, d]
            tokens: what else is known of the tokens.

        Returns:
            Shape: [b, n, d], or [b, 1, d] for a whole row

        Raises:
            NotImplementedError: if the tokens have no batch dimension.
        """
        if features.dim() < 3:
            raise NotImplementedError(
                f"The features of pass 1 have the shape {list(features.shape)}, all rows in one sequence, as in the "
                "vision towers of Qwen-VL; a gate expected [batch, tokens, channels]. Set `gate=None` for this model."
            )
        x = precise(features.detach().flatten(1, -2))
        if self.prior is None:
            return x
        return sequence_features(x, tokens, bool(self.is_causal)) + self.prior.to(x.dtype)

    @torch.no_grad()
    def forward(self, features: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """How far it is open.

        Args:
            features: features of pass 1. Shape: [b, n, d]; of a map of tokens [b, h, w, d]
            tokens: what else is known of the tokens.

        Returns:
            Weights in [0, 1], 0 at padding. Shape: [b, n, 1]; of a map [b, h, w, 1]
        """
        y = self.compared(features, tokens)
        cosine = cosines(y, self.direction.to(y.dtype))
        opened = ((cosine - self.threshold) / self.width).clamp(0, 1)
        opened = opened.expand(-1, features[0, ..., 0].numel())
        if tokens.own is not None:
            opened = opened * tokens.own
        return opened.reshape(*features.shape[:-1], 1).to(features.dtype)


def precise(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosines(y: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`cos(y, direction)`. Shapes: [b, n, d], [d] -> [b, n]"""
    # Not a matmul, which autocast would run in low precision.
    return (F.normalize(y, dim=-1) * F.normalize(direction, dim=-1)).sum(-1)


def tokens_for(
    gate: str, kwargs: Mapping[str, Any], features: torch.Tensor, before: "RunningSum | None" = None
) -> Tokens:
    """What a gate has to know of the tokens of a forward besides their features.

    Args:
        gate: "sequence" or "token".
        kwargs: the arguments of the backbone.
        features: Shape: [b, n, d], of a map [b, h, w, d]
        before: the sum over the tokens in the key-value cache, to which these are added; `None` if there is no cache.

    Raises:
        ValueError: if there is a mask from which padding cannot be told.
    """
    mask, shape = kwargs.get("attention_mask"), features.shape[:-1]
    if gate == "token":
        return Tokens(own_tokens(mask, shape, has_cache=True))
    if before is not None:
        own = own_tokens(mask, shape, has_cache=True, num_cached=before.length)
        return Tokens(own, sums=before.extend(steps_of(features, own)))
    own = own_tokens(mask, shape)
    positions = kwargs.get("position_ids")
    # As transformers tells several texts in a row, which it does where there are neither masks nor caches.
    if own is None and isinstance(positions, torch.Tensor) and positions.dim() == 2:
        return Tokens(starts=first_of_texts(positions))
    return Tokens(own)


def first_of_texts(positions: torch.Tensor) -> torch.Tensor:
    """Which tokens of a row begin a text: those whose position is not the next one. Shape: [b, n]"""
    return F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
