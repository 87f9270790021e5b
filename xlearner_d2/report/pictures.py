"""A grid of pictures: what is there on the left, what the model sees on the right."""

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.transforms import ResizeTransform, TransformList
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from ..data.depth import read_depth
from ..extensions import rgb2id
from ..labels import image_labels

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Colour = tuple[float, float, float]
Line = tuple[str, Colour]  # of a caption
KINDS = ("instances", "sem_seg", "panoptic_seg", "depth", "scores", "label_scores")
_GREEN, _RED, _WHITE = (0.45, 0.95, 0.45), (1.0, 0.5, 0.45), (1.0, 1.0, 1.0)
_MARGIN, _HEADER = 6, 34
_MOST_LABELS = 6


def draw_dataset_predictions(
    model: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    dataset_name: str,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    output_file: str | Path,
    records: Sequence[Record] | None = None,
    num_images: int = 8,
    score_threshold: float = 0.5,
) -> None:
    """Run a model on images spread evenly over a data set and draw its predictions; see :func:`draw_predictions`.

    Args:
        model: in evaluation mode during the call if it is a module, takes one mapped record at a time.
        dataset_name: a registered data set.
        mapper: turns a record into an input of the model, such as ``DatasetMapper(…, is_train=False)``.
        output_file, score_threshold: see :func:`draw_predictions`.
        records: of the data set, where they hold more than it has itself, such as proposals.
        num_images: fewer if the data set is smaller.

    Raises:
        ValueError: for an empty data set, and as :func:`draw_predictions`.
    """
    records = DatasetCatalog.get(dataset_name) if records is None else records
    if not records or num_images < 1:
        raise ValueError(f"{num_images} of the {len(records)} images of {dataset_name!r} cannot be drawn.")
    # The same images at every call, so that pictures of several models can be compared.
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    records = [records[index] for index in chosen]
    with torch.no_grad(), inference_context(model) if isinstance(model, torch.nn.Module) else nullcontext():
        outputs = [model([mapper(copy.deepcopy(dict(record)))])[0] for record in records]
    if not set(KINDS) & set(outputs[0]):
        logger.info("No pictures of %s: %s cannot be drawn.", dataset_name, ", ".join(outputs[0]) or "nothing")
        return
    draw_predictions(
        records, outputs, MetadataCatalog.get(dataset_name), output_file=output_file, score_threshold=score_threshold
    )


def draw_predictions(
    records: Sequence[Record],
    outputs: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    *,
    output_file: str | Path,
    score_threshold: float = 0.5,
    max_fallback: int = 5,
    cell_size: int = 480,
) -> None:
    """Write a PNG with the ground truth next to the prediction for each image.

    Args:
        records: data set records with ``file_name`` and any of ``annotations``, ``sem_seg_file_name``,
            ``pan_seg_file_name``, ``depth_file_name``, ``category_id`` and ``category_ids``.
        outputs: one per record, in the size of its file, with any of ``instances``, ``sem_seg`` (logits [C, H, W]),
            ``panoptic_seg`` (drawn instead of these two), ``depth`` ([H, W]), ``label_scores`` ([C] probabilities) and
            ``scores`` ([C]; probabilities, or logits, which a softmax turns into probabilities).
        metadata: names and, if it has them, colours of the classes.
        output_file: its folder is created.
        score_threshold: instances below it are left out; if that leaves none, the best ones are drawn.
        max_fallback: how many are drawn then.
        cell_size: longer edge of every picture, in pixels; small images are enlarged to it, large ones reduced.

    Raises:
        ValueError: for no image, another number of outputs than records, or an output that cannot be drawn.
    """
    if not records or len(records) != len(outputs):
        raise ValueError(f"Got {len(records)} records and {len(outputs)} outputs, but as many of each are expected.")
    for output in outputs:
        if not set(KINDS) & set(output):
            raise ValueError(
                f"An output has only {', '.join(output) or 'nothing'}, but one of {', '.join(KINDS)} is drawn."
            )
    metadata = with_colours(metadata)
    cells = []
    for record, output in zip(records, outputs, strict=True):
        image = utils.read_image(record["file_name"], format="RGB")
        transform = resize_to(image, cell_size)
        image = transform.apply_image(image)
        left, right = Visualizer(image, metadata), Visualizer(image, metadata)
        _draw_truth(left, record, output, transform)
        nearest = _nearest(record, transform) if "depth" in output and "depth_file_name" in record else None
        _draw_output(right, record, output, score_threshold=score_threshold, max_fallback=max_fallback, nearest=nearest)
        cells += [left.output.get_image(), right.output.get_image()]
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    _compose(cells, pairs_per_row=1 if len(records) == 1 else 2).save(output_file)


def resize_to(image: np.ndarray, cell_size: int) -> ResizeTransform:
    height, width = image.shape[:2]
    scale = cell_size / max(height, width)
    return ResizeTransform(
        height, width, *(max(1, round(side * scale)) for side in (height, width)), Image.Resampling.BICUBIC
    )


