"""Feature selection: which tokens the feedback starts from, and which of their channels.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from typing import ClassVar

import torch
from torch import nn

from ..config import TopDownConfig
from .feedback import select, token_mask
from .gate import Gate, Tokens
from .prompt_input import GivenPrompt
from .run import Selected, ThreadState
from .strength import checked_scale
from .topdown_layer import AdapterIdentity, TopDownLayer, weight_of


class Prompt(nn.Module):
    """The task prompt: weighs each token by its similarity to a learned vector.

    The cosine does not depend on the vector's length, which only sets how far a gradient step turns it.

    Args:
        hidden_size: d.
        std: standard deviation of the initial values; 1 in the official code.
    """

    def __init__(self, hidden_size: int, std: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(std * torch.randn(hidden_size))

    def forward(self, features: torch.Tensor, given: GivenPrompt | None = None) -> torch.Tensor:
        """Weight of each token, clamp(cos(x, prompt), 0, 1).

        Args:
            features: features of pass 1. Shape: [b, n, d]
            given: prompts to take the place of the learned one.

        Returns:
            Weights in [0, 1]. Shape: [b, n, 1]

        Raises:
            ValueError: if the features are of another size than the input of the value projections.
        """
        if features.shape[-1] != self.hidden_size:
            raise ValueError(
                f"The hidden states have {features.shape[-1]} channels and the value projections take "
                f"{self.hidden_size}; TOAST does not support attention to something else than the hidden states."
            )
        return token_mask(features, self.weight if given is None else given.for_features(features, self.weight.dtype))


class Transform(nn.Module):
    """The channel transform, a linear map from the right as `top_down_transform` of the official code.

    Args:
        hidden_size: d. The map starts as the identity.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight`. Shape: [b, n, d] -> [b, n, d]"""
        return x @ self.weight


class FeatureSelection(TopDownLayer):
    """Keeps what matters for the task in the features of pass 1 (the paper's "feature selection").

    Formula: `m = clamp(cos(x, prompt), 0, 1)`, `z = (m * x) @ transform`. With `transform_r > 0` the transform is
    `1 + B A`, of which only `A` and `B` are stored. A gate multiplies the mask `m` (`gate.py`).
    """

    adapter_layer_names = (
        *("topdown_prompt", "topdown_transform", "topdown_transform_A", "topdown_transform_B"),
        "topdown_gate",
    )
    other_param_names = ("topdown_config", "topdown_range", "topdown_identity", "topdown_feedback_scale")
    parts: ClassVar = {
        "prompt": "prompt",
        **dict.fromkeys(["transform", "transform_A", "transform_B"], "transform"),
    }

    def __init__(self, value_projection: nn.Module) -> None:
        super().__init__(value_projection)
        self.topdown_prompt = nn.ModuleDict()
        self.topdown_transform = nn.ModuleDict()
        self.topdown_transform_A = nn.ModuleDict()
        self.topdown_transform_B = nn.ModuleDict()
        self.topdown_gate = nn.ModuleDict()
        self.topdown_config: dict[str, TopDownConfig] = {}
        self.topdown_range: dict[str, tuple[int, int]] = {}
        self.topdown_identity: dict[str, AdapterIdentity] = {}
        self.topdown_feedback_scale: dict[str, float] = {}
        self.state = ThreadState()

    def update_layer(
        self, adapter_name: str, config: TopDownConfig, hidden_size: int, blocks_name: str, num_blocks: int
    ) -> None:
        """Create the prompt and the transform of an adapter, and its gate.

        Args:
            adapter_name: its name.
            config: its config.
            hidden_size: number of channels of the features.
            blocks_name: the full name in the model of the list of blocks.
            num_blocks: how many there are.
        """
        self.topdown_config[adapter_name] = config
        self.topdown_range[adapter_name] = config.feedback_range(num_blocks)
        self.topdown_identity[adapter_name] = AdapterIdentity()
        self.topdown_feedback_scale[adapter_name] = config.feedback_scale
        self.topdown_prompt[adapter_name] = Prompt(hidden_size, std=0.02 if config.init_weights else 1.0)
        if config.transform_r == 0:
            self.topdown_transform[adapter_name] = Transform(hidden_size)
        else:
            self.topdown_transform_A[adapter_name] = nn.Linear(hidden_size, config.transform_r, bias=False)
            self.topdown_transform_B[adapter_name] = nn.Linear(config.transform_r, hidden_size, bias=False)
            nn.init.zeros_(weight_of(self.topdown_transform_B[adapter_name]))
        self.add_gate(adapter_name, config.gate, (config.gate_is_causal or {}).get(blocks_name))
        self._finish_update(adapter_name, config, frozen=("topdown_gate",))

    def add_gate(self, adapter_name: str, gate: str | None, is_causal: bool | None = None) -> None:
        """Put a new gate, which is open, on an adapter; none if `gate` is `None`."""
        if adapter_name in self.topdown_gate:
            del self.topdown_gate[adapter_name]
        if gate is not None:
            prompt = weight_of(self.topdown_prompt[adapter_name])
            with torch.inference_mode(False):  # else nothing outside of that mode could change it any more
                new = Gate(len(prompt), is_running=gate == "sequence", is_causal=is_causal)
                self.topdown_gate[adapter_name] = new.to(device=prompt.device, dtype=prompt.dtype)

    def forward(self, features: torch.Tensor, mask: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Select tokens, then channels.

        Args:
            features: features of pass 1, in the dtype of the adapter. Shape: [b, n, d]
            mask: weights of the tokens, by `weigh`. Shape: [b, n, 1]
            adapter_name: whose transform.

        Returns:
            What the feedback path starts from. Shape: [b, n, d]
        """
        return select(features, mask, lambda x: self._transform(x, adapter_name))

    def weigh(
        self,
        features: torch.Tensor,
        adapter_name: str,
        compared: torch.Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mask of the tokens, under the gate if there is one, and keep it for whoever wants to look at it.

        Args:
            features: features of pass 1. Shape: [b, n, d]
            compared: what the prompt is compared with, if not the features themselves. Shape: [b, n, d]
            tokens: what the gate has to know of the tokens besides.

        Returns:
            The features in the dtype of the adapter, and the mask. Shapes: [b, n, d], [b, n, 1]
        """
        dtype = weight_of(self.topdown_prompt[adapter_name]).dtype
        features = self._cast_input_dtype(features, dtype)
        compared = features if compared is None else self._cast_input_dtype(compared, dtype)
        mask = self.topdown_prompt[adapter_name](compared, self.state.current.prompt)
        gate = None
        if self.topdown_config[adapter_name].gate is not None and adapter_name in self.topdown_gate:
            gate = self.topdown_gate[adapter_name](compared, tokens or Tokens())
            mask = gate * mask
        # What is exported is traced with tensors that hold no numbers.
        kept = None if torch.compiler.is_exporting() else mask.detach()
        self.state.current.selected[adapter_name] = Selected(kept, gate)
        return features, mask

    def _transform(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if adapter_name in self.topdown_transform:
            return self.topdown_transform[adapter_name](x)
        return x + self.topdown_transform_B[adapter_name](self.topdown_transform_A[adapter_name](x))

    # -------------------------------------------------------------------------------- the strength, as of a LoRA layer

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter to that of its config times `scale`; an adapter that is not here is ignored.

        Raises:
            ValueError: if it is no finite number.
        """
        if adapter in self.topdown_feedback_scale:
            initial = self.topdown_config[adapter].feedback_scale
            self.topdown_feedback_scale[adapter] = checked_scale(checked_scale(scale) * initial)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapter.

        Raises:
            ValueError: if it is no finite number.
        """
        for name in self._active_here():
            alpha = self.topdown_feedback_scale[name]
            self.topdown_feedback_scale[name] = checked_scale(alpha * checked_scale(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapter; without a number set it to that of its config.

        Raises:
            ValueError: if it is no finite number, or zero.
        """
        for name in self._active_here():
            if scale is None:
                self.set_scale(name, 1.0)
            elif checked_scale(scale) == 0:
                raise ValueError("Feedback cannot be divided by a scale of 0; call `unscale_layer()` to reset it.")
            else:
                self.topdown_feedback_scale[name] = checked_scale(self.topdown_feedback_scale[name] / scale)

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.topdown_feedback_scale]

    def is_void_at_0(self, adapter_name: str) -> bool:
        """Whether feedback times zero may be left out: it has no gradients, and nothing else comes with it."""
        return not torch.is_grad_enabled() and not self.topdown_config[adapter_name].double_value_bias
