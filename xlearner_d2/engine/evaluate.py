"""Evaluation of what has been trained: each source's head on each of its test sets, with Detectron2's evaluators."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import inference_context, inference_on_dataset
from detectron2.utils import comm

from ..checkpoint.load import load_resnet
from ..checkpoint.pixels import PixelConvention
from ..data.loader import build_test_loader
from ..evaluation.build import build_evaluator, main_metric
from ..evaluation.probe import probe_backbone
from ..modeling import XLearner
from ..modeling.branches import build_branch
from ..modeling.xlearner import cpu_autocast_dtype
from ..specs import SourceSpec
from .branches import student_config
from .plan import Plan
from .workers import wait_for_all

logger = logging.getLogger(__name__)

#: source -> test data set -> metric name -> value, in percent
SourceResults = dict[str, dict[str, dict[str, float]]]


def evaluate_sources(model: XLearner, plan: Plan, sources: Sequence[SourceSpec], *, folder: Path) -> SourceResults:
    """Headline metrics of sources on their test sets; empty on ranks other than the main one.

    Args:
        folder: where predictions are kept.
    """
    results: SourceResults = {}
    with inference_context(model), model.autocast():
        for source in sources:
            for name, records in plan.data[source.name].test.items():
                head = plan.heads[source.name]
                # Images of other sizes are padded to those of their batch, which features depend on: one by one then,
                # as Detectron2 does.
                one_size = head.MODEL.META_ARCHITECTURE == "ImageClassifier"
                loader = build_test_loader(
                    head,
                    records,
                    batch_size=max(source.ims_per_batch // comm.get_world_size(), 1) if one_size else 1,
                    num_workers=plan.cfg.DATALOADER.NUM_WORKERS,
                )
                evaluator = build_evaluator(name, output_dir=str(folder / source.name / name), head=head)
                found: Any = inference_on_dataset(model.heads[source.name], loader, evaluator)
                wait_for_all()  # the main worker scores what all have found
                if comm.is_main_process():
                    results.setdefault(source.name, {})[name] = main_metric(found)
    return results


def probe_student(plan: Plan, weights: str | Path) -> dict[str, dict[str, float]]:
    """Linear-probe accuracy (percent) of the student and, for comparison, of the same network at random weights.

    Args:
        weights: the exported student.

    Returns:
        ``{probe: {"student": top-1, "random": top-1}}``.
    """
    cfg = student_config(plan.cfg, plan.tasks)
    torch.manual_seed(max(cfg.SEED, 0))
    random = build_branch(cfg, out_features=("res5",)).to(cfg.MODEL.DEVICE)
    student = build_branch(cfg, out_features=("res5",)).to(cfg.MODEL.DEVICE)
    load_resnet(student, weights, pixels=PixelConvention.of(cfg))
    results: dict[str, dict[str, float]] = {}
    for probe in plan.probes:
        for name, backbone in (("student", student), ("random", random)):
            found = probe_backbone(
                backbone.eval(),
                probe.train,
                probe.test,
                seed=max(cfg.SEED, 0),
                image_size=probe.image_size,
                pixel_mean=cfg.MODEL.PIXEL_MEAN,
                pixel_std=cfg.MODEL.PIXEL_STD,
                input_format=cfg.INPUT.FORMAT,
                autocast_dtype=cpu_autocast_dtype(cfg),
            )
            results.setdefault(probe.name, {})[name] = found.accuracy
        found_by = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in results[probe.name].items())
        logger.info(f"Linear probe of {probe.name}: {found_by}.")
    return results
