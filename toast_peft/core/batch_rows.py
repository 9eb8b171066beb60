"""Which rows of a batch some features are of, where each row has an adapter or a prompt of its own.

Blocks may run on more than the rows that the model is called with. `generate` makes several of a row for beams; a row
may have several choices, frames or images, that the model puts one after the other. Where rows have different numbers
of images nothing but the place of their tokens in the text says which image is of which row.

Notation used for tensor shapes:
    - b: number of rows
    - n: number of tokens
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import nn

    from .layers import FeedbackPath

# What a model may be called with that has a row for each row of the batch.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "input_values", "input_features")
_INPUTS_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


class BatchRows(NamedTuple):
    """The rows that a model is called with.

    Args:
        number: b.
        parts: how many choices, frames or images each of them has, 0 if not all as many.
    """

    number: int
    parts: int = 1

    def describe(self, num_features: int) -> str:
        """Why it is not known which of them the features are of; empty if there are as many."""
        if num_features == self.number and self.parts > 0:
            return ""
        return (
            f" The adapted blocks get {num_features} sequences for the {self.number} rows that the model was called "
            "with, as images of which a row may have several. Give each row as many, or use one for the whole batch."
        )


def num_rows(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The number of rows in the arguments of a forward or of `generate`, `None` if it cannot be told from these."""
    given = [*args[:1], *[kwargs[name] for name in (*_INPUTS, *_INPUTS_OF_DECODER) if name in kwargs]]
    found = [len(x) for x in given if isinstance(x, torch.Tensor) and x.dim() > 0]
    return found[0] if found else None


def repeats_of(num_given: int, num_features: int, may_repeat: bool, batch: BatchRows | None) -> int | None:
    """For how many rows of the features that follow one another each of those is that were given.

    Args:
        num_given: number of names or prompts.
        num_features: number of rows of the features.
        may_repeat: whether each may be for several rows of the batch, as `generate` makes them of one.
        batch: the rows of the batch, `None` if they are not known.

    Returns:
        `None` if that is not known.
    """
    number, parts = (num_features, 1) if batch is None else batch
    if num_features == num_given and (parts > 0 or num_given != number):
        return 1
    if number == num_given == 1:  # all is of the one row
        return num_features
    repeats, rest = divmod(number, num_given)
    is_whole = rest == 0 and repeats > 0 and (repeats == 1 or may_repeat)
    is_known = parts > 0 and num_features in (number, number * parts)
    return num_features // num_given if is_whole and is_known else None


def note_rows(path: "FeedbackPath", model: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> None:
    """Keep the rows that a model is called with beside what each of them has of its own."""
    current = path.state.current
    has_prompts = current.prompt is not None and current.prompt.prompts.dim() == 2
    if current.row_names is None and not has_prompts:
        return
    batch = _rows_of_call(path, model, args, kwargs)
    if current.row_names is not None:
        current.row_names = current.row_names._replace(batch=batch)
    if current.prompt is not None:
        current.prompt = current.prompt._replace(batch=batch)


def sees_images_of_texts(path: "FeedbackPath", model: "nn.Module") -> bool:
    """Whether a backbone gets images and the model around it texts, each with any number of these."""
    modules = (path.passes.backbone_forward.module, model)
    return [getattr(module, "main_input_name", None) for module in modules] == ["pixel_values", "input_ids"]


def _rows_of_call(path: "FeedbackPath", model: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> BatchRows | None:
    number = num_rows(args, kwargs)
    if number is None:
        return None
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    images = kwargs.get("pixel_values")
    parts = 1 if torch.compiler.is_compiling() else _images_of_each_row(getattr(model, "config", None), ids, images)
    if parts > 1 or (parts == 0 and sees_images_of_texts(path, model)):
        return BatchRows(number, parts)
    for x, dim in ((ids, 3), (images, 5)):  # several choices or frames
        if isinstance(x, torch.Tensor) and x.dim() == dim and len(x) == number:
            return BatchRows(number, x.shape[1])
    return BatchRows(number)


def _images_of_each_row(config: Any, ids: Any, images: Any) -> int:
    """How many images each row of a text has, by its tokens for images: 0 if not all as many, 1 if that is not known.

    Args:
        config: that of the model.
        ids: Shape: [b, n]
        images: Shape: [images, channels, height, width]
    """
    token = getattr(config, "image_token_id", None)
    if token is None or not (isinstance(ids, torch.Tensor) and isinstance(images, torch.Tensor)):
        return 1
    numbers = (ids == token).flatten(1).sum(1)
    if (numbers != numbers[0]).any():
        return 0
    per_row, rest = divmod(len(images), len(ids))
    return per_row if images.dim() == 4 and rest == 0 else 1