def with_colours(metadata: Metadata) -> Metadata:
    """A copy in which every class has a fixed colour, so that both sides of a pair agree."""
    result = Metadata(**metadata.as_dict())
    palette = colormap(rgb=True, maximum=255).astype(int)
    # Dark and grey colours cannot be told apart on a photograph.
    palette = palette[(palette.max(axis=1) >= 180) & (np.ptp(palette, axis=1) >= 60)].tolist()
    for kind in ("thing", "stuff"):
        names = result.get(f"{kind}_classes", ())
        if not result.get(f"{kind}_colors", None):
            result.set(**{f"{kind}_colors": [palette[index % len(palette)] for index in range(len(names))]})
    return result


def overlay(visualizer: Visualizer, classes: Sequence[int], *, scores: Sequence[float] | None, **shapes: Any) -> None:
    names, colours = visualizer.metadata.get("thing_classes", ()), visualizer.metadata.thing_colors
    labels = [names[index] if index < len(names) else str(index) for index in classes]
    if scores is not None:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
    fill = [tuple(channel / 255 for channel in colours[index % len(colours)]) for index in classes] if colours else None
    visualizer.overlay_instances(labels=labels, assigned_colors=fill, **shapes)


def _draw_truth(visualizer: Visualizer, record: Record, output: Mapping[str, Any], transform: ResizeTransform) -> None:
    """Draw of the record what the output predicts."""
    if "panoptic_seg" in output and "pan_seg_file_name" in record:
        segments = rgb2id(utils.read_image(record["pan_seg_file_name"], "RGB"))
        _draw_panoptic(visualizer, transform.apply_segmentation(segments.astype(np.float32)), record["segments_info"])
        return
    if "depth" in output and "depth_file_name" in record:
        draw_depth(visualizer, _true_depth(record, transform))
    if "label_scores" in output:
        names = visualizer.metadata.get("classes", ()) or visualizer.metadata.get("thing_classes", ())
        draw_caption(visualizer, [(_name(names, label), _WHITE) for label in image_labels(record)[:_MOST_LABELS]])
    if "sem_seg" in output and "sem_seg_file_name" in record:
        labels = utils.read_image(record["sem_seg_file_name"]).astype(np.uint8)
        draw_labels(visualizer, transform.apply_segmentation(labels))
    if "instances" in output:
        size = (transform.new_h, transform.new_w)
        change = functools.partial(
            utils.transform_instance_annotations, transforms=TransformList([transform]), image_size=size
        )
        items = [change(copy.deepcopy(item)) for item in record.get("annotations", ())]
        has_masks = (
            bool(items)
            and output["instances"].has("pred_masks")
            and all(i.get("segmentation") is not None for i in items)
        )
        overlay(
            visualizer,
            [item["category_id"] for item in items],
            scores=None,
            boxes=np.array([item["bbox"] for item in items]).reshape(-1, 4),
            masks=[item["segmentation"] for item in items] if has_masks else None,
        )
    if "scores" in output and "category_id" in record:
        names = visualizer.metadata.get("classes", ())
        draw_caption(visualizer, [(_name(names, record["category_id"]), _WHITE)])


def _draw_output(
    visualizer: Visualizer,
    record: Record,
    output: Mapping[str, Any],
    *,
    score_threshold: float,
    max_fallback: int,
    nearest: float | None = None,
) -> None:
    height, width = visualizer.img.shape[:2]
    segments, infos = output.get("panoptic_seg", (None, None))
    # Panoptic-DeepLab says what its segments are by their numbers alone.
    if infos is not None or (segments is not None and "label_divisor" in visualizer.metadata.as_dict()):
        _draw_panoptic(visualizer, _enlarge(segments, height, width), infos)
        return
    if "depth" in output:
        draw_depth(visualizer, _enlarge(output["depth"], height, width), nearest=nearest)
    if "label_scores" in output:
        names = visualizer.metadata.get("classes", ()) or visualizer.metadata.get("thing_classes", ())
        draw_caption(visualizer, _likely_labels(output["label_scores"], image_labels(record), names))
    if "sem_seg" in output:
        logits = output["sem_seg"].detach().float().cpu()[None]
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        draw_labels(visualizer, logits[0].argmax(dim=0).numpy())
    if "instances" in output:
        instances = _best(output["instances"].to("cpu"), score_threshold, max_fallback)
        boxes = instances.pred_boxes.clone()
        boxes.scale(width / instances.image_size[1], height / instances.image_size[0])
        masks = None
        if instances.has("pred_masks"):
            small = instances.pred_masks.float()[:, None]  # [instances, 1, height, width]
            masks = (
                [mask[0].numpy() for mask in F.interpolate(small, size=(height, width)).byte()] if len(small) else []
            )
        classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
        overlay(visualizer, classes, scores=scores, boxes=boxes.tensor.detach().numpy(), masks=masks)
    if "scores" in output:
        draw_caption(visualizer, _guesses(output["scores"], record, visualizer.metadata.get("classes", ())))


