"""What is checked of a run's settings, its sources and their heads; each check gives the problems that it finds."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from torch import nn

from ..config import default_config
from ..data.mappers import build_mapper
from ..evaluation.build import check_evaluation
from ..modeling.expanded import STAGES as RESNET_STAGES
from ..modeling.heads import COMPILED_HINT, has_compiled_operators
from ..settings import AMP_PRECISIONS, SHARING, STAGES
from ..specs import SourceSpec, one_of
from .branches import squeezes
from .drawn import check_sampling
from .optimizer import CLIP_TYPES, OPTIMIZERS, make_multiplier, make_optimizer
from .resumed import flat
from .scaling import check_timeouts
from .squeeze_settings import check_squeeze, squeeze_config
from .trunk_settings import check_trunk, starts_from_trunk, trunk_config


def check_settings(cfg: CfgNode, world_size: int) -> list[str]:
    """Problems of the settings that stand for themselves: those of no source."""
    problems = one_of("STAGE", cfg.XLEARNER.STAGE, STAGES)
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind != "XLearner":
        cure = "Begin the file with _BASE_: configs/base.yaml"
        problems.append(f"MODEL.META_ARCHITECTURE is {kind!r}, but 'XLearner' is expected. {cure}.")
    problems += check_sampling(cfg, world_size)
    problems += one_of("AMP_PRECISION", cfg.XLEARNER.AMP_PRECISION, AMP_PRECISIONS)
    if cfg.XLEARNER.COMPILE:
        problems += one_of("COMPILE", cfg.XLEARNER.COMPILE, torch.compiler.list_backends(exclude_tags=()))
    problems += one_of("SHARING", cfg.XLEARNER.SHARING, SHARING)
    for stage in cfg.XLEARNER.RECONCILIATION.STAGES:
        problems += one_of("RECONCILIATION.STAGES", stage, RESNET_STAGES)
    problems += check_device(cfg.MODEL.DEVICE)
    if not can_be_made(Path(cfg.OUTPUT_DIR)):
        problems.append(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, which is no folder that can be made or written to.")
    if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS and not Path(cfg.MODEL.WEIGHTS).is_file():
        problems.append(f"MODEL.WEIGHTS: there is no file {cfg.MODEL.WEIGHTS}.")
    if cfg.XLEARNER.WANDB and importlib.util.find_spec("wandb") is None:
        wish = "the package wandb is not installed: pip install wandb, or leave the setting empty"
        problems.append(f"XLEARNER.WANDB is {cfg.XLEARNER.WANDB!r}, but {wish}.")
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not has_compiled_operators():
        problems.append(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs {COMPILED_HINT}")
    problems += _check_solver(cfg.SOLVER, "SOLVER")
    problems += _check_solver(cfg.XLEARNER.SQUEEZE.SOLVER, "XLEARNER.SQUEEZE.SOLVER")
    problems += check_timeouts(cfg) + check_squeeze(cfg) + check_trunk(cfg)
    return problems or _try_solvers(cfg)


#: What a run reads of Detectron2's settings; heads read all others, in their own configs.
_READ = (
    *("MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.PIXEL_", "MODEL.BACKBONE.", "MODEL.RESNETS."),
    *("INPUT.FORMAT", "SOLVER.", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD", "CUDNN_BENCHMARK"),
    *("OUTPUT_DIR", "SEED", "VERSION", "XLEARNER.", "TRANSFER."),
)


def tell_unread(cfg: CfgNode) -> None:
    """Warn of settings that are not as by default, but have no effect, as they are those of a head."""
    own, default = (dict(flat(yaml.safe_load(of.dump()))) for of in (cfg, default_config()))
    is_read = {name: name.startswith(_READ) and name != "SOLVER.IMS_PER_BATCH" for name in default}
    unread = [name for name, value in default.items() if not is_read[name] and own[name] != value]
    if unread:
        cure = "Set them in the OPTS or the CONFIG of a source, and the images of a step in its IMS_PER_BATCH."
        text = f"No source reads {', '.join(unread)}, which the config sets. {cure}"
        log_first_n(logging.WARNING, text, key="message")  # a study makes the same plan for each of its runs


def tell_long_warm_up(cfg: CfgNode) -> None:
    """Warn of stages that end before their learning rate has risen, as with Detectron2's 1,000 steps of warm-up."""
    stages = {}
    if starts_from_trunk(cfg):
        stages["The trunk"] = trunk_config(cfg)
    if cfg.XLEARNER.STAGE != "squeeze":
        stages["The expansion"] = cfg
    if squeezes(cfg):
        stages["The squeeze"] = squeezing = squeeze_config(cfg)
        if cfg.XLEARNER.SQUEEZE.ONLINE:  # in the steps of the expansion
            squeezing.SOLVER.MAX_ITER = cfg.SOLVER.MAX_ITER
    for name, own in stages.items():
        if own.SOLVER.WARMUP_ITERS >= own.SOLVER.MAX_ITER:
            steps = f"{name} takes {own.SOLVER.MAX_ITER} steps, but SOLVER.WARMUP_ITERS is {own.SOLVER.WARMUP_ITERS}"
            text = f"{steps}, in which its learning rate rises: it never is what SOLVER.BASE_LR says."
            log_first_n(logging.WARNING, text, key="message")


