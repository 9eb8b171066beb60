"""Value projections with their weight folded into the feedback: this is then feedback of the values.

    W_v (h + td) + b = W_v h + td_v,    td_v = W_v td + b

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - out: number of channels of the values
"""

from collections.abc import Iterable

import torch

from .replaced_forward import ReplacedForward
from .value_projection import ValueHooks, is_plain, weight_matrix


def foldable(all_hooks: Iterable[ValueHooks]) -> list[ValueHooks]:
    """The hooks of value projections if the weights of all can be folded, else none."""
    chosen = list(all_hooks)
    if not all(is_plain(hooks.module, num_hooks=len(hooks.handles)) for hooks in chosen):
        return []
    # So that the matrices and biases of all blocks can be put together.
    sizes = {(value_weight(hooks).shape, hooks.module.bias is None) for hooks in chosen}
    return chosen if len(sizes) == 1 else []


def value_weight(hooks: ValueHooks) -> torch.Tensor:
    """What the hidden states are multiplied with to give the values. Shape: [d, out]"""
    weight = weight_matrix(hooks.module)
    return (weight if hooks.columns is None else hooks.columns.rows(weight)).T


def value_bias(hooks: ValueHooks, double_bias: bool) -> torch.Tensor | None:
    """What is added to the feedback of the values, beside what the projection adds to its output. Shape: [out]"""
    # A projection of values only is computed with the feedback in place of its bias.
    times = int(double_bias) + int(hooks.columns is None)
    if hooks.module.bias is None or times == 0:
        return None
    bias = hooks.module.get_parameter("bias")
    return times * (bias if hooks.columns is None else hooks.columns.rows(bias))


class FoldedValues(ReplacedForward):
    """Forward of a plain value projection that gets the feedback of its values.

    The hooks stay where they are, and see to it that the projection is not wrapped by another method.
    """

    def __init__(self, hooks: ValueHooks) -> None:
        super().__init__(hooks.module, hooks.state)
        self.hooks = hooks
        hooks.folded = hooks.module

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        run, columns = self.state.current.run, self.hooks.columns
        if run is None or not run.of_values or self.hooks.index not in run.feedback:
            return self.original(hidden_states)
        td = self.hooks.feedback(run, hidden_states)
        if columns is None:  # one matmul, as without feedback
            values = torch.addmm(td.flatten(0, -2), hidden_states.flatten(0, -2), weight_matrix(self.module).t())
            return values.view(td.shape)
        output = self.original(hidden_states)
        columns.add(output, td)
        return output

    def remove(self) -> None:
        super().remove()
        self.hooks.folded = None
