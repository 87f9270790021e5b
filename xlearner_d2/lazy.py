"""Detectron2's LazyConfig: settings written in Python, and what its lazy trainer builds an expansion from.

A file such as ``configs/lazy/openmoji.py`` holds ``settings``, the same tree as a YAML config, which is all that
``train_net.py --config-file`` reads; and the five names that Detectron2's ``lazyconfig_train_net.py`` reads. They
follow ``settings``, so ``settings.SOLVER.MAX_ITER=100`` on its command line does what it says.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import yaml
from detectron2.config import CfgNode, LazyCall
from detectron2.modeling import build_model
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from .config import default_config, load_config
from .engine.branches import initialise_branches, settle_statistics
from .engine.optimizer import make_multiplier, make_optimizer
from .engine.plan import Plan, make_plan
from .engine.trainer import build_loader
from .modeling import XLearner
from .modeling.heads import find_config
from .settings import usable
from .specs import ConfigError


def complete(base: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run: those of a YAML config, with changes, as a tree that interpolations can refer to.

    Args:
        base: YAML file, looked for where the config of a head is.
        changes: tree of settings; None in the place of a record drops it.

    Raises:
        ConfigError: for a setting that is not known or has the wrong type.
    """
    changed = OmegaConf.merge(_tree(load_config(find_config(base))), dict(changes))
    return _tree(_config(OmegaConf.to_container(changed)))


#: Settings that only :mod:`.engine` carries out. Left at their defaults, nothing is missing from what others train.
_ENGINE_ALONE = (
    "XLEARNER.EXTEND",
    "XLEARNER.FREEZE",
    "XLEARNER.TRUNK_STEPS",
    "XLEARNER.STEPS",
    "XLEARNER.AMP_PRECISION",
    "XLEARNER.WEIGHTING.METHOD",
    "XLEARNER.SQUEEZE.ONLINE",
    "XLEARNER.WANDB",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "TEST.EVAL_PERIOD",
)
OmegaConf.register_new_resolver("usable", usable, replace=True)
# The trainer with mixed precision is for GPUs; on a CPU the model sets its own.
OmegaConf.register_new_resolver(
    "on_gpu", lambda wanted, device: wanted and usable(device).startswith("cuda"), replace=True
)


class Nodes(NamedTuple):
    """What ``lazyconfig_train_net.py`` reads from a file, by the names it knows."""

    model: Mapping[str, Any]
    dataloader: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    lr_multiplier: Mapping[str, Any]
    train: Mapping[str, Any]


def expansion() -> Nodes:
    """The expand stage, for a file that has ``settings``.

    Evaluation and the squeeze are those of ``train_net.py``: give it the weights as ``XLEARNER.SQUEEZE.TEACHER``.
    """
    settings = "${settings}"
    return Nodes(
        model=LazyCall(build_expansion)(settings=settings),
        dataloader={"train": LazyCall(build_train_loader)(settings=settings)},
        optimizer=LazyCall(build_optimizer)(settings=settings, params={"model": None}),
        lr_multiplier=LazyCall(build_lr_multiplier)(settings=settings),
        train={
            "output_dir": "${settings.OUTPUT_DIR}",
            "init_checkpoint": "",
            "max_iter": "${settings.SOLVER.MAX_ITER}",
            "seed": "${settings.SEED}",
            "amp": {"enabled": "${on_gpu:${settings.SOLVER.AMP.ENABLED},${settings.MODEL.DEVICE}}"},
            "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
            "checkpointer": {"period": "${settings.SOLVER.CHECKPOINT_PERIOD}", "max_to_keep": 2},
            "eval_period": 0,
            "log_period": 20,
            "device": "${usable:${settings.MODEL.DEVICE}}",
        },
    )


def build_expansion(settings: Mapping[str, Any]) -> XLearner:
    """The expanded model, started as ``MODEL.WEIGHTS`` and ``XLEARNER.BRANCHES`` say.

    Raises:
        ConfigError: for settings that ``train_net.py`` alone carries out, besides those of the plan.
    """
    plan = _plan_of(settings)
    model = build_model(plan.cfg).to(memory_format=torch.channels_last if plan.cfg.XLEARNER.CHANNELS_LAST else None)
    initialise_branches(model, plan.cfg, plan.branches)
    if plan.cfg.MODEL.DEVICE.startswith("cuda"):  # the trainer's flags, not these settings, say in which precision
        settle_statistics(model, plan.cfg)
    return cast(XLearner, model)


def build_train_loader(settings: Mapping[str, Any]) -> DataLoader[Any]:
    """The endless loader of all sources' shares of each step."""
    return build_loader(_plan_of(settings), "expand")


def build_optimizer(settings: Mapping[str, Any], params: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """The optimiser that ``SOLVER`` describes.

    Args:
        params: ``{"model": the model to train}``, as Detectron2's lazy trainer gives it.
    """
    return make_optimizer(_plan_of(settings).cfg, params["model"])


def build_lr_multiplier(settings: Mapping[str, Any]) -> Any:
    """The schedule that ``SOLVER`` describes, as a ``ParamScheduler`` of fvcore."""
    return make_multiplier(_plan_of(settings).cfg)


def _tree(cfg: CfgNode) -> dict[str, Any]:
    """Plain containers, without tuples, which OmegaConf does not know."""
    return cast(dict[str, Any], yaml.safe_load(cfg.dump(sort_keys=False)))


def _config(settings: Any) -> CfgNode:
    cfg = default_config()
    try:
        cfg.merge_from_other_cfg(CfgNode(settings))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError([str(error.args[0])]) from error
    return cfg


def _plan_of(settings: Mapping[str, Any]) -> Plan:
    cfg = _config(OmegaConf.to_container(OmegaConf.create(dict(settings)), resolve=True))
    own, default = (_flat(tree) for tree in (cfg, default_config()))
    wish = "which only train_net.py --config-file can do. Train with it, or set"
    problems = [
        f"{name} is {own[name]!r}, {wish} {default[name]!r}." for name in _ENGINE_ALONE if own[name] != default[name]
    ]
    if problems:
        raise ConfigError(problems)
    return _plan(cfg.dump(sort_keys=False))


def _flat(cfg: CfgNode) -> dict[str, Any]:
    """The settings of the engine alone, by their dotted names."""
    return {name: functools.reduce(getattr, name.split("."), cfg) for name in _ENGINE_ALONE}


@functools.cache  # the nodes share one, as reading and checking data takes a while
def _plan(text: str) -> Plan:
    return make_plan(_config(yaml.safe_load(text)), world_size=comm.get_world_size())
