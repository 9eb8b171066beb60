"""Where the tokens of an image lie in it, and the image as it was before its processor.

Notation used for tensor shapes:
    - b: batch size
    - n: number of tokens
    - h, w: rows and columns of patches, or of the map of a stage
"""

from typing import Any

import numpy as np

Grid = tuple[int, int]


def patch_grid(config: Any, image_size: tuple[int, int], num_tokens: int) -> Grid | None:
    """Rows and columns of the patches of an image, by the size of a patch.

    Args:
        config: that of the backbone, with its `patch_size`.
        image_size: height and width in pixels.
        num_tokens: n. Before the patches there may be a class token, a distillation token and register tokens.

    Returns:
        The grid; `None` if the tokens are something else than these and the patches.
    """
    patch = patch_size_of(config)
    if patch is None:
        return None
    rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    most = 2 + (getattr(config, "num_register_tokens", 0) or 0)
    return (rows, columns) if rows * columns > 0 and 0 <= num_tokens - rows * columns <= most else None


def patch_size_of(config: Any) -> Grid | None:
    """Height and width of a patch in pixels, if the config has them."""
    size = getattr(config, "patch_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def covered(patch: Grid | None, image_size: Grid, grid: Grid) -> Grid:
    """Height and width in pixels of what a map covers of an image.

    It may be less, where the last pixels are of no whole patch, or more, where the last row or column is padding.

    Args:
        patch: the size of a patch, `None` for the map of a stage: stages halve height and width, so one place of it
            covers a power of two of pixels. If that is not so, the map is as large as the image.
        image_size: height and width in pixels.
        grid: h and w.
    """
    if patch is None:
        ratios = [pixels / places for pixels, places in zip(image_size, grid, strict=True)]
        side = 2 ** round(np.log2(ratios).mean())
        patch = (side, side)
    size = grid[0] * patch[0], grid[1] * patch[1]
    fits = all(abs(one - pixels) < side for one, pixels, side in zip(size, image_size, patch, strict=True))
    return size if fits else image_size


def on_grid(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Put what belongs to the patches where they lie; the tokens before them are left out. [..., n] -> [..., h, w]"""
    rows, columns = grid
    return values[..., values.shape[-1] - rows * columns :].reshape(*values.shape[:-1], rows, columns)


def images_of(pixel_values: np.ndarray, processor: Any = None) -> np.ndarray:
    """The images that were normalised, for looking at.

    Args:
        pixel_values: Shape: [b, channels, height, width]
        processor: whose `image_mean` and `image_std` are undone. Without these each image is scaled from its smallest
            to its largest value.

    Returns:
        Values from 0 to 1. Shape: [b, height, width, 3]
    """
    pixels = pixel_values.transpose(0, 2, 3, 1)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is not None and std is not None and getattr(processor, "do_normalize", True):
        pixels = pixels * np.asarray(std) + np.asarray(mean)
    else:
        low, high = pixels.min((1, 2, 3), keepdims=True), pixels.max((1, 2, 3), keepdims=True)
        pixels = (pixels - low) / np.maximum(high - low, 1e-12)
    pixels = pixels if pixels.shape[-1] == 3 else pixels.mean(-1, keepdims=True).repeat(3, -1)
    return pixels.clip(0, 1).astype(np.float32)
