"""X-Learner for Detectron2: one universal backbone from many tasks and many data sources.

Importing the package registers its meta-architectures and backbones with Detectron2 and does nothing else.
"""

from typing import TYPE_CHECKING, Any

from . import _quiet  # noqa: F401  must come before Detectron2
from .config import load_config
from .modeling import ImageClassifier, XLearner
from .settings import add_xlearner_config

if TYPE_CHECKING:
    from .library import export, load_student, train

__version__ = "0.1.0"
__all__ = ["ImageClassifier", "XLearner", "add_xlearner_config", "export", "load_config", "load_student", "train"]


def __getattr__(name: str) -> Any:
    """What needs the whole project, which is imported only when asked for."""
    if name in __all__:
        from . import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
