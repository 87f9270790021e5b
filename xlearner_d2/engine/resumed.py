"""What has changed in the settings of a run that is resumed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from detectron2.config import CfgNode

from ..checkpoint.files import write_atomically

#: The config that a run was started with, or resumed the last time; in OUTPUT_DIR.
CONFIG_FILE = "config.yaml"
#: What the checkpoints of a stage are made of: with other values they fit no more, or go on as something else.
_FIXED = (
    "MODEL.RESNETS.",
    "MODEL.BACKBONE.",
    "XLEARNER.SHARING",
    "XLEARNER.RECONCILIATION.",
    "XLEARNER.FREEZE",
    "XLEARNER.WEIGHTING.METHOD",
    "SOLVER.OPTIMIZER",
)


def keep_config(cfg: CfgNode) -> None:
    """Write the config of a run into its folder, sources in their order, which is that of branches and optimiser."""
    write_atomically(cfg.dump(sort_keys=False), Path(cfg.OUTPUT_DIR) / CONFIG_FILE)


def _kept(cfg: CfgNode) -> dict[str, Any] | None:
    """The config of the run so far; None when there is none."""
    path = Path(cfg.OUTPUT_DIR) / CONFIG_FILE
    if not path.is_file():
        return None
    return cast(dict[str, Any], CfgNode.load_yaml_with_base(str(path), allow_unsafe=False))


def changed_settings(cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """By name, each setting that differs from those of the run so far: what it was, and what it is; None: not there."""
    kept = _kept(cfg)
    if kept is None:
        return {}
    before = dict(flat(kept))
    now = dict(flat(yaml.safe_load(cfg.dump())))
    names = [*now, *(name for name in before if name not in now)]
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def check_unchanged(cfg: CfgNode) -> list[str]:
    """Problems of settings that cannot be changed while a run lasts."""
    changes = changed_settings(cfg)
    problems = [_stays(cfg, name, *change) for name, change in changes.items() if name.startswith(_FIXED)]
    return problems + _check_order(cfg)


def _check_order(cfg: CfgNode) -> list[str]:
    """Problems of the order of sources, by which checkpoints have what the optimiser remembers of each parameter."""
    before, now = (list(of.get("XLEARNER", {}).get("SOURCES", {})) for of in (_kept(cfg) or cfg, cfg))
    if sorted(before) != sorted(now) or before == now:  # others do not fit the checkpoint, which says so
        return []
    return [_stays(cfg, "The order of XLEARNER.SOURCES", ", ".join(before), ", ".join(now))]


def check_squeeze_unchanged(cfg: CfgNode) -> list[str]:
    """The same for a squeeze that has begun."""
    name = "XLEARNER.SQUEEZE.SOLVER.OPTIMIZER"
    before, now = (of or cfg.SOLVER.OPTIMIZER for of in changed_settings(cfg).get(name, ("", "")))
    return [] if before == now else [_stays(cfg, name, before, now)]


def check_expansion_unchanged(cfg: CfgNode) -> list[str]:
    """The same for an expansion that has begun: its checkpoints hold a student, or none."""
    name = "XLEARNER.SQUEEZE.ONLINE"
    changes = changed_settings(cfg)
    return [_stays(cfg, name, *changes[name])] if name in changes else []


def check_start_unchanged(cfg: CfgNode) -> list[str]:
    """The same for an expansion that has begun, or is done: it started as a trunk, or it did not."""
    name = "XLEARNER.TRUNK_STEPS"
    before, now = (steps or 0 for steps in changed_settings(cfg).get(name, (0, 0)))
    # Not of another number alone, which another number of workers brings.
    return [] if bool(before) == bool(now) else [_stays(cfg, name, before, now)]


def _stays(cfg: CfgNode, name: str, before: Any, now: Any) -> str:
    return f"{name} is {now!r}, but the run in {cfg.OUTPUT_DIR} has {before!r}. Set it so, or another OUTPUT_DIR."


def describe_changes(cfg: CfgNode) -> str:
    """In words; empty when nothing has changed."""
    changes = [f"{name} is {now!r}, was {before!r}" for name, (before, now) in changed_settings(cfg).items()]
    return f"Changed since the run was started, or resumed the last time: {'; '.join(changes)}." if changes else ""


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the leaves; ``prefix`` stands before each name."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
