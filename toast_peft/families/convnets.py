"""ConvNets (ResNet, ConvNeXt, ...): the blocks that the two passes run over are stages, the feedback is a map.

    image --> pass 1, stem, stages 0 .. feedback_from - 1 --> features --> feedback path --> td of every stage
    image --> pass 2, stem and stages from feedback_to on, each with td added to its input --> output

    features x of pass 1 --> m = clamp(cos(norm(x), prompt), 0, 1) --> z_L = (m * x) @ transform, over the channels
                                                                        |
    stage L-1        td = linear2(z)  <--  z = linear1(z_L)            <-+    added to the input of the stage
       ...
    stem + stage 0   td = linear2(z)  <--  z = linear1(z of stage 1)          added to the image

The chain is one of transposed convolutions. The stem belongs to stage 0: the feedback of that stage is added to the
image, and where pass 2 does not need stage 0 it does not run the stem either.

Batch norms in training mode update their running statistics once in a forward, in the last pass that they run in, so
with zero feedback exactly as those of the base model do. Both passes normalise with the statistics of the batch then.

Source: https://github.com/bfshi/TOAST, `visual_classification/src/models/convnext_backbone/convnext_top_down.py`.

Notation used for tensor shapes:
    - b: batch size
    - c, h, w: channels, height and width of a stage's output
    - c', h', w': those of its input, to which the feedback is added; of the first stage, the image's
    - s: stride of the stage, about h' / h
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import TopDownConfig
from ..core.active_adapters import ActiveAdapter
from ..core.backbone_forward import BackboneForward
from ..core.block_forward import BlockForward
from ..core.layers import FeedbackLayer, FeedbackPath
from ..core.run import Run
from ..core.stack import Stack
from ..core.two_passes import TwoPasses
from .lookup import blocks_at, find_submodule, join_names, model_type_of

_STEM = -1  # its index; the stages count from 0


@dataclass(frozen=True)
class ConvNetArchitecture:
    """Names inside the backbone of a ConvNet (`ConvNextModel`, `ResNetModel`, ...).

    Args:
        stem: path from the backbone to the layers between the image and the first stage.
        stages: path from the backbone to the `nn.ModuleList` of stages.
        final_norm: path from the backbone to the norm over the channels that follows the last stage, `None` if there
            is none. If there is one, the prompt is compared with the features after it, as the official code does.
    """

    stem: str
    stages: str
    final_norm: str | None

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether a module of this model type has the layers that the row names; other versions may have others."""
        return isinstance(find_submodule(backbone, self.stages), nn.ModuleList)


_CONVNEXT = ConvNetArchitecture("embeddings", "encoder.stages", "layernorm")
_RESNET = ConvNetArchitecture("embedder", "encoder.stages", final_norm=None)

CONVNETS = {
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "regnet": _RESNET,
    "resnet": _RESNET,
}


@dataclass(frozen=True)
class StageShape:
    """A stage as a link of the feedback path; the first one together with the stem.

    Args:
        convolution: one of its convolutions, whose device and dtype new parameters take.
        in_channels: channels of its input, to which the feedback is added. Of the first one these are the image's.
        out_channels: channels of its output.
        stride: how many times smaller its output is than its input, in height and width.
    """

    convolution: nn.Conv2d
    in_channels: int
    out_channels: int
    stride: int


@dataclass(kw_only=True)
class ConvNetStack(Stack):
    """The stages of a ConvNet.

    `names` are those of the modules whose input the feedback is added to: the stem for stage 0, else the stage itself.

    Args:
        stem: the layers between the image and the first stage.
        stem_name: its full name in the model.
        shapes: one for each stage.
        feedback_from: the feedback starts from the output of stage `feedback_from - 1`.
    """

    stem: nn.Module
    stem_name: str
    shapes: list[StageShape]
    feedback_from: int

    @property
    def hidden_size(self) -> int:
        """Number of channels of the features that the feedback starts from."""
        return self.shapes[self.feedback_from - 1].out_channels

    @property
    def adapted_names(self) -> list[str]:
        """Full names of the modules that get another forward, and so must stay what they are."""
        return [*super().adapted_names, self.stem_name]

    def _new_feedback_path(self) -> FeedbackPath:
        return ConvNetFeedbackPath(self.shapes)

    def _new_passes(self, path: FeedbackPath, model: nn.Module) -> TwoPasses:
        return TwoPassesOverStages(self, path, model)


