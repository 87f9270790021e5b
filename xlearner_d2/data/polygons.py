"""The polygons of an object's mask, as COCO json has them."""

from collections.abc import Sequence


def no_polygon(polygons: Sequence[Sequence[float]]) -> str:
    """In words: what is wrong with the first polygon that has no area; empty if all have one.

    Args:
        polygons: each ``[x1, y1, x2, y2, …]``.
    """
    lengths = [len(polygon) for polygon in polygons if len(polygon) % 2 or len(polygon) < 6]
    return f"has a polygon of {lengths[0]} numbers, but an even number of at least 6 is expected" if lengths else ""