def _enlarge(values: torch.Tensor, height: int, width: int) -> np.ndarray:
    """[height, width] float32 of a map [H, W], by nearest neighbour."""
    return F.interpolate(values.detach().float().cpu()[None, None], size=(height, width))[0, 0].numpy()


def _draw_panoptic(visualizer: Visualizer, segments: np.ndarray, infos: Sequence[Mapping[str, Any]] | None) -> None:
    """Segments by number, [H, W]; without ``infos`` a number is that of the class times ``label_divisor`` and more."""
    keys = ("id", "category_id", "isthing")
    shown = None if infos is None else [{key: info[key] for key in keys} for info in infos]
    visualizer.draw_panoptic_seg(torch.as_tensor(segments.astype(np.int64)), shown, area_threshold=0, alpha=0.55)


def _true_depth(record: Record, transform: ResizeTransform) -> np.ndarray:
    depth: np.ndarray = transform.apply_segmentation(read_depth(record["depth_file_name"], scale=record["depth_scale"]))
    return depth


def _nearest(record: Record, transform: ResizeTransform) -> float | None:
    """The smallest depth that is known of the picture as it is drawn."""
    depth = _true_depth(record, transform)
    return float(depth[depth > 0].min()) if (depth > 0).any() else None


def draw_depth(visualizer: Visualizer, depth: np.ndarray, *, nearest: float | None = None) -> None:
    """Near is bright; where nothing is known, the image stays.

    Args:
        nearest: what is brightest; by default, the nearest that there is.
    """
    known = depth > 0
    inverse = np.divide(1, depth, where=known, out=np.zeros_like(depth))
    brightest = 1 / nearest if nearest else max(float(inverse.max()), 1e-9)
    colours = matplotlib.colormaps["inferno"](np.clip(inverse / brightest, 0, 1))[..., :3]
    image = np.where(known[..., None], 255 * colours, visualizer.img)
    visualizer.output.ax.imshow(
        image.astype(np.uint8), extent=(0, visualizer.output.width, visualizer.output.height, 0)
    )


def _likely_labels(scores: torch.Tensor, labels: Sequence[int], names: Sequence[str]) -> list[Line]:
    """The labels that are more likely than not, or the likeliest one: green if right, red if wrong."""
    ranking = scores.detach().float().cpu().argsort(descending=True)[:_MOST_LABELS].tolist()
    shown = [index for index in ranking if scores[index] >= 0.5] or ranking[:1]
    return [(f"{_name(names, i)} {float(scores[i]):.0%}", _GREEN if i in labels else _RED) for i in shown]


def _best(instances: Instances, score_threshold: float, max_fallback: int) -> Instances:
    """Instances from ``score_threshold`` on, or the ``max_fallback`` best if there are none."""
    above = instances[instances.scores >= score_threshold]
    return above if len(above) else instances[instances.scores.argsort(descending=True)[:max_fallback]]


def draw_labels(visualizer: Visualizer, labels: np.ndarray) -> None:
    visualizer.draw_sem_seg(labels, area_threshold=0, alpha=0.55)


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)


def _guesses(scores: torch.Tensor, record: Record, names: Sequence[str]) -> list[Line]:
    """Up to three lines "class probability": green if right, red if the first one is wrong."""
    scores = scores.detach().float().cpu()
    if scores.min() < 0 or abs(float(scores.sum()) - 1) > 1e-2:
        scores = scores.softmax(dim=0)
    lines = []
    for rank, index in enumerate(scores.argsort(descending=True)[:3].tolist()):
        right = index == record.get("category_id")
        colour = _GREEN if right else _RED if rank == 0 else _WHITE
        lines.append((f"{_name(names, index)} {float(scores[index]):.0%}", colour))
    return lines


def draw_caption(visualizer: Visualizer, lines: Sequence[Line]) -> None:
    """Lines of text from the top left corner downwards."""
    height = visualizer.img.shape[0]
    size = max(visualizer._default_font_size, 14)
    for number, (text, colour) in enumerate(lines):
        position = (8, 8 + number * min(2.1 * size, height / 4))
        visualizer.draw_text(text, position, font_size=size, color=colour, horizontal_alignment="left")


def _compose(cells: Sequence[np.ndarray], *, pairs_per_row: int) -> Image.Image:
    """Pictures in rows of pairs, each centred in its cell, below a line of column titles."""
    columns = 2 * pairs_per_row
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width = max(cell.shape[1] for cell in cells)
    # A wider gap between pairs than within one.
    lefts = [_MARGIN + column * (width + _MARGIN) + column // 2 * 3 * _MARGIN for column in range(columns)]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    size = (lefts[-1] + width + _MARGIN, _HEADER + sum(height + _MARGIN for height in heights))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    for column, left in enumerate(lefts):
        title = "prediction" if column % 2 else "ground truth"
        draw.text((left + width // 2, _HEADER // 2), title, fill="black", font=font, anchor="mm")
    top = _HEADER
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=False):
            corner = (left + (width - cell.shape[1]) // 2, top + (height - cell.shape[0]) // 2)
            sheet.paste(Image.fromarray(cell), corner)
        top += height + _MARGIN
    return sheet
