"""The strength of the feedback, as the scale of a LoRA: `v = W (h + alpha * td) + b`.

From the mask of the tokens to the feedback of every block all is linear and without bias,

    z_L = (alpha * m * x) @ transform  -->  alpha * z of every block  -->  alpha * td of every block

so the feedback path multiplies the mask by alpha, in one place for all families, for feedback on maps and for fused
feedback. The mask that is kept to be looked at is the one without it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config_checks import is_of_type

if TYPE_CHECKING:
    from .feature_selection import FeatureSelection


def checked_scale(value: Any) -> float:
    """A strength as a float.

    Raises:
        ValueError: if it is no finite number.
    """
    if not is_of_type(value, float):
        raise ValueError(
            f"The scale of the feedback is {value!r}; expected a finite number. Give 1.0 for the feedback as it was "
            "trained, and 0.0 for none."
        )
    return float(value)


def set_scales(selections: Iterable["FeatureSelection"], adapter_names: list[str], alpha: float) -> None:
    """Set the strength of adapters, in all stacks of blocks that they give feedback to.

    Args:
        selections: those of the model.
        adapter_names: whose strength.
        alpha: what their feedback is multiplied by.

    Raises:
        ValueError: if there is none of a name, or alpha is no finite number.
    """
    scales, alpha = [selection.topdown_feedback_scale for selection in selections], checked_scale(alpha)
    known = sorted({name for of_stack in scales for name in of_stack})
    if not adapter_names or not set(adapter_names) <= set(known):
        raise ValueError(
            f"The scale of the feedback was to be set for the adapter {', '.join(map(repr, adapter_names)) or None}; "
            f"expected one of {known}. Name one of them."
        )
    for of_stack in scales:
        of_stack.update({name: alpha for name in adapter_names if name in of_stack})


@contextmanager
def rescaled(selections: Iterable["FeatureSelection"], multiplier: float) -> Iterator[None]:
    """In it, the strength of all adapters is multiplied. What an adapter that is there afterwards had comes back.

    Raises:
        ValueError: if the multiplier is no finite number, or a product is none.
    """
    scales, multiplier = [selection.topdown_feedback_scale for selection in selections], checked_scale(multiplier)
    before = [dict(of_stack) for of_stack in scales]
    inside = [{name: checked_scale(alpha * multiplier) for name, alpha in old.items()} for old in before]
    _put(scales, inside)
    try:
        yield
    finally:
        _put(scales, before)


def _put(scales: list[dict[str, float]], values: list[dict[str, float]]) -> None:
    for of_stack, new in zip(scales, values, strict=True):
        of_stack.update({name: alpha for name, alpha in new.items() if name in of_stack})
