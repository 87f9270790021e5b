"""Pictures are written for every kind of prediction, at a legible size, with the right instances."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from xlearner_d2.report import draw_dataset_predictions, draw_predictions, pictures

WIDTH, HEIGHT = 48, 32
METADATA = {
    "thing_classes": ["cat", "dog"],
    "stuff_classes": ["sky", "road"],
    "classes": ["cat", "dog", "cow"],
    "ignore_label": 255,
}


@pytest.fixture
def record(tmp_path):
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)).save(tmp_path / "a.png")
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[16:], labels[:4] = 1, 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    polygon = [4.0, 4.0, 20.0, 4.0, 20.0, 24.0, 4.0, 24.0]
    annotation = {"bbox": [4, 4, 16, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [polygon]}
    return {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "annotations": [annotation],
        "category_id": 1,
    }


def _instances(scores, *, masks=False):
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor([[4.0, 4.0, 20.0, 24.0]]).repeat(len(scores), 1))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.arange(len(scores)) % 2
    if masks:
        instances.pred_masks = torch.ones(len(scores), HEIGHT, WIDTH, dtype=torch.bool)
    return instances


OUTPUTS = {
    "boxes": lambda: {"instances": _instances([0.9, 0.2])},
    "masks": lambda: {"instances": _instances([0.9, 0.2], masks=True)},
    "no_boxes": lambda: {"instances": _instances([])},
    "no_masks": lambda: {"instances": _instances([], masks=True)},
    "semantic": lambda: {"sem_seg": torch.randn(2, HEIGHT, WIDTH)},
    "panoptic": lambda: {"sem_seg": torch.randn(2, HEIGHT, WIDTH), "instances": _instances([0.9], masks=True)},
    "classes": lambda: {"scores": torch.tensor([0.1, 0.7, 0.2])},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_kind_is_drawn(record, tmp_path, kind):
    file = tmp_path / "new" / "grid.png"
    draw_predictions([record], [OUTPUTS[kind]()], Metadata(**METADATA), output_file=file, cell_size=240)
    image = np.asarray(Image.open(file))
    assert image.shape[1] > 2 * 240
    assert image.shape[0] > 160
    cell = image[pictures._HEADER :, pictures._MARGIN : pictures._MARGIN + 240]
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) > 3, "the ground truth is drawn"


def test_small_images_are_enlarged_and_large_ones_reduced(record, tmp_path):
    heights = []
    for scale in (1, 4, 40):
        image = np.zeros((HEIGHT * scale, WIDTH * scale, 3), dtype=np.uint8)
        Image.fromarray(image).save(record["file_name"])
        draw_predictions([record], [OUTPUTS["classes"]()], Metadata(**METADATA), output_file=tmp_path / "grid.png")
        heights.append(Image.open(tmp_path / "grid.png").size)
    assert len(set(heights)) == 1


@pytest.mark.parametrize("has_masks", [False, True])
def test_ground_truth_and_equal_prediction_look_alike(record, tmp_path, has_masks):
    output = _instances([1.0], masks=has_masks)
    if has_masks:
        output.pred_masks[:] = False
        output.pred_masks[0, 4:24, 4:20] = True
    draw_predictions([record], [{"instances": output}], Metadata(**METADATA), output_file=tmp_path / "grid.png")
    image = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)[pictures._HEADER :]
    left, right = (image[:320, start : start + 480] for start in (pictures._MARGIN, 2 * pictures._MARGIN + 480))
    # They differ in the score that is part of the label, which covers little.
    assert (np.abs(left - right).max(axis=2) > 40).mean() < 0.05


@pytest.mark.parametrize("scale", [1, 5])
def test_predictions_follow_the_size_of_the_picture(record, scale):
    canvas = np.zeros((HEIGHT * scale, WIDTH * scale, 3))
    visualizer = Visualizer(canvas, pictures.with_colours(Metadata(**METADATA)))
    output = _instances([1.0], masks=True)
    output.pred_masks[:] = False
    output.pred_masks[0, 4:24, 4:20] = True
    pictures._draw_output(visualizer, record, {"instances": output}, score_threshold=0.5, max_fallback=1)
    box, mask = visualizer.output.ax.patches
    assert np.array(box.get_bbox().extents) == pytest.approx(scale * np.array([4, 4, 20, 24]))
    # A polygon runs through the centres of a mask's outermost pixels.
    assert np.ptp(mask.get_xy(), axis=0) == pytest.approx(scale * np.array([16, 20]) - 1)


@pytest.mark.parametrize(("scores", "expected"), [([0.6, 0.2, 0.5], 2), ([0.1, 0.3, 0.2, 0.4], 3), ([0.1], 1), ([], 0)])
def test_threshold_and_fallback(scores, expected):
    kept = pictures._best(_instances(scores), 0.5, 3)
    assert kept.scores.tolist() == pytest.approx(sorted(kept.scores.tolist(), reverse=True))
    assert len(kept) == expected


@pytest.mark.parametrize("scores", [[0.1, 0.7, 0.2], np.log([0.1, 0.7, 0.2]).tolist()])
def test_captions_name_the_best_guesses(scores):
    lines = pictures._guesses(torch.tensor(scores), {"category_id": 2}, ["cat", "dog", "cow"])
    assert [text for text, _ in lines] == ["dog 70%", "cow 20%", "cat 10%"]
    assert [colour for _, colour in lines] == [pictures._RED, pictures._GREEN, pictures._WHITE]


def test_colours_are_fixed_and_given_ones_are_kept():
    first, second = (pictures.with_colours(Metadata(**METADATA)) for _ in range(2))
    assert first.thing_colors == second.thing_colors
    assert len(first.stuff_colors) == 2
    given = pictures.with_colours(Metadata(thing_colors=[[1, 2, 3], [4, 5, 6]], **METADATA))
    assert given.thing_colors == [[1, 2, 3], [4, 5, 6]]


def test_random_state_is_left_alone(record, tmp_path):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw_predictions([record], [OUTPUTS["panoptic"]()], Metadata(**METADATA), output_file=tmp_path / "grid.png")
    assert (np.random.get_state()[1] == before).all()


class _Model(torch.nn.Module):
    def forward(self, inputs):
        assert not self.training
        assert not torch.is_grad_enabled()
        return [{"instances": _instances([0.9])} for _ in inputs]


def test_a_data_set_is_drawn(record, tmp_path):
    DatasetCatalog.register("test_pictures", lambda: [record] * 5)
    MetadataCatalog.get("test_pictures").set(**METADATA)
    model, seen = _Model(), []
    try:
        draw_dataset_predictions(
            model,
            "test_pictures",
            lambda item: seen.append(item.pop("annotations")) or item,
            output_file=tmp_path / "grid.png",
            num_images=3,
        )
        with pytest.raises(ValueError, match="0 of the 5 images of 'test_pictures' cannot be drawn"):
            draw_dataset_predictions(model, "test_pictures", dict, output_file=tmp_path / "b.png", num_images=0)
    finally:
        DatasetCatalog.remove("test_pictures")
        MetadataCatalog.remove("test_pictures")
    assert len(seen) == 3
    assert model.training
    assert "annotations" in record
    assert (tmp_path / "grid.png").is_file()


def test_unequal_numbers(record, tmp_path):
    with pytest.raises(ValueError, match="1 records and 0 outputs"):
        draw_predictions([record], [], Metadata(**METADATA), output_file=tmp_path / "grid.png")


def test_nothing_that_can_be_drawn(record, tmp_path):
    with pytest.raises(ValueError, match="only proposals, but one of instances, sem_seg, panoptic_seg, depth"):
        draw_predictions([record], [{"proposals": 0}], Metadata(**METADATA), output_file=tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_unknown_class_is_shown_by_number(record):
    visualizer = Visualizer(np.zeros((64, 64, 3)), pictures.with_colours(Metadata(thing_classes=["cat"])))
    pictures.overlay(visualizer, [5], scores=[0.5], boxes=np.array([[1.0, 1.0, 60.0, 60.0]]))
    assert visualizer.output.ax.texts[0].get_text() == "5 50%"


@pytest.mark.parametrize("count", [0, 1])
def test_rotated_boxes_are_drawn_in_the_size_of_the_picture(record, tmp_path, count):
    output = _instances([1.0] * count)
    output.pred_boxes = RotatedBoxes(torch.tensor([[12.0, 14.0, 16.0, 20.0, 90.0]]).repeat(count, 1))
    visualizer = Visualizer(np.zeros((5 * HEIGHT, 5 * WIDTH, 3)), pictures.with_colours(Metadata(**METADATA)))
    pictures._draw_output(visualizer, record, {"instances": output}, score_threshold=0.5, max_fallback=1)
    corners = {tuple(np.round(xy)) for line in visualizer.output.ax.lines for xy in line.get_xydata()}
    assert corners == ({(10, 30), (10, 110), (110, 30), (110, 110)} if count else set())
    record["annotations"][0] |= {"bbox": [12.0, 14.0, 16.0, 20.0, 30.0], "bbox_mode": BoxMode.XYWHA_ABS}
    draw_predictions([record], [{"instances": output}], Metadata(**METADATA), output_file=tmp_path / "grid.png")


def _colours_of(output, record, **metadata):
    """Colour at the left and right of the prediction, where it is drawn over a black image."""
    visualizer = Visualizer(np.zeros((HEIGHT, WIDTH, 3)), pictures.with_colours(Metadata(**{**METADATA, **metadata})))
    pictures._draw_output(visualizer, record, output, score_threshold=0.5, max_fallback=1)
    image = visualizer.output.get_image()
    return tuple(tuple(int(c) for c in image[HEIGHT // 4, x]) for x in (WIDTH // 8, 7 * WIDTH // 8))


def test_segments_known_by_their_numbers_alone_are_those_that_are_listed(record):
    """Panoptic-DeepLab gives no list of segments: a number is that of the class times the divisor, and more."""
    segments = torch.full((HEIGHT, WIDTH), 1000)
    segments[:, WIDTH // 2 :] = 0
    infos = [{"id": 1000, "category_id": 1, "isthing": False}, {"id": 0, "category_id": 0, "isthing": False}]
    listed = _colours_of({"panoptic_seg": (segments, infos)}, record)
    ids = {"thing_dataset_id_to_contiguous_id": {}, "label_divisor": 1000}
    assert _colours_of({"panoptic_seg": (segments, None)}, record, **ids) == listed
    assert listed[0] != listed[1]


def test_true_and_predicted_depth_have_one_scale(record, tmp_path):
    """Also where the nearest pixel is lost as the picture is drawn smaller than its file."""
    depth = np.full((HEIGHT, WIDTH), 2.0, dtype=np.float32)
    depth[:, WIDTH // 2 :] = 4.0
    depth[1, 1] = 0.1
    np.save(tmp_path / "depth.npy", depth)
    record |= {"depth_file_name": str(tmp_path / "depth.npy"), "depth_scale": 1.0}
    for size in (12, 480):
        sheets = []
        for scale in (1.0, 8.0):
            output = {"depth": scale * torch.from_numpy(depth)}
            options = {"output_file": tmp_path / "grid.png", "cell_size": size}
            draw_predictions([record], [output], Metadata(**METADATA), **options)
            sheets.append(np.asarray(Image.open(tmp_path / "grid.png"))[pictures._HEADER :])
        (left, right), (_, far) = (
            [sheet[: size * 2 // 3, x:][:, :size] for x in (pictures._MARGIN, 2 * pictures._MARGIN + size)]
            for sheet in sheets
        )
        assert (left == right).all()
        assert not (left == far).all()
