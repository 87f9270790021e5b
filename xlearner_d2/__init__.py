"""X-Learner for Detectron2: one universal backbone from many tasks and many data sources.

Importing the package registers its meta-architectures and backbones with Detectron2 and does nothing else.
"""

from . import _quiet  # noqa: F401  must come before Detectron2
from .config import add_xlearner_config, load_config
from .modeling import ImageClassifier, XLearner

__version__ = "0.1.0"
__all__ = ["ImageClassifier", "XLearner", "add_xlearner_config", "load_config"]
