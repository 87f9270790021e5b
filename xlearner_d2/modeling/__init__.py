"""Branches, reconciliation, heads and distillation; importing it registers them with Detectron2."""

from . import linear_head, timm_backbone  # noqa: F401  registers LinearSemSegHead and build_timm_backbone
from .classifier import ImageClassifier
from .depth import DepthEstimator
from .expanded import BranchView, ExpandedBackbone, build_expanded_backbone
from .plug_in import ExpandedBranch
from .xlearner import XLearner

__all__ = [
    "BranchView",
    "DepthEstimator",
    "ExpandedBackbone",
    "ExpandedBranch",
    "ImageClassifier",
    "XLearner",
    "build_expanded_backbone",
]
