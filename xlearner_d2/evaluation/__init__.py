"""Evaluators for every kind of supervision, and what a predictor without learning scores."""

from .build import build_evaluator, main_metric
from .classification import ClassificationEvaluator
from .trivial import trivial_metrics

__all__ = ["ClassificationEvaluator", "build_evaluator", "main_metric", "trivial_metrics"]
