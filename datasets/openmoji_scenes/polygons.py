"""Masks as COCO polygons that give back the same mask, holes included."""

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def _bridge(outline: Points, hole: Points) -> Points:
    """Cut ``hole`` out by a slit of no width from its first point to the nearest point of ``outline``.

    COCO polygons have no holes, but they are filled by the even-odd rule, and the slit's two sides cancel.
    """
    at = int(((outline - hole[0]) ** 2).sum(axis=1).argmin())
    return np.concatenate([outline[: at + 1], hole, hole[:1], outline[at:]])


def mask_to_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """One polygon [x0, y0, x1, y1, ...] per connected part of ``mask``, in pixels from the image's corner."""
    # Contours run through pixel centres. On a grid twice as fine they stay a quarter of a pixel inside of the
    # edge, so that every pixel centre is on its own side of the polygon.
    fine = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    points = [(contour[:, 0].astype(np.float64) + 0.5) / 2 for contour in contours]
    polygons = []
    for index, outline in enumerate(points):
        _, _, child, parent = hierarchy[0][index]
        if parent >= 0:
            continue
        while child >= 0:
            outline = _bridge(outline, points[child])
            child = hierarchy[0][child][0]
        polygons.append(outline.ravel().tolist())
    return polygons
