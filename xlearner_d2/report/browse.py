"""Contact sheets of mapped images: what a head gets to see, with its labels drawn on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from ..labels import PanopticLabels
from .pictures import draw_caption, draw_depth, draw_labels, overlay, resize_to, with_colours

Record = Mapping[str, Any]
_WHITE = (1.0, 1.0, 1.0)
_MARGIN, _HEADER, _MOST_LABELS = 6, 34, 6


def draw_sheet(
    records: Sequence[Record],
    metadata: Metadata,
    *,
    output_file: str | Path,
    title: str,
    image_format: str,
    columns: int = 4,
    cell_size: int = 320,
) -> None:
    """Write a PNG of mapped images in rows, each with its boxes, masks, keypoints, semantic map or classes.

    Args:
        records: as mappers give them to a model, with ``image`` [3, H, W] and any of ``instances``, ``sem_seg``,
            ``depth``, ``category_id`` and ``category_ids``.
        metadata: names and, if it has them, colours of the classes.
        output_file: its folder is created.
        title: a line above the images.
        image_format: "RGB" or "BGR", the channel order of ``image``.
        cell_size: longer edge of every picture, in pixels.

    Raises:
        ValueError: without any image.
    """
    if not records:
        raise ValueError(f"There is no image to draw for {output_file}.")
    metadata = with_colours(metadata)
    cells = [_draw(record, metadata, image_format=image_format, cell_size=cell_size) for record in records]
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    _compose(cells, title=title, columns=min(columns, len(cells))).save(output_file)


def panoptic_names(metadata: Metadata) -> Metadata:
    """The metadata with the names of things and stuff as Detectron2's PanopticFPN numbers them in mapped records."""
    labels = PanopticLabels.of(metadata)
    if labels is None:
        return metadata
    found = {key: value for key, value in metadata.as_dict().items() if not key.startswith(("thing_", "stuff_"))}
    stuff = ["things", *(metadata.stuff_classes[number] for number in labels.stuff)]
    things = [metadata.thing_classes[number] for number in labels.things]
    return Metadata(**found, thing_classes=things, stuff_classes=stuff)


def describe_sizes(records: Sequence[Record]) -> str:
    """In words: sizes of the images in their files and as mapped, and how many objects they have."""
    files = [(record["height"], record["width"]) for record in records if "height" in record and "width" in record]
    text = f"images of {_range(tuple(record['image'].shape[1:]) for record in records)}"
    text += f" from files of {_range(files)}" if files else ""
    counts = [len(record["instances"]) for record in records if "instances" in record]
    return text + (f", with {min(counts)} to {max(counts)} objects" if counts else "")


def _range(sizes: Any) -> str:
    """``128 x 128`` or ``96 x 128 to 192 x 256``, height first, by area."""
    ordered = sorted({tuple(map(int, size)) for size in sizes}, key=lambda size: size[0] * size[1])
    first, last = ("{} x {}".format(*size) for size in (ordered[0], ordered[-1]))
    return first if len(ordered) == 1 else f"{first} to {last}"


def _draw(record: Record, metadata: Metadata, *, image_format: str, cell_size: int) -> np.ndarray:
    """Picture [H, W, 3] of one mapped record."""
    image = record["image"].permute(1, 2, 0).clamp(0, 255).byte().numpy()  # [H, W, 3]
    image = np.ascontiguousarray(image[..., ::-1] if image_format == "BGR" else image)
    transform = resize_to(image, cell_size)
    visualizer = Visualizer(transform.apply_image(image), metadata)
    if "sem_seg" in record:
        labels = record["sem_seg"].numpy().astype(np.uint8)
        draw_labels(visualizer, transform.apply_segmentation(labels))
    if "depth" in record:
        draw_depth(visualizer, transform.apply_segmentation(record["depth"].numpy()))
    if "instances" in record:
        _draw_instances(visualizer, record["instances"], scale=transform.new_w / image.shape[1])
    names = metadata.get("classes", ()) or metadata.get("thing_classes", ())
    labels = record["category_ids"] if "category_ids" in record else [record.get("category_id")]
    lines = [names[label] for label in labels if label is not None]
    shown = [*lines[:_MOST_LABELS], *([f"and {len(lines) - _MOST_LABELS} more"] if len(lines) > _MOST_LABELS else [])]
    draw_caption(visualizer, [(line, _WHITE) for line in shown])
    return visualizer.output.get_image()


def _draw_instances(visualizer: Visualizer, instances: Instances, *, scale: float) -> None:
    size = visualizer.img.shape[:2]
    boxes: Boxes = instances.gt_boxes.clone()
    boxes.scale(scale, scale)
    shapes: dict[str, Any] = {"boxes": boxes.tensor.numpy()}
    if instances.has("gt_masks"):
        shapes["masks"] = _masks(instances, size)
    if instances.has("gt_keypoints"):
        keypoints = instances.gt_keypoints.tensor.clone()  # [objects, keypoints, (x, y, visibility)]
        keypoints[..., :2] *= scale
        shapes["keypoints"] = keypoints.numpy()
    overlay(visualizer, instances.gt_classes.tolist(), scores=None, **shapes)


def _masks(instances: Instances, size: tuple[int, int]) -> list[np.ndarray]:
    """Masks of objects, [H, W] each, in the picture's ``size``: of polygons or of bit maps."""
    masks, (height, width) = instances.gt_masks, instances.image_size
    if hasattr(masks, "polygons"):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    if not len(masks):
        return []
    enlarged = F.interpolate(torch.as_tensor(masks.tensor)[:, None].float(), size=size)  # [objects, 1, H, W]
    return [mask[0].numpy() for mask in enlarged.byte()]


def _compose(cells: Sequence[np.ndarray], *, title: str, columns: int) -> Image.Image:
    """Pictures in rows, each centred in its cell, below a title that is cut to the sheet's width."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width = max(cell.shape[1] for cell in cells)
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    sheet_width = columns * (width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, _HEADER + sum(height + _MARGIN for height in heights)), "white")
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(sheet).text((_MARGIN, _HEADER // 2), title, fill="black", font=font, anchor="lm")
    top = _HEADER
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            corner = (left + (width - cell.shape[1]) // 2, top + (height - cell.shape[0]) // 2)
            sheet.paste(Image.fromarray(cell), corner)
        top += height + _MARGIN
    return sheet
