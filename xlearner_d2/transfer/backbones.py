"""The backbones that a study compares: random weights, a ResNet file, or a branch of an expanded checkpoint."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

from ..checkpoint.fetch import local_file
from ..checkpoint.load import load_resnet
from ..checkpoint.pixels import PixelConvention
from ..modeling.branches import Branch, build_branch
from ..modeling.expanded import STAGES
from ..modeling.plug_in import expanded_branch
from ..specs import ConfigError

#: Path of a backbone that has no file.
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """One ``NAME=PATH`` of the command line.

    Attributes:
        name: ``role`` or ``role/variant``.
        path: a ResNet checkpoint, an expanded one, or "random"; ``{seed}`` in it stands for the seed.
        task: the branch of an expanded checkpoint.
    """

    name: str
    path: str
    task: str = ""

    def file(self, seed: int) -> Path | None:
        """The file for one seed; None for random weights."""
        return None if self.path == RANDOM else Path(self.path.replace("{seed}", str(seed)))


def parse_backbone(text: str) -> BackboneSpec:
    """Parse ``NAME=PATH`` or ``NAME=PATH:TASK``.

    Raises:
        ConfigError: for anything else.
    """
    name, _, path = text.partition("=")
    task = ""
    if not Path(path).exists() and ":" in path and "/" not in path.rpartition(":")[2]:  # as in the address of a file
        path, _, task = path.rpartition(":")
        path = path if task else ""
    if not (name and path) or (path == RANDOM and task):
        raise ConfigError([f"--weights {text!r}: NAME=PATH, NAME=PATH:TASK or NAME=random is expected."])
    return BackboneSpec(name=name, path=path, task=task)


def parse_backbones(texts: Sequence[str]) -> list[BackboneSpec]:
    """Parse every ``NAME=PATH`` of a command line; a path with ``://`` is fetched.

    Raises:
        ConfigError: with all problems.
    """
    found, problems = [], []
    for text in texts:
        try:
            backbone = parse_backbone(text)
            if "://" in backbone.path:
                if "{seed}" in backbone.path:
                    raise ConfigError([f"--weights {text!r}: {{seed}} stands in paths alone, not in addresses."])
                backbone = replace(backbone, path=str(local_file(backbone.path)))
            found.append(backbone)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, what="The command line")
    return found


def name_problems(names: Iterable[str], where: str) -> list[str]:
    """Names that no record can have; ``where`` stands before each."""
    return [
        f"{where}{name!r}: a role such as squeezed, or role/variant, of letters, digits, - and _ is expected."
        for name in names
        if not re.fullmatch(r"[\w-]+(/[\w-]+)?", name)
    ]


def check_backbones(backbones: Sequence[BackboneSpec], seeds: Sequence[int], cfg: CfgNode) -> None:
    """See that names are such that each backbone has records of its own, and that every file can be loaded.

    Args:
        cfg: describes the ResNet.

    Raises:
        ConfigError: with all problems.
    """
    names = [backbone.name for backbone in backbones]
    problems = [f"--weights gives {name!r} twice." for name in sorted({n for n in names if names.count(n) > 1})]
    problems += name_problems(names, "--weights ")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        resnet = build_branch(cfg, out_features=STAGES)
    except ConfigError:
        raise
    except (AssertionError, ValueError, KeyError) as error:  # as of a depth that wants other channels
        raise ConfigError([f"MODEL.RESNETS: the network cannot be built: {error}"], what="The suite") from error
    files = {(backbone.file(seed), backbone.task): (backbone, seed) for backbone in backbones for seed in seeds}
    for (path, _), (backbone, seed) in files.items():
        if path is not None and not path.is_file():
            problems.append(f"--weights {backbone.name}: there is no file {path}.")
        elif path is not None:
            problems += _loading_problems(backbone, cfg, seed, resnet)
    if problems:
        raise ConfigError(problems, what="The command line")


def _loading_problems(backbone: BackboneSpec, cfg: CfgNode, seed: int, resnet: Branch) -> list[str]:
    try:
        load_backbone(backbone, cfg, seed=seed, resnet=resnet)
    except ConfigError as error:
        return [f"--weights {backbone.name}: {error}"]
    return []


def fingerprint(backbone: BackboneSpec, seed: int) -> str:
    """SHA-256 of the file and the task; "" for random weights."""
    path = backbone.file(seed)
    if path is None:
        return ""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(backbone.task.encode())
    return digest.hexdigest()


def load_backbone(backbone: BackboneSpec, cfg: CfgNode, *, seed: int, resnet: Branch | None = None) -> Backbone:
    """The backbone with its weights loaded.

    Args:
        cfg: describes the ResNet and its device.
        seed: of random weights, and in the file's name.
        resnet: load into this one, which keeps its norm and what is frozen; else into a new one with all stages.

    Returns:
        ``resnet`` itself, or what is to replace it: a branch of an expanded checkpoint.

    Raises:
        ConfigError: when the file cannot be loaded, or is of another architecture.
    """
    path = backbone.file(seed)
    if backbone.task:
        shapes = (resnet or build_branch(cfg, out_features=STAGES)).output_shape()
        branch = expanded_branch(str(path), backbone.task, out_features=list(shapes), used_by=cfg)
        _check_shapes(branch.output_shape(), shapes, f"{path}, {backbone.task}")
        return branch.to(cfg.MODEL.DEVICE)
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = build_branch(cfg, out_features=STAGES)
        state = fresh.state_dict()
        if resnet is None:
            return fresh.to(cfg.MODEL.DEVICE)
        resnet.load_state_dict({name: state[name] for name in resnet.state_dict()})
        return resnet
    resnet = resnet or build_branch(cfg, out_features=STAGES).to(cfg.MODEL.DEVICE)
    # Frozen, it would never learn to do with strides elsewhere, and one suite compares files of either kind.
    load_resnet(resnet, path, pixels=PixelConvention.of(cfg), move_strides=True)
    return resnet


def _check_shapes(got: Mapping[str, ShapeSpec], wanted: Mapping[str, ShapeSpec], where: str) -> None:
    problems = [
        f"{where}: {stage} has {got[stage].channels} channels at stride {got[stage].stride}, but {shape.channels} at "
        f"stride {shape.stride} are expected; see MODEL.RESNETS of the suite."
        for stage, shape in wanted.items()
        if (got[stage].channels, got[stage].stride) != (shape.channels, shape.stride)
    ]
    if problems:
        raise ConfigError(problems, what="The backbone")
