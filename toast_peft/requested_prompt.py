"""A prompt from an example: what to look for, shown instead of learned.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - k: number of tokens that are asked for
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .collecting import device_of_inputs
from .core.dropout import in_evaluation_mode
from .core.layers import FeedbackPath, feedback_paths
from .core.padding import own_tokens
from .core.stored_pass import STORED_INPUT
from .core.topdown_layer import weight_of
from .first_pass import FirstPassIsOver
from .initialization import attention_mask_of

Tokens = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
Boxes = torch.Tensor | Sequence[float] | Sequence[Sequence[float]]


@torch.no_grad()
def prompt_from(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tokens | None = None, boxes: Boxes | None = None
) -> torch.Tensor:
    """The prompts that look for what is in some inputs: the mean normalised features of pass 1, without padding.

    They are what the mask compares with the prompt, so that given to the model as `topdown_prompt` they open the
    tokens that are similar to these. Those of the images of a class are averaged by `prompt_from(...).mean(0)`.

    Args:
        model: has one active TOAST adapter; of the forward only pass 1 is run, in evaluation mode.
        inputs: those of the model.
        tokens: the tokens to look for, all by default: a boolean mask, or positions, the same for all rows or for each
            row its own; of a map of tokens (ConvNets, Swin) row by row. Shape: [n] or [b, n], [k] or [b, k]
        boxes: instead of tokens, what to look for in `pixel_values`: left, top, right and bottom in pixels. All tokens
            of an image that a box touches count. Shape: [4] or [b, 4]

    Returns:
        One prompt for each row, not normalised again. Shape: [b, d]

    Raises:
        ValueError: if there is not one stack of blocks with an active adapter, or if tokens or boxes do not fit.

    Example:

    ```py
    >>> request = toast_peft.prompt_from(model, example, boxes=[32, 32, 96, 128])
    >>> logits = model(**images, topdown_prompt=request).logits
    ```
    """
    if tokens is not None and boxes is not None:
        raise ValueError("Both `tokens` and `boxes` were given; expected one of them.")
    device = device_of_inputs(model)
    inputs = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items() if name != STORED_INPUT
    }
    features, is_own = Features(model).of(inputs)
    if boxes is not None:
        chosen = _in_boxes(boxes, inputs.get("pixel_values"), features, _patch_size(model))
    elif tokens is not None:
        chosen = _as_mask(torch.as_tensor(tokens, device=features.device), features.shape[:-1])
    else:
        chosen = is_own
    if (chosen & ~is_own).any():
        raise ValueError(
            "`tokens` asks for padding, which `attention_mask` leaves out; expected tokens of the inputs."
        )
    weights = chosen.unsqueeze(-1)
    prompts = (F.normalize(features.flatten(1, -2), dim=-1) * weights).sum(1) / weights.sum(1)
    bad = (~prompts.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"No prompts follow from the rows {bad}: none of their tokens was chosen, or the features are NaN or "
            "infinite; expected at least one token of each row."
        )
    return prompts


class Features:
    """Runs pass 1 of a model and gives what the mask compares with the prompt.

    Args:
        model: the model.

    Raises:
        ValueError: if there is not one stack of blocks with an active adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        active = [(backbone, path) for backbone, path in feedback_paths(model) if path.active_adapter is not None]
        if len(active) != 1:
            raise ValueError(
                f"`model` has {len(active)} stacks of blocks with an active TOAST adapter; expected one, whose "
                "features a prompt is compared with."
            )
        [(self.backbone, self.path)] = active
        self.attention_mask: Any = None

    def of(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is compared, and which tokens are not padding. Shapes: [b, n, d], of a map [b, h, w, d]; [b, n]"""
        current = self.path.state.current
        selected = current.selected
        with ExitStack() as stack:
            # Of the last forward with feedback, which this is none of, for `feedback_statistics`.
            stack.callback(setattr, current, "selected", selected)
            stack.enter_context(in_evaluation_mode(self.model.modules()))
            stack.enter_context(self.backbone.register_forward_pre_hook(self._keep_mask, with_kwargs=True))
            stack.enter_context(self.path.register_forward_pre_hook(_end))
            try:
                self.model(**inputs)
            except FirstPassIsOver as over:
                features = over.features
            else:
                raise ValueError(f"The forward of {type(self.model).__name__} does not run the adapted backbone.")
        if features.dim() < 3:
            raise ValueError(
                f"The features of {type(self.backbone).__name__} have the shape {list(features.shape)}; expected "
                "[rows, tokens, channels], so that it is known which tokens are of which row."
            )
        learned = weight_of(self.path.selection.topdown_prompt[str(self.path.active_adapter)])
        features = features.to(torch.promote_types(learned.dtype, torch.float32))
        return features, self._own_tokens(features)

    def _keep_mask(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.attention_mask = attention_mask_of(self.path, args, kwargs)

    def _own_tokens(self, features: torch.Tensor) -> torch.Tensor:
        own = own_tokens(self.attention_mask, features.shape[:-1])
        if own is None:
            own = torch.ones(features.flatten(1, -2).shape[:-1], dtype=torch.bool)
        return own.to(features.device)


def _end(path: FeedbackPath, args: tuple) -> None:
    features, _, compared, _ = args
    raise FirstPassIsOver(features if compared is None else compared)


def _as_mask(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The tokens that were asked for, as a mask of all.

    Args:
        tokens: a mask or positions. Shape: [n] or [b, n], of a map also [h, w] or [b, h, w]; [k] or [b, k]
        shape: b and n, or b, h and w of a map.

    Returns:
        Shape: [b, n]
    """
    num_rows, num_tokens = shape[0], shape[1:].numel()
    if tokens.dtype == torch.bool:
        if tokens.shape in (shape, shape[1:], (num_rows, num_tokens), (num_tokens,)):
            return tokens.reshape(-1, num_tokens).expand(num_rows, -1)
        raise ValueError(
            f"`tokens` is a mask of the shape {list(tokens.shape)}; expected [{num_tokens}] or [{num_rows}, "
            f"{num_tokens}], an entry for each token."
        )
    is_whole = not (tokens.is_floating_point() or tokens.is_complex())
    if not is_whole or tokens.dim() not in (1, 2) or (tokens.dim() == 2 and len(tokens) != num_rows):
        raise ValueError(
            f"`tokens` has the shape {list(tokens.shape)} and the type {tokens.dtype}; expected a boolean mask, or "
            f"positions of the shape [k] or [{num_rows}, k]."
        )
    outside = tokens[(tokens < 0) | (tokens >= num_tokens)].tolist()
    if outside:
        raise ValueError(f"`tokens` has the positions {outside}; expected some of 0 to {num_tokens - 1}.")
    positions = tokens.long().expand(num_rows, -1)
    mask = torch.zeros(num_rows, num_tokens, dtype=torch.bool, device=tokens.device)
    return mask.scatter(1, positions, torch.ones_like(positions, dtype=torch.bool))


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, by the config of the adapted backbone; `None` if it has none."""
    size = getattr(getattr(Features(model).backbone, "config", None), "patch_size", None)
    return (size, size) if isinstance(size, int) else size


def _in_boxes(
    boxes: Boxes, pixel_values: Any, features: torch.Tensor, patch_size: Sequence[int] | None
) -> torch.Tensor:
    """The tokens of an image that a box touches. Those before the patches, as CLS, are of no place.

    Args:
        boxes: Shape: [4] or [b, 4]
        pixel_values: Shape: [b, channels, height, width]
        features: Shape: [b, n, d], of a map [b, h, w, d]
        patch_size: height and width of a patch, of a model whose features are no map.

    Returns:
        A mask. Shape: [b, n]
    """
    left, top, right, bottom = _edges(boxes, features)
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() != 4:
        raise ValueError("`boxes` needs `pixel_values` of the shape [rows, channels, height, width]; give `tokens`.")
    sizes = pixel_values.shape[-2:]
    if features.dim() == 4:
        num_rows, num_columns = features.shape[1:3]
        height, width = sizes[0] / num_rows, sizes[1] / num_columns
    elif patch_size is None:
        raise ValueError("`boxes` needs a `patch_size` in the config of the backbone, which has none; give `tokens`.")
    else:
        height, width = patch_size
        num_rows, num_columns = sizes[0] // patch_size[0], sizes[1] // patch_size[1]
    num_before = features.shape[1:-1].numel() - num_rows * num_columns
    if num_before < 0:
        raise ValueError(
            f"Of {num_rows} x {num_columns} patches there are {features.shape[1]} features, so that it is not known "
            "where they are in the image; give `tokens`."
        )
    y, x = (torch.arange(number, device=features.device) for number in (num_rows, num_columns))
    rows, columns = (y * height < bottom) & ((y + 1) * height > top), (x * width < right) & ((x + 1) * width > left)
    return F.pad((rows[:, :, None] & columns[:, None, :]).flatten(1), (num_before, 0))


def _edges(boxes: Boxes, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Left, top, right and bottom of the box of each row. Shape of each: [b, 1]"""
    corners = torch.as_tensor(boxes, device=features.device)
    if corners.shape not in ((4,), (len(features), 4)) or not (corners[..., :2] < corners[..., 2:]).all():
        raise ValueError(
            f"`boxes` is {corners.tolist()}; expected left, top, right and bottom of one, or of one for each of the "
            f"{len(features)} rows, with left < right and top < bottom."
        )
    return corners.expand(len(features), 4).split(1, dim=1)
