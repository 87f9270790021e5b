"""Evaluation by several workers: each scores its part of the images, and the result is that of one worker."""

import dataclasses
import json
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from disk_data import NAMES, SIZE
from PIL import Image
from processes import LONG, Processes

from xlearner_d2.data.sources import register_sources
from xlearner_d2.evaluation import build_evaluator, fast_coco
from xlearner_d2.specs import parse_sources

# Detectron2 turns tensors into arrays in a way that numpy 2 is going to refuse.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

VOC_OBJECT = (
    "<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
    "<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
)


def write_voc(root):
    """The boxes of the COCO set once more, as Pascal VOC."""
    content = json.loads((root / "boxes.json").read_text())
    for folder in ("ImageSets/Main", "Annotations"):
        (root / "voc" / folder).mkdir(parents=True)
    (root / "voc/JPEGImages").symlink_to(root / "boxes")
    (root / "voc/ImageSets/Main/test.txt").write_text("\n".join(str(image["id"]) for image in content["images"]))
    for item in content["annotations"]:
        x, y, width, height = item["bbox"]
        found = VOC_OBJECT.format(name=NAMES[item["category_id"] - 1], x0=x + 1, y0=y + 1, x1=x + width, y1=y + height)
        size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
        file = root / f"voc/Annotations/{item['image_id']}.xml"
        file.write_text(f"<annotation><filename>{item['image_id']}.png</filename>{size}{found}</annotation>")


@pytest.fixture
def sets(project, monkeypatch):
    """Registered sets of eight images, by the kind of their evaluator."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    monkeypatch.setattr(fast_coco, "hotcoco", None)  # its threads do not survive a fork; pycocotools counts the same
    project.content["XLEARNER"]["DATASETS"]["t_voc"] = {"FORMAT": "voc", "ROOT": "voc", "SPLIT": "test"}
    project.write(project.content)
    write_voc(project.root / "data")
    cfg = project.load()
    sources = parse_sources(cfg.XLEARNER.SOURCES, problems := [])
    sources.append(dataclasses.replace(sources[1], name="voc", train=("t_voc",), test=("t_voc",)))
    register_sources(cfg, sources, ())
    assert problems == []
    return {source.name: source.test[0] for source in sources}


def prediction(record, rng):
    """What a model could find in an image: partly right, and the same whoever asks."""
    scores = torch.from_numpy(rng.random(len(NAMES))).float()
    found = {"scores": scores}
    if "annotations" in record:
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]] * 2
        found["instances"] = instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes) + torch.from_numpy(rng.normal(0, 3, (len(boxes), 4))))
        instances.scores = torch.from_numpy(rng.random(len(boxes)))
        instances.pred_classes = torch.from_numpy(rng.integers(0, len(NAMES), len(boxes)))
        instances.pred_masks = torch.zeros(len(boxes), record["height"], record["width"], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(
            instances.pred_masks, instances.pred_boxes.tensor.int().tolist(), strict=True
        ):
            mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
    found["sem_seg"] = torch.from_numpy(rng.random((len(NAMES), SIZE, SIZE)))
    return found


def evaluate(name, rank, world_size):
    records = DatasetCatalog.get(name)
    evaluator = build_evaluator(name, output_dir=None)
    evaluator.reset()
    for number in InferenceSampler._get_local_indices(len(records), world_size, rank):
        evaluator.process([records[number]], [prediction(records[number], np.random.default_rng(number))])
    return evaluator.evaluate()


@pytest.mark.parametrize("world_size", [3, 11])
def test_results_are_those_of_one_worker(sets, tmp_path, world_size):
    """Eight images are 3, 3 and 2 of three workers; of eleven workers, three have none."""
    wanted = {name: evaluate(name, 0, 1) for name in sets.values()}

    def work(rank):
        init = f"file://{tmp_path}/meeting"
        dist.init_process_group("gloo", init, timedelta(seconds=LONG), world_size=world_size, rank=rank)
        comm.create_local_process_group(world_size)
        torch.save(
            {name: dict(evaluate(name, rank, world_size) or {}) for name in sets.values()}, tmp_path / f"{rank}.pt"
        )

    processes = Processes(work, world_size, tmp_path)
    assert processes.wait() == [0] * world_size, processes.errors()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    assert set(wanted) == set(found[0])
    for name, kinds in wanted.items():
        for kind, metrics in kinds.items():
            assert found[0][name][kind] == pytest.approx(metrics, nan_ok=True), (name, kind)
            assert any(0 < value < 100 for value in metrics.values()), (name, kind)
    assert all(not any(results.values()) for results in found[1:])


def test_evaluation_does_not_depend_on_the_batches_of_training(project):
    """Images of several sizes, which a batch would pad to the largest."""
    for number in range(0, 8, 2):
        for folder in ("images", "labels"):
            file = project.root / f"data/areas/{folder}/{number}.png"
            Image.open(file).resize((SIZE + 16 * number, SIZE), Image.Resampling.NEAREST).save(file)
    areas = project.content["XLEARNER"]["SOURCES"]["areas"]
    project.content["XLEARNER"] |= {"SOURCES": {"areas": areas}, "PROBES": {}, "STAGE": "expand"}
    project.content["SOLVER"]["MAX_ITER"] = 4
    project.write(project.content)
    few = project.run("XLEARNER.SOURCES.areas.IMS_PER_BATCH", 2)
    assert project.run("XLEARNER.SOURCES.areas.IMS_PER_BATCH", 8, eval_only=True)["expanded"] == few["expanded"]
