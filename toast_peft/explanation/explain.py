"""Runs a model without and with its feedback, and keeps what is to be looked at.

Pass 1 is the forward with the feedback of the stack left out, pass 2 the forward as it is, both with eager attention,
which alone returns what the attentions are.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - h, w: height and width of a map of tokens
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..core.dropout import in_evaluation_mode
from ..core.layers import FeedbackPath, feedback_path_of, feedback_paths
from ..core.strength import rescaled
from ..families.convnets import ConvNetFeedbackPath
from .explanation import NUM_PREDICTIONS, Explanation, Pass
from .grids import images_of, patch_grid, patch_size_of
from .received import recorded_attention
from .swap import swapped_features


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor_or_tokenizer: Any = None,
    *,
    stack: str | None = None,
    adapter_name: str | None = None,
) -> Explanation:
    """Show what the mask selects, and what the feedback changes in attention and output.

    The model runs twice, and a third time if there are several rows, in evaluation mode, without gradients and with
    eager attention; afterwards it is as it was. Meanwhile no other thread should use it.

    Args:
        model: has the adapter, as a PEFT model or injected directly.
        inputs: of the model's forward, on its device.
        processor_or_tokenizer: the tokenizer gives the tokens their names, the image processor the images their
            colours; a processor may do both.
        stack: where several stacks of blocks have feedback, as encoder and decoder, the name of one of them. The
            feedback of the others stays in both passes.
        adapter_name: where several adapters are active, whose mask, gate and norms of the feedback. Pass 1 is without
            any of them and pass 2 with all.

    Returns:
        Arrays on the CPU, all in float32. `plot()`, `save()` and `to_html()` draw them.

    Raises:
        ValueError: if no adapter is active, if it is not clear which stack or which adapter is meant, or if `inputs`
            have a cache or `adapter_names`.
        TypeError: if `inputs` is not a dict.
        NotImplementedError: if the tokens have no batch dimension, as in the vision towers of Qwen-VL.

    Example:

    ```py
    >>> inputs = processor(image, return_tensors="pt")
    >>> explanation = toast_peft.explain(model, inputs, processor)
    >>> explanation.save("cat.html")
    ```
    """
    _check_inputs(inputs)
    name, backbone, path = _find_stack(model, stack)
    forward = partial(_Forward, backbone, path, _find_adapter(path, adapter_name))
    with torch.no_grad(), in_evaluation_mode(model.modules()), _with_eager_attention(backbone), _all_rows(path):
        with rescaled([path.selection], 0.0):
            first = forward(has_feedback=False).run(model, inputs)
        second = forward(has_feedback=True).run(model, inputs)
        swapped = _with_features_of_others(forward(has_feedback=True), model, inputs) if len(second.mask) > 1 else None
    passes = first.as_pass(), second.as_pass()
    return Explanation(
        first=passes[0],
        second=passes[1],
        mask=second.mask,
        gate=second.gate,
        feedback_norm=second.feedback_norm,
        features=second.features,
        swapped_logits=swapped,
        **_tokens(_side(model, name), second.mask, inputs, processor_or_tokenizer),
        **_picture(backbone, second.mask, inputs, processor_or_tokenizer),
        has_logits_of_tokens=_side(model, name) != "encoder_" and _is_of_tokens(second.logits, second.mask),
        labels=_labels(model, [p.logits for p in passes if p.logits is not None], processor_or_tokenizer),
    )


class _Forward:
    """One forward of the model, and what hooks on a stack see of one of the active adapters.

    Attributes:
        mask: Shape: [b, n], or of a map [b, h, w]
        gate: `None` without one. Shape: as the mask
        features: Shape: [b, n, d], or of a map [b, h, w, d]
        feedback_norm: for each block the norm of what is added. Shape: as the mask; the map has the block's size
    """

    mask: np.ndarray
    gate: np.ndarray | None
    features: np.ndarray
    feedback_norm: dict[int, np.ndarray]

    def __init__(self, backbone: nn.Module, path: FeedbackPath, adapter_name: str, has_feedback: bool) -> None:
        self.backbone, self.path, self.has_feedback = backbone, path, has_feedback
        self.adapter_name = adapter_name
        self.attentions: tuple[torch.Tensor, ...] = ()
        self.received: dict[int, torch.Tensor] = {}
        self.logits: torch.Tensor | None = None

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> "_Forward":
        with ExitStack() as hooks:
            for backbone, path in feedback_paths(model):
                ask = partial(self._ask, path)
                hooks.enter_context(backbone.register_forward_pre_hook(ask, with_kwargs=True))
            hooks.enter_context(self.backbone.register_forward_hook(self._see_output))
            hooks.enter_context(self.path.register_forward_hook(self._see_feedback, with_kwargs=True))
            self.received = hooks.enter_context(recorded_attention(self.path))
            self.logits = getattr(model(**inputs), "logits", None)
        return self

    def _ask(
        self, path: FeedbackPath, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Ask the backbone itself for attentions: a model around it may return those of another one."""
        forward = path.passes.backbone_forward
        asked = {"use_cache": False} if "use_cache" in forward.argument_names else {}
        if path is self.path and path.keeps_shape and "output_attentions" in forward.not_recorded:
            asked["output_attentions"] = True
        return args, kwargs | asked

    def _see_output(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self.attentions = getattr(output, "attentions", None) or ()

    def _see_feedback(
        self, path: FeedbackPath, args: tuple, kwargs: dict[str, Any], feedback: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor] | None:
        name = args[1]
        if name != self.adapter_name:
            return None if self.has_feedback else {}
        mask, gate, _ = path.state.current.selected[name]
        assert mask is not None  # it is none while a model is exported
        if mask.dim() < 3:
            raise NotImplementedError(
                f"The tokens of all images come in one sequence without a batch, {list(mask.shape[:-1])}, as in the "
                "vision towers of Qwen-VL, which order them by windows and return no attention; `explain` expected "
                "[batch, tokens]. Put the adapter on the language model to explain that."
            )
        self.mask, self.features = to_numpy(mask.squeeze(-1)), to_numpy(args[0])
        self.gate = None if gate is None else to_numpy(gate.squeeze(-1))
        if not self.has_feedback:
            return {}
        added = feedback if path.fused is None else _not_fused(path, args, kwargs)
        channels = 1 if isinstance(path, ConvNetFeedbackPath) else -1
        blocks = sorted(path.blocks_of(name))
        norms = {index: to_numpy(added[index].float().norm(dim=channels)) for index in blocks if index in added}
        # There is none at a strength of 0.
        self.feedback_norm = norms or {index: np.zeros_like(self.mask) for index in blocks}
        return None

    def as_pass(self) -> Pass:
        b, *sizes = self.mask.shape
        are_whole = all(torch.is_tensor(a) and a.shape == (b, a.shape[1], *sizes, *sizes) for a in self.attentions)
        attentions = tuple(map(to_numpy, self.attentions)) if self.attentions and are_whole else None
        are_all = len(self.received) == len(self.path.passes.block_forwards)
        received = tuple(to_numpy(self.received[index]) for index in sorted(self.received)) if are_all else None
        return Pass(None if self.logits is None else to_numpy(self.logits), attentions, received)


def _not_fused(path: FeedbackPath, args: tuple, kwargs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """What is added to the inputs of the value projections, where fused feedback is added to the values."""
    fused, path.fused = path.fused, None
    try:
        return path.forward(*args, **kwargs)
    finally:
        path.fused = fused


def _with_features_of_others(forward: _Forward, model: nn.Module, inputs: Mapping[str, Any]) -> np.ndarray | None:
    with swapped_features(model):
        logits = forward.run(model, inputs).logits
    return None if logits is None else to_numpy(logits)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the CPU in float32, as NumPy has no bfloat16."""
    return tensor.detach().float().cpu().numpy().copy()


# ---------------------------------------------------------------------------------------------------- before and after


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"`inputs` is a {type(inputs).__name__}, expected a dict of what the model's forward takes; pass what the "
            "tokenizer or the image processor returns."
        )
    caches = [name for name, value in inputs.items() if isinstance(value, Cache)]
    if caches:
        raise ValueError(
            f"`inputs` has the cache `{caches[0]}`, but attention is explained between all tokens; leave it out and "
            "give the whole sequence."
        )
    if inputs.get("adapter_names") is not None:
        raise ValueError(
            "`inputs` has `adapter_names`, but what is explained is one adapter in all rows; leave them out and "
            "activate it with `set_adapter`."
        )


def _find_stack(model: nn.Module, wanted: str | None) -> tuple[str, nn.Module, FeedbackPath]:
    """Name, backbone and feedback path of the stack that is explained."""
    found = [
        (name, module, path)
        for name, module in model.named_modules()
        if (path := feedback_path_of(module)) is not None and path.active_adapters
    ]
    if not found:
        raise ValueError(
            "No TOAST adapter is active in this model, so there is no feedback to explain; add one with "
            "`get_peft_model(model, TopDownConfig())`, or enable the one that is there."
        )
    names = [name.rpartition(".")[2] for name, _, _ in found]
    chosen = [stack for stack, name in zip(found, names, strict=True) if wanted in (None, name)]
    if len(chosen) != 1:
        raise ValueError(f"`stack={wanted!r}`, but the stacks with feedback are {names}; name one of them.")
    return chosen[0]


def _find_adapter(path: FeedbackPath, wanted: str | None) -> str:
    """Name of the active adapter that is explained."""
    chosen = [name for name in path.active_adapters if wanted in (None, name)]
    if len(chosen) != 1:
        raise ValueError(
            f"`adapter_name={wanted!r}`, but the active adapters are {path.active_adapters}; name one of them."
        )
    return chosen[0]


@contextmanager
def _all_rows(path: FeedbackPath) -> Iterator[None]:
    """Pass 2 of all rows for a while, also of those that may be skipped, so that each has what is recorded in it."""
    configs = [path.selection.topdown_config[name] for name in path.active_adapters]
    before = [config.skip_closed_rows for config in configs]
    try:
        for config in configs:
            config.skip_closed_rows = False
        yield
    finally:
        for config, skips in zip(configs, before, strict=True):
            config.skip_closed_rows = skips


@contextmanager
def _with_eager_attention(backbone: nn.Module) -> Iterator[None]:
    """Eager attention in the backbone for a while, where its attention can be chosen."""
    models = [module for module in backbone.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(config): config for module in models for config in _with_sub_configs(module.config)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        if isinstance(backbone, PreTrainedModel) and backbone._can_set_attn_implementation():
            backbone.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _with_sub_configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_sub_configs(getattr(config, name))


# --------------------------------------------------------------------------------------------- tokens and images


def _side(model: nn.Module, stack: str) -> str:
    """Of an encoder-decoder which of both; empty for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ""
    return "decoder_" if "decoder" in stack.rpartition(".")[2] else "encoder_"


def _is_of_tokens(logits: torch.Tensor | None, mask: np.ndarray) -> bool:
    return logits is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape


def _tokens(side: str, mask: np.ndarray, inputs: Mapping[str, Any], processor_or_tokenizer: Any) -> dict[str, Any]:
    """Names of the tokens if they are those of a text, and which of all are padding. Shape of the mask: [b, n]"""
    prefix = side.removeprefix("encoder_")
    ids, attended = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
    is_padding = np.zeros(mask.shape, bool)
    if isinstance(attended, torch.Tensor) and attended.shape == mask.shape:
        is_padding = to_numpy(attended) == 0
    if not isinstance(ids, torch.Tensor) or ids.shape != mask.shape:
        return {"tokens": None, "is_padding": is_padding}
    name = _decoder_of(processor_or_tokenizer)
    return {"tokens": [[name(token) for token in row] for row in ids.tolist()], "is_padding": is_padding}


def _decoder_of(processor_or_tokenizer: Any) -> Any:
    """What names a token: its text, without a tokenizer its number."""
    tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
    return (lambda token: tokenizer.decode([token])) if hasattr(tokenizer, "decode") else str


def _picture(
    backbone: nn.Module, mask: np.ndarray, inputs: Mapping[str, Any], processor_or_tokenizer: Any
) -> dict[str, Any]:
    """The images and the grid of their patches, if the tokens are those of images."""
    pixels = inputs.get("pixel_values")
    nothing = {"images": None, "grid": None, "patch_size": None}
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != len(mask):
        return nothing
    if mask.ndim == 2:
        height, width = pixels.shape[-2:]
        config = getattr(backbone, "config", None)
        grid, patch_size = patch_grid(config, (height, width), mask.shape[1]), patch_size_of(config)
    else:
        grid, patch_size = (mask.shape[1], mask.shape[2]), None
    if grid is None:
        return nothing
    processor = getattr(processor_or_tokenizer, "image_processor", processor_or_tokenizer)
    return {"images": images_of(to_numpy(pixels), processor), "grid": grid, "patch_size": patch_size}


def _labels(model: nn.Module, logits: list[np.ndarray], processor_or_tokenizer: Any) -> dict[int, str]:
    """Names of classes; of a vocabulary of those tokens that are predicted."""
    if not logits or logits[0].ndim not in (2, 3):
        return {}
    num_classes = logits[0].shape[-1]
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    if len(id2label) == num_classes:
        return dict(id2label)
    k = min(NUM_PREDICTIONS, num_classes)
    predicted = {int(i) for of_pass in logits for i in np.unique(np.argpartition(-of_pass, k - 1, -1)[..., :k])}
    name = _decoder_of(processor_or_tokenizer)
    return {index: name(index) for index in sorted(predicted)}
