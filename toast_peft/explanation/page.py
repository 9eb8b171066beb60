"""Makes the interactive page: fills `page.html` with numbers, small enough to send around.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
"""

import base64
import json
import struct
import zlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from .attention import CLIPPED_AT, attention_rollout, of_class_token
from .grids import on_grid

if TYPE_CHECKING:
    from .explanation import Explanation

MOST_NUMBERS = 600_000  # of attention in a page, over all rows
_UNIT = 10_000  # numbers are whole multiples of 1 / _UNIT


def make_page(explanation: "Explanation") -> str:
    """One HTML page with all rows of the batch, which loads nothing."""
    kept, is_by_head = _kept_queries(explanation)
    data = {
        "unit": _UNIT,
        "quantile": CLIPPED_AT,
        "isImage": explanation.images is not None,
        "isReceived": explanation.first.received is not None,
        "hasHeads": is_by_head,
        "rows": [_row(explanation, row, kept, is_by_head) for row in range(len(explanation.mask))],
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # "<" inside of a script could end it, or begin a comment.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__DATA__", text)


def _kept_queries(explanation: "Explanation") -> tuple[bool, bool]:
    """Whether a text has all queries in its page, and not only their mean, and whether attention is by head."""
    attentions = explanation.first.attentions
    if attentions is None:
        return False, explanation.first.received is not None
    numbers = 2 * sum(attention.size for attention in attentions)
    heads = attentions[0].shape[1]
    if explanation.images is not None:
        return False, numbers / attentions[0].shape[-1] <= 4 * MOST_NUMBERS
    return numbers / heads <= MOST_NUMBERS, numbers <= MOST_NUMBERS


def _row(explanation: "Explanation", row: int, all_queries: bool, is_by_head: bool) -> dict[str, Any]:
    """What the page shows of one row of the batch."""
    tokens = np.arange(explanation.mask.shape[1])
    if explanation.images is None and explanation.mask.ndim == 2:
        tokens = np.flatnonzero(~explanation.is_padding[row])
    elif explanation.mask.ndim == 2:
        assert explanation.grid is not None
        tokens = tokens[len(tokens) - explanation.grid[0] * explanation.grid[1] :]
    names = None if explanation.tokens is None else [explanation.tokens[row][token] for token in tokens]
    return {
        "name": str(row),
        "image": None if explanation.images is None else _png(explanation.images[row]),
        "size": None if explanation.images is None else explanation.images.shape[2:0:-1],
        "tokens": names or [str(token) for token in tokens],
        "gate": None if explanation.gate is None else _map(explanation, explanation.gate[row], tokens),
        "mask": _map(explanation, explanation.mask[row], tokens),
        "norms": {index: _map(explanation, norm[row], tokens) for index, norm in explanation.feedback_norm.items()},
        "attention": _attention(explanation, row, tokens, all_queries, is_by_head),
        "maps": [
            _map(explanation, maps[row, 0], tokens) | {"values": []} for maps in explanation.first.received or ()
        ],
        "predictions": _predictions(explanation, row, tokens),
    }


def _map(explanation: "Explanation", values: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Values with rows and columns where they lie in an image. Shape: [n], or [h, w]"""
    if values.ndim == 1:
        values = values[tokens]
        if explanation.grid is not None:
            values = on_grid(values, explanation.grid)
    if values.ndim == 1:
        return {"values": _numbers(values)}
    coarse = _coarse(values)
    if explanation.images is None:
        return {"values": _numbers(coarse)}
    # Which part of the image the map covers, and with it what the last row and column that are kept stand for.
    places = np.array(coarse.shape) * _step(values)
    parts = np.array(explanation.extent(values.shape)) / explanation.images.shape[1:3]
    cover = (parts * places / values.shape).round(5).tolist()
    return {"grid": list(coarse.shape), "cover": cover, "values": _numbers(coarse)}


def _step(values: np.ndarray) -> int:
    """One row and column of so many are kept of a map. Shape: [h, w]"""
    return max(1, -(-max(values.shape) // 64))


def _coarse(values: np.ndarray) -> np.ndarray:
    """A map of an image's size is more than a screen shows. Shape: [h, w]"""
    step = _step(values)
    return values[::step, ::step]


def _attention(
    explanation: "Explanation", row: int, tokens: np.ndarray, all_queries: bool, is_by_head: bool
) -> list[Any]:
    """For both passes, each block and each head rows of attention; the mean head comes first, the rollout last.

    What the places of a map receive is one row, and has no rollout.
    """
    passes = []
    for of_pass in (explanation.first, explanation.second):
        if of_pass.received is not None:
            of_blocks = [maps[row] for maps in of_pass.received]
            passes.append([[[_numbers(_coarse(of_head))] for of_head in (maps.mean(0), *maps)] for maps in of_blocks])
            continue
        if of_pass.attentions is None:
            return []
        blocks = [attention[row] for attention in of_pass.attentions]
        heads = [[block.mean(0), *(block if is_by_head else [])] for block in blocks]
        heads.append([attention_rollout([block[None] for block in blocks])[0]])
        passes.append([[_queries(explanation, matrix, tokens, all_queries) for matrix in block] for block in heads])
    return passes


def _queries(explanation: "Explanation", matrix: np.ndarray, tokens: np.ndarray, all_queries: bool) -> list[list[int]]:
    """What is shown of one matrix of attention. Shape: [n, n]"""
    if explanation.images is not None:
        return [_numbers(of_class_token(matrix[None], len(tokens))[0, tokens])]
    among = matrix[np.ix_(tokens, tokens)]
    return [_numbers(line) for line in (among if all_queries else among.mean(0, keepdims=True))]


def _predictions(explanation: "Explanation", row: int, tokens: np.ndarray) -> list[list[list[Any]]]:
    """For each token that predicts, or once for all: label and probability in both passes."""
    positions = tokens if explanation.has_logits_of_tokens else [-1]
    return [
        [[p.label, round(p.first, 4), round(p.second, 4)] for p in explanation.predictions(row, int(position))]
        for position in positions
    ]


def _numbers(values: np.ndarray) -> list[int]:
    return np.rint(np.nan_to_num(values) * _UNIT).astype(int).ravel().tolist()


def _png(image: np.ndarray) -> str:
    """The image as the address of itself. Shape: [height, width, 3]"""
    height, width, _ = image.shape
    pixels = np.rint(image * 255).astype(np.uint8).reshape(height, -1)
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # before each line its filter, 0 for none

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
