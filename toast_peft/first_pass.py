"""Pass 1 of a model by itself, and which of the inputs of a batch belong to which row.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - k: 2 if the hidden states are stored beside the features, else 1
    - d: hidden size
"""

import hashlib
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils.generic import find_labels

from .base_feedback import sha256_of
from .core.dropout import in_evaluation_mode
from .core.layers import FeedbackPath, feedback_paths
from .core.prompt_input import PROMPT_INPUT
from .core.stored_pass import STORED_INPUT, StoredPass
from .core.variational_loss import predicts_next_token
from .feature_shards import StoredRow

Rows = list[dict[str, Any]]


class FirstPassIsOver(Exception):
    """Ends a forward after pass 1.

    Args:
        features: what the feedback starts from. Shape: [b, n, d]
    """

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features


class FirstPass:
    """Pass 1 of a model for rows of a data set.

    Args:
        model: has one active adapter.
        data_collator: makes batches of rows.

    Attributes:
        model: the module that takes the inputs.
        passes: those of its backbone.
        origin: what pass 1 is of all that the adapter can choose.
        input_names: the inputs that the features may depend on.
        dtype: of the features, known after `check`.

    Raises:
        ValueError: if pass 1 of this model cannot be stored.
    """

    dtype: torch.dtype

    def __init__(self, model: nn.Module, data_collator: Callable) -> None:
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.data_collator = data_collator
        self.backbone, self.path = _only_backbone(model)
        self.passes = self.path.passes
        self.forward = self.passes.backbone_forward
        self.config = self.path.selection.topdown_config[str(self.path.active_adapter)]
        self.origin = self.forward.origin(str(self.path.active_adapter))
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.model.forward).parameters.values()
        unused = (STORED_INPUT, PROMPT_INPUT)  # in pass 1
        self.arguments = [p.name for p in parameters if p.kind in kinds and p.name not in unused]
        labels = {*find_labels(type(self.model)), "labels", "label", "label_ids"}
        self.input_names = tuple(name for name in self.arguments if name not in labels)
        self.predicts_next_token = predicts_next_token(self.model)
        self.keeps_hidden_states = self.origin.feedback_to > 0

    # ------------------------------------------------------------------------------------------------------- running

    def __call__(self, rows: Rows) -> list[StoredRow]:
        """What is to be stored of the rows, without padding."""
        batch = self._batch(rows)
        inputs = inputs_of(batch, self.input_names, len(rows))
        check_labels(batch, inputs, self.predicts_next_token)
        with torch.no_grad():
            stored = self._run(batch)
        if stored.dim() != 4 or len(stored) != len(rows):
            raise ValueError(
                f"The features of {len(rows)} rows have the shape {list(stored[:, :, 0].shape)}; expected [rows, "
                "tokens, channels]."
            )
        own = own_tokens(inputs, len(rows), stored.shape[1]).to(stored.device)
        return [StoredRow(stored[i, own[i]], checksum(inputs, i)) for i in range(len(rows))]

    def _batch(self, rows: Rows) -> dict[str, Any]:
        """The arguments of a forward of the model, on the CPU."""
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"`dataset` has rows of the type {type(rows[0]).__name__}; expected dicts.")
        batch = self.data_collator([dict(row) for row in rows])
        if not isinstance(batch, Mapping) or not any(name in batch for name in self.input_names):
            described = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"`data_collator` gave {described}; expected a dict with inputs of {type(self.model).__name__}, "
                f"{list(self.input_names)}."
            )
        return {name: batch[name] for name in self.arguments if name in batch}

    def _forward(self, batch: dict[str, Any]) -> Any:
        device = next(self.model.parameters()).device
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        with in_evaluation_mode(self.model.modules()):
            return self.model(**moved)

    def _run(self, batch: dict[str, Any]) -> torch.Tensor:
        """Features and hidden states. Shape: [b, n, k, d]"""
        outputs: list[Any] = []
        with ExitStack() as stack:
            stack.enter_context(self.path.register_forward_pre_hook(_end))
            if self.keeps_hidden_states:
                below = self.passes.block_forwards[self.origin.feedback_to - 1].module
                stack.enter_context(below.register_forward_hook(lambda block, args, output: outputs.append(output)))
            try:
                self._forward(batch)
            except FirstPassIsOver as over:
                features = over.features
            else:
                raise ValueError(f"The forward of {type(self.model).__name__} does not run the adapted backbone.")
        # Not those of a block that returns something else besides, or that runs several times (ALBERT).
        self.keeps_hidden_states = len(outputs) == 1 and isinstance(outputs[0], torch.Tensor)
        return torch.stack([features, *outputs] if self.keeps_hidden_states else [features], dim=2)

    # ---------------------------------------------------------------------------------------------------- checking

    def check(self, rows: Rows) -> list[StoredRow]:
        """What is to be stored of the rows, after checks that training can use it.

        Raises:
            ValueError: if something below the feedback is trained, or if the model computes something else with what
                is stored than without.
        """
        computed, batch = self(rows), self._batch(rows)
        self.dtype = computed[0].features.dtype
        self._check_frozen(batch)
        different = self._outputs_that_differ(batch, [row.features for row in computed])
        if different:
            raise ValueError(
                f"With stored features {type(self.model).__name__} computes another {', '.join(different)}; expected "
                "the same. It needs what the blocks below the feedback compute in between; leave `feedback_to` at 0."
            )
        return computed

    def _outputs_that_differ(self, batch: dict[str, Any], rows: list[torch.Tensor]) -> list[str]:
        """Which outputs of a batch are others when pass 1 does not run; those of padding, which nobody uses, may be.

        Args:
            batch: the arguments of the forward.
            rows: what is stored of each. Shape: [n, k, d]
        """
        inputs = inputs_of(batch, self.input_names, len(rows))
        mask = _mask_of(inputs)
        features, *hidden_states = (x.contiguous() for x in padded(rows, inputs).unbind(2))
        stored = StoredPass(self.origin, features, hidden_states[0] if hidden_states else None)
        with torch.no_grad():
            expected = self._forward(batch)
            with self._given(stored):
                found = dict(_tensors(self._forward(batch)))

        def is_other(name: str, x: torch.Tensor) -> bool:
            y = found[name]
            if mask is not None and x.shape[:2] == mask.shape:
                x, y = x[mask.to(x.device)], y[mask.to(y.device)]
            return not _is_close(y, x)

        return [name for name, x in _tensors(expected) if name in found and is_other(name, x)]

    def _check_frozen(self, batch: dict[str, Any]) -> None:
        trained = []

        def look(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = dict(zip(self.forward.argument_names, args, strict=False)) | kwargs
            trained.append(self.forward.features_are_trained(self.origin, given))

        with torch.enable_grad(), self.backbone.register_forward_pre_hook(look, with_kwargs=True):
            self._run(batch)
        if any(trained):
            raise ValueError(
                "Something below the feedback is trained, so that pass 1 changes from step to step and cannot be "
                "stored; expected it to be frozen. Freeze it, or train without stored features."
            )

    @contextmanager
    def _given(self, stored: StoredPass) -> Iterator[None]:
        self.path.state.current.stored = stored
        try:
            yield
        finally:
            self.path.state.current.stored = None

    def check_padding(self, rows: Rows) -> None:
        """Check that what the model computes of a row does not depend on how far it is padded.

        Args:
            rows: two of different lengths.

        Raises:
            ValueError: if they do.
        """
        if _mask_of(self._batch(rows[:1])) is None:  # then no batch has both, or its padding is taken for tokens
            return
        computed, alone = ([row.features for row in found] for found in (self(rows), [self([r])[0] for r in rows]))
        depends = any(x.shape != y.shape or not _is_close(x, y) for x, y in zip(computed, alone, strict=True))
        if depends or self._outputs_that_differ(self._batch(rows), computed):
            raise ValueError(
                f"What {type(self.model).__name__} computes of a row depends on its padding, which is another one in "
                "each batch; expected the same. Give `attention_mask` and pad on the right, or make all rows equally "
                "long."
            )

    # ------------------------------------------------------------------------------------------------- telling apart

    def key(self) -> dict[str, Any]:
        """What tells pass 1 of this model from that of others."""
        hashes = [sha256_of({name: tensor}) for name, tensor in self._weights()]  # one after the other in memory
        return {
            "format": 1,
            "model_type": self.config.backbone_type,
            **self.origin._asdict(),
            "keeps_hidden_states": self.keeps_hidden_states,
            "computed_in": str(self.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that pass 1 may use, and what is below a head that is not trained."""
        unused = [self.path, *list(self.forward.blocks)[self.origin.feedback_from :]]
        if not self.origin.normalize_features and self.forward.final_norm is not None:
            unused.append(self.forward.final_norm)
        unused += [part for part in self.model.modules() if isinstance(part, AuxiliaryTrainingWrapper)]
        left_out = {id(part) for root in unused for part in root.modules()}
        for prefix, module in self.model.named_modules():
            if id(module) in left_out:
                continue
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.requires_grad:
                    yield from _parts(f"{prefix}.{name}", tensor.detach())


def _end(path: FeedbackPath, args: tuple) -> None:
    raise FirstPassIsOver(args[0])


def _only_backbone(model: nn.Module) -> tuple[nn.Module, FeedbackPath]:
    """The backbone of a model, with its feedback path.

    Raises:
        ValueError: if there is not just one whose pass 1 can be stored.
    """
    backbones = list(feedback_paths(model))
    if len(backbones) != 1 or backbones[0][1].active_adapter is None:
        raise ValueError(
            f"`model` has {len(backbones)} stacks of blocks with a TOAST adapter, of which "
            f"{sum(path.active_adapter is not None for _, path in backbones)} are active; expected one, active. In an "
            "encoder-decoder the features of the decoder depend on what is trained in the encoder."
        )
    [(backbone, path)] = backbones
    name = type(backbone).__name__
    if type(path) is not FeedbackPath:
        raise ValueError(
            f"Features of {name} cannot be stored, as its feedback is a map; expected a transformer with one list of "
            "blocks. Train without stored features."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"Features of {name} cannot be stored, as it is a part of an encoder-decoder.")
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ValueError(
            f"Features of {name} cannot be stored, as its batch norms make those of a row depend on the other rows of "
            "the batch. Train without stored features."
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            f"Weights of {type(model).__name__} are offloaded or not loaded; expected all in memory, as it is their "
            "hash that tells features of this model from those of others. Store them where the model fits."
        )
    return backbone, path


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor is made of, on the CPU; several if it is quantised."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, torch.Tensor.cpu(tensor)


def _tensors(output: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """The names and the numbers in the output of a model, but for those of a cache."""
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from _tensors(value, f"{name}[{index}]")


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding, relative to the largest entry. Shape: any"""
    rounding = 1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.03
    largest = expected.abs().max().item()
    return torch.allclose(found, expected, rtol=0, atol=rounding * largest, equal_nan=True)


# ------------------------------------------------------------------------------------------------- the rows of a batch


def inputs_of(batch: Mapping[str, Any], names: tuple[str, ...], num_rows: int) -> dict[str, Any]:
    """The inputs in a batch that features may depend on.

    Raises:
        ValueError: if it cannot be told what of them belongs to which row.
    """
    inputs = {name: batch[name] for name in sorted(names) if batch.get(name) is not None}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 or len(value) != num_rows:
                raise ValueError(
                    f"`{name}` has the shape {list(value.shape)} in a batch of {num_rows} rows; expected an entry for "
                    "each row, or it cannot be told whether features belong to a row."
                )
        elif not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"`{name}` is a {type(value).__name__}; expected a tensor with an entry for each row.")
    return inputs


def _mask_of(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The attention mask, if it has an entry for each token. Shape: [b, n]"""
    mask = inputs.get("attention_mask")
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def check_labels(batch: Mapping[str, Any], inputs: Mapping[str, Any], predicts_next_token: bool) -> None:
    """Check that the loss does not depend on what is computed of padding, of which nothing is stored.

    Raises:
        ValueError: if padding is followed by a token with a label, which the loss compares with what padding gives.
    """
    labels, mask = batch.get("labels"), _mask_of(inputs)
    if not predicts_next_token or labels is None or mask is None or labels.shape != mask.shape:
        return
    if (~mask[:, :-1] & mask[:, 1:] & (labels[:, 1:] != -100)).any():
        raise ValueError(
            "A row is padded on the left and its first token has a label, which the loss predicts from padding, of "
            "which no features are stored; expected -100. Set it to that, or pad on the right."
        )


def own_tokens(inputs: Mapping[str, Any], num_rows: int, num_tokens: int) -> torch.Tensor:
    """Which tokens of each row are not padding. Shape: [b, n]

    Raises:
        ValueError: if there is padding and it cannot be told.
    """
    mask = _mask_of(inputs)
    if mask is not None and mask.shape[1] == num_tokens:
        return mask
    if mask is not None and not mask.all():
        raise ValueError(
            f"`attention_mask` has the shape {list(mask.shape)} and leaves out some, while the features are of "
            f"{num_tokens} tokens; expected a mask of these, or rows of equal length without padding."
        )
    return torch.ones(num_rows, num_tokens, dtype=torch.bool)


def checksum(inputs: Mapping[str, Any], index: int) -> int:
    """A checksum of the inputs of a row, whatever it is padded with."""
    mask, total = _mask_of(inputs), 0
    for name, value in inputs.items():
        if name == "attention_mask" and mask is not None:  # told by the shapes of what it leaves
            continue
        if not isinstance(value, torch.Tensor):
            total = zlib.crc32(f"{name} {value!r}".encode(), total)
            continue
        of_row = value[index]
        if mask is not None and value.shape[:2] == mask.shape:
            of_row = of_row[mask[index]]
        total = zlib.crc32(f"{name} {of_row.dtype} {list(of_row.shape)}".encode(), total)
        total = zlib.crc32(of_row.cpu().contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


def padded(rows: list[torch.Tensor], inputs: Mapping[str, Any]) -> torch.Tensor:
    """What is stored of the rows of a batch, with zeros where the batch is padded.

    Args:
        rows: Shape of each: [n, k, d]
        inputs: those of the batch.

    Returns:
        Shape: [b, n, k, d]

    Raises:
        ValueError: if it cannot be told where the batch is padded.
    """
    mask, lengths = _mask_of(inputs), [len(row) for row in rows]
    if mask is not None and mask.sum(1).tolist() == lengths:
        batch = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:])
        batch[mask] = torch.cat(rows)
        return batch
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The rows have {lengths} tokens, and the batch has no `attention_mask` that says where these are; "
            "expected one, of the shape [rows, tokens]."
        )
    return torch.stack(rows)