def make_convnet_stack(
    model: nn.Module, backbone_name: str, architecture: ConvNetArchitecture, config: TopDownConfig
) -> ConvNetStack:
    """The stages of the ConvNet `backbone_name`.

    Raises:
        ValueError: if `config` does not fit.
    """
    backbone = model.get_submodule(backbone_name)
    stages, stem = blocks_at(backbone, architecture.stages), backbone.get_submodule(architecture.stem)
    stages_name, stem_name = (
        join_names(backbone_name, architecture.stages),
        join_names(backbone_name, architecture.stem),
    )
    _check_config(config)
    first, last = config.feedback_range(len(stages))
    names = {f"{stages_name}.{index}" if index > 0 else stem_name: index for index in range(last, first)}
    return ConvNetStack(
        backbone=backbone,
        blocks=stages,
        blocks_name=stages_name,
        final_norm=_final_norm(backbone, architecture, config),
        normalize_features=architecture.final_norm is not None,
        model_type=model_type_of(backbone),
        names=names,
        stem=stem,
        stem_name=stem_name,
        shapes=[_shape(stage, stem if index == 0 else None) for index, stage in enumerate(stages)],
        feedback_from=first,
    )


def _check_config(config: TopDownConfig) -> None:
    given = [
        name
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "double_value_bias")
        if getattr(config, name) not in (None, False)
    ]
    if given:
        raise ValueError(
            f"`{given[0]}={getattr(config, given[0])!r}` is about the value projections of a transformer; a ConvNet "
            "has none. Its stages are found by the model type; choose among them with `feedback_from` and "
            "`feedback_to`, which count stages."
        )


def _final_norm(backbone: nn.Module, architecture: ConvNetArchitecture, config: TopDownConfig) -> str | None:
    """The path of the final norm, after which the features are compared with the prompt."""
    num_stages = len(blocks_at(backbone, architecture.stages))
    first, _ = config.feedback_range(num_stages)
    if config.normalize_features and first < num_stages:
        raise ValueError(
            f"`normalize_features=True`, but the final norm fits the output of the last stage, {num_stages - 1}, and "
            f"the feedback starts from stage {first - 1}; leave it at None or False."
        )
    if architecture.final_norm is None or find_submodule(backbone, architecture.final_norm) is not None:
        return architecture.final_norm
    if config.normalize_features is not False and first == num_stages:
        raise ValueError(
            f"{type(backbone).__name__} has no final norm {architecture.final_norm!r}, after which the features of a "
            f"{model_type_of(backbone)!r} are compared with the prompt. Pass normalize_features=False to compare them "
            "as they are."
        )
    return None


def _shape(stage: nn.Module, stem: nn.Module | None) -> StageShape:
    of_stage = list(_convolutions_and_poolings(stage))
    of_stem = [] if stem is None else list(_convolutions_and_poolings(stem))
    convolutions = [layer for layer in of_stem + of_stage if isinstance(layer, nn.Conv2d)]
    return StageShape(
        convolution=convolutions[0],
        in_channels=convolutions[0].in_channels,
        out_channels=convolutions[-1].out_channels,
        # A stage makes its input smaller once, a residual branch and its shortcut both; the stem with every layer.
        stride=math.prod(map(_stride, of_stem)) * max(map(_stride, of_stage)),
    )


