"""Figures that show what a model does."""

from .pictures import draw_dataset_predictions, draw_predictions

__all__ = ["draw_dataset_predictions", "draw_predictions"]
