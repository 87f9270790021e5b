"""Contact sheets of mapped images, from the mappers that a run uses."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from disk_data import write_data
from PIL import Image

from xlearner_d2.commands import browse_data
from xlearner_d2.report.browse import describe_sizes, draw_sheet, panoptic_names
from xlearner_d2.specs import ConfigError

ROOT = Path(__file__).resolve().parents[2]
META = Metadata(name="x", thing_classes=["cat", "dog"], stuff_classes=["road", "sky"], classes=["cat", "dog"])
META.set(keypoint_names=["a", "b"], keypoint_connection_rules=[])
RED, BLUE = (250, 10, 10), (10, 10, 250)


def record(colour: tuple[int, int, int] = RED, *, height: int = 32, width: int = 48, **labels: Any) -> dict[str, Any]:
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width)
    return {"image": image, "height": 2 * height, "width": 2 * width, **labels}


def sheet(records: list[dict[str, Any]], root: Path, *, image_format: str = "RGB", **options: Any) -> np.ndarray:
    file = root / "new/sheet.png"
    draw_sheet(records, META, output_file=file, title="title", image_format=image_format, **options)
    return np.asarray(Image.open(file))


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Of pixels that are about of a colour."""
    return float((np.abs(picture.astype(int) - colour).max(axis=-1) < 12).mean())


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_pixels_are_the_mapped_ones_in_their_own_order(image_format: str, tmp_path: Path) -> None:
    picture = sheet([record(RED)], tmp_path, image_format=image_format)
    assert share(picture, RED if image_format == "RGB" else RED[::-1]) > 0.8


def test_images_are_in_rows(tmp_path: Path) -> None:
    one = sheet([record()], tmp_path, cell_size=64)
    five = sheet([record()] * 5, tmp_path, cell_size=64, columns=2)
    assert five.shape[1] > 2 * 64
    assert five.shape[0] == one.shape[0] + 2 * (one.shape[0] - 34)  # three rows below one title


def instances(*, masks: Any = None) -> Instances:
    found = Instances((32, 48), gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 24.0, 32.0]])), gt_classes=torch.tensor([1]))
    if masks is not None:
        found.gt_masks = masks
    return found


def left_half() -> BitMasks:
    mask = torch.zeros(1, 32, 48, dtype=torch.bool)
    mask[:, :, :24] = True
    return BitMasks(mask)


POLYGON = PolygonMasks([[np.array([0.0, 0, 24, 0, 24, 32, 0, 32])]])