#: Images of a task in one worker's step, below which statistics of a batch are said to be of few.
FEW_IMAGES = 4


def tell_few_images(cfg: CfgNode, sources: Sequence[SourceSpec], world_size: int) -> None:
    """Warn of BN over few images, as branches of a worker see its share of their sources' images alone."""
    x = cfg.XLEARNER
    if world_size == 1 or x.STAGE == "squeeze" or x.SHARING == "shared" or cfg.MODEL.RESNETS.NORM != "BN":
        return
    if cfg.MODEL.BACKBONE.TIMM:  # of which many have no BN
        return
    shares = Counter[str]()
    for source in sources:
        shares[source.task] += source.ims_per_batch // world_size
    if few := ", ".join(f"{task} ({share})" for task, share in shares.items() if share < FEW_IMAGES):
        text = f"Each of the {world_size} workers has few images of {few} in a step, and BN normalises by these."
        cure = "MODEL.RESNETS.NORM SyncBN (on CPUs naiveSyncBN) joins those of all; or set IMS_PER_BATCH higher."
        log_first_n(logging.WARNING, f"{text} {cure}", key="message")


def check_device(name: str) -> list[str]:
    """Problems of ``MODEL.DEVICE``."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"MODEL.DEVICE is {name!r}, but cpu, cuda, or a certain GPU such as cuda:0 is expected."]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"MODEL.DEVICE is {name!r}, but this machine has no usable GPU. Set it to cpu."]
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count and (device.index or 0) >= count:
        return [f"MODEL.DEVICE is {name!r}, but this machine has {count} usable GPUs, counted from 0."]
    return []


def can_be_made(folder: Path) -> bool:
    """Whether a folder is there, or the first of those above it that is lets one write."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _check_solver(solver: CfgNode, where: str) -> list[str]:
    """Problems of those keys that are there; the squeeze's own section has some of them."""
    problems = []
    if solver.get("OPTIMIZER", OPTIMIZERS[0]) not in OPTIMIZERS:
        problems.append(f"{where}.OPTIMIZER is {solver.OPTIMIZER!r}, but one of {', '.join(OPTIMIZERS)} is expected.")
    steps, rate = solver.get("MAX_ITER", 1), solver.get("BASE_LR", 1.0)
    if not isinstance(steps, int) or steps < 1:
        problems.append(f"{where}.MAX_ITER is {steps!r}, but a number of steps of at least 1 is expected.")
    if not isinstance(rate, int | float) or not rate > 0:
        problems.append(f"{where}.BASE_LR is {rate!r}, but a positive number is expected.")
    period = solver.get("CHECKPOINT_PERIOD", 1)
    if not isinstance(period, int) or period < 1:
        problems.append(f"{where}.CHECKPOINT_PERIOD is {period!r}, but a number of steps of at least 1 is expected.")
    clip = solver.get("CLIP_GRADIENTS", {}).get("CLIP_TYPE", CLIP_TYPES[0])
    if clip not in CLIP_TYPES:
        expected = f"one of {', '.join(CLIP_TYPES)} is expected"
        problems.append(f"{where}.CLIP_GRADIENTS.CLIP_TYPE is {clip!r}, but {expected}.")
    return problems


