"""What `fit_gate` collects from forwards: what a gate compares with its direction, and who sees what comes later.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - k: number of tokens of a domain, or of rows if the gate gives one number for a whole row
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from .core.gate import Gate, steps_of
from .core.layers import FeedbackPath

_DISTURBED = 1e-3  # relative to the largest entry: more than rounding, far less than what a token changes


class Domain(NamedTuple):
    """What a gate looks at in the target or in a domain of the reference.

    Args:
        y: what it compares with its direction, before that is normalised. Shape: [k, d]
        rows: which row each of these is of, or which text packed into a row; for a gate that looks at tokens alone
            each of them is one. Shape: [k]
        mean: of the normalised features over all tokens. Shape: [d]
    """

    y: torch.Tensor
    rows: torch.Tensor
    mean: torch.Tensor

    def after(self, prior: torch.Tensor) -> "Domain":
        """The same with sums that start from a prior, normalised, and in double precision. Shape: [d]"""
        return self._replace(y=F.normalize(self.y.double() + prior, dim=-1))

    def largest(self, scores: torch.Tensor) -> torch.Tensor:
        """The largest score of each row. Shape: [k] -> [number of rows]"""
        _, rows = self.rows.unique(return_inverse=True)
        return scores.new_full((int(rows.max()) + 1,), -1.0).scatter_reduce(0, rows, scores, "amax")


class Compared:
    """What a gate compares with its direction, collected from forwards.

    Args:
        path: the feedback path.
        adapter_name: its adapter, which has a gate.
    """

    def __init__(self, path: FeedbackPath, adapter_name: str) -> None:
        self.path = path
        self.gate = cast(Gate, path.selection.topdown_gate[adapter_name])
        self._begin()

    def _begin(self) -> None:
        self.y: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []
        self.total = torch.zeros(())
        self.num_rows = self.num_tokens = 0

    def hooks(self) -> Iterator[Any]:
        """Set the hook."""
        yield self.path.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook: the features, after pass 1."""
        features, _, compared, _ = args
        x, tokens = features if compared is None else compared, kwargs["tokens"]
        y = self.gate.compared(x, tokens)  # without a prior, which a new gate does not have yet
        steps = steps_of(x.flatten(1, -2), None)
        shape = steps.shape[:2]
        own = torch.ones_like(steps[..., 0], dtype=torch.bool) if tokens.own is None else tokens.own.expand(shape)
        is_first = torch.arange(shape[1], device=own.device) == 0 if tokens.starts is None else tokens.starts
        rows = is_first.expand(shape).flatten().cumsum(0).view(shape) - 1 + self.num_rows
        has_tokens = own if y.shape[1] == shape[1] else own.any(1, keepdim=True)
        self.y.append(y[has_tokens].cpu())
        self.rows.append(rows[:, : y.shape[1]][has_tokens].cpu())
        self.total = self.total + steps[own].sum(0).cpu()
        self.num_rows = int(rows.max()) + 1
        self.num_tokens += int(own.sum())

    def take(self, name: str) -> Domain:
        """All of a domain, not normalised yet.

        Raises:
            ValueError: if there is nothing, or something that is not finite.
        """
        if self.num_tokens == 0:
            raise ValueError(f"The {name} gave no tokens; expected at least one batch that has some.")
        y, rows, mean = torch.cat(self.y), torch.cat(self.rows), self.total / self.num_tokens
        self._begin()
        if not (y.isfinite().all() and mean.isfinite().all()):
            raise ValueError(f"The hidden states of the {name} are NaN or infinite; expected finite ones.")
        return Domain(y, rows if self.gate.prior is not None else torch.arange(len(y)), mean)


class Disturbance:
    """Finds out whether tokens see those after them: changes the last one, and looks at the others.

    Args:
        path: the feedback path of the backbone.
    """

    def __init__(self, path: FeedbackPath) -> None:
        self.path = path
        self.last: torch.Tensor | None = None  # which token of each row is changed; [b]
        self.is_before: torch.Tensor | None = None  # which tokens of the same text are before that; [b, n]
        self.features: list[torch.Tensor] = []  # without and with the change; [b, n, d]
        self.is_over = True

    def hooks(self) -> Iterator[Any]:
        """Set the hooks."""
        first_block = self.path.passes.block_forwards[0].module
        yield first_block.register_forward_pre_hook(self.disturb, with_kwargs=True)
        yield self.path.register_forward_pre_hook(self.keep, with_kwargs=True)

    def disturb(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A hook: the other way round, which no norm undoes."""
        if self.is_over or self.last is None:
            return None
        self.is_over = True  # a block may run several times
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[torch.arange(len(x)), self.last] *= -1
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def keep(self, path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook: the features, after pass 1."""
        self.features.append(args[0].float())
        tokens, shape = kwargs["tokens"], args[0].shape[:2]
        own = torch.ones(shape, device=args[0].device) if tokens.own is None else tokens.own.expand(shape)
        positions = torch.arange(shape[1], device=own.device)
        self.last = (positions * own).argmax(1)
        texts = torch.zeros_like(own) if tokens.starts is None else tokens.starts.expand(shape).cumsum(1)
        is_of_last_text = texts == texts.gather(1, self.last.unsqueeze(1))
        self.is_before = (positions < self.last.unsqueeze(1)) & (own != 0) & is_of_last_text

    def was_seen(self) -> bool | None:
        """Whether tokens before the last ones have changed; `None` if there are no such tokens."""
        assert self.is_before is not None
        if not self.is_before.any():
            return None
        plain, disturbed = self.features
        change = (disturbed - plain).abs().amax(-1)[self.is_before]
        return bool((change > _DISTURBED * plain.abs().max()).any())
