"""Modules of other projects, imported because the config names them: heads can then use what they register."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from .specs import ConfigError

#: Functions of a module that add keys to a config, as Detectron2's projects call them.
_ADDS_KEYS = re.compile(r"add_\w+_config")


def import_modules(names: Sequence[str]) -> list[ModuleType]:
    """Import ``XLEARNER.IMPORTS``; a module that was imported before is not run again.

    Raises:
        ConfigError: with every module that cannot be imported.
    """
    provide_panopticapi()
    modules, problems = [], []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            wish = "install it, or add its folder to PYTHONPATH"
            problems.append(f"XLEARNER.IMPORTS names {name!r}, but there is no module {error.name!r}: {wish}.")
        except Exception as error:  # whatever a third party's module raises
            problems.append(f"XLEARNER.IMPORTS names {name!r}, which fails when it is imported: {error!r}")
    if problems:
        raise ConfigError(problems)
    return modules


def add_imported_configs(head: CfgNode, names: Sequence[str]) -> None:
    """Call each function ``add_<something>_config`` of the modules ``names`` with a head's config.

    Raises:
        ConfigError: with every module that cannot be imported, or whose function fails.
    """
    problems = []
    for module in import_modules(names):
        for function in _functions(module):
            try:
                function(head)
            except Exception as error:  # whatever a third party's function raises
                where = f"XLEARNER.IMPORTS names {module.__name__!r}"
                problems.append(f"{where}, whose {function.__name__}(cfg) fails on a new config: {error!r}")
    if problems:
        raise ConfigError(problems)


def _functions(module: ModuleType) -> list[Callable[[CfgNode], None]]:
    return [item for name, item in vars(module).items() if _ADDS_KEYS.fullmatch(name) and callable(item)]


def provide_panopticapi() -> None:
    """Stand in for ``panopticapi``, which Detectron2 imports but no package registry has, unless it is installed.

    Its three functions that Detectron2 uses come from hotcoco, whose ``pq_compute`` has the same arguments and
    results, and from the definition of COCO's panoptic PNGs: id = R + 256 G + 256² B.
    """
    if "panopticapi" in sys.modules or importlib.util.find_spec("panopticapi") is not None:
        return
    package, utils, evaluation = (ModuleType(f"panopticapi{part}") for part in ("", ".utils", ".evaluation"))
    utils.rgb2id, utils.id2rgb = rgb2id, id2rgb  # type: ignore[attr-defined]
    evaluation.pq_compute = _pq_compute  # type: ignore[attr-defined]
    package.utils, package.evaluation = utils, evaluation  # type: ignore[attr-defined]
    package.__path__ = []
    sys.modules |= {module.__name__: module for module in (package, utils, evaluation)}


def _pq_compute(*args: Any, **kwargs: Any) -> Any:
    from hotcoco.panoptic import pq_compute  # only when it is needed: there may be no wheel for a machine

    return pq_compute(*args, **kwargs)


def rgb2id(colours: np.ndarray) -> np.ndarray:
    """Segment ids, int32 (…), of a panoptic PNG's colours, (…, 3)."""
    return np.asarray(colours, dtype=np.int32) @ np.array([1, 256, 256**2], dtype=np.int32)


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """A panoptic PNG's colours, uint8 (…, 3), of segment ids, (…) below 2²⁴."""
    return (np.asarray(ids)[..., None] // np.array([1, 256, 256**2]) % 256).astype(np.uint8)
