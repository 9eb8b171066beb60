"""Initialises feedback from data, in place of a random prompt and, in closed form, of pre-tuning.

A random prompt is nearly orthogonal to every token, so the mask is near zero and little feedback gets through. The
mean of the normalised features is similar to most tokens. And what the variational loss teaches `linear1` over many
steps, to compute the blocks' inputs on the way down, is for a linear chain a least-squares problem.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from .convolutional_feedback import ConvolutionalFeedbackPath
from .feedback import FeedbackPath
from .model import feedback_paths


class Statistics:
    """Sums over tokens, collected from forwards while hooks on a feedback path and its value projections are set.

    Args:
        path: the feedback path.
        adapter_name: the adapter to initialise; it must be active.
    """

    def __init__(self, path: FeedbackPath, adapter_name: str) -> None:
        self.path = path
        self.blocks = path.blocks_of(adapter_name) if type(path) is FeedbackPath else []
        self.mean_feature: torch.Tensor | float = 0.0  # [d], not divided by the number of tokens
        self.gram: torch.Tensor | float = 0.0  # features' x features, [d, d]
        self.products: dict[int, torch.Tensor | float] = dict.fromkeys(self.blocks, 0.0)  # features' x inputs, [d, d]
        self.inputs: dict[int, torch.Tensor] = {}
        self.attention_mask: torch.Tensor | None = None

    def start_batch(self, attention_mask: torch.Tensor | None) -> None:
        """Forget the forward before. Shape of the mask: [b, n]"""
        self.inputs = {}
        self.attention_mask = attention_mask

    def keep_input(self, index: int, value_projection: nn.Module, args: tuple) -> None:
        """A hook: the input of a value projection in pass 1, which comes first."""
        self.inputs.setdefault(index, args[0])

    def add(self, path: FeedbackPath, args: tuple) -> None:
        """A hook: the features, after pass 1."""
        compared = args[2] if isinstance(path, ConvolutionalFeedbackPath) else args[0]
        self.mean_feature = self.mean_feature + F.normalize(self._tokens(compared), dim=-1).sum(0)
        if self.blocks:
            features = self._tokens(args[0])
            self.gram = self.gram + features.T @ features
            for index, hidden_states in self.inputs.items():
                self.products[index] = self.products[index] + features.T @ self._tokens(hidden_states)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens but padding. Shape: [b, ..., d] -> [tokens, d]"""
        mask = self.attention_mask
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(x.device) != 0]
        return x.reshape(-1, x.shape[-1]).double()


@torch.no_grad()
def initialize_feedback(
    model: PeftModel | nn.Module,
    dataloader: Iterable[dict[str, Any]],
    adapter_name: str = "default",
    ridge: float = 1e-3,
) -> None:
    """Initialise the feedback of an adapter from some batches of data, as PEFT's EVA does for LoRA.

    The prompt becomes the mean of the normalised features. Each `linear1` becomes the least-squares solution, with a
    ridge, by which the chain computes from the features the input of the block's value projection: the variational
    loss in closed form, with that projection's normed input for the block's. `linear2` stays: after
    `init_weights=True` it is zero and the adapter still an exact no-op.

    Of TOAST-Lite, ConvNets and hierarchical transformers only the prompt is set.

    Args:
        model: has the adapter, which must be active.
        dataloader: gives inputs of the model; labels are ignored, tokens with `attention_mask` 0 left out.
        adapter_name: the adapter.
        ridge: added to the diagonal of the Gram matrix, relative to its mean.

    Raises:
        ValueError: if the model has no such active adapter, or the dataloader gives nothing.

    Example:

    ```py
    >>> model = get_peft_model(base, TopDownConfig(modules_to_save=["classifier"]))
    >>> toast_peft.initialize_feedback(model, DataLoader(train_set.select(range(512)), batch_size=32))
    ```
    """
    paths = [path for _, path in feedback_paths(model)]
    if not paths or any(path.active_adapter != adapter_name for path in paths):
        active = sorted({str(path.active_adapter) for path in paths}) or "none"
        raise ValueError(f"`adapter_name` is {adapter_name!r}; expected the active TOAST adapter, which is {active}.")
    statistics = [Statistics(path, adapter_name) for path in paths]
    _collect(model, dataloader, statistics)
    if any(isinstance(s.mean_feature, float) for s in statistics):
        raise ValueError(f"The dataloader {dataloader!r} gave no batch; expected at least one.")
    for collected in statistics:
        _set_prompt(collected, adapter_name)
        _set_chain(collected, adapter_name, ridge)


def _collect(model: nn.Module, dataloader: Iterable[dict[str, Any]], statistics: list[Statistics]) -> None:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with ExitStack() as hooks:
            for collected in statistics:
                hooks.enter_context(collected.path.register_forward_pre_hook(collected.add))
                for index in collected.blocks:
                    value_projection = collected.path.layers[str(index)].value_projection
                    keep = partial(collected.keep_input, index)
                    hooks.enter_context(value_projection.register_forward_pre_hook(keep, prepend=True))
            for batch in dataloader:
                inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
                inputs.pop("labels", None)
                for collected in statistics:
                    collected.start_batch(inputs.get("attention_mask"))
                model(**inputs)
    finally:
        model.train(training)


def _set_prompt(collected: Statistics, adapter_name: str) -> None:
    prompt = collected.path.selection.topdown_prompt[adapter_name].weight
    prompt.copy_(F.normalize(collected.mean_feature, dim=0))


def _set_chain(collected: Statistics, adapter_name: str, ridge: float) -> None:
    """Solve `z_{l+1} linear1_l' = input_l` from the top down; with `z_l = x P_l`, of `x` only sums are needed."""
    if not collected.blocks or adapter_name in collected.path.layers[str(collected.blocks[0])].topdown_scaling:
        return  # Lite: not a chain of matrices that are trained in full
    identity = product = torch.eye(len(collected.gram), dtype=collected.gram.dtype, device=collected.gram.device)
    for index in collected.blocks:
        gram = product.T @ collected.gram @ product
        regular = gram + ridge * gram.diagonal().mean() * identity
        solution = torch.linalg.solve(regular, product.T @ collected.products[index])
        collected.path.layers[str(index)].topdown_linear1[adapter_name].weight.copy_(solution.T)
        product = product @ solution
