"""Adds the feedback to the input of a block's value projection, which may compute queries and keys as well."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from .feedback import steer
from .moving_hooks import MovingHooks
from .run import Run, ThreadState


class ValueColumns(NamedTuple):
    """Where the values are in the output of a fused projection: at the end of each of some equal parts.

    Args:
        parts: 1 for queries, keys and values one after the other; the number of key-value heads if interleaved.
        columns: number of values in each part.
    """

    parts: int
    columns: int

    def replace(self, output: torch.Tensor, steered: torch.Tensor) -> torch.Tensor:
        """The queries and keys of `output` with the values of `steered`. Shape of each: [b, n, all columns]"""
        of_input, of_steered = (tensor.unflatten(-1, (self.parts, -1)) for tensor in (output, steered))
        columns = [of_input[..., : -self.columns], of_steered[..., -self.columns :]]
        return torch.cat(columns, dim=-1).flatten(-2)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows that compute the values. Shape: [all columns, ...] -> [parts * columns, ...]"""
        return weight.unflatten(0, (self.parts, -1))[:, -self.columns :].flatten(0, 1)

    def add(self, output: torch.Tensor, change: torch.Tensor) -> None:
        """Add to the values in `output`, in place. Shapes: [b, n, all columns], [b, n, parts * columns]"""
        values = output.unflatten(-1, (self.parts, -1))[..., -self.columns :]
        values.add_(change.unflatten(-1, (self.parts, -1)))


class ValueHooks(MovingHooks):
    """Hooks on a value projection: `v = W (h + td) + b`.

    Whoever looks at the input of a projection of values only with a hook of their own sees `h + td`. To the output of
    a fused projection `W_v td` is added, where it is a plain linear layer. Where its weight may be quantised, sharded,
    offloaded or wrapped by another method, it runs once more, on `h + td`, and the values are taken of that.

    Args:
        value_projection: the layer.
        state: has the `run` of this thread, with the feedback of each block.
        index: the block.
        columns: which of its outputs are values; `None` if all are.
        arrange: brings the feedback into the shape of the projection's input, where that is another one.

    Attributes:
        module: what the hooks are on now.
        folded: the layer that adds the feedback of its values itself, as its weight is folded into fused feedback.
    """

    def __init__(
        self,
        value_projection: nn.Module,
        state: ThreadState,
        index: int,
        columns: ValueColumns | None = None,
        arrange: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.state = state
        self.index = index
        self.arrange = arrange
        self.columns = columns
        self.folded: nn.Module | None = None
        super().__init__(value_projection)

    def _hang_on(self, module: nn.Module) -> list[RemovableHandle]:
        if self.columns is not None:
            # First, as it computes the values anew, which LoRA of pass 2 adds to.
            return [module.register_forward_hook(self.replace_values, prepend=True)]
        return [
            module.register_forward_pre_hook(self.add_feedback),
            module.register_forward_hook(self.add_bias_again),
        ]

    def add_feedback(self, module: nn.Module, args: tuple) -> tuple | None:
        """The projection's arguments with the feedback added to the first one."""
        run = self._run_with_feedback()
        if run is None:
            return None
        hidden_states, *others = args
        return (self._steered(run, hidden_states), *others)

    def replace_values(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """The output of a fused projection with the values of `h + td`. Shape: [b, n, all columns]"""
        run = self._run_with_feedback()
        if run is None or self.columns is None:
            return None
        hidden_states, *others = args
        if is_plain(module, num_hooks=1):
            self._add_to_values(run, module, hidden_states, output)
            return None
        steered = self._without_feedback(module, self._steered(run, hidden_states), *others)
        if run.double_bias:
            steered = steered + self._bias(module, hidden_states)
        return self.columns.replace(output, steered)

    def _add_to_values(self, run: Run, module: nn.Module, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """`v = W_v h + b_v + W_v td`. Shapes: [b, n, d], [b, n, all columns]"""
        assert self.columns is not None
        bias = self.columns.rows(module.get_parameter("bias")) if run.double_bias and module.bias is not None else None
        weight = self.columns.rows(weight_matrix(module))
        self.columns.add(output, F.linear(self.feedback(run, hidden_states), weight, bias))

    def add_bias_again(self, module: nn.Module, args: tuple, value: torch.Tensor) -> torch.Tensor | None:
        """Official ViT: `v = W h + b + W td + b`. Shape: [b, n, d]"""
        run = self._run_with_feedback()
        return value + self._bias(module, args[0]) if run is not None and run.double_bias else None

    def _run_with_feedback(self) -> Run | None:
        """The running forward, if it has feedback for this block."""
        run = self.state.current.run
        if run is None or self.index not in run.feedback:
            return None
        if not run.of_values:
            return run
        if self.module is not self.folded:
            raise RuntimeError(
                f"The value projection of block {self.index} is another layer, a {type(self.module).__name__}, than "
                "when `fuse_feedback()` folded its weight into the feedback. Call `unfuse_feedback()`, and then "
                "`fuse_feedback()` again."
            )
        return None

    def _steered(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        return steer(hidden_states, self.feedback(run, hidden_states))

    def feedback(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is added to the hidden states or the values, for as many tokens, which is checked. Shape: [b, n, d]"""
        if self.index not in run.steered:
            run.steered.append(self.index)
        td = run.feedback[self.index]
        td = td if self.arrange is None else self.arrange(td, hidden_states)
        expected = hidden_states.shape if not run.of_values else (*hidden_states.shape[:-1], td.shape[-1])
        if td.shape != expected:  # they might still be broadcast
            raise ValueError(
                f"The feedback of block {self.index} has the shape {list(td.shape)} and the input of its value "
                f"projection {list(hidden_states.shape)}; expected the same, as TOAST supports only attention that "
                "takes its values from the hidden states of the block, token by token."
            )
        return td.to(device=hidden_states.device, dtype=hidden_states.dtype)

    def _bias(self, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._without_feedback(module, torch.zeros_like(hidden_states[..., :1, :]))

    def _without_feedback(self, module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        run, self.state.current.run = self.state.current.run, None
        try:
            return module(*args)
        finally:
            self.state.current.run = run


def is_plain(module: nn.Module, num_hooks: int) -> bool:
    """Whether a module is a linear layer and nothing more, so that its weight alone says what it computes.

    Args:
        module: the module.
        num_hooks: how many of our own hooks it has.
    """
    is_linear = type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"
    if not is_linear or type(module.weight) is not nn.Parameter:  # quantised, sharded
        return False
    # Of accelerate, which fetches an offloaded weight, and whatever hangs on it besides our own hook.
    is_changed = "forward" in module.__dict__ or "_hf_hook" in module.__dict__
    return not is_changed and len(module._forward_hooks) + len(module._forward_pre_hooks) == num_hooks


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a plain linear layer. Shape: [out, in]"""
    weight = cast(nn.Parameter, module.weight)
    return weight.t() if isinstance(module, Conv1D) else weight  # GPT-2 stores it the other way round


def input_size(value_projection: nn.Module) -> int:
    """Number of channels a linear layer takes, 0 if the module is no linear layer.

    Not read from its weight: quantised weights are packed and those of sharded models are empty.
    """
    # `nx` is that of GPT-2's Conv1D, which is a linear layer.
    return getattr(value_projection, "in_features", getattr(value_projection, "nx", 0))


def output_size(value_projection: nn.Module) -> int:
    """Number of channels a linear layer gives."""
    return getattr(value_projection, "out_features", getattr(value_projection, "nf", 0))
