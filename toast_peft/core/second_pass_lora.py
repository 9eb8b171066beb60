"""LoRA in pass 2 only: what the linear layers of the blocks add there, under the gate of the adapter.

    pass 1:  y = W x + c
    pass 2:  y = W x + c + g ((alpha / r) B A x + b)          all times the strength of the adapter (`strength.py`)

Pass 1 stays the base model, so that the features and the gate `g` are those of the base model as well. Of a value
projection `x` is `h + td`, as its hook gives it; of one that computes queries and keys too, `x` is `h`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - in, out: number of channels that a target takes and gives
"""

import math
from typing import ClassVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TopDownConfig
from .active_adapters import Rows
from .feedback import low_rank
from .moving_hooks import MovingHooks
from .run import SecondPass, ThreadState
from .topdown_layer import TopDownLayer, to_device_of, weight_of
from .value_projection import input_size, output_size


class Bias(nn.Module):
    """A bias as a module of its own, which starts at zero.

    Args:
        size: number of channels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class SecondPassLora(TopDownLayer):
    """What one linear layer adds to its output in pass 2, `(alpha / r) B A x + b`, one or both; zero at the start.

    Args:
        target: the linear layer, which stays as it is, be it quantised or wrapped by another method.
    """

    adapter_layer_names = ("topdown_pass2_A", "topdown_pass2_B", "topdown_pass2_bias")
    other_param_names = ("topdown_dropout", "topdown_scaling")
    parts: ClassVar = dict.fromkeys(["pass2_A", "pass2_B", "pass2_bias"], "pass2")

    def __init__(self, target: nn.Module) -> None:
        super().__init__(target)
        base = self.get_base_layer()
        self.in_features, self.out_features = input_size(base), output_size(base)
        self.topdown_pass2_A = nn.ModuleDict()
        self.topdown_pass2_B = nn.ModuleDict()
        self.topdown_pass2_bias = nn.ModuleDict()
        self.topdown_dropout = nn.ModuleDict()
        self.topdown_scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: TopDownConfig) -> None:
        """Create the factors of an adapter if they have a rank, and its bias."""
        if r := config.pass2_r:
            self.topdown_pass2_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
            self.topdown_pass2_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
            self.topdown_dropout[adapter_name] = nn.Dropout(config.pass2_lora_dropout)
            self.topdown_scaling[adapter_name] = config.pass2_lora_alpha / r
        if config.pass2_bias == "all":
            self.topdown_pass2_bias[adapter_name] = Bias(self.out_features)
        self.reset_parameters(adapter_name)
        self._finish_update(adapter_name, config)

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter adds something here."""
        return adapter_name in self.topdown_pass2_A or adapter_name in self.topdown_pass2_bias

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """Start as an exact no-op, as LoRA does."""
        if adapter_name in self.topdown_pass2_A:
            nn.init.kaiming_uniform_(weight_of(self.topdown_pass2_A[adapter_name]), a=math.sqrt(5))
            nn.init.zeros_(weight_of(self.topdown_pass2_B[adapter_name]))
        if adapter_name in self.topdown_pass2_bias:
            nn.init.zeros_(weight_of(self.topdown_pass2_bias[adapter_name]))

    def trained(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters of an adapter that want a gradient."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        found = [weight_of(container[adapter_name]) for container in containers if adapter_name in container]
        return [parameter for parameter in found if parameter.requires_grad]

    def forward(
        self, x: torch.Tensor, adapter_name: str, gate: torch.Tensor | None, scale: float = 1.0
    ) -> torch.Tensor:
        """What is added to the output.

        Args:
            x: the input of the target. Shape: [b, n, in], or [b * n, in]
            adapter_name: whose factors.
            gate: how far the gate is open for each token, `None` without one. Shape: [b, n, 1]
            scale: the strength of the adapter.

        Returns:
            Shape: [b, n, out], or [b * n, out]
        """
        x = to_device_of(self, x)
        added = self._product(x, adapter_name) if adapter_name in self.topdown_pass2_A else None
        if adapter_name in self.topdown_pass2_bias:
            bias = weight_of(self.topdown_pass2_bias[adapter_name])
            added = bias.expand(*x.shape[:-1], -1) if added is None else added + bias
        assert added is not None  # or the adapter has nothing here, see `has`
        added = added if scale == 1 else scale * added
        return added if gate is None else gate_of_input(gate, x).to(added.dtype) * added

    def _product(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`(alpha / r) B A x`. Shape: [..., in] -> [..., out]"""
        a, b = self.topdown_pass2_A[adapter_name], self.topdown_pass2_B[adapter_name]
        x = self._cast_input_dtype(x, weight_of(a).dtype)
        dropout = cast(nn.Dropout, self.topdown_dropout[adapter_name])
        return low_rank(dropout(x) if dropout.p > 0 else x, a, b, self.topdown_scaling[adapter_name])


def gate_of_input(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gate in the form of a module's input, token by token.

    Args:
        gate: Shape: [b, n, 1]
        x: Shape: [b, n, in], or all tokens in one sequence, [b * n, in]

    Returns:
        Shape: [b, n, 1], or [b * n, 1]

    Raises:
        ValueError: if the module takes something else than the tokens.
    """
    if x.dim() == 2 and len(x) == gate.numel():
        gate = gate.reshape(-1, 1)
    if x.shape[:-1] != gate.shape[:-1]:  # they might still be broadcast
        raise ValueError(
            f"A module of `pass2_target_modules` takes an input of shape {list(x.shape)}, and the gate is for tokens "
            f"of shape {list(gate.shape[:-1])}, so it is not known which value of it counts where. Leave this module "
            "out, or the gate."
        )
    return gate.to(x.device)


def in_rows(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Input or output of a module with a row for each row of the batch.

    Args:
        x: Shape: [b, ..., in], or all tokens in one sequence, [b * n, in]
        rows: some rows of the batch.

    Returns:
        Shape: [b, ..., in]

    Raises:
        ValueError: if the module takes something else than the tokens.
    """
    if x.dim() == 2 and len(x) == rows.batch_size * rows.num_tokens:
        return x.unflatten(0, (rows.batch_size, rows.num_tokens))
    if len(x) != rows.batch_size:
        raise ValueError(
            f"A module of `pass2_target_modules` takes an input of shape {list(x.shape)} in a mixed batch of "
            f"{rows.batch_size} rows, so it is not known which value of it belongs to which. Leave this module out, "
            "or run each adapter in a batch of its own."
        )
    return x


class SecondPassHook(MovingHooks):
    """Hook on a linear layer, which adds to its output in pass 2.

    Args:
        target: the linear layer.
        state: has the `run` of this thread, with the adapter that adds something, and its gate.
        layer: computes what is added.
    """

    def __init__(self, target: nn.Module, state: ThreadState, layer: SecondPassLora) -> None:
        self.state = state
        self.layer = layer
        super().__init__(target)

    def _hang_on(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(self.add)]

    def add(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """The output in pass 2; where the gate is zero it is the same, bit for bit. Shape: [b, n, out]"""
        run = self.state.current.run
        if run is None:
            return None
        for second_pass in run.second_pass:
            if self.layer.has(second_pass.adapter_name):
                output = self._with(second_pass, args[0], output)
        return output

    def _with(self, second_pass: SecondPass, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Shapes: [b, n, in], [b, n, out] -> [b, n, out]; or [b * n, ...] of all"""
        name, gate, scale, rows = second_pass
        if rows is None:
            added = self.layer(x, name, gate, scale)
            return output + added.to(device=output.device, dtype=output.dtype)
        x, whole = in_rows(x, rows), in_rows(output, rows)
        added = self.layer(rows.of(x), name, gate, scale).to(device=output.device, dtype=output.dtype)
        return whole.index_add(0, rows.indices.to(output.device), added).view(output.shape)