def _convolutions_and_poolings(module: nn.Module) -> Iterator[nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d]:
    """In the order of the module's definition, without what other methods have added."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        yield module
    for child in module.children():
        yield from _convolutions_and_poolings(child)


def _stride(layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> int:
    return max(layer.stride) if isinstance(layer.stride, tuple) else layer.stride


class ConvNetFeedbackLayer(FeedbackLayer):
    """One stage's share of the feedback path.

    `linear1` undoes the stage's stride: a transposed convolution with kernel and stride `s`, from `c` to `c'`
    channels. `linear2` is a convolution with a kernel of 1. Both are without bias. The factors of Lite are
    convolutions with a kernel of 1; B of `linear1` is a transposed one with kernel and stride `s`.

    There is no identity from a stage's output to its input. What `init_weights=True` starts `linear1` with is nearest
    to it: each position is repeated `s x s` times, and channel `i` goes to channel `i mod c'`, scaled such that the
    variance stays. Cutting the channels off instead would leave the image with the feedback of three of them, which
    may be inactive in all images; then `linear2` would never get a gradient.
    """

    def __init__(self, shape: StageShape) -> None:
        super().__init__(shape.convolution, shape.out_channels, shape.in_channels)
        self.stride = shape.stride

    def _new_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Conv2d(in_features, out_features, kernel_size=1, bias=False)

    def _new_linear1(self, in_features: int) -> nn.Module:
        return nn.ConvTranspose2d(in_features, self.out_features, self.stride, self.stride, bias=False)

    def init_identity(self, linear1: torch.Tensor) -> None:
        """Set the weight of `linear1` to its start. Shape: [c, c', s, s]"""
        channels = torch.arange(self.in_features)
        linear1.zero_()
        linear1[channels, channels % self.out_features] = self._identity_scale

    def _init_random(self, linear1: torch.Tensor) -> None:
        nn.init.kaiming_uniform_(linear1, a=math.sqrt(5))  # torch's own, which the official code leaves it at

    def _identity(self, z: torch.Tensor) -> torch.Tensor:
        """What `init_identity` sets `linear1` to, without weights. Shape: [b, c, h, w] -> [b, c', s h, s w]"""
        folded = self._fold_channels(z.movedim(1, -1)).movedim(-1, 1)
        return F.interpolate(folded, scale_factor=self.stride, mode="nearest")

    def _arrange(self, z: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """The output of `linear1` in the size of the stage's input: bottom and right are cropped or filled with zeros.

        Raises:
            RuntimeError: if the size is not about s times that of the stage's output.
        """
        missing = [wanted - found for wanted, found in zip(size, z.shape[-2:], strict=True)]
        if max(map(abs, missing)) > self.stride:
            raise RuntimeError(
                f"Feedback of the size {list(z.shape[-2:])} has to be added to an input of the size {list(size)}: the "
                f"stage does not have the stride {self.stride} that its convolutions have. TOAST does not support it."
            )
        return F.pad(z, (0, missing[1], 0, missing[0])) if any(missing) else z


class ConvNetFeedbackPath(FeedbackPath):
    """Feature selection and the chain of feedback layers of a ConvNet.

    Args:
        shapes: one for each stage.
    """

    keeps_shape = False

    def __init__(self, shapes: list[StageShape]) -> None:
        super().__init__(shapes[-1].convolution)
        self.shapes = shapes

    def _new_layer(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        return ConvNetFeedbackLayer(self.shapes[index])

    def _select(self, features: torch.Tensor, mask: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Select positions and channels. Shapes: [b, h, w, c], [b, h, w, 1] -> [b, c, h, w]"""
        return super()._select(features, mask, adapter_name).movedim(-1, 1)


class StageForward(BlockForward):
    """Forward of a stage or the stem: skips it where a pass does not need it, and adds its feedback in pass 2."""

    def __init__(self, module: nn.Module, index: int, path: FeedbackPath) -> None:
        super().__init__(module, index, path)
        self.stage = max(index, 0)
        self.receives_feedback = index != 0  # that of stage 0 has been added to the image

    def is_skipped(self, run: Run) -> bool:
        """Whether the running pass does not need this stage."""
        if run.first_pass:
            return self.stage >= run.feedback_from and not run.complete
        return self.stage < run.feedback_to and not run.repeat_lower_blocks

    def _first_pass(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = cast(ConvNetFeedbackPath, self.path).shapes[self.stage]
        if self.is_skipped(run):
            # The layers that follow expect the stage's channels; what they make of them is not used.
            return hidden_states.new_zeros(len(hidden_states), shape.out_channels, 1, 1)
        if self.receives_feedback:
            self._check_channels(hidden_states, shape.in_channels)
            height, width = hidden_states.shape[-2:]
            run.input_sizes[self.stage] = height, width
        runs_again = self.stage >= run.feedback_to or run.repeat_lower_blocks
        with running_statistics_kept(self.module) if runs_again else nullcontext():
            output = self.original(hidden_states)
        self.keep(run, output)
        return output

    def _second_pass(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.receives_feedback:
            run.inputs[self.stage] = hidden_states
        if self.receives_feedback and self.stage in run.feedback:
            td = run.feedback[self.stage]
            hidden_states = hidden_states + td.to(device=hidden_states.device, dtype=hidden_states.dtype)
        output = self.original(hidden_states)
        if self.index != _STEM:
            self.reconstruct(run, run.inputs[self.stage], output)
        return output

    def _check_channels(self, hidden_states: torch.Tensor, expected: int) -> None:
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"The input of stage {self.stage} has {hidden_states.shape[1]} channels, but the feedback for it has "
                f"{expected}, as many as its first convolution takes."
            )


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalise with the batch but leave their running statistics alone."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    norms = [norm for norm in norms if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class ConvNetBackboneForward(BackboneForward):
    """Forward of the backbone of a ConvNet: pass 1, feedback, pass 2."""

    records_inside = False

    def _features(self, run: Run, adapter: ActiveAdapter) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features, and after the final norm those that the prompt is compared with. Shapes: [b, h, w, c]"""
        # Contiguous, or torch chooses the kernel of the transform by what requires a gradient.
        features = run.output_below(adapter.feedback_from).movedim(1, -1).contiguous()
        return features, self._after_final_norm(features) if self._normalizes(adapter) else None

    def _normalizes(self, adapter: ActiveAdapter) -> bool:
        # The final norm has the channels of the last stage.
        return adapter.feedback_from == len(self.blocks) and super()._normalizes(adapter)


class TwoPassesOverStages(TwoPasses):
    """The replaced forwards of one ConvNet.

    Args:
        stack: the backbone, its stem and its stages.
        path: computes the feedback.
    """

    block_forward_class = StageForward
    backbone_forward_class = ConvNetBackboneForward

    def numbered_modules(self, stack: Stack) -> Iterable[tuple[int, nn.Module]]:
        """The modules that a pass can skip, the stem with them."""
        return [(_STEM, cast(ConvNetStack, stack).stem), *enumerate(stack.blocks)]

    def steer(self, index: int, value_projection: nn.Module) -> None:
        """Nothing: the stages add the feedback themselves."""
