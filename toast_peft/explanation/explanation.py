"""What `explain` gives: arrays, and the ways to look at them.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - d: hidden size
    - h, w: height and width of a map of tokens
    - c: number of classes, or of tokens in the vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .attention import Sinks, View
from .grids import covered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PREDICTIONS = 5


class Pass(NamedTuple):
    """What the model computes in one of the two passes.

    Args:
        logits: `None` if the model has none. Shape: [b, c]; of language models [b, n, c]
        attentions: for each block, from the first on; `None` for ConvNets, hierarchical transformers, and where the
            model does not return them. Shape of each: [b, heads, n, n], queries before keys
        received: of hierarchical transformers, for each block the attention that each place of its map receives from
            the queries of its window, without windows from all, on average. In SegFormer and PVT the places are the
            patches that keys are made of. `None` for other models, and PVT with linear attention. Shape of each:
            [b, heads, h, w], with the block's size
    """

    logits: np.ndarray | None
    attentions: tuple[np.ndarray, ...] | None
    received: tuple[np.ndarray, ...] | None


class Prediction(NamedTuple):
    """One of the most probable classes or tokens, and its probability in each pass."""

    label: str
    first: float
    second: float


@dataclass(frozen=True, repr=False)
class Explanation:
    """What the feedback of a model sees in some inputs, and what it changes. Made by [`explain`].

    Args:
        first: pass 1, the model without feedback but with its trained head.
        second: pass 2, the output of the adapted model.
        mask: how much of each token is selected, from 0 to 1. Shape: [b, n]; of ConvNets and hierarchical transformers
            [b, h, w]
        gate: how far the gate of the adapter is open for each token, from 0 to 1; a factor of the mask. `None` if it
            has none. Shape: as the mask
        feedback_norm: for each block that receives feedback the norm of what is added to the input of its value
            projection, of a ConvNet to the input of the stage. Shape: [b, n], or [b, h, w] with its own size
        features: what the feedback starts from. Shape: [b, n, d], or [b, h, w, d]
        swapped_logits: those of pass 2 with the feedback of the next row's features ([`swapped_features`]). Where they
            are those of `second` the feedback does not depend on the input. `None` if there is one row. Shape: as the
            logits
        tokens: for each row the text of its tokens, `None` if they are not those of a text.
        is_padding: whether a token is padding, which pictures leave out. Shape: as the mask
        images: from 0 to 1, `None` if there are none. Shape: [b, height, width, 3]
        grid: rows and columns of the patches. They are the last tokens; before them are the class token and others.
        patch_size: height and width of a patch in pixels; `None` for the maps of stages, and without images.
        has_logits_of_tokens: whether the logits are one for each of these tokens, as in a language model.
        labels: names of the classes by their index; of a vocabulary those that are among the most probable.
    """

    first: Pass
    second: Pass
    mask: np.ndarray
    gate: np.ndarray | None
    feedback_norm: dict[int, np.ndarray]
    features: np.ndarray
    swapped_logits: np.ndarray | None
    tokens: list[list[str]] | None
    is_padding: np.ndarray
    images: np.ndarray | None
    grid: tuple[int, int] | None
    patch_size: tuple[int, int] | None
    has_logits_of_tokens: bool
    labels: dict[int, str]

    def __repr__(self) -> str:
        """What there is, without the numbers."""
        images = "no images" if self.images is None else f"images {list(self.images.shape)}"
        blocks = f"feedback to the blocks {sorted(self.feedback_norm)}"
        return f"Explanation(mask {list(self.mask.shape)}, features {list(self.features.shape)}, {blocks}, {images})"

    def extent(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what a map of this many rows and columns covers of the images.

        Raises:
            ValueError: if there are no images.
        """
        if self.images is None:
            raise ValueError("There are no images; expected an explanation of a model that gets `pixel_values`.")
        return covered(self.patch_size, self.images.shape[1:3], grid)

    def predictions(self, row: int = 0, token: int = -1) -> list[Prediction]:
        """The classes that are most probable in pass 1 or pass 2, by their probability in pass 2.

        Args:
            row: of the batch.
            token: of a language model, which token to predict from.

        Returns:
            Five to ten; none if the model has no logits of the shape [b, c], nor [b, n, c] of these tokens.
        """
        first, second = (self._logits(of_pass, row, token) for of_pass in (self.first, self.second))
        if first is None or second is None:
            return []
        chosen = sorted({int(i) for logits in (first, second) for i in np.argsort(-logits)[:NUM_PREDICTIONS]})
        before, after = _softmax(first), _softmax(second)
        rows = [Prediction(self.labels.get(i, str(i)), float(before[i]), float(after[i])) for i in chosen]
        return sorted(rows, key=lambda prediction: -prediction.second)

    def _logits(self, of_pass: Pass, row: int, token: int) -> np.ndarray | None:
        if of_pass.logits is None or (of_pass.logits.ndim != 2 and not self.has_logits_of_tokens):
            return None
        return of_pass.logits[row] if of_pass.logits.ndim == 2 else of_pass.logits[row, token]

    def plot(
        self,
        rows: Sequence[int] | None = None,
        *,
        block: int = -1,
        head: int | None = None,
        query: int | None = None,
        sinks: Sinks = "clip",
        rollout: bool = False,
    ) -> "Figure":
        """Draw mask and attention with matplotlib.

        Args:
            rows: of the batch; `None` for all.
            block: whose attention; -1 is the last. Without attentions, whose norm of the feedback.
            head: of the block, `None` for the mean.
            query: the token whose attention is shown; `None` for the class token or the mean over all patches, and in
                a text for the last token. Hierarchical transformers have the mean only.
            sinks: "clip" ends the scale of colours at the 95 % quantile, so that a few tokens with most of the
                attention do not hide the others; "keep" at the largest value. No value is changed.
            rollout: show the rollout of all blocks up to this one (https://arxiv.org/abs/2005.00928). It needs
                attention between all tokens.

        Returns:
            A figure, for `savefig`; a notebook shows it.

        Raises:
            ImportError: if matplotlib is missing.
            ValueError: if there is nothing to draw on, or no such row, block, head or token.
        """
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib, which is not installed; `pip install 'toast_peft[explain]'`, or use "
                "`to_html()`, which needs nothing."
            ) from error
        chosen = list(range(len(self.mask))) if rows is None else list(rows)
        view = View(block, head, query, sinks, rollout)
        self._check(chosen, view)
        if self.images is not None:
            from .pictures import draw_images

            return draw_images(self, chosen, view)
        from .text_pictures import draw_texts

        return draw_texts(self, chosen, view)

    def _check(self, rows: list[int], view: View) -> None:
        b, n, query = len(self.mask), self.mask.shape[1], view.query
        wrong = [row for row in rows if not -b <= row < b]
        if wrong or not rows:
            raise ValueError(f"`rows={rows}`, but the batch has the rows 0 to {b - 1}; take some of them.")
        if self.mask.ndim == 3 and (query is not None or view.rollout):
            raise ValueError(
                f"`query={query}` and `rollout={view.rollout}`, but this model has no attention between all tokens of "
                "its map; leave both out."
            )
        if query is not None and not -n <= query < n:
            raise ValueError(f"`query={query}`, but there are {n} tokens; take one from 0 on.")
        if self.images is None and self.mask.ndim == 3:
            raise ValueError("There are no images to draw on; pass `pixel_values` of the shape [b, channels, h, w].")

    def save(self, path: str | Path, **options: Any) -> None:
        """Write a picture, or a page if the name ends with `.html`.

        Args:
            path: its ending says the format, `.png`, `.pdf`, `.svg` or another one of matplotlib.
            options: those of `plot`; a page has none.

        Raises:
            ValueError: if `options` are given for a page.
        """
        if Path(path).suffix.lower() not in (".html", ".htm"):
            self.plot(**options).savefig(path, dpi=110)
            return
        if options:
            raise ValueError(f"{sorted(options)} were given for a page, where all of them are chosen by click.")
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def to_html(self) -> str:
        """One page without anything outside of it: a slider from pass 1 to pass 2, each block and head by click."""
        from .page import make_page

        return make_page(self)

    def _repr_html_(self) -> str:
        """In a notebook, in a frame of its own so that styles do not mix."""
        page = escape(self.to_html())
        return f'<iframe srcdoc="{page}" title="Explanation" style="width:100%;height:46rem;border:0"></iframe>'


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
