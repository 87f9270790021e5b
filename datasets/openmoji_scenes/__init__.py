"""Data sets composed from OpenMoji artwork: classification, detection with masks, semantic segmentation.

Nothing of Detectron2 or torch is imported here, so that worker processes start at once.
"""