@pytest.mark.parametrize("masks", [left_half(), POLYGON], ids=["bits", "polygons"])
def test_masks_cover_what_they_mark(masks: Any, tmp_path: Path) -> None:
    picture = sheet([record(instances=instances(masks=masks))], tmp_path)
    body = picture[40:-10]
    left, right = body[:, : body.shape[1] // 2], body[:, body.shape[1] // 2 + 8 :]
    assert share(left, RED) < 0.1
    assert share(right, RED) > 0.8


def test_boxes_keypoints_and_images_without_objects(tmp_path: Path) -> None:
    found = instances()
    found.gt_keypoints = Keypoints(torch.tensor([[[4.0, 4.0, 2.0], [20.0, 20.0, 2.0]]]))
    empty = Instances((32, 48), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    empty.gt_masks = BitMasks(torch.zeros(0, 32, 48))
    plain = sheet([record()], tmp_path)
    assert share(sheet([record(instances=empty)], tmp_path), RED) == pytest.approx(share(plain, RED), abs=0.01)
    assert share(sheet([record(instances=found)], tmp_path), RED) < share(plain, RED) - 0.01


def test_ignored_pixels_show_the_image(tmp_path: Path) -> None:
    labels = torch.full((32, 48), 255)
    labels[:, :24] = 1
    picture = sheet([record(sem_seg=labels)], tmp_path)[40:-10]
    assert share(picture[:, : picture.shape[1] // 2 - 8], RED) < 0.1
    assert share(picture[:, picture.shape[1] // 2 + 8 :], RED) > 0.9


@pytest.mark.parametrize("labels", [{"category_id": 1}, {"category_ids": [0, 1]}, {"category_ids": []}])
def test_classes_are_written(labels: dict[str, Any], tmp_path: Path) -> None:
    plain = sheet([record()], tmp_path)
    written = bool(labels.get("category_ids", True))
    assert bool((sheet([record(**labels)], tmp_path) != plain).any()) == written


def test_near_is_brighter_and_unknown_depth_shows_the_image(tmp_path: Path) -> None:
    depth = torch.zeros(32, 48)
    depth[:, 16:32], depth[:, 32:] = 1, 50
    picture = sheet([record(BLUE, depth=depth)], tmp_path)[40:-10]
    unknown, near, far = (picture[:, (2 * part + 1) * picture.shape[1] // 6] for part in range(3))
    assert share(unknown[None], BLUE) > 0.9
    assert near.mean() > far.mean() + 50


def test_names_of_a_panoptic_fpn() -> None:
    names = ["dog", "sky", "cat"]
    maps = {"thing_dataset_id_to_contiguous_id": {2: 0, 9: 2}, "stuff_dataset_id_to_contiguous_id": {4: 1}}
    found = panoptic_names(Metadata(name="p", thing_classes=names, stuff_classes=names, **maps))
    assert (found.thing_classes, found.stuff_classes) == (["dog", "cat"], ["things", "sky"])
    assert panoptic_names(META) is META


def test_sizes_in_words() -> None:
    two = [record(height=32), record(height=40, instances=instances())]
    assert describe_sizes(two[:1]) == "images of 32 x 48 from files of 64 x 96"
    assert describe_sizes(two) == "images of 32 x 48 to 40 x 48 from files of 64 x 96 to 80 x 96, with 1 to 1 objects"


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no image to draw for"):
        sheet([], tmp_path)


CONFIG = """
_BASE_: {root}/configs/base.yaml
MODEL: {{DEVICE: cpu, RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}}}
XLEARNER:
  DATASETS:
    x_boxes: {{FORMAT: coco, IMAGES: boxes, ANNOTATIONS: boxes.json}}
    x_pics: {{FORMAT: image_folder, IMAGES: pics}}
  SOURCES:
    boxes: {{TASK: detection, CONFIG: configs/heads/light_mask_rcnn_fpn.yaml, TRAIN: [x_boxes], TEST: [x_boxes]}}
    pics: {{TASK: classification, CONFIG: configs/heads/classifier.yaml, TRAIN: [x_pics], TEST: [x_pics]}}
"""


@pytest.fixture
def browse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call the tool's main function, in this process."""
    write_data(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=ROOT))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def call(*options: str) -> None:
        arguments = ["--config-file", f"{tmp_path}/config.yaml", "--output", f"{tmp_path}/out", *options]
        browse_data.run(browse_data.make_parser().parse_args(arguments))

    return call


def test_the_tool_draws_every_source(
    browse: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    browse("--num", "3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["boxes_train.png", "pics_train.png"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/out/boxes_train.png: 3 images of ")
    assert first.endswith("from files of 64 x 64, with 1 to 1 objects")
    assert second.endswith("pics_train.png: 3 images of 224 x 224 from files of 64 x 64")


def test_the_tool_draws_test_images_of_one_source_in_the_size_for_tests(
    browse: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = "[INPUT.MIN_SIZE_TEST, 40, INPUT.MIN_SIZE_TRAIN, [50]]"
    browse("--source", "boxes", "--split", "test", "--num", "2", "XLEARNER.SOURCES.boxes.OPTS", opts)
    expected = "2 images of 40 x 40 from files of 64 x 64, with 1 to 1 objects"
    assert capsys.readouterr().out == f"{tmp_path}/out/boxes_x_boxes_test.png: {expected}\n"


def test_test_images_have_their_own_colours(browse: Callable[..., None], tmp_path: Path) -> None:
    def drawn(jitter: float) -> bytes:
        opts = f"[INPUT.COLOR_JITTER, {jitter}]"
        browse("--source", "boxes", "--split", "test", "--num", "2", "XLEARNER.SOURCES.boxes.OPTS", opts)
        return (tmp_path / "out/boxes_x_boxes_test.png").read_bytes()

    assert drawn(0.9) == drawn(0.0)


def test_where_a_run_would_write_does_not_matter(browse: Callable[..., None], tmp_path: Path) -> None:
    browse("--source", "pics", "--num", "1", "OUTPUT_DIR", f"{tmp_path}/config.yaml/no_folder")
    assert (tmp_path / "out/pics_train.png").is_file()


def test_the_tool_with_an_unknown_source(browse: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--source names 'boxs', which is no source\. Did you mean 'boxes'\?"):
        browse("--source", "boxs")
    assert not (tmp_path / "out").exists()


def test_a_source_without_the_split_is_left_out_or_told(
    browse: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As frozen sources may be without TRAIN."""
    browse("--split", "test", "XLEARNER.SOURCES.pics.TEST", "[]")
    assert "Without TEST, and so not drawn: pics.\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"SOURCES\.pics has no TEST, but --split test draws that"):
        browse("--split", "test", "--source", "pics", "XLEARNER.SOURCES.pics.TEST", "[]")


def test_errors_end_the_tool(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/browse_data.py",
        "--config-file",
        "x.yaml",
        "--output",
        str(tmp_path),
        "--num",
        "0",
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: The command line has 1 problem:\n  1. --num is 0, but at least 1 is expected." in done.stderr
