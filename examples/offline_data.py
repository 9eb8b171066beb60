"""Real data that is on every machine: handwritten digits from scikit-learn and Python's own docstrings."""

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Their docstrings are worked examples with numbers, quite unlike the prose of the other modules.
NUMERIC_MODULES = ("_pydecimal", "fractions", "statistics")


def handwritten_digits(digits: Sequence[int], examples_per_class: int, orientations: int = 1) -> DatasetDict:
    """Images of some of the digits, 8 x 8 pixels.

    Args:
        digits: the digits to keep; they become the classes, in this order.
        examples_per_class: number of training images of each digit. All other images are for validation.
        orientations: above 1, each image is there so many times, turned and mirrored, and each orientation of a digit
            is a class of its own. A model that tells these apart has features that also describe other digits.

    Returns:
        The splits "train" and "validation" with the columns "image" and "label".
    """
    images, targets = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / images.max())).astype(np.uint8)
    chosen = np.flatnonzero(np.isin(targets, digits))
    train, validation = train_test_split(
        chosen, train_size=examples_per_class * len(digits), stratify=targets[chosen], random_state=0
    )
    names = [f"{digit} orientation {o}" if o else str(digit) for digit in digits for o in range(orientations)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})

    def split(rows: np.ndarray) -> Dataset:
        pairs = [(row, orientation) for row in rows for orientation in range(orientations)]
        columns = {
            "image": [PILImage.fromarray(_turned(pixels[row], orientation)) for row, orientation in pairs],
            "label": [digits.index(targets[row]) * orientations + orientation for row, orientation in pairs],
        }
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(train=split(train), validation=split(validation))


def digit_scenes(digits: Sequence[int], scenes: int) -> DatasetDict:
    """Images of four handwritten digits each, 16 x 16 pixels, and masks that say which pixel belongs to which digit.

    Args:
        digits: the digits to take; the strokes of the first one are class 1 of the masks, what is in no stroke is 0.
        scenes: number of images in each split.

    Returns:
        The splits "train", "validation" and "test", made of different digits, with the columns "image" and "mask".
    """
    images, targets = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / images.max())).astype(np.uint8)
    masks = (pixels > 127) * (np.searchsorted(digits, targets) + 1).astype(np.uint8)[:, None, None]
    features = Features({"image": Image(), "mask": Image()})
    generator = np.random.default_rng(0)
    thirds = np.array_split(generator.permutation(np.flatnonzero(np.isin(targets, digits))), 3)

    def split(rows: np.ndarray) -> Dataset:
        chosen = generator.choice(rows, (scenes, 4))
        columns = {"image": _tiled(pixels[chosen]), "mask": _tiled(masks[chosen])}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict({name: split(rows) for name, rows in zip(("train", "validation", "test"), thirds, strict=True)})


def _tiled(images: np.ndarray) -> list[PILImage.Image]:
    """Four images side by side and below each other. Shape of `images`: [scenes, 4, 8, 8]"""
    scenes = images.reshape(-1, 2, 2, 8, 8).swapaxes(2, 3).reshape(-1, 16, 16)
    return [PILImage.fromarray(scene) for scene in scenes]


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turned = np.rot90(pixels, orientation % 4)
    return np.ascontiguousarray(turned if orientation < 4 else np.fliplr(turned))


def library_docstrings(numeric: bool) -> DatasetDict:
    """Docstrings of Python's standard library, read from its sources without importing them.

    Args:
        numeric: whether to take those of `NUMERIC_MODULES`, or those of all other modules.

    Returns:
        The splits "train" and "validation" (every fifth docstring) with the column "text".
    """
    root = Path(sysconfig.get_path("stdlib"))
    # Many classes share a docstring, which must not be in both splits.
    texts = list(dict.fromkeys(text for path in _sources(root, numeric) for text in _docstrings(path)))
    if not texts:
        raise FileNotFoundError(f"The sources of Python's standard library are not in {root}.")
    random.Random(0).shuffle(texts)
    validation = texts[::5]
    train = [text for index, text in enumerate(texts) if index % 5]
    return DatasetDict(train=Dataset.from_dict({"text": train}), validation=Dataset.from_dict({"text": validation}))


def _sources(root: Path, numeric: bool) -> Iterator[Path]:
    if numeric:
        yield from (root / f"{name}.py" for name in NUMERIC_MODULES)
        return
    # Only what every installation has: distributions leave out or add other folders.
    packages = ("asyncio", "collections", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml")
    for path in sorted(root.glob("*.py")) + [path for name in packages for path in sorted(root.glob(f"{name}/*.py"))]:
        if path.stem not in NUMERIC_MODULES:
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text
