"""What the two passes run over in a model; each family of models makes its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import nn

from ..config import TopDownConfig
from .layers import FeedbackPath
from .two_passes import TwoPasses


@dataclass(kw_only=True)
class Stack(ABC):
    """The part of a model that the two passes run over.

    Args:
        backbone: the module that owns the blocks; its forward is run twice.
        blocks: all blocks, from the input to the output; of a ConvNet the stages.
        blocks_name: the full name in the model of the list of blocks.
        final_norm: path from the backbone to the norm that follows the last block, `None` if unknown.
        normalize_features: whether, by the model type, the feedback starts after `final_norm`.
        model_type: what the backbone is, for messages and for comparing when an adapter is loaded.
        names: the full names in the model of the modules that the feedback is added to the input of, each with the
            index of its block.
        has_cache: whether the backbone may fill a key-value cache.
        excluded: names that `exclude_modules` leaves out of `names`.
        second_pass: the full names in the model of the linear layers with LoRA of pass 2, by their names in the path.
    """

    backbone: nn.Module
    blocks: list[nn.Module] | nn.ModuleList | nn.Sequential
    blocks_name: str
    final_norm: str | None
    normalize_features: bool
    model_type: str
    names: dict[str, int]
    has_cache: bool = False
    excluded: set[str] = field(default_factory=set)
    second_pass: dict[str, str] = field(default_factory=dict)

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Number of channels of the features that the feedback starts from."""

    @property
    def adapted_names(self) -> list[str]:
        """Full names of the modules that get another forward or hooks, and so must stay what they are."""
        return [
            *self.names,
            *self.second_pass.values(),
            *(f"{self.blocks_name}.{index}" for index in range(len(self.blocks))),
        ]

    def add_feedback_path(self, model: nn.Module) -> FeedbackPath:
        """Give the backbone, a part of `model`, a feedback path still without adapters, and let it run twice."""
        path = self._new_feedback_path()
        path.passes = self._new_passes(path, model)
        self.backbone.feedback_path = path
        return path

    def add_adapter(self, path: FeedbackPath, model: nn.Module, adapter_name: str, config: TopDownConfig) -> None:
        """Give a new adapter what it has besides the feedback layers of the blocks."""
        path.selection.update_layer(adapter_name, config, self.hidden_size, self.blocks_name, len(self.blocks))
        if config.feedback_to_output:
            path.add_output().update_layer(adapter_name, config, self.hidden_size)
            path.passes.steer_output()
        for name, full_name in self.second_pass.items():
            target = model.get_submodule(full_name)
            layer = path.add_target(name, target)
            layer.update_layer(adapter_name, config)
            path.passes.add_in_second_pass(name, target, layer)

    @abstractmethod
    def _new_feedback_path(self) -> FeedbackPath: ...

    def _new_passes(self, path: FeedbackPath, model: nn.Module) -> TwoPasses:
        return TwoPasses(self, path, model)


def remove_feedback_path(backbone: nn.Module, path: FeedbackPath) -> None:
    """Leave the backbone as it was before `add_feedback_path`."""
    if path.fused is not None:
        path.fused.remove()
    path.passes.remove()
    del backbone.feedback_path
