"""The keypoints of COCO json's categories, as Detectron2's metadata describes them."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from detectron2.utils.colormap import colormap

logger = logging.getLogger(__name__)

#: What names a side, and its opposite.
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_WORD = re.compile(r"(?i:left|right)")
#: The words anywhere; letters that stand alone, or begin or end a name of words that are written together (LEye, EyeL).
_SIDE = re.compile(r"(?i:left|right)|(?<![A-Za-z])[lLrR](?![a-z])|(?<=[a-z])[LR](?![A-Za-z])")


def keypoint_names(category: dict[str, Any]) -> list[str]:
    """Names of a category's keypoints; empty if it has none."""
    names = category.get("keypoints")
    return [str(name) for name in names] if isinstance(names, list) else []


def keypoint_metadata(categories: Sequence[dict[str, Any]], subject: str) -> dict[str, Any]:
    """``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules``; empty without keypoints.

    Detectron2's keypoint heads have one list of keypoints for all classes. Categories with different ones give a
    warning and no metadata, so that their boxes can be used all the same.
    """
    listed = [category for category in categories if keypoint_names(category)]
    if not listed:
        return {}
    names = keypoint_names(listed[0])
    if any(keypoint_names(category) != names for category in listed) or len(set(names)) < len(names):
        logger.warning("%s: keypoints cannot be used, as all classes need the same ones, each once.", subject)
        return {}
    pairs = flip_map(names)
    if not pairs:
        text = (
            "%s: no keypoints differ in left and right, or in l and r, alone, so that none swap in a mirrored image: %s"
        )
        logger.warning(text, subject, ", ".join(names))
    return {
        "keypoint_names": names,
        "keypoint_flip_map": pairs,
        "keypoint_connection_rules": _connections(names, listed[0].get("skeleton")),
    }


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs that swap when an image is mirrored: names that differ in left and right, or in l and r, alone."""
    pairs: list[tuple[str, str]] = []
    left = set(names)
    for sides in (_WORD, _SIDE):  # by words first: the letters of left_RV may name something else
        for name in names:
            other = _mirrored(name, sides)
            if other != name and {name, other} <= left and _mirrored(other, sides) == name:
                pairs.append((name, other))
                left -= {name, other}
    return pairs


def _mirrored(name: str, sides: re.Pattern[str]) -> str:
    return sides.sub(lambda found: _opposite(found[0]), name)


def _opposite(side: str) -> str:
    other = _SIDES[side.lower()]
    return other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other


def _connections(names: Sequence[str], skeleton: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Lines to draw, from pairs of keypoints that COCO counts from 1; others are left out."""
    colours = colormap(rgb=True, maximum=255).astype(int).tolist()
    rules = []
    for number, pair in enumerate(skeleton if isinstance(skeleton, list) else []):
        if len(pair) == 2 and all(isinstance(end, int) and 1 <= end <= len(names) for end in pair):
            first, second = (names[end - 1] for end in pair)
            rules.append((first, second, tuple(colours[number % len(colours)])))
    return rules
