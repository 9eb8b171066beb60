"""The parameters of the feedback: PEFT's containers, keyed by adapter name, around the formulas of `feedback.py`.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

import math
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..config import TopDownConfig
from .feature_selection import FeatureSelection
from .feedback import low_rank, step_down
from .gate import Tokens
from .output_feedback import TO_OUTPUT, OutputFeedback
from .run import SecondPass, ThreadState
from .second_pass_lora import SecondPassLora
from .topdown_layer import TopDownLayer, to_device_of, weight_of
from .value_projection import input_size

if TYPE_CHECKING:
    from .fused_feedback import FusedFeedback
    from .two_passes import TwoPasses


class FeedbackLayer(TopDownLayer):
    """One block's share of the feedback path.

    Formula: `z_l = linear1(z_{l+1})`, `td_l = linear2(z_l)`; both without bias, `[d, d]`. In TOAST-Lite
    (`r > 0`) each is `W + (lora_alpha / r) * B A` with `W` fixed; the identity and the zero that `init_weights=True`
    fixes `linear1` and `linear2` to are not stored.

    Args:
        value_projection: the layer whose device and dtype new parameters take.
        in_features: number of channels of what comes from the block above.
        out_features: number of channels of the feedback and of what the block below gets.
    """

    adapter_layer_names = tuple(
        f"topdown_{linear}{suffix}" for linear in ("linear1", "linear2") for suffix in ("", "_A", "_B")
    )
    other_param_names = ("topdown_dropout", "topdown_scaling")
    parts: ClassVar = {f"{linear}{suffix}": linear for linear in ("linear1", "linear2") for suffix in ("", "_A", "_B")}
    topdown_linear1: nn.ModuleDict
    topdown_linear1_A: nn.ModuleDict
    topdown_linear1_B: nn.ModuleDict
    topdown_linear2: nn.ModuleDict
    topdown_linear2_A: nn.ModuleDict
    topdown_linear2_B: nn.ModuleDict

    def __init__(self, value_projection: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__(value_projection)
        self.in_features, self.out_features = in_features, out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.topdown_dropout = nn.ModuleDict()
        self.topdown_scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: TopDownConfig) -> None:
        """Create `linear1` and `linear2` of an adapter, or their low-rank factors and what these are added to."""
        d, r = self.out_features, config.r
        if r == 0 or not config.init_weights or config.pretrained_feedback is not None:
            self.topdown_linear1[adapter_name] = self._new_linear1(self.in_features)
            self.topdown_linear2[adapter_name] = self._new_linear(d, d)
        if r > 0:
            for name, factor in self.new_factors(r).items():
                getattr(self, name)[adapter_name] = factor
            self.topdown_scaling[adapter_name] = config.lora_alpha / r
            self.topdown_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.reset_parameters(adapter_name, config.init_weights)
        self._finish_update(adapter_name, config, frozen=("topdown_linear1", "topdown_linear2") if r > 0 else ())

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter has a part here."""
        return adapter_name in self.topdown_linear1 or adapter_name in self.topdown_linear1_A

    def new_factors(self, r: int) -> dict[str, nn.Module]:
        """A and B of both linear layers for a rank, by the names of their containers."""
        d = self.out_features
        return {
            "topdown_linear1_A": self._new_linear(self.in_features, r),
            "topdown_linear1_B": self._new_linear1(r),
            "topdown_linear2_A": self._new_linear(d, r),
            "topdown_linear2_B": self._new_linear(r, d),
        }

    def _new_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=False)

    def _new_linear1(self, in_features: int) -> nn.Module:
        """The layer that ends at the block: `linear1` itself, or its factor B."""
        return self._new_linear(in_features, self.out_features)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Initialise: the exact no-op (`linear1` identity, `linear2` zero), or normal with std 0.02 as officially."""
        if adapter_name in self.topdown_linear1:
            linear1 = weight_of(self.topdown_linear1[adapter_name])
            linear2 = weight_of(self.topdown_linear2[adapter_name])
            if init_weights:
                self.init_identity(linear1)
                nn.init.zeros_(linear2)
            else:
                self._init_random(linear1)
                nn.init.normal_(linear2, std=0.02)
        for name in ("topdown_linear1", "topdown_linear2"):
            if adapter_name in getattr(self, f"{name}_A"):
                nn.init.kaiming_uniform_(getattr(self, f"{name}_A")[adapter_name].weight, a=math.sqrt(5))
                nn.init.zeros_(getattr(self, f"{name}_B")[adapter_name].weight)

    @property
    def _identity_scale(self) -> float:
        """What keeps the variance where channel `i` goes to channel `i mod out_features`."""
        return min(1.0, math.sqrt(self.out_features / self.in_features))

    def _fold_channels(self, z: torch.Tensor) -> torch.Tensor:
        """Channel `i` to channel `i mod out_features`, scaled. Shape: [..., in_features] -> [..., out_features]"""
        padded = F.pad(z, (0, -self.in_features % self.out_features))
        return self._identity_scale * padded.unflatten(-1, (-1, self.out_features)).sum(-2)

    def init_identity(self, linear1: torch.Tensor) -> None:
        """Set the weight of `linear1` to what is fixed in TOAST-Lite. Shape: [d, d]"""
        nn.init.eye_(linear1)

    def _init_random(self, linear1: torch.Tensor) -> None:
        nn.init.normal_(linear1, std=0.02)

    def _identity(self, z: torch.Tensor) -> torch.Tensor:
        """What `init_identity` sets `linear1` to, without weights."""
        return z

    def forward(
        self, z: torch.Tensor, adapter_name: str, size: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step down the feedback path.

        Args:
            z: what the block above passes on, or the selected features. Shape: [b, n, d]
            size: height and width of the block's input where it is a map.

        Returns:
            What the block below gets, and the feedback of this block. Shapes: [b, n, d], [b, n, d]
        """
        return step_down(z, lambda z: self._linear1(z, adapter_name, size), lambda z: self._linear2(z, adapter_name))

    def reconstruct(self, output: torch.Tensor, adapter_name: str, size: tuple[int, ...] = ()) -> torch.Tensor:
        """`linear1` of the block's output, which the variational loss compares with the block's input.

        Args:
            output: the output of the block. Shape: [b, n, d]
            size: height and width of its input where it is a map.

        Returns:
            The input as the feedback path computes it. Shape: [b, n, d]
        """
        parameter = next(p for name, p in self.named_parameters() if f".{adapter_name}." in name)
        return self._linear1(self._cast_input_dtype(output, parameter.dtype), adapter_name, size)

    def _linear1(self, z: torch.Tensor, adapter_name: str, size: tuple[int, ...] = ()) -> torch.Tensor:
        full = self.topdown_linear1[adapter_name] if adapter_name in self.topdown_linear1 else self._identity
        return self._arrange(self._with_low_rank("topdown_linear1", full(z), z, adapter_name), size)

    def _linear2(self, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if adapter_name not in self.topdown_linear2:  # zero, so that there is nothing to add to
            return self._low_rank("topdown_linear2", z, adapter_name)
        return self._with_low_rank("topdown_linear2", self.topdown_linear2[adapter_name](z), z, adapter_name)

    def _with_low_rank(self, name: str, fixed: torch.Tensor, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What a matrix computes, and in TOAST-Lite what the factors add to it."""
        return fixed + self._low_rank(name, z, adapter_name) if adapter_name in self.topdown_scaling else fixed

    def _low_rank(self, name: str, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        a, b = getattr(self, f"{name}_A")[adapter_name], getattr(self, f"{name}_B")[adapter_name]
        dropout = cast(nn.Dropout, self.topdown_dropout[adapter_name])
        return low_rank(dropout(z) if dropout.p > 0 else z, a, b, self.topdown_scaling[adapter_name])

    def _arrange(self, z: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """The output of `linear1` in the shape of the block's input, which here it has."""
        return z


class FeedbackPath(nn.Module):
    """Feature selection and the chain of feedback layers of one stack of blocks.

    It is a child of the backbone and outside of its blocks, so that the whole chain can run between the two passes
    also where each block is a unit of sharding or offloading.

    Args:
        value_projection: a layer whose device and dtype the feature selection takes.

    Attributes:
        to_output: feedback to the output, `None` if no adapter has it.
        second_pass: LoRA of pass 2, by the index of the block and the name of the target in it.
        passes: what runs the backbone twice and hands the feedback to its blocks.
        fused: computes the feedback of all blocks at once, `None` where it is not fused.
    """

    passes: "TwoPasses"
    fused: "FusedFeedback | None"
    to_output: OutputFeedback | None
    keeps_shape: ClassVar[bool] = True  # whether each `linear1` is a matrix from the block's output to its input

    def __init__(self, value_projection: nn.Module) -> None:
        super().__init__()
        self.selection = FeatureSelection(value_projection)
        self.layers = nn.ModuleDict()
        self.second_pass = nn.ModuleDict()
        self.register_module("to_output", None)
        self.register_module("fused", None)

    @property
    def state(self) -> ThreadState:
        """The running state of the backbone."""
        return self.selection.state

    def add_block(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        """The feedback layer of a block, made if it is not there."""
        name = self._layer_name(index, config)
        if name not in self.layers:
            self.layers[name] = self._new_layer(index, value_projection, config)
        return self.layer(name)

    def layer(self, name: str) -> FeedbackLayer:
        """The feedback layer of this name, which begins with the index of its block."""
        return cast(FeedbackLayer, self.layers[name])

    def _layer_name(self, index: int, config: TopDownConfig) -> str:
        return str(index)

    def _new_layer(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        d = input_size(value_projection)
        return FeedbackLayer(value_projection, d, d)

    def add_output(self) -> OutputFeedback:
        """Feedback to the output, made if it is not there."""
        if self.to_output is None:
            self.to_output = OutputFeedback(self.selection.value_projection)
        return self.to_output

    def add_target(self, name: str, target: nn.Module) -> SecondPassLora:
        """LoRA of pass 2 for a linear layer, made if it is not there; `name` begins with the index of its block."""
        if name not in self.second_pass:
            self.second_pass[name] = SecondPassLora(target)
        return cast(SecondPassLora, self.second_pass[name])

    def second_pass_layers(self, adapter_name: str, index: int | None = None) -> list[SecondPassLora]:
        """LoRA of pass 2 of an adapter, in all blocks or in one."""
        prefix = "" if index is None else f"{index}-"
        layers = [cast(SecondPassLora, self.second_pass[name]) for name in self.second_pass if name.startswith(prefix)]
        return [layer for layer in layers if layer.has(adapter_name)]

    def in_second_pass(self, adapter_name: str) -> SecondPass | None:
        """What pass 2 adds besides the feedback that has just been computed."""
        if self.selection.topdown_config[adapter_name].pass2_target_modules is None:
            return None
        alpha = self.selection.topdown_feedback_scale[adapter_name]
        is_void = alpha == 0 and self.selection.is_void_at_0(adapter_name)
        selected = self.state.current.selected.get(adapter_name)
        return None if is_void else SecondPass(adapter_name, None if selected is None else selected.gate, alpha)

    def _opened(self, adapter_name: str, mask: torch.Tensor) -> torch.Tensor:
        """Where the adapter may change something; LoRA of pass 2 does so whatever the mask. Shape: [b, n, 1]"""
        second_pass = self.in_second_pass(adapter_name)
        if second_pass is None:
            return mask
        return torch.ones_like(mask) if second_pass.gate is None else second_pass.gate

    @property
    def active_adapters(self) -> list[str]:
        """The adapters whose feedback the next forward uses; none if they are disabled."""
        if self.selection.disable_adapters:
            return []
        of_rows = self.state.current.row_names
        names = self.selection.active_adapters if of_rows is None else dict.fromkeys(filter(None, of_rows.names))
        return [name for name in names if name in self.selection.topdown_config]

    @property
    def active_adapter(self) -> str | None:
        """The adapter whose feedback the next forward uses, for what works with one; `None` if there is none.

        Raises:
            ValueError: if there are several.
        """
        names = self.active_adapters
        if len(names) > 1:
            raise ValueError(
                f"The TOAST adapters {names} are active together, and this works with one; activate it alone, with "
                "`set_adapter`."
            )
        return names[0] if names else None

    def drop_adapter(self, adapter_name: str) -> None:
        """Drop the weights of an adapter, which stays the active one: another of the same name takes its place."""
        layers: list[TopDownLayer] = [self.selection, *map(self.layer, self.layers)]
        layers += [*self.second_pass_layers(adapter_name), *([] if self.to_output is None else [self.to_output])]
        for layer in layers:
            containers = [getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names]
            for container in (*containers, layer.frozen_peft_weight_names):
                if adapter_name in container:
                    del container[adapter_name]

    def blocks_of(self, adapter_name: str) -> list[int]:
        """Indices of the blocks that receive feedback, from the top down."""
        return [index for index, _ in self.layers_of(adapter_name)]

    def _replicate_for_data_parallel(self) -> None:
        raise NotImplementedError(
            "TOAST does not run in nn.DataParallel, which copies modules in each forward. Start the training with "
            "`accelerate launch` or `torchrun` (DistributedDataParallel), or make one GPU visible."
        )

    def layers_of(self, adapter_name: str) -> list[tuple[int, FeedbackLayer]]:
        """The chain of an adapter, from the top down: indices of blocks with their layers."""
        layers = [(int(name), self.layer(name)) for name in self.layers]
        chain = [(index, layer) for index, layer in layers if layer.has(adapter_name)]
        return sorted(chain, key=itemgetter(0), reverse=True)

    def forward(
        self,
        features: torch.Tensor,
        adapter_name: str,
        compared: torch.Tensor | None = None,
        sizes: Mapping[int, tuple[int, ...]] | None = None,
        skip_closed: bool = False,
        tokens: Tokens | None = None,
    ) -> dict[int, torch.Tensor]:
        """The feedback of every block.

        Args:
            features: features of pass 1. Shape: [b, n, d]; of a map of tokens [b, h, w, d]
            adapter_name: whose feedback.
            compared: what the prompt is compared with, `None` for the features themselves. Shape: as the features
            sizes: for each block the height and width of its input, where it is a map.
            skip_closed: compute none if the adapter changes no token.
            tokens: what a gate has to know of the tokens besides their features.

        Returns:
            For each block index what is added to the input of its value projection, times the strength; of fused
            feedback perhaps to its output. That to the output is there under `TO_OUTPUT`. Shape: as that
        """
        selection, fused = self.selection, self.fused
        features = to_device_of(selection, features)
        compared = None if compared is None else to_device_of(selection, compared)
        features, mask = selection.weigh(features, adapter_name, compared, tokens)
        alpha = selection.topdown_feedback_scale[adapter_name]
        is_void = alpha == 0 and selection.is_void_at_0(adapter_name)
        if skip_closed:
            opened = torch.zeros_like(mask) if is_void else self._opened(adapter_name, mask)
            open_rows = opened.flatten(1).any(1)
            self.state.current.open_rows, is_void = open_rows, not bool(open_rows.any())
        if is_void:
            return {}
        mask = mask if alpha == 1 else alpha * mask  # the chain is linear, see `strength.py`
        to_output = self.to_output if selection.topdown_config[adapter_name].feedback_to_output else None
        if fused is not None and to_output is None:
            return fused(features, mask)
        z = self._select(features, mask, adapter_name)
        feedback = {} if to_output is None else {TO_OUTPUT: to_output(z, adapter_name)}
        if fused is not None:
            return fused(features, mask) | feedback
        for index, layer in self.layers_of(adapter_name):
            z, feedback[index] = layer(to_device_of(layer, z), adapter_name, (sizes or {}).get(index, ()))
        return feedback

    def _select(self, features: torch.Tensor, mask: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return self.selection(features, mask, adapter_name)


def feedback_path_of(backbone: nn.Module) -> FeedbackPath | None:
    """The feedback path of a backbone, `None` if it has none."""
    path = backbone._modules.get("feedback_path")
    return path if isinstance(path, FeedbackPath) else None


def feedback_paths(model: nn.Module) -> Iterator[tuple[nn.Module, FeedbackPath]]:
    """All backbones in the model that have a feedback path, with it."""
    for module in model.modules():
        path = feedback_path_of(module)
        if path is not None:
            yield module, path


def paths_with(model: nn.Module, adapter_name: str) -> list[tuple[nn.Module, FeedbackPath]]:
    """The backbones that an adapter gives feedback to, of an encoder-decoder both or one, with their feedback path."""
    return [pair for pair in feedback_paths(model) if adapter_name in pair[1].selection.topdown_config]


def check_is_active(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that gives no feedback now, or not alone where it does.

    Raises:
        ValueError: if it is so.
    """
    active = [path.active_adapter for _, path in feedback_paths(model)]
    own = [path.active_adapter for _, path in paths_with(model, adapter_name)]
    if not own or any(name != adapter_name for name in own):
        found = sorted({name for name in active if name is not None}) or "none"
        raise ValueError(f"`adapter_name` is {adapter_name!r}; expected the active TOAST adapter, which is {found}.")


def hidden_states_of(output: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
    """The hidden states in the output of a block; some blocks return more than these. Shape: [b, n, d]"""
    return output[0] if isinstance(output, tuple) else output
