"""Draws what the feedback sees in a text, with matplotlib: tokens with a background, and predictions.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .attention import View, scale_limit

if TYPE_CHECKING:
    from .explanation import Explanation

_HEAT, _CHANGE = "YlOrBr", "RdBu_r"
_WIDTH = 96  # characters in a line


class Strip(NamedTuple):
    """The tokens once, with a colour for each.

    Args:
        title: above it.
        values: Shape: [n]
        limit: where the scale ends.
        is_change: whether the values have a sign.
    """

    title: str
    values: np.ndarray
    limit: float
    is_change: bool = False


def draw_texts(
    explanation: "Explanation",
    rows: list[int],
    view: View,
) -> Figure:
    """For each row of the batch its tokens, coloured by mask and attention. Arguments as `Explanation.plot`."""
    heights: list[float] = []
    drawings: list[Any] = []
    for row in rows:
        names, _ = shown_tokens(explanation, row)
        lines = 1 + max(line for line, _ in places(names))
        strips = _strips(explanation, row, view)
        drawings += [(strip, names, lines) for strip in strips] + [
            explanation.predictions(row, _query(explanation, row, view.query))
        ]
        heights += [0.5 + 0.26 * lines] * len(strips) + [0.6 + 0.2 * len(drawings[-1])]
    figure = Figure(figsize=(9.5, sum(heights) + 0.2 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, drawing in zip(axes, drawings, strict=True):
        if isinstance(drawing, tuple):
            _draw_strip(figure, axis, *drawing)
        else:
            _draw_predictions(axis, drawing)
    return figure


def shown_tokens(explanation: "Explanation", row: int) -> tuple[list[str], np.ndarray]:
    """Names and indices of the tokens that are not padding."""
    indices = np.flatnonzero(~explanation.is_padding[row])
    names = explanation.tokens[row] if explanation.tokens is not None else None
    return [str(index) if names is None else names[index] for index in indices], indices


def _query(explanation: "Explanation", row: int, query: int | None) -> int:
    """The token whose attention is shown, by default the last one."""
    return int(shown_tokens(explanation, row)[1][-1]) if query is None else query


def _strips(
    explanation: "Explanation",
    row: int,
    view: View,
) -> list[Strip]:
    names, indices = shown_tokens(explanation, row)
    mask = explanation.mask[row, indices]
    strips = [Strip("mask", mask, scale_limit(mask, "keep"))]
    if explanation.gate is not None:
        strips.insert(0, Strip("gate, a factor of the mask", explanation.gate[row, indices], 1.0))
    if explanation.first.attentions is None or explanation.second.attentions is None:
        return strips
    first, second = (
        view.matrix(attentions)[row] for attentions in (explanation.first.attentions, explanation.second.attentions)
    )
    index = _query(explanation, row, view.query)
    shown = np.ix_(indices, indices)
    change = (second - first)[shown].mean(0)
    limit = scale_limit(np.stack([first[index, indices], second[index, indices]]), view.sinks)
    of_query = f"{view.name} of {explanation.tokens[row][index] if explanation.tokens else index!r}"
    return [
        *strips,
        Strip(
            f"change of the {view.name} that a token receives", change, scale_limit(np.abs(change), view.sinks), True
        ),
        Strip(f"{of_query} in pass 1", first[index, indices], limit),
        Strip(f"{of_query} in pass 2", second[index, indices], limit),
    ]


def places(names: list[str]) -> Iterator[tuple[int, int]]:
    """Line and first character of each token in lines of a fixed width."""
    line = start = 0
    for name in names:
        length = len(readable(name)) + 1
        if start and start + length > _WIDTH:
            line, start = line + 1, 0
        yield line, start
        start += length


def readable(name: str) -> str:
    """The text of a token where all of it can be seen."""
    return name.strip(" ").replace("\n", "\\n").replace("\t", "\\t")[:_WIDTH] or "␣"


def _draw_strip(figure: Figure, axis: Any, strip: Strip, names: list[str], lines: int) -> None:
    low, colours = (-strip.limit, _CHANGE) if strip.is_change else (0.0, _HEAT)
    scale = ScalarMappable(Normalize(low, strip.limit), colours)
    for name, value, (line, start) in zip(names, strip.values, places(names), strict=True):
        colour = scale.to_rgba(value)
        box = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        ink = "white" if np.dot(colour[:3], (0.3, 0.6, 0.1)) < 0.5 else "black"
        text = readable(name).replace("$", r"\$")
        axis.text(start, line, text, family="monospace", fontsize=9, va="center", color=ink, bbox=box)
    axis.set(xlim=(-0.5, _WIDTH), ylim=(lines - 0.4, -0.7))
    axis.set_axis_off()
    axis.set_title(strip.title, fontsize=9, loc="left")
    beyond = bool((np.abs(strip.values) > strip.limit * 1.0001).any())
    extend = ("both" if strip.is_change else "max") if beyond else "neither"
    bar = figure.colorbar(scale, ax=axis, fraction=0.03, pad=0.01, aspect=8, extend=extend)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=3)


def _draw_predictions(axis: Any, predictions: list[Any]) -> None:
    axis.set_title("predictions" if predictions else "", fontsize=9, loc="left")
    if not predictions:
        axis.set_axis_off()
        return
    places = np.arange(len(predictions))
    for offset, name in ((-0.2, "first"), (0.2, "second")):
        values = [getattr(prediction, name) for prediction in predictions]
        label = "pass 1" if name == "first" else "pass 2"
        axis.barh(places + offset, values, height=0.4, label=label, color="#9aa5b1" if name == "first" else "#c2570c")
    axis.set_yticks(places, [readable(prediction.label).replace("$", r"\$") for prediction in predictions])
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_xlabel("probability", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
