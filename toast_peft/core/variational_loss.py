"""The variational loss of pre-tuning: the feedback path learns to compute each block's input from its output.

Formula: `sum over the blocks l of the loop of mse(linear1_l(output_l), input_l)`, both of pass 2 and without gradient,
so that only `linear1` learns from it. In a ConvNet the input is that of the stage before the feedback is added to it.

Source: https://arxiv.org/abs/2305.15542, section on pre-tuning; `var_loss` in the official code, times 0.1 there for
ViT, 0.01 for ConvNeXt and (both arguments divided by 10) LLaMA.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..config import TopDownConfig
from .feedback import reconstruction_error
from .layers import FeedbackPath, feedback_paths, hidden_states_of
from .padding import own_tokens
from .topdown_layer import to_device_of

if TYPE_CHECKING:
    from .run import Current


class Reconstruction:
    """The errors of one forward, block by block.

    Args:
        path: has `linear1` of every block.
        adapter_name: whose.
        attention_mask: counts only tokens that are not padding by it; `None` for all.
    """

    def __init__(self, path: FeedbackPath, adapter_name: str, attention_mask: Any) -> None:
        self.path = path
        self.adapter_name = adapter_name
        self.attention_mask = attention_mask
        self.errors: dict[int, torch.Tensor] = {}

    def add(self, index: int, hidden_states: torch.Tensor, output: Any) -> None:
        """Compare the input of a block, computed from its output, with what it was, once. Shape: [b, n, d]"""
        layer = self.path.layer(str(index))
        if index in self.errors:
            return
        hidden_states, output = (to_device_of(layer, x.detach()) for x in (hidden_states, hidden_states_of(output)))
        reconstructed = layer.reconstruct(output, self.adapter_name, tuple(hidden_states.shape[-2:]))
        squares = reconstruction_error(hidden_states, reconstructed)
        own = own_tokens(self.attention_mask, squares.shape[:-1], has_cache=True)
        if own is None:
            self.errors[index] = squares.mean()
        else:
            mask = own.to(squares).unsqueeze(-1)
            self.errors[index] = (squares * mask).sum() / (mask.sum() * squares.shape[-1])

    def loss(self, config: TopDownConfig) -> torch.Tensor | None:
        """The weighted sum over the blocks, `None` if none of them ran. Shape: []"""
        errors = list(self.errors.values())
        return config.variational_weight * total(errors) if errors else None


def total(losses: list[torch.Tensor]) -> torch.Tensor:
    """The sum of one or more losses, on the device of the first. Shape of each: []"""
    first, *others = losses
    return sum((loss.to(first.device) for loss in others), start=first)


def with_variational_loss(output: Any, path: FeedbackPath, model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The output of a model with the variational loss in its loss, if it has one; else it is left to be taken.

    Args:
        output: what the model returns.
        path: has the variational loss that this thread's last forward has left.
        model: the model.
        kwargs: what it was called with.
    """
    is_tuple = isinstance(output, tuple)
    loss = output[0] if is_tuple else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.dim() > 0:  # a tuple without a loss begins with something else
        return output
    added = take_variational_loss(path)
    assert added is not None  # it is the reason for the call
    loss = loss + _share_of_batch(model, kwargs) * added.to(loss.device)
    if is_tuple:
        return (loss, *output[1:])
    output.loss = loss
    return output


def forget_variational_loss(current: "Current") -> None:
    """Forget that of the forward before; warns if it was to be trained on, and nobody has taken it."""
    if current.variational_loss is not None and current.variational_loss.requires_grad:
        warnings.warn(
            "The variational loss of the last forward in training was not used: the model gave no loss for it to be a "
            "part of, as with label smoothing, or its own forward was not called, as by trainers of TRL. Add "
            "`model.variational_loss()` to your loss after each forward, or set `variational_weight=0`.",
            stacklevel=2,
        )
    current.variational_loss = None


def take_variational_loss(path: FeedbackPath) -> torch.Tensor | None:
    """The variational loss of the last forward of this thread, which is then forgotten. Shape: []"""
    current = path.state.current
    loss, current.variational_loss = current.variational_loss, None
    if loss is not None:
        path.passes.last_variational_loss = loss.detach()
    return loss


def last_variational_loss(model: nn.Module) -> torch.Tensor | None:
    """The last variational loss that became a part of a loss, times its weight, without gradient; to be logged.

    Shape: []
    """
    losses = [path.passes.last_variational_loss for _, path in feedback_paths(model)]
    found = [loss for loss in losses if loss is not None]
    return total(found) if found else None


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the loss of a model compares what a token gives with the label of the next one."""
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return shifts and not getattr(model.config, "is_encoder_decoder", False)


def _share_of_batch(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor | float:
    """The share of this forward in a batch that gradient accumulation has split.

    With `num_items_in_batch` the task loss is a sum over the labels divided by their number in the whole batch. The
    variational loss, a mean, is weighted alike; counted as `Trainer` counts labels.
    """
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if num_items is None or labels is None:
        return 1.0
    if predicts_next_token(model):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / num_items
