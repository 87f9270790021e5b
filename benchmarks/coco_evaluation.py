"""COCO evaluation by hotcoco against pycocotools, through the project's evaluator, on random detections."""

import json
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from xlearner_d2.evaluation import build_evaluator, fast_coco

HEIGHT, WIDTH, CLASSES, IMAGES, DETECTIONS = 480, 640, 80, 600, 50


def outline(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """An ellipse as a polygon."""
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack([x + width / 2 * (1 + np.cos(angles)), y + height / 2 * (1 + np.sin(angles))], axis=1)
    return [points.round(2).ravel().tolist()]


def random_box(rng: np.random.Generator) -> list[float]:
    """x, y, width, height."""
    width, height = rng.integers(5, 300, 2)
    return [float(v) for v in (rng.integers(0, WIDTH - width), rng.integers(0, HEIGHT - height), width, height)]


def make_truth(rng: np.random.Generator) -> dict[str, Any]:
    """Annotations as in a COCO file, up to 14 in an image."""
    annotations: list[dict[str, Any]] = []
    for image in range(IMAGES):
        for _ in range(rng.integers(0, 15)):
            box = random_box(rng)
            found = {"id": len(annotations) + 1, "image_id": image, "category_id": int(rng.integers(CLASSES))}
            annotations.append({**found, "bbox": box, "area": box[2] * box[3] * 0.8, "segmentation": outline(*box)})
    images = [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": ""} for i in range(IMAGES)]
    categories = [{"id": i, "name": str(i)} for i in range(CLASSES)]
    return {"images": images, "categories": categories, "annotations": [{"iscrowd": 0, **a} for a in annotations]}


def make_predictions(rng: np.random.Generator, truth: dict[str, Any], *, masks: bool) -> list[dict[str, Any]]:
    """What ``COCOEvaluator.process`` keeps: boxes near the annotated ones, and others."""
    by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in range(IMAGES)}
    for found in truth["annotations"]:
        by_image[found["image_id"]].append(found)
    predictions = []
    for image, known in by_image.items():
        instances = []
        for number in range(DETECTIONS):
            near = known[number % len(known)] if known and number % 3 else None
            box = (
                random_box(rng) if near is None else [v + rng.normal(0, 4) for v in near["bbox"][:2]] + near["bbox"][2:]
            )
            label = int(rng.integers(CLASSES)) if near is None else near["category_id"]
            result = {"image_id": image, "category_id": label, "bbox": box, "score": float(rng.random())}
            if masks:
                mask = pycocotools.mask.frPyObjects(outline(*box), HEIGHT, WIDTH)[0]
                result["segmentation"] = {**mask, "counts": mask["counts"].decode()}
            instances.append(result)
        predictions.append({"image_id": image, "instances": instances})
    return predictions


def coco_evaluation(args: Namespace) -> dict[str, dict[str, float]]:
    """Time of ``evaluate``, from the detections to AP for each class; fails unless all numbers are the same."""
    rng = np.random.default_rng(0)
    truth, found = make_truth(rng), {}
    with TemporaryDirectory() as folder:
        (Path(folder) / "truth.json").write_text(json.dumps(truth))
        register_coco_instances("benchmark_coco", {}, f"{folder}/truth.json", folder)
        MetadataCatalog.get("benchmark_coco").set(
            thing_classes=[str(i) for i in range(CLASSES)],
            thing_dataset_id_to_contiguous_id={i: i for i in range(CLASSES)},
        )
        for masks in (False, True):
            predictions = make_predictions(rng, truth, masks=masks)
            fast, fast_results = _evaluate(predictions)
            library, fast_coco.hotcoco = fast_coco.hotcoco, None
            slow, slow_results = _evaluate(predictions)  # pycocotools, also where Detectron2 has C++ of its own
            fast_coco.hotcoco = library
            np.testing.assert_equal(fast_results, slow_results)
            found["boxes and masks" if masks else "boxes"] = {
                "ratio": round(slow[0] / fast[0], 2),
                "ratio_of_processor_time": round(slow[1] / fast[1], 2),
                "seconds": round(fast[0], 3),
                "reference_seconds": round(slow[0], 3),
                "detections": IMAGES * DETECTIONS,
            }
        DatasetCatalog.remove("benchmark_coco")
    return found


def _evaluate(predictions: list[dict[str, Any]]) -> tuple[tuple[float, float], Any]:
    """((wall seconds, processor seconds), results)."""
    evaluator = build_evaluator("benchmark_coco", output_dir=None)
    evaluator._use_fast_impl = evaluator._use_fast_impl and fast_coco.hotcoco is not None  # type: ignore[attr-defined]
    evaluator.reset()
    evaluator._predictions = json.loads(json.dumps(predictions))  # type: ignore[attr-defined]
    evaluator._predicts_masks = "segmentation" in predictions[0]["instances"][0]  # type: ignore[attr-defined]
    wall, used = perf_counter(), process_time()
    results = evaluator.evaluate()
    return (perf_counter() - wall, process_time() - used), results
