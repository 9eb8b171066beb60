"""The feedback path of a ConvNet: a chain of transposed convolutions from the last stage to the image.

    features x of pass 1 --> m = clamp(cos(norm(x), prompt), 0, 1) --> z_L = (m * x) @ transform, over the channels
                                                                        |
    stage L-1        td = linear2(z)  <--  z = linear1(z_L)            <-+    added to the input of the stage
       ...
    stem + stage 0   td = linear2(z)  <--  z = linear1(z of stage 1)          added to the image

Source: https://github.com/bfshi/TOAST, `visual_classification/src/models/convnext_backbone/convnext_top_down.py`.

Notation used for tensor shapes:
    - b: batch size
    - c, h, w: channels, height and width of a stage's output
    - c', h', w': those of its input, to which the feedback is added; of the first stage, the image's
    - s: stride of the stage, about h' / h
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .config import TopDownConfig
from .feedback import FeedbackLayer, FeedbackPath, to_device_of
from .stage_stack import StageShape


class ConvolutionalFeedbackLayer(FeedbackLayer):
    """One stage's share of the feedback path.

    `linear1` undoes the stage's stride: a transposed convolution with kernel and stride `s`, from `c` to `c'`
    channels. `linear2` is a convolution with a kernel of 1. Both are without bias. The factors of Lite are
    convolutions with a kernel of 1; B of `linear1` is a transposed one with kernel and stride `s`.

    There is no identity from a stage's output to its input. What `init_weights=True` starts `linear1` with is nearest
    to it: each position is repeated `s x s` times, and channel `i` goes to channel `i mod c'`, scaled such that the
    variance stays. Cutting the channels off instead would leave the image with the feedback of three of them, which
    may be inactive in all images; then `linear2` would never get a gradient.
    """

    def __init__(self, node: StageShape) -> None:
        super().__init__(node.convolution, node.out_channels, node.in_channels)
        self.stride = node.stride

    def _new_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Conv2d(in_features, out_features, kernel_size=1, bias=False)

    def _new_linear1(self, in_features: int) -> nn.Module:
        return nn.ConvTranspose2d(in_features, self.out_features, self.stride, self.stride, bias=False)

    def init_identity(self, linear1: torch.Tensor) -> None:
        channels = torch.arange(self.in_features)
        linear1.zero_()
        linear1[channels, channels % self.out_features] = self._identity_scale

    def _init_random(self, linear1: torch.Tensor) -> None:
        nn.init.kaiming_uniform_(linear1, a=math.sqrt(5))  # torch's own, which the official code leaves it at

    def _identity(self, z: torch.Tensor) -> torch.Tensor:
        """What `init_identity` sets `linear1` to, without weights. Shape: [b, c, h, w] -> [b, c', s h, s w]"""
        folded = self._fold_channels(z.movedim(1, -1)).movedim(-1, 1)
        return F.interpolate(folded, scale_factor=self.stride, mode="nearest")

    def forward(self, z: torch.Tensor, adapter_name: str, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One step down the feedback path.

        Args:
            z: what the stage above passes on, or the selected features. Shape: [b, c, h, w]
            size: h' and w'. If they are not s h and s w, bottom and right are cropped or filled with zeros.

        Returns:
            What the stage below gets, and the feedback of this stage. Shapes: [b, c', h', w'], [b, c', h', w']

        Raises:
            RuntimeError: if the size is not about s times that of `z`.
        """
        z = self._fit(self._linear1(z, adapter_name), size)
        return z, self._linear2(z, adapter_name)

    def reconstruct(self, output: torch.Tensor, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """`linear1` of the stage's output, which the variational loss compares with the stage's input.

        Args:
            output: the output of the stage. Shape: [b, c, h, w]
            hidden_states: its input, for the size. Shape: [b, c', h', w']

        Returns:
            The input as the feedback path computes it. Shape: [b, c', h', w']
        """
        return self._fit(super().reconstruct(output, adapter_name, hidden_states), tuple(hidden_states.shape[-2:]))

    def _fit(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        missing = [wanted - found for wanted, found in zip(size, z.shape[-2:], strict=True)]
        if max(map(abs, missing)) > self.stride:
            raise RuntimeError(
                f"Feedback of the size {list(z.shape[-2:])} has to be added to an input of the size {list(size)}: the "
                f"stage does not have the stride {self.stride} that its convolutions have. TOAST does not support it."
            )
        return F.pad(z, (0, missing[1], 0, missing[0])) if any(missing) else z


class ConvolutionalFeedbackPath(FeedbackPath):
    """Feature selection and the chain of feedback layers of a ConvNet.

    Args:
        nodes: one for each stage.
    """

    def __init__(self, nodes: list[StageShape]) -> None:
        super().__init__(nodes[-1].convolution)
        self.nodes = nodes

    def add_block(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        """The feedback layer of a stage, made if it is not there."""
        if str(index) not in self.layers:
            self.layers[str(index)] = ConvolutionalFeedbackLayer(self.nodes[index])
        return self.layers[str(index)]

    def forward(
        self,
        features: torch.Tensor,
        adapter_name: str,
        compared: torch.Tensor,
        sizes: dict[int, tuple[int, int]],
    ) -> dict[int, torch.Tensor]:
        """The feedback of every stage.

        Args:
            features: features of pass 1. Shape: [b, h, w, c]
            compared: what the prompt is compared with, the features or these after a norm. Shape: [b, h, w, c]
            sizes: for each stage the height and width of its input.

        Returns:
            For each stage what is added to its input; for the first, to the image. Shape: [b, c', h', w']
        """
        features, compared = (to_device_of(self.selection, x) for x in (features, compared))
        z = self.selection(features, adapter_name, compared).movedim(-1, 1)
        feedback = {}
        for index in self.blocks_of(adapter_name):
            layer = self.layers[str(index)]
            z, feedback[index] = layer(to_device_of(layer, z), adapter_name, sizes[index])
        return feedback
