"""Procedural two-colour textures: backgrounds, and the "stuff" classes of semantic segmentation."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

#: Float32 image, shape (size, size, 3), range 0..255.
Image = NDArray[np.float32]
#: How much of the second colour each pixel has: shape (size, size), range 0..1.
Weights = NDArray[np.float64]


def _grid(rng: Generator, size: int, *, upright: bool = False) -> tuple[Weights, Weights]:
    """Pixel coordinates, turned and moved at random and counted in periods of the pattern."""
    period = rng.uniform(0.08, 0.16) * size
    angle = rng.uniform(-0.15, 0.15) if upright else rng.uniform(0, np.pi)
    y, x = np.mgrid[:size, :size] / period
    u = np.cos(angle) * x + np.sin(angle) * y + rng.uniform()
    v = np.cos(angle) * y - np.sin(angle) * x + rng.uniform()
    return u, v


def _soft_step(values: Weights, sharpness: float = 3.0) -> Weights:
    """0 below zero and 1 above, with a short ramp against jagged edges."""
    return np.clip(0.5 + sharpness * values, 0, 1)


def _resize(values: Weights, size: int) -> Weights:
    """Enlarge a coarse square grid by cosine interpolation."""
    place = np.linspace(0, len(values) - 1 - 1e-6, size)
    low = place.astype(int)
    part = (1 - np.cos(np.pi * (place - low))) / 2
    rows = values[low] * (1 - part)[:, None] + values[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def plain(rng: Generator, size: int) -> Weights:
    return np.zeros((size, size))


def gradient(rng: Generator, size: int) -> Weights:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    return np.clip(0.5 + np.cos(angle) * x + np.sin(angle) * y, 0, 1)


def stripes(rng: Generator, size: int) -> Weights:
    return _soft_step(np.sin(2 * np.pi * _grid(rng, size)[0]), 1.5)


def dots(rng: Generator, size: int) -> Weights:
    u, v = _grid(rng, size)
    return _soft_step(rng.uniform(0.25, 0.38) - np.hypot(u % 1 - 0.5, v % 1 - 0.5), 6)


def checker(rng: Generator, size: int) -> Weights:
    u, v = _grid(rng, size)
    return _soft_step(np.sin(np.pi * u) * np.sin(np.pi * v))


def clouds(rng: Generator, size: int) -> Weights:
    coarse, fine = (_resize(rng.uniform(size=(cells, cells)), size) for cells in (6, 14))
    return 0.65 * coarse + 0.35 * fine


def grain(rng: Generator, size: int) -> Weights:
    return np.clip(0.5 + 0.35 * _resize(rng.normal(size=(size // 2, size // 2)), size), 0, 1)


def waves(rng: Generator, size: int) -> Weights:
    u, v = _grid(rng, size)
    return _soft_step(np.sin(2 * np.pi * (u + 0.35 * np.sin(np.pi * v))), 1.5)


def rings(rng: Generator, size: int) -> Weights:
    y, x = np.mgrid[:size, :size] - rng.uniform(0.2, 0.8, size=(2, 1, 1)) * size
    return _soft_step(np.sin(2 * np.pi * np.hypot(x, y) / (rng.uniform(0.08, 0.16) * size)), 1.5)


def bricks(rng: Generator, size: int) -> Weights:
    u, v = _grid(rng, size, upright=True)
    u = u / 2 + 0.5 * (np.floor(v) % 2)
    mortar = np.minimum(np.minimum(u % 1, 1 - u % 1) * 2, np.minimum(v % 1, 1 - v % 1))
    return _soft_step(0.1 - mortar, 8)


def crosshatch(rng: Generator, size: int) -> Weights:
    u, v = _grid(rng, size)
    return _soft_step(0.12 - np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)), 8)


def cells(rng: Generator, size: int) -> Weights:
    """Voronoi cells, each of its own shade."""
    centres = rng.uniform(0, size, size=(40, 2))
    y, x = np.mgrid[:size, :size]
    distance = (y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2
    return rng.uniform(size=40)[distance.argmin(axis=-1)]


TEXTURES: dict[str, Callable[[Generator, int], Weights]] = {
    texture.__name__: texture
    for texture in (
        *(plain, gradient, stripes, dots, checker, clouds, grain),  # seen upstream
        *(waves, rings, bricks, crosshatch, cells),  # kept for downstream
    )
}


def _colours(rng: Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two colours that can be told apart, yet are calmer than the glyphs."""
    first = rng.uniform(60, 230, size=3)
    away = rng.uniform(35, 75, size=3) * np.where(first > 145, -1, 1)
    return first.astype(np.float32), (first + away).astype(np.float32)


def paint(name: str, rng: Generator, size: int) -> Image:
    """The texture ``name`` in two random colours."""
    first, second = _colours(rng)
    weights = TEXTURES[name](rng, size)[..., None].astype(np.float32)
    return np.asarray(first + (second - first) * weights, dtype=np.float32)


def paint_regions(names: list[str], rng: Generator, size: int) -> tuple[Image, NDArray[np.uint8]]:
    """Cut the image along wavy lines into one region per name.

    Returns:
        The image, and for each pixel the index of its region: shape (size, size).
    """
    image = paint(names[0], rng, size)
    region = np.zeros((size, size), dtype=np.uint8)
    for index, name in enumerate(names[1:], 1):
        angle, phase = rng.uniform(0, 2 * np.pi, size=2)
        y, x = np.mgrid[:size, :size] / size - 0.5
        across = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(0, 0.25)
        along = np.cos(angle) * y - np.sin(angle) * x
        inside = across + rng.uniform(0.02, 0.06) * np.sin(8 * along + phase) > 0
        image[inside] = paint(name, rng, size)[inside]
        region[inside] = index
    return image, region
