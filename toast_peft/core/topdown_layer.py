"""What PEFT asks of the layers of a method: containers keyed by adapter name, switching, and what is refused."""

import re
import uuid
from typing import ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import TopDownConfig

NO_MERGE = (
    "TOAST cannot be merged into the base model: the feedback depends on the input, it is not a change of weights. "
    "Keep the adapter, or use `unload()` to get the plain base model back."
)
NO_DELTA_WEIGHT = (
    "TOAST has no delta weight: the feedback depends on the input, it is not a change of weights. To see what an "
    "adapter changes, compare the outputs with and without `disable_adapter()`."
)


class TopDownLayer(nn.Module, BaseTunerLayer):
    """What the parts of the feedback share: containers keyed by adapter name, as PEFT wants them.

    Args:
        value_projection: the layer whose device and dtype new parameters take. It stays a part of its own block.
    """

    cast_input_dtype_enabled = True
    # Container name without prefix -> the entry of `trainable_parts` it belongs to.
    parts: ClassVar[dict[str, str]] = {}
    value_projection: nn.Module
    frozen_peft_weight_names: dict[str, tuple[str, ...]]

    def __init__(self, value_projection: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's registration: the projection must not become a second owner's submodule.
        self.__dict__["value_projection"] = value_projection
        self.frozen_peft_weight_names = {}
        self.merged_adapters = []
        # Not a method: PEFT takes a method for mergeable if its layers have one.
        self.__dict__["merge"] = _merge_nothing

    def get_base_layer(self) -> nn.Module:
        """The value projection without any wrapper of another method; PEFT takes device and dtype from it."""
        layer = self.value_projection
        base: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        return base

    def _finish_update(self, adapter_name: str, config: TopDownConfig, frozen: tuple[str, ...] = ()) -> None:
        parts = {f"topdown_{name}": part for name, part in self.parts.items()}
        untrained = {name for name, part in parts.items() if part not in (config.trainable_parts or ())}
        self.frozen_peft_weight_names[adapter_name] = tuple(sorted(untrained | set(frozen)))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The weights of an offloaded layer are not on the device it runs on; its accelerate hook knows that.
        hook = getattr(self.get_base_layer(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def unmerge(self) -> None:
        """Nothing: feedback is never merged."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Always raises: feedback is not a change of weights."""
        raise NotImplementedError(NO_DELTA_WEIGHT)

    # Who scales adapters calls these three on every layer. The feature selection does it for the whole chain, once.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Nothing: the strength of the feedback is that of the feature selection."""

    def scale_layer(self, scale: float) -> None:
        """Nothing: the strength of the feedback is that of the feature selection."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing: the strength of the feedback is that of the feature selection."""


def _merge_nothing(safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """For another method, which calls this as well when it merges its own. TOAST's tuner refuses to merge."""


class AdapterIdentity:
    """Tells an adapter of one model from any other, also of the same name; one of a copied model has its own."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex

    def __deepcopy__(self, memo: dict) -> "AdapterIdentity":
        return AdapterIdentity()


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer without bias; a plain tensor within `torch.func.functional_call`."""
    return cast(nn.Parameter, layer.weight)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor, of any shape, was changed in place; one of inference mode does not count that, and has 0."""
    return 0 if tensor.is_inference() else tensor._version


def belongs_to(adapter_name: str, parameter_name: str) -> bool:
    """Whether a parameter of a model is feedback of an adapter, `...topdown_prompt.default.weight` for example."""
    return re.search(rf"\.topdown_\w+\.{re.escape(adapter_name)}\.", parameter_name) is not None


def device_of(root: nn.Module) -> torch.device:
    """Where the parameters of a module are, which has some."""
    pending: list[nn.Module | None] = [root]
    while True:
        module = pending.pop()
        if module is not None:
            for parameter in module._parameters.values():
                if parameter is not None:
                    return parameter.device
            pending.extend(module._modules.values())


def to_device_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of any shape, where the module is. Blocks, and with them feedback layers, may be on several devices.

    Raises:
        RuntimeError: if the module has no weights, as after a failed load with `low_cpu_mem_usage`.
    """
    device = device_of(module)
    if device.type != "meta":
        return tensor.to(device)
    is_offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())  # its own hook will fetch the weights
    if tensor.device.type != "meta" and not is_offloaded:
        raise RuntimeError(
            "The TOAST adapter has no weights: it was made with `low_cpu_mem_usage=True` and none were loaded, or "
            "loading them has failed. Load it again, or take it away with `delete_adapter`."
        )
    return tensor
