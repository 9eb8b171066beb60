"""Fused feedback for inference: from the selected tokens to the feedback of all blocks at once.

The feedback path is linear, so the feedback of a block is one matrix times the selected tokens:

    td_l = (m * x) @ M_l                with  M_l = transform @ W1_{L-1}' @ ... @ W1_l' @ W2_l'
    TOAST-Lite, W1 = 1 + s B1 A1 and W2 = s B2 A2:      M_l = (transform @ W1_{L-1}' @ ... @ W1_l' @ A2_l') @ (s B2_l')

A value projection is linear as well. Where all of a path are plain layers their weights are folded in, and what is
computed is the feedback of the values, of as many channels as these have:

    W_v (h + td_l) + b = W_v h + (m * x) @ (M_l @ W_v') + b

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - r: rank of TOAST-Lite
    - l: number of blocks that receive feedback
    - out: number of channels of the feedback, d, or of the values
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .feature_selection import FeatureSelection, Prompt
from .feedback import select
from .folded_values import FoldedValues, foldable, value_bias, value_weight
from .layers import FeedbackLayer, FeedbackPath, feedback_paths
from .topdown_layer import version_of, weight_of
from .value_projection import ValueHooks


class FusedFeedback(nn.Module):
    """The feedback path of one adapter as one matmul, or as a matmul and a batched one in TOAST-Lite.

    The matrices are buffers that are not saved: they move with the model, and the adapter's own weights stay.

    Args:
        path: the feedback path, which stays as it is.
        adapter_name: its adapter.

    Raises:
        NotImplementedError: if the path or its weights cannot be fused.

    Attributes:
        of_values: whether it gives the feedback of the values, not of the input of the value projections.
    """

    down: torch.Tensor  # [d, l * out]; in TOAST-Lite [d, l * r]
    up: torch.Tensor | None  # [l, r, out] in TOAST-Lite
    bias: torch.Tensor | None  # of the values, [l, out]

    def __init__(self, path: FeedbackPath, adapter_name: str) -> None:
        super().__init__()
        _check_that_it_can_be_fused(path, adapter_name)
        self.adapter_name = adapter_name
        self.blocks = path.blocks_of(adapter_name)
        hooks = foldable(path.passes.value_hooks[index] for index in self.blocks)
        self.of_values = bool(hooks)
        self.weights = Weights([*_modules_of(path, adapter_name), *(hook.module for hook in hooks)])
        self.forwards: list[FoldedValues] = []
        prompt = weight_of(path.selection.topdown_prompt[adapter_name])
        # An adapter is in float32 beside a base model in less; what is folded into that is so precise as its weights.
        like = prompt.to(value_weight(hooks[0]).dtype) if hooks else prompt
        with torch.no_grad():
            down, *up = zip(*_factors(path, adapter_name, hooks), strict=True)
            config = path.selection.topdown_config[adapter_name]
            biases = [value_bias(hook, config.double_value_bias) for hook in hooks]
            biases_there = [bias.to(like) for bias in biases if bias is not None]
            self._keep("down", torch.cat(down, dim=-1).to(like))
            self._keep("up", torch.stack(up[0]).to(like) if up else None)
            self._keep("bias", torch.stack(biases_there) if biases_there else None)

    def _keep(self, name: str, matrix: torch.Tensor | None) -> None:
        self.register_buffer(name, matrix, persistent=False)

    def install(self, path: FeedbackPath) -> None:
        """Let the path compute its feedback here, and the value projections take that of their values."""
        path.fused = self.train(path.training)
        if self.of_values:
            self.forwards = [FoldedValues(path.passes.value_hooks[index]) for index in self.blocks]

    def remove(self) -> None:
        """Leave the value projections as they were."""
        for forward in self.forwards:
            forward.remove()

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """The feedback of every block.

        Args:
            features: features of pass 1. Shape: [b, n, d]
            mask: weights of the tokens. Shape: [b, n, 1]

        Returns:
            For each block index what is added to the input of its value projection, or to the values. Shape: as that
        """
        tokens = select(features, mask, lambda z: z.flatten(0, -2)).to(self.down.dtype)
        td = self._full(tokens) if self.up is None else self._low_rank(tokens, self.up)
        shape = (*mask.shape[:-1], td[0].shape[-1])
        return {index: of_block.view(shape) for index, of_block in zip(self.blocks, td, strict=True)}

    def _full(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shape: [b * n, d] -> [b * n, out] for each block"""
        td = tokens @ self.down if self.bias is None else torch.addmm(self.bias.flatten(), tokens, self.down)
        return td.unflatten(-1, (len(self.blocks), -1)).unbind(1)

    def _low_rank(self, tokens: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shape: [b * n, d] -> [b * n, out] for each block"""
        z = (tokens @ self.down).unflatten(-1, (len(self.blocks), -1)).transpose(0, 1)  # l, b * n, r
        return (torch.bmm(z, up) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), z, up)).unbind(0)

    def check(self, active: list[str], training: bool) -> None:
        """Look whether it is still the feedback of the active adapter, and all that is asked for.

        Args:
            active: the active adapters.
            training: whether the backbone is in training mode.

        Raises:
            RuntimeError: if not.
        """
        if active != [self.adapter_name]:
            raise RuntimeError(
                f"The feedback of the adapter {self.adapter_name!r} is fused, and "
                f"{' and '.join(map(repr, active))} is active. "
                "Call `unfuse_feedback()`."
            )
        if training:
            raise RuntimeError(
                "Fused feedback is for inference, and the model is in training mode. Call `model.eval()` first, or "
                "`unfuse_feedback()` to train."
            )
        if torch.is_grad_enabled() and self.weights.require_grad():
            raise RuntimeError(
                "Fused feedback gives no gradients to the weights that it was made of, some of which require one. Run "
                "the model within `torch.no_grad()`, or call `unfuse_feedback()` first."
            )
        # What is compiled is not asked: torch.compile would make the versions of the weights a part of the graph.
        if not torch.compiler.is_compiling() and self.weights.have_changed():
            raise RuntimeError(
                "Weights that fused feedback was made of have changed since. Call `unfuse_feedback()`, and then "
                "`fuse_feedback()` again."
            )


class Weights:
    """The weights of some modules, and whether they are still those that they were.

    Args:
        modules: they have no weights in submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # Of the modules and not the tensors themselves: loading may put others in their place.
        self.parameters = [module._parameters for module in modules]
        self.versions = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [
            (id(weight), version_of(weight))
            for parameters in self.parameters
            for weight in parameters.values()
            if weight is not None
        ]

    def have_changed(self) -> bool:
        """Whether one is another tensor, or was changed in place. Moving and casting a model keeps the tensors."""
        return self._versions() != self.versions

    def require_grad(self) -> bool:
        """Whether one requires a gradient."""
        weights = (weight for parameters in self.parameters for weight in parameters.values())
        return any(weight is not None and weight.requires_grad for weight in weights)

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "have_changed": self.have_changed()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parameters = state["parameters"]  # of the copy, which has tensors of its own
        self.versions = [] if state["have_changed"] else self._versions()


def _modules_of(path: FeedbackPath, adapter_name: str) -> list[nn.Module]:
    """The modules that have the weights of an adapter."""
    layers = [path.selection, *(layer for _, layer in path.layers_of(adapter_name))]
    # A gate is a factor of the mask, which is computed as ever.
    names = [(layer, name) for layer in layers for name in layer.adapter_layer_names if name != "topdown_gate"]
    containers = [getattr(layer, name) for layer, name in names]
    return [container[adapter_name] for container in containers if adapter_name in container]


def _check_that_it_can_be_fused(path: FeedbackPath, adapter_name: str) -> None:
    if not path.keeps_shape:
        raise NotImplementedError(
            "`fuse_feedback()` does not support ConvNets and hierarchical transformers, whose feedback changes its "
            "shape from stage to stage. Use the model as it is."
        )
    for module in _modules_of(path, adapter_name):
        weight = weight_of(module)
        dimensions = 1 if isinstance(module, Prompt) else 2
        if type(weight) is not nn.Parameter or weight.is_meta or weight.dim() != dimensions or weight.numel() == 0:
            raise NotImplementedError(
                "`fuse_feedback()` needs the weights of the adapter in one piece, and they are offloaded, sharded "
                "(FSDP, DeepSpeed) or not loaded. Use the model as it is, or load it on one device."
            )


def _factors(path: FeedbackPath, adapter_name: str, hooks: list[ValueHooks]) -> list[tuple[torch.Tensor, ...]]:
    """The matrix `M_l` of each block, as two factors where it is of low rank.

    Args:
        path: the feedback path.
        adapter_name: its adapter.
        hooks: of the value projections whose weights are folded in, or none.

    Returns:
        For each block, from the top down, one matrix or two. Shapes: [d, out]; or [d, r], [r, out]
    """
    z = _transform(path.selection, adapter_name)
    factors = []
    for i, (_, layer) in enumerate(path.layers_of(adapter_name)):
        z = _times(z, layer, "topdown_linear1", adapter_name)
        if adapter_name in layer.topdown_linear2:
            of_block = [_times(z, layer, "topdown_linear2", adapter_name)]
        else:
            a, b = _low_rank(z, layer, "topdown_linear2", adapter_name)
            of_block = [z @ a, b]
        if hooks:
            of_block[-1] = of_block[-1] @ value_weight(hooks[i]).to(z)
        factors.append(tuple(of_block))
    return factors


def _transform(selection: FeatureSelection, adapter_name: str) -> torch.Tensor:
    """The channel transform, `1 + A' B'` where it is of low rank. Shape: [d, d]"""
    prompt = weight_of(selection.topdown_prompt[adapter_name])
    # Float64, so that the rounding of many products does not add up; MPS does not have it.
    dtype = torch.float32 if prompt.device.type == "mps" else torch.float64
    if adapter_name in selection.topdown_transform:
        return weight_of(selection.topdown_transform[adapter_name]).to(dtype)
    a, b = (weight_of(getattr(selection, f"topdown_transform_{factor}")[adapter_name]).T.to(dtype) for factor in "AB")
    return torch.eye(len(prompt), dtype=dtype, device=prompt.device) + a @ b


def _times(z: torch.Tensor, layer: FeedbackLayer, name: str, adapter_name: str) -> torch.Tensor:
    """`z @ W'` of `linear1` or `linear2`, `W' + s A' B'` in TOAST-Lite. Shape: [d, d] -> [d, d]"""
    full = getattr(layer, name)
    product = z @ weight_of(full[adapter_name]).T.to(z) if adapter_name in full else z  # the identity is not stored
    if adapter_name not in layer.topdown_scaling:
        return product
    a, b = _low_rank(z, layer, name, adapter_name)
    return product + z @ a @ b


def _low_rank(
    z: torch.Tensor, layer: FeedbackLayer, name: str, adapter_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A'` and `s B'` of TOAST-Lite, in the precision of `z`. Shapes: [d, r], [r, d]"""
    a, b = (weight_of(getattr(layer, f"{name}_{factor}")[adapter_name]).T.to(z) for factor in "AB")
    return a, layer.topdown_scaling[adapter_name] * b


def fuse(model: nn.Module) -> None:
    """Fuse the feedback of the active adapter, in all feedback paths of a model.

    Raises:
        ValueError: if there is no active adapter, or if feedback is fused already.
        NotImplementedError: if it cannot be fused.
    """
    paths = [path for _, path in feedback_paths(model) if path.active_adapter is not None]
    refuse_fused(model, "fuse it again")
    if not paths:
        raise ValueError(
            "No TOAST adapter is active; expected one, as `fuse_feedback()` fuses that of the active one."
        )
    all_fused = [FusedFeedback(path, str(path.active_adapter)) for path in paths]
    for path, fused in zip(paths, all_fused, strict=True):
        fused.install(path)


def unfuse(model: nn.Module) -> None:
    """Go back to the feedback path as it is trained. Nothing happens where no feedback is fused."""
    for _, path in feedback_paths(model):
        if path.fused is not None:
            path.fused.remove()
            path.fused = None


def refuse_fused(model: nn.Module, action: str, adapter_name: str | None = None) -> None:
    """Refuse what would make fused feedback wrong.

    Args:
        model: the model.
        action: what was to be done, for the message.
        adapter_name: only if the fused feedback is that of this adapter.

    Raises:
        ValueError: if feedback is fused.
    """
    names = {path.fused.adapter_name for _, path in feedback_paths(model) if path.fused is not None}
    if names if adapter_name is None else adapter_name in names:
        raise ValueError(
            f"The feedback of the adapter {names.pop()!r} is fused; call `unfuse_feedback()` first, to {action}."
        )
