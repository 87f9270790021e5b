"""Images composed of a background and glyphs, with exact labels."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .glyphs import Glyph, raster
from .renderings import finish_image, render_glyph
from .sets import SetSpec, clutter_glyphs, object_classes, stuff_classes
from .textures import paint, paint_regions

IGNORE_VALUE = 255
#: An object is moved until at least this share of every object can be seen.
MIN_VISIBLE = 0.6
#: Smallest visible area, as a fraction of the image.
MIN_AREA = 0.0015
_ATTEMPTS = 8


@dataclass(kw_only=True)
class Scene:
    """A background onto which objects are drawn from back to front.

    Attributes:
        image: RGB, shape (size, size, 3), range 0..255.
        owner: for each pixel the index of the object that is seen there, or -1.
        mixed: pixels on outlines, which show an object and what is behind it.
        class_ids: the class of each object.
        areas: the area of each object inside the image, in pixels, with nothing in front of it.
    """

    image: NDArray[np.float32]
    owner: NDArray[np.int16] = field(init=False)
    mixed: NDArray[np.bool_] = field(init=False)
    class_ids: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = np.full(self.image.shape[:2], -1, dtype=np.int16)
        self.mixed = np.zeros(self.image.shape[:2], dtype=np.bool_)

    def draw(self, layer: NDArray[np.float32]) -> None:
        """Blend a premultiplied RGBA layer over the image, without a label."""
        self.image = np.asarray(self.image * (1 - layer[..., 3:] / np.float32(255)) + layer[..., :3], dtype=np.float32)

    def fits(self, mask: NDArray[np.bool_]) -> bool:
        """Whether an object of this mask could be added with every object still visible enough."""
        area = int(mask.sum())
        if area < MIN_AREA * mask.size:
            return False
        left = np.bincount(self.owner[~mask] + 1, minlength=len(self.areas) + 1)[1:]
        needed = np.maximum(MIN_VISIBLE * np.array(self.areas), MIN_AREA * mask.size)
        return bool((left >= needed).all())

    def add(self, layer: NDArray[np.float32], class_id: int) -> bool:
        """Draw an object in front of all others, if it fits."""
        mask = layer[..., 3] > 127
        if not self.fits(mask):
            return False
        self.owner[mask] = len(self.class_ids)
        self.mixed[mask] = False
        self.mixed |= (layer[..., 3] > 51) & (layer[..., 3] < 204)
        self.class_ids.append(class_id)
        self.areas.append(int(mask.sum()))
        self.draw(layer)
        return True

    def masks(self) -> list[NDArray[np.bool_]]:
        """The visible mask of each object."""
        return [self.owner == index for index in range(len(self.class_ids))]


def _tinted(pixels: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    """Premultiplied RGBA with other brightness and colour balance; no colour exceeds its alpha."""
    tint = np.append(rng.uniform(0.8, 1.1) * rng.uniform(0.9, 1.1, size=3), 1).astype(np.float32)
    return np.minimum(pixels * tint, pixels[..., 3:])


def _glyph_layer(
    glyph: Glyph, spec: SetSpec, rng: Generator, size: int, scale: tuple[float, float]
) -> NDArray[np.float32]:
    """The glyph at a random place, size, turn and tint. Premultiplied RGBA, shape (size, size, 4), range 0..255."""
    extent = rng.uniform(*scale) * size
    side = max(16, 1 << int(np.ceil(np.log2(extent))))
    pixels = render_glyph(raster(glyph.char, side), spec.rendering)
    # At most a margin of the object leaves the image.
    centre = rng.uniform(0.4 * extent, size - 0.4 * extent, size=2)
    angle = np.deg2rad(rng.uniform(-spec.rotation, spec.rotation))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (extent / side)
    if rng.uniform() < 0.5:
        matrix[:, 0] *= -1
    move = centre - matrix @ np.full(2, (side - 1) / 2)
    layer = cv2.warpAffine(_tinted(pixels, rng), np.column_stack([matrix, move]), (size, size), flags=cv2.INTER_LINEAR)
    return np.asarray(layer, dtype=np.float32)


def _scatter(scene: Scene, spec: SetSpec, rng: Generator, size: int) -> None:
    """Add one to ``max_objects`` objects of random classes."""
    classes = list(object_classes(spec).values())
    for _ in range(rng.integers(1, spec.max_objects + 1)):
        class_id = int(rng.integers(len(classes)))
        glyph = classes[class_id][rng.integers(len(classes[class_id]))]
        for _ in range(_ATTEMPTS):
            if scene.add(_glyph_layer(glyph, spec, rng, size, spec.scale), class_id):
                break


def compose_single(spec: SetSpec, class_id: int, rng: Generator, size: int) -> NDArray[np.uint8]:
    """One large object of class ``class_id``, perhaps with small glyphs of no class behind it."""
    scene = Scene(image=paint(str(rng.choice(spec.textures)), rng, size))
    others = clutter_glyphs(spec)
    if others and rng.uniform() < spec.clutter:
        for _ in range(rng.integers(1, 4)):
            other = others[rng.integers(len(others))]
            scene.draw(_glyph_layer(other, spec, rng, size, (0.12, 0.25)))
    glyphs = list(object_classes(spec).values())[class_id]
    scene.draw(_glyph_layer(glyphs[rng.integers(len(glyphs))], spec, rng, size, spec.scale))
    return finish_image(scene.image, spec.rendering, rng)


def compose_scene(spec: SetSpec, rng: Generator, size: int) -> tuple[NDArray[np.uint8], Scene]:
    """Several objects on one texture; the scene knows their classes and masks."""
    scene = Scene(image=paint(str(rng.choice(spec.textures)), rng, size))
    _scatter(scene, spec, rng, size)
    return finish_image(scene.image, spec.rendering, rng), scene


def compose_dense(spec: SetSpec, rng: Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Several objects on one to three textures.

    Returns:
        The image, and the class index of each pixel (shape (size, size)); outlines have ``IGNORE_VALUE``.
    """
    num_regions = int(rng.integers(1, min(3, len(spec.textures)) + 1))
    names = [str(name) for name in rng.choice(spec.textures, size=num_regions, replace=False)]
    image, region = paint_regions(names, rng, size)
    scene = Scene(image=image)
    _scatter(scene, spec, rng, size)
    stuff = stuff_classes(spec)
    stuff_ids = np.array([stuff.index("background" if name == "plain" else name) for name in names])
    thing_ids = np.array([*scene.class_ids, 0]) + len(stuff)  # the last entry is what -1 reads
    labels = np.where(scene.owner >= 0, thing_ids[scene.owner], stuff_ids[region])
    labels[scene.mixed] = IGNORE_VALUE
    return finish_image(scene.image, spec.rendering, rng), labels.astype(np.uint8)
