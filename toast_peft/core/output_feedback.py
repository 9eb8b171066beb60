"""Feedback to the output: the last hidden states of pass 2 become `final_norm(h) + W z_L`.

`z_L` are the selected features that the chain starts from, of the same token. In TOAST-Lite `W` is `(alpha / r) B A`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

import math
from typing import ClassVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TopDownConfig
from .feedback import low_rank
from .moving_hooks import MovingHooks
from .run import ThreadState
from .topdown_layer import TopDownLayer, weight_of

TO_OUTPUT = -2  # stands for the output where feedback is kept by the index of the block


class OutputFeedback(TopDownLayer):
    """What is added to the output, `W z_L`; zero at the start.

    Args:
        value_projection: the layer whose device and dtype new parameters take, as those of the feature selection.
    """

    adapter_layer_names = ("topdown_output", "topdown_output_A", "topdown_output_B")
    other_param_names = ("topdown_dropout", "topdown_scaling")
    parts: ClassVar = dict.fromkeys(["output", "output_A", "output_B"], "output")

    def __init__(self, value_projection: nn.Module) -> None:
        super().__init__(value_projection)
        self.topdown_output = nn.ModuleDict()
        self.topdown_output_A = nn.ModuleDict()
        self.topdown_output_B = nn.ModuleDict()
        self.topdown_dropout = nn.ModuleDict()
        self.topdown_scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: TopDownConfig, hidden_size: int) -> None:
        """Create the matrix of an adapter, or its factors."""
        if config.r == 0:
            self.topdown_output[adapter_name] = nn.Linear(hidden_size, hidden_size, bias=False)
        else:
            self.topdown_output_A[adapter_name] = nn.Linear(hidden_size, config.r, bias=False)
            self.topdown_output_B[adapter_name] = nn.Linear(config.r, hidden_size, bias=False)
            self.topdown_scaling[adapter_name] = config.lora_alpha / config.r
            self.topdown_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.reset_parameters(adapter_name)
        self._finish_update(adapter_name, config)

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter has feedback to the output."""
        return adapter_name in self.topdown_output or adapter_name in self.topdown_output_A

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """Start as an exact no-op."""
        if adapter_name in self.topdown_output:
            nn.init.zeros_(weight_of(self.topdown_output[adapter_name]))
        else:
            nn.init.kaiming_uniform_(weight_of(self.topdown_output_A[adapter_name]), a=math.sqrt(5))
            nn.init.zeros_(weight_of(self.topdown_output_B[adapter_name]))

    def forward(self, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What is added to the output. Shape: [b, n, d] -> [b, n, d]"""
        if adapter_name in self.topdown_output:
            return self.topdown_output[adapter_name](z)
        dropout = cast(nn.Dropout, self.topdown_dropout[adapter_name])
        a, b = self.topdown_output_A[adapter_name], self.topdown_output_B[adapter_name]
        return low_rank(dropout(z) if dropout.p > 0 else z, a, b, self.topdown_scaling[adapter_name])


class OutputHook(MovingHooks):
    """Hook on the final norm of a backbone, whose output is that of the backbone.

    Args:
        final_norm: the norm.
        state: has the `run` of this thread, with the feedback.
    """

    def __init__(self, final_norm: nn.Module, state: ThreadState) -> None:
        self.state = state
        super().__init__(final_norm)

    def _hang_on(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(self.add)]

    def add(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """The output in pass 2. Shape: [b, n, d]"""
        run = self.state.current.run
        if run is None or TO_OUTPUT not in run.feedback:
            return None
        td = run.feedback[TO_OUTPUT]
        if td.shape != output.shape:  # they might still be broadcast
            raise ValueError(
                f"The feedback to the output has the shape {list(td.shape)} and the output of the final norm "
                f"{list(output.shape)}; expected the same. Set `feedback_to_output=False` for this model."
            )
        return output + td.to(device=output.device, dtype=output.dtype)
