"""Draws what the feedback sees in images, with matplotlib.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - h, w: rows and columns of a map
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from .attention import CLIPPED_AT, View, of_class_token, scale_limit
from .grids import on_grid

if TYPE_CHECKING:
    from .explanation import Explanation, Pass

HEAT, CHANGE = "inferno", "RdBu_r"
_OPACITY = 0.7


class Column(NamedTuple):
    """A column of the figure, one picture for each row of the batch.

    Args:
        title: above it.
        maps: Shape: [b, h, w]
        scale: its label, the same for columns that share one.
        limit: where the scale ends.
        is_change: whether the values have a sign.
    """

    title: str
    maps: np.ndarray
    scale: str
    limit: float
    is_change: bool = False


def draw_images(
    explanation: "Explanation",
    rows: list[int],
    view: View,
) -> Figure:
    """One row for each image: input, gate, mask, attention or norm of the feedback. Arguments as `plot`."""
    assert explanation.images is not None
    columns = [*_gate_columns(explanation, rows), _mask_column(explanation, rows)]
    if explanation.first.attentions is None and explanation.first.received is None:
        columns.append(_norm_column(explanation, rows, view))
    else:
        columns += _attention_columns(explanation, rows, view)
    height, width = explanation.images.shape[1:3]
    size = (2.3 * (1 + len(columns)), len(rows) * (2.3 * height / width + 0.35) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    lines = figure.add_gridspec(len(rows) + 1, 1 + len(columns), height_ratios=[height / width] * len(rows) + [0.06])
    axes = np.array([[figure.add_subplot(lines[i, j]) for j in range(1 + len(columns))] for i in range(len(rows))])
    for line, row in zip(axes, rows, strict=True):
        _draw_row(line, explanation, row, columns)
    for axis, title in zip(axes[0], ["input", *(column.title for column in columns)], strict=True):
        axis.set_title(title, fontsize=10)
    _draw_scales(figure, lines, axes, columns)
    return figure


def _gate_columns(explanation: "Explanation", rows: list[int]) -> list[Column]:
    """The gate, if it is not the same for all patches of an image, which is a line of text."""
    if explanation.gate is None:
        return []
    maps = as_map(explanation, explanation.gate)
    return [Column("gate", maps, "a factor of the mask", 1.0)] if np.ptp(maps[rows], axis=(1, 2)).any() else []


def _mask_column(explanation: "Explanation", rows: list[int]) -> Column:
    maps = as_map(explanation, explanation.mask)
    return Column("mask", maps, "mask", scale_limit(maps[rows], "keep"))


def _norm_column(explanation: "Explanation", rows: list[int], view: View) -> Column:
    blocks = sorted(explanation.feedback_norm)
    index = blocks[-1] if view.block == -1 else view.block
    if index not in blocks:
        raise ValueError(f"`block={view.block}`, but those with feedback are {blocks}; take one of them, or -1.")
    maps = as_map(explanation, explanation.feedback_norm[index])
    return Column(f"feedback of block {index}", maps, "norm", scale_limit(maps[rows], view.sinks))


def _attention_columns(
    explanation: "Explanation",
    rows: list[int],
    view: View,
) -> list[Column]:
    first, second = (
        as_map(explanation, _attention_of(explanation, of_pass, view))
        for of_pass in (explanation.first, explanation.second)
    )
    limit = scale_limit(np.stack([first[rows], second[rows]]), view.sinks)
    change = second - first
    return [
        Column(f"{view.name}, pass 1", first, view.name, limit),
        Column(f"{view.name}, pass 2", second, view.name, limit),
        Column("pass 2 - pass 1", change, "change", scale_limit(np.abs(change[rows]), view.sinks), is_change=True),
    ]


def _attention_of(explanation: "Explanation", of_pass: "Pass", view: View) -> np.ndarray:
    """What one query attends to, or the places of a map receive. Shape: [b, n] or [b, h, w]"""
    if of_pass.received is not None:
        return view.of_block(of_pass.received)
    assert explanation.grid is not None and of_pass.attentions is not None
    matrix = view.matrix(of_pass.attentions)
    rows, columns = explanation.grid
    return of_class_token(matrix, rows * columns) if view.query is None else matrix[:, view.query]


def as_map(explanation: "Explanation", values: np.ndarray) -> np.ndarray:
    """Shape: [b, n] or [b, h, w] -> [b, h, w]"""
    assert explanation.grid is not None
    return values if values.ndim == 3 else on_grid(values, explanation.grid)


def _draw_row(axes: np.ndarray, explanation: "Explanation", row: int, columns: list[Column]) -> None:
    assert explanation.images is not None
    image = explanation.images[row]
    grey = image.mean(-1)
    axes[0].imshow(image)
    axes[0].set_xlabel(outcome(explanation, row), fontsize=8)
    height, width = grey.shape
    for axis, column in zip(axes[1:], columns, strict=True):
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        low, colours = (-column.limit, CHANGE) if column.is_change else (0, HEAT)
        values = column.maps[row]
        # Where nothing changes the image is seen.
        opacity = np.clip(np.abs(values) / column.limit, 0, 0.9) if column.is_change else _OPACITY
        over = {"vmin": low, "vmax": column.limit, "cmap": colours, "alpha": opacity}
        # Beyond the image there may be padding, and its last pixels may be of no patch.
        bottom, right = explanation.extent(values.shape)
        axis.imshow(values, extent=(0, right, bottom, 0), interpolation="nearest", **over)
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def outcome(explanation: "Explanation", row: int) -> str:
    """The most probable class of both passes, if there are classes, and how far the gate is open, in lines."""
    lines = [] if explanation.gate is None else [f"gate: {explanation.gate[row].mean():.0%} open"]
    predictions = explanation.predictions(row)
    if predictions:
        best = max(predictions, key=lambda p: p.first), max(predictions, key=lambda p: p.second)
        lines += [f"pass 1: {best[0].label} {best[0].first:.0%}", f"pass 2: {best[1].label} {best[1].second:.0%}"]
    return "\n".join(lines)


def _draw_scales(figure: Figure, lines: GridSpec, axes: np.ndarray, columns: list[Column]) -> None:
    """A colour bar below the columns that share it; with an arrow where values are beyond its end."""
    for scale in dict.fromkeys(column.scale for column in columns):
        sharing = [index for index, column in enumerate(columns) if column.scale == scale]
        column = columns[sharing[0]]
        is_clipped = max(np.abs(columns[index].maps).max() for index in sharing) > column.limit * 1.0001
        beyond = ("both" if column.is_change else "max") if is_clipped else "neither"
        place = figure.add_subplot(lines[-1, sharing[0] + 1 : sharing[-1] + 2])
        colours = axes[0, sharing[0] + 1].images[-1]
        scalars = ScalarMappable(colours.norm, colours.cmap)
        bar = figure.colorbar(scalars, cax=place, orientation="horizontal", extend=beyond, extendfrac=0.03)
        bar.set_label(scale + (f", clipped at its {CLIPPED_AT:.0%} quantile" if is_clipped else ""), fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.ax.locator_params(nbins=3)
