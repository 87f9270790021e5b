"""Evaluation of the expanded model: each source's head on each of its test sets, with Detectron2's evaluators."""

import logging
from typing import Any

from detectron2.evaluation import inference_context, inference_on_dataset
from detectron2.utils import comm

from ..data.loader import build_test_loader
from ..evaluation.build import build_evaluator, main_metric
from ..modeling import XLearner
from .plan import Plan

logger = logging.getLogger(__name__)

#: source -> test data set -> metric name -> value, in percent
SourceResults = dict[str, dict[str, dict[str, float]]]


def evaluate_sources(model: XLearner, plan: Plan) -> SourceResults:
    """Headline metrics of every source on every test set; empty on ranks other than the main one."""
    results: SourceResults = {}
    with inference_context(model), model.autocast():
        for source in plan.sources:
            for name, records in plan.data[source.name].test.items():
                share = max(source.ims_per_batch // comm.get_world_size(), 1)
                loader = build_test_loader(
                    plan.heads[source.name],
                    records,
                    batch_size=share,
                    num_workers=plan.cfg.DATALOADER.NUM_WORKERS,
                )
                folder = plan.stage_dir("expand") / "inference" / source.name / name
                evaluator = build_evaluator(name, output_dir=str(folder))
                found: Any = inference_on_dataset(model.heads[source.name], loader, evaluator)
                if comm.is_main_process():
                    results.setdefault(source.name, {})[name] = main_metric(found)
    return results
