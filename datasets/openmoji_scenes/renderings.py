"""How a set looks: changes to the glyphs, and changes to the finished image."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Pixels = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _line_art(glyph: Pixels) -> Pixels:
    """Black outlines on white paper; the shape (alpha) stays."""
    alpha = glyph[..., 3:]
    luma = (glyph[..., :3] @ _LUMA)[..., None] / np.maximum(alpha / 255, 1e-3)
    paper = np.clip((luma - 60) / 60, 0.08, 1)
    return np.concatenate([np.repeat(paper * alpha, 3, axis=-1), alpha], axis=-1)


def _grey(image: Pixels, rng: Generator) -> Pixels:
    luma = (image @ _LUMA)[..., None]
    return np.repeat(128 + rng.uniform(0.5, 0.8) * (luma - 128), 3, axis=-1)


def _inverted(image: Pixels, rng: Generator) -> Pixels:
    return 255 - image


def _blurred(image: Pixels, rng: Generator) -> Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.008, 0.016) * len(image)), dtype=np.float32)


def _noisy(image: Pixels, rng: Generator) -> Pixels:
    return image + np.float32(rng.uniform(25, 45)) * rng.standard_normal(size=image.shape, dtype=np.float32)


#: Changes to a glyph: premultiplied RGBA in and out, shape (side, side, 4), range 0..255.
GLYPH_RENDERINGS: dict[str, Callable[[Pixels], Pixels]] = {"line_art": _line_art}
#: Changes to an image: RGB in and out, shape (size, size, 3), range 0..255 (clipped later).
IMAGE_RENDERINGS: dict[str, Callable[[Pixels, Generator], Pixels]] = {
    "grey": _grey,
    "inverted": _inverted,
    "blurred": _blurred,
    "noisy": _noisy,
}


def render_glyph(glyph: NDArray[np.uint8], rendering: str) -> Pixels:
    """Apply ``rendering`` if it is one of glyphs."""
    pixels = glyph.astype(np.float32)
    return GLYPH_RENDERINGS[rendering](pixels) if rendering in GLYPH_RENDERINGS else pixels


def finish_image(image: Pixels, rendering: str, rng: Generator) -> NDArray[np.uint8]:
    """Apply ``rendering`` if it is one of images, add the faint noise of a camera and round."""
    if rendering in IMAGE_RENDERINGS:
        image = IMAGE_RENDERINGS[rendering](image, rng)
    noise = rng.standard_normal(size=image.shape, dtype=np.float32)
    return np.clip(image + np.float32(rng.uniform(1, 5)) * noise, 0, 255).round().astype(np.uint8)
