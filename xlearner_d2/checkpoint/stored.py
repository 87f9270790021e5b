"""The config that an expanded checkpoint was trained with, which is in the file, against the one that uses it."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..specs import ConfigError

#: What an image is for a network.
PIXEL_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
#: What decides the features of a model and shows neither in the names nor in the shapes of its weights.
CONVENTION_KEYS = ("MODEL.RESNETS.STRIDE_IN_1X1", *PIXEL_KEYS)


#: What a ResNet is besides its depth.
_NETWORK_KEYS = tuple(
    f"MODEL.RESNETS.{name}"
    for name in ("NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "RES5_DILATION")
)


def settings_of_its_own(cfg: CfgNode) -> dict[str, Any]:
    """What a config needs, besides the depth, to use a ResNet that was trained with ``cfg``: what is no default."""
    default, resnets = get_cfg(), cfg.MODEL.RESNETS
    keys = [key for key in (*CONVENTION_KEYS, *_NETWORK_KEYS) if _plain(_get(cfg, key)) != _plain(_get(default, key))]
    if "BN" not in resnets.NORM:  # the kinds of BN are one map in inference
        keys.append("MODEL.RESNETS.NORM")
    if resnets.DEPTH < 50:
        keys = [key for key in keys if key != "MODEL.RESNETS.STRIDE_IN_1X1"]  # of bottlenecks
    return {key: _plain(_get(cfg, key)) for key in keys}


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The config in an expanded checkpoint; empty in files of other kinds."""
    return yaml.safe_load(checkpoint.get("xlearner", {}).get("config", "{}"))


def differing_settings(cfg: CfgNode, stored: Mapping[str, Any], keys: Sequence[str], what: str) -> list[str]:
    """A problem for each setting that the config has otherwise than the file; those not in the file are not known.

    Args:
        what: names the file.
    """
    problems = []
    for key in keys:
        here, there = _plain(_get(cfg, key)), _plain(_get(stored, key))
        if there is not None and here != there:
            problems.append(f"{key} is {here!r}, but {what} was trained with {there!r}.")
    return problems


def check_convention(
    cfg: CfgNode, checkpoint: Mapping[str, Any], path: object, keys: Sequence[str] = CONVENTION_KEYS
) -> None:
    """See that a config would use the model of an expanded checkpoint as it was trained.

    Args:
        path: of the checkpoint, for messages.
        keys: settings that have to agree.

    Raises:
        ConfigError: naming every setting that would make its weights compute something else.
    """
    problems = differing_settings(cfg, stored_config(checkpoint), keys, f"the expanded model {path}")
    if problems:
        raise ConfigError(problems)


def _get(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = None if node is None else node.get(part)
    return node


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