def _try_solvers(cfg: CfgNode) -> list[str]:
    """What Detectron2 and torch refuse of the solver of a stage, tried on a layer: the squeeze starts hours later."""
    stages: dict[str, Callable[[CfgNode], CfgNode]] = {
        "SOLVER": CfgNode.clone,
        "XLEARNER.SQUEEZE.SOLVER": squeeze_config,
    }
    if starts_from_trunk(cfg):
        stages["SOLVER, with as many steps as XLEARNER.TRUNK_STEPS,"] = trunk_config
    for where, config in stages.items():
        try:
            own = config(cfg)
            least, rate = own.SOLVER.BASE_LR_END, own.SOLVER.BASE_LR
            if own.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR" and not 0 <= least <= rate:
                return [f"{where}.BASE_LR_END is {least}, but a rate from 0 to BASE_LR, {rate}, is expected."]
            make_multiplier(own)
            make_optimizer(own, nn.Linear(1, 1))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            return [f"{where} is refused by Detectron2 or PyTorch: {error.args[0] if error.args else repr(error)}."]
    return []


def check_head(source: SourceSpec, head: CfgNode, world_size: int) -> list[str]:
    """Problems of a head's settings with the way the source is trained and tested."""
    where, problems = f"XLEARNER.SOURCES.{source.name}", []
    options, share = head.MODEL.CLASSIFIER, source.ims_per_batch // world_size
    mixes = options.MIXUP or options.CUTMIX
    if mixes and share % 2:
        problems.append(
            f"{where}.IMS_PER_BATCH gives each worker {share} images, but mixup and cutmix need an even number."
        )
    if mixes and options.MULTI_LABEL:
        problems.append(f"{where}: MODEL.CLASSIFIER.MULTI_LABEL cannot be combined with MIXUP or CUTMIX.")
    low, high = (*head.MODEL.DEPTH_HEAD.RANGE, 0.0, 0.0)[:2]
    if not 0 < low < high:
        got = head.MODEL.DEPTH_HEAD.RANGE
        problems.append(f"{where}: MODEL.DEPTH_HEAD.RANGE is {got}, but a nearest and a farther distance are expected.")
    return problems


def check_training(sources: Sequence[SourceSpec], frozen: Collection[str]) -> list[str]:
    """A new source of a frozen task has its head to train; something has to be trained."""
    problems = [
        f"XLEARNER.SOURCES.{source.name}.TRAIN is empty, but its head is new: at least one data set is needed."
        for source in sources
        if not source.train and frozen and source.name not in frozen
    ]
    if sources and all(source.name in frozen for source in sources):
        problems.append("XLEARNER.FREEZE leaves nothing to train: add a source, or freeze less.")
    return problems


def check_tests(source: SourceSpec, head: CfgNode) -> list[str]:
    """Found now, as test sets are evaluated after hours of training."""
    where, problems = f"XLEARNER.SOURCES.{source.name}", []
    sigmas, keypoints = head.TEST.KEYPOINT_OKS_SIGMAS, head.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if head.MODEL.KEYPOINT_ON and sigmas and len(sigmas) != keypoints:
        wish = f"one for each of the {keypoints} keypoints is expected"
        problems.append(f"{where}: TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} entries, but {wish}.")
    for name in source.test:
        try:
            check_evaluation(name, head)
            build_mapper(head, is_train=False)
        except (AssertionError, ValueError) as error:  # Detectron2 asserts what its mapper needs
            problems.append(f"{where}.TEST: {error}")
    return problems
