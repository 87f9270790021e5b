"""Branches, reconciliation, heads and distillation; importing it registers them with Detectron2."""

from .classifier import ImageClassifier
from .expanded import BranchView, ExpandedBackbone, build_expanded_backbone
from .xlearner import XLearner

__all__ = ["BranchView", "ExpandedBackbone", "ImageClassifier", "XLearner", "build_expanded_backbone"]
