"""The feedback path of a hierarchical transformer, whose stages halve height and width and widen the channels.

Beyond the paper. Within a stage it is the path of `feedback.py`. Where it goes down into the next stage, `linear1`
undoes what leads up from there: as patch merging makes one token of four, it makes four of one.

Notation used for tensor shapes:
    - b: batch size
    - h, w, d: height, width and channels of a block's input
    - h', w', d': those of what comes from the block above
"""

import torch
from torch import nn
from torch.nn import functional as F

from .config import TopDownConfig
from .feedback import FeedbackLayer, FeedbackPath, to_device_of
from .hierarchical_stack import HierarchicalStack
from .value_projection import input_size

_MERGED = 2  # tokens in height and in width that become one in the next stage


class HierarchicalFeedbackLayer(FeedbackLayer):
    """One block's share of the feedback path.

    Args:
        value_projection: the layer whose device and dtype new parameters take.
        in_features: d'.
        from_next_stage: whether the block above is of the next stage. Then `linear1` has four times as many outputs,
            and `init_weights=True` starts it with channel `i` to channel `i mod d` of all four tokens, scaled such
            that the variance stays.
    """

    def __init__(self, value_projection: nn.Module, in_features: int, from_next_stage: bool) -> None:
        super().__init__(value_projection, in_features, input_size(value_projection))
        self.num_tokens = _MERGED**2 if from_next_stage else 1

    def _new_linear1(self, in_features: int) -> nn.Module:
        return self._new_linear(in_features, self.num_tokens * self.out_features)

    def init_identity(self, linear1: torch.Tensor) -> None:
        channels = torch.arange(self.in_features)
        linear1.zero_()
        for token in range(self.num_tokens):
            linear1[token * self.out_features + channels % self.out_features, channels] = self._identity_scale

    def _identity(self, z: torch.Tensor) -> torch.Tensor:
        """What `init_identity` sets `linear1` to, without weights."""
        return self._fold_channels(z).repeat(1, 1, 1, self.num_tokens)

    def forward(self, z: torch.Tensor, adapter_name: str, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One step down the feedback path.

        Args:
            z: what the block above passes on, or the selected features. Shape: [b, h', w', d']
            size: h and w. If they are odd, what is too much at the bottom and on the right is cut off.

        Returns:
            What the block below gets, and the feedback of this block. Shapes: [b, h, w, d], [b, h, w, d]

        Raises:
            RuntimeError: if the stage above is not about half as high and wide.
        """
        z = self._linear1(z, adapter_name)
        if self.num_tokens > 1:
            z = _unmerge(z)
        missing = [wanted - found for wanted, found in zip(size, z.shape[1:3], strict=True)]
        if max(map(abs, missing)) >= _MERGED:
            raise RuntimeError(
                f"Feedback for {list(z.shape[1:3])} tokens has to be added to {list(size)}. TOAST supports stages "
                "that halve height and width."
            )
        z = F.pad(z, (0, 0, 0, missing[1], 0, missing[0])) if any(missing) else z
        return z, self._linear2(z, adapter_name)


def _unmerge(z: torch.Tensor) -> torch.Tensor:
    """Shape: [b, h', w', 4 d] -> [b, 2 h', 2 w', d]"""
    z = z.unflatten(-1, (_MERGED, _MERGED, -1))  # b, h', w', rows, columns, d
    return z.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class HierarchicalFeedbackPath(FeedbackPath):
    """Feature selection and the chain of feedback layers through several stages.

    Args:
        stack: the blocks of all stages.
    """

    def __init__(self, stack: HierarchicalStack) -> None:
        super().__init__(stack.value_projections[max(stack.value_projections)])
        self.hidden_sizes = stack.hidden_sizes
        self.stages = stack.stages

    def add_block(self, index: int, value_projection: nn.Module, config: TopDownConfig) -> FeedbackLayer:
        """The feedback layer of a block, made if it is not there.

        The first one of a chain, which starts from the output of its own block, is another one than where the chain
        comes from the block above.
        """
        above = index + 1
        is_first = above == config.feedback_range(len(self.stages))[0]
        name = _name(index, is_first and above < len(self.stages))
        if name not in self.layers:
            source = index if is_first else above
            self.layers[name] = HierarchicalFeedbackLayer(
                value_projection, self.hidden_sizes[source], self.stages[source] > self.stages[index]
            )
        return self.layers[name]

    def forward(
        self, features: torch.Tensor, adapter_name: str, sizes: dict[int, tuple[int, int]]
    ) -> dict[int, torch.Tensor]:
        """The feedback of every block.

        Args:
            features: features of pass 1. Shape: [b, n, d]
            sizes: for each block the height and width of its input.

        Returns:
            For each block index what is added to the input of its value projection. Shape: [b, h, w, d]
        """
        first, last = self.selection.topdown_config[adapter_name].feedback_range(len(self.stages))
        features = to_device_of(self.selection, features).unflatten(1, sizes[first - 1])
        z = self.selection(features, adapter_name)
        feedback = {}
        for index in range(first - 1, last - 1, -1):
            layer = self.layers[_name(index, index == first - 1 < len(self.stages) - 1)]
            z, feedback[index] = layer(to_device_of(layer, z), adapter_name, sizes[index])
        return feedback


def _name(index: int, is_start: bool) -> str:
    return f"{index}_start" if is_start else str(index)
