"""A prompt given with the inputs, one for each row: it takes the place of the learned one in that call.

    m = clamp(cos(x, topdown_prompt), 0, 1)

It is an argument of the model's forward and of `generate` (`model_forward.py`), or holds in a `with` block. Until the
call is over it waits in the state of the thread, where the feature selection finds it. Pass 1 does not depend on it.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from .batch_rows import BatchRows, repeats_of

if TYPE_CHECKING:
    from .layers import FeedbackPath

PROMPT_INPUT = "topdown_prompt"  # the argument of the model's forward and of `generate`


class GivenPrompt(NamedTuple):
    """Prompts that the tokens are compared with instead of the learned one.

    Args:
        prompts: one for all rows, or one for each. Shape: [d] or [b, d]
        may_repeat: whether each may be for several rows that follow one another, as `generate` makes them of one.
        batch: the rows that the model was called with, `None` if they are not known.
    """

    prompts: torch.Tensor
    may_repeat: bool = False
    batch: BatchRows | None = None

    def for_features(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The prompts as they are compared with features.

        Args:
            features: Shape: [b, n, d], of a map [b, h, w, d]
            dtype: of the learned prompt; a given one may be more precise.

        Returns:
            Shape: [d], or [b, 1, d], of a map [b, 1, 1, d]

        Raises:
            ValueError: if they are on another device, or not as many as there are rows.
        """
        prompts = self.prompts
        if prompts.device.type != features.device.type:
            raise ValueError(
                f"`{PROMPT_INPUT}` is on {str(prompts.device)!r} and the features on {str(features.device)!r}; move "
                "it to where the model's inputs are."
            )
        prompts = prompts.to(features.device, torch.promote_types(prompts.dtype, dtype))
        if prompts.dim() == 1 or len(prompts) == 1:
            return prompts.flatten()
        repeats = self._repeats(features)
        prompts = prompts.repeat_interleave(repeats, dim=0) if repeats > 1 else prompts
        return prompts.view(len(prompts), *[1] * (features.dim() - 2), -1)

    def _repeats(self, features: torch.Tensor) -> int:
        """For how many rows each prompt is. Shape of the features: [b, n, d]"""
        num_prompts, num_rows = len(self.prompts), len(features)
        repeats = repeats_of(num_prompts, num_rows, self.may_repeat, self.batch) if features.dim() > 2 else None
        if repeats is None:
            raise ValueError(
                f"`{PROMPT_INPUT}` has {num_prompts} rows and the features of pass 1 have the shape "
                f"{list(features.shape)}; expected one prompt for each row of the batch, or [d], one for all."
                f"{'' if self.batch is None else self.batch.describe(num_rows)}"
            )
        return repeats


def path_for(paths: Iterable["FeedbackPath"], prompts: torch.Tensor) -> "FeedbackPath":
    """The feedback path that prompts are for, after checks of all that is known before the forward."""
    paths = list(paths)
    if [path for path in paths if path.state.current.row_names is not None]:
        raise ValueError(
            f"`{PROMPT_INPUT}` was given in a mixed batch; expected one adapter. Leave out `adapter_names`."
        )
    active = [path for path in paths if path.active_adapter is not None]
    if len(active) != 1:
        raise ValueError(
            f"`{PROMPT_INPUT}` was given, and {len(active)} stacks of blocks have an active TOAST adapter; expected "
            "one, whose features it is compared with. Enable an adapter, or in an encoder-decoder give one of the "
            "stacks feedback with `target_modules`; or leave it out."
        )
    [path] = active
    d = path.selection.topdown_prompt[str(path.active_adapter)].hidden_size
    if not isinstance(prompts, torch.Tensor) or not prompts.is_floating_point():
        found = prompts.dtype if isinstance(prompts, torch.Tensor) else type(prompts).__name__
        raise ValueError(f"`{PROMPT_INPUT}` is of the type {found}; expected a tensor of floating-point numbers.")
    if prompts.dim() not in (1, 2) or prompts.shape[-1] != d or len(prompts) == 0:
        raise ValueError(
            f"`{PROMPT_INPUT}` has the shape {list(prompts.shape)}; expected [{d}], or [rows of the batch, {d}], as "
            f"the features have {d} channels."
        )
    return path


@contextmanager
def given_prompt(paths: Iterable["FeedbackPath"], prompts: torch.Tensor) -> Iterator[None]:
    """In it, the active adapter compares with these prompts, in this thread.

    Args:
        paths: the feedback paths of the model.
        prompts: Shape: [d] or [b, d]

    Raises:
        ValueError: if they do not fit.
    """
    current = path_for(paths, prompts).state.current
    outer, current.prompt = current.prompt, GivenPrompt(prompts)
    try:
        yield
    finally:
        current.prompt = outer


@contextmanager
def repeated_rows(paths: Iterable["FeedbackPath"]) -> Iterator[None]:
    """In it, the prompt or the adapter of a row is for several rows if `generate` makes these of one."""
    before = [(current, current.prompt, current.row_names) for current in (path.state.current for path in paths)]
    try:
        for current, prompt, row_names in before:
            current.prompt = None if prompt is None else prompt._replace(may_repeat=True)
            current.row_names = None if row_names is None else row_names._replace(may_repeat=True)
        yield
    finally:
        for current, prompt, row_names in before:
            current.prompt, current.row_names = prompt, row_names
