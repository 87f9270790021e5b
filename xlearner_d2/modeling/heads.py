"""Any Detectron2 config is a head: its model is built, and its ResNet is replaced by a view of the task's branch."""

import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import Backbone, build_model
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.utils.logger import log_first_n
from torch import nn

from ..config import check_config_file
from ..extensions import add_imported_configs
from ..labels import PanopticLabels
from ..settings import add_head_config
from ..specs import ConfigError, SourceSpec, TaskSpec
from .adapt import adapt
from .branches import ARCHITECTURE_KEYS, Branch, branch_config, follow_network, has_res5_in_head, stand_on_branch
from .expanded import STAGES, BranchView, ExpandedBackbone
from .timm_backbone import TimmBackbone

#: Metadata that holds names -> settings that hold their number.
CLASS_COUNTS = {
    "thing_classes": ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
    "stuff_classes": ("MODEL.SEM_SEG_HEAD.NUM_CLASSES",),
    "classes": ("MODEL.CLASSIFIER.NUM_CLASSES",),
    "keypoint_names": ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",),
}
#: What Detectron2's own meta-architectures learn from; others are taken at their word.
NEEDED_CLASSES = {
    "GeneralizedRCNN": ("thing_classes",),
    "ProposalNetwork": (),
    "RetinaNet": ("thing_classes",),
    "FCOS": ("thing_classes",),
    "SemanticSegmentor": ("stuff_classes",),
    "PanopticFPN": ("thing_classes", "stuff_classes"),
    "ImageClassifier": ("classes",),
}
#: Settings whose value needs Detectron2's compiled operators.
_COMPILED = {
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.ROI_HEADS.NAME": "RROIHeads",
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
}
COMPILED_HINT = (
    "Detectron2's compiled operators, which this installation lacks (detectron2._C): build Detectron2 from its source "
    "for this Python and PyTorch."
)
#: What to do about a name or key that Detectron2 does not know.
_IMPORT_HINT = "If another project defines it, name its module in XLEARNER.IMPORTS."


def has_compiled_operators() -> bool:
    """Whether Detectron2 was built with its compiled operators."""
    return importlib.util.find_spec("detectron2._C") is not None


def find_config(name: str) -> str:
    """Path of a head's config: a file as seen from the working directory or the project's folder, or the model zoo's.

    Raises:
        ConfigError: when there is none.
    """
    project = Path(__file__).resolve().parents[2]
    for path in (Path(name), project / name):
        if path.is_file():
            return str(path)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError as error:
        places = f"a file {name}, nor one in {project}, nor one in Detectron2's model zoo"
        raise ConfigError([f"there is neither {places}."]) from error


def head_config(source: SourceSpec, cfg: CfgNode, *, where: str = "") -> CfgNode:
    """The Detectron2 config of one source's head, fitted to the project's branches and to the source's classes.

    Args:
        source: its data sets must be registered; without any, OPTS has to give the number of classes.
        cfg: the project's config; decides the branches, the input normalisation and the device.
        where: the setting that describes the source, for messages; that in ``XLEARNER.SOURCES`` unless given.

    Raises:
        ConfigError: when the config cannot be found or read, or the data set lacks what the head needs.
    """
    is_source, where = not where, where or f"XLEARNER.SOURCES.{source.name}"
    try:
        path = find_config(source.config)
        check_config_file(path)
    except ConfigError as error:
        raise ConfigError([f"{where}.CONFIG is {source.config!r}: {problem}" for problem in error.problems]) from error
    head = get_cfg()
    add_head_config(head)
    try:
        add_imported_configs(head, cfg.XLEARNER.IMPORTS)
        head.merge_from_file(path, allow_unsafe=True)  # checked above
        _follow(head, branch_config(cfg, source.task), f"{where} ({source.config})")
        if source.data_sets:
            _set_classes(head, source, where)
        followed = head.clone()
        head.merge_from_list(list(source.opts))
        # A model that is fine-tuned keeps the norms of the ResNet that it has.
        _check_followed(head, followed, where, free=() if is_source else ("NORM",))
        _check_supported(head, f"{where} ({source.config})")
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [_words(error, where, source)]
        raise ConfigError(problems) from error
    # Mappers for tests read what keypoints and classes there are from TRAIN, which a frozen source need not have.
    head.DATASETS.TRAIN, head.DATASETS.TEST = source.train or source.test, source.test
    head.freeze()
    return head


def _words(error: Exception, where: str, source: SourceSpec) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    hint = f" {_IMPORT_HINT}" if "Non-existent config key" in text else ""
    return f"{where} ({source.config}): {text}{hint and '.'}{hint}"


def _follow(head: CfgNode, cfg: CfgNode, where: str) -> None:
    """Copy what is one setting for all sources."""
    if any(head.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        text = "its deformable convolutions belong to the ResNet that a branch replaces"
        wish = "set MODEL.RESNETS.DEFORM_ON_PER_STAGE in the project's own config for branches that have them"
        log_first_n(logging.WARNING, f"{where}: {text}; {wish}.", key="message")
    follow_network(head, cfg)
    head.MODEL.PIXEL_MEAN, head.MODEL.PIXEL_STD = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    head.INPUT.FORMAT = cfg.INPUT.FORMAT
    head.MODEL.DEVICE = cfg.MODEL.DEVICE


def _check_followed(head: CfgNode, followed: CfgNode, where: str, *, free: Sequence[str]) -> None:
    """See that a source's own settings leave alone what holds for all sources, as they would be without effect.

    Args:
        free: of the keys in ``MODEL.RESNETS``, those that are the head's own.
    """
    if has_res5_in_head(head):
        free = (*free, "NORM", "NUM_GROUPS", "WIDTH_PER_GROUP", "STRIDE_IN_1X1")
    keys = [f"MODEL.RESNETS.{name}" for name in ARCHITECTURE_KEYS if name not in free]
    keys += ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.DEVICE", "MODEL.BACKBONE.TIMM"]
    problems = []
    for key in keys:
        own, common = (functools.reduce(getattr, key.split("."), cfg) for cfg in (head, followed))
        if own != common:
            wish = (
                f", but it holds for all sources and is {common!r}: set it in the config of the run, or leave it out."
            )
            problems.append(f"{where}.OPTS sets {key} to {own!r}{wish}")
    if problems:
        raise ConfigError(problems)


def _set_classes(head: CfgNode, source: SourceSpec, where: str) -> None:
    """Fit the head to the classes and keypoints that the metadata of the source's data set lists."""
    metadata = MetadataCatalog.get(source.data_sets[0])
    for names in _needed(head, source):
        if not any(name in metadata.as_dict() for name in names):
            lack = f"the data set {source.data_sets[0]!r} has no {' or '.join(names)}"
            wish = f"which {head.MODEL.META_ARCHITECTURE} learns from (CONFIG {source.config})"
            boxes = names == ("classes",) and "thing_classes" in metadata.as_dict()
            hint = " Set MODEL.CLASSIFIER.MULTI_LABEL to learn which objects an image has." if boxes else ""
            raise ConfigError([f"{where}: {lack}, {wish}.{hint}"])
    for name, settings in CLASS_COUNTS.items():
        if name in metadata.as_dict():
            head.merge_from_list([item for key in settings for item in (key, len(metadata.get(name)))])
    if metadata.get("evaluator_type", None) == "multi_label":
        head.MODEL.CLASSIFIER.MULTI_LABEL = True
    if "classes" not in metadata.as_dict():  # a detection set, for multi-label classification
        head.MODEL.CLASSIFIER.NUM_CLASSES = len(metadata.get("thing_classes", ()))
    head.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = metadata.get("ignore_label", head.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    labels = PanopticLabels.of(metadata)
    if labels is not None and head.MODEL.META_ARCHITECTURE == "PanopticFPN":
        head.MODEL.ROI_HEADS.NUM_CLASSES = len(labels.things)
        head.MODEL.SEM_SEG_HEAD.NUM_CLASSES = labels.stuff_classes
    _set_imported_counts(head)


def _set_imported_counts(head: CfgNode) -> None:
    """``NUM_CLASSES`` in sections that imported modules added, such as ``MODEL.POINT_HEAD``."""
    is_semantic = head.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    count = (head.MODEL.SEM_SEG_HEAD if is_semantic else head.MODEL.ROI_HEADS).NUM_CLASSES
    for name in head.MODEL.keys() - get_cfg().MODEL.keys() - {"CLASSIFIER"}:
        section = head.MODEL[name]
        if isinstance(section, CfgNode) and "NUM_CLASSES" in section:
            section.NUM_CLASSES = count


def _needed(head: CfgNode, source: SourceSpec) -> list[tuple[str, ...]]:
    """Metadata that the head's data set should have: one of each tuple."""
    needed: list[tuple[str, ...]] = [(name,) for name in NEEDED_CLASSES.get(head.MODEL.META_ARCHITECTURE, ())]
    opts = dict(zip(source.opts[::2], source.opts[1::2], strict=False))
    if opts.get("MODEL.CLASSIFIER.MULTI_LABEL", head.MODEL.CLASSIFIER.MULTI_LABEL):
        needed = [("classes", "thing_classes") if names == ("classes",) else names for names in needed]
    if opts.get("MODEL.KEYPOINT_ON", head.MODEL.KEYPOINT_ON):
        needed += [("keypoint_names",), ("keypoint_flip_map",)]
    return needed


def _check_supported(head: CfgNode, where: str) -> None:
    """See that the head needs no operator that is missing here, and no stride that no branch has."""
    problems = []
    resnets = head.MODEL.RESNETS
    wanted = [f"{key} {value}" for key, value in _COMPILED.items() if _get(head, key) == value]
    if any(resnets.DEFORM_ON_PER_STAGE):
        wanted.append("MODEL.RESNETS.DEFORM_ON_PER_STAGE")
    if wanted and not has_compiled_operators():
        problems.append(f"{where}: {', '.join(wanted)} needs {COMPILED_HINT}")
    res4, res5 = resnets.get("RES4_DILATION", 1), resnets.RES5_DILATION
    if res4 != 1 or res5 not in (1, 2):
        problems.append(
            f"{where} wants a dilated res4 (MODEL.RESNETS.RES4_DILATION {res4}, RES5_DILATION {res5}), but res4 of a "
            "branch has stride 16. Set RES4_DILATION to 1 and RES5_DILATION to 1 or 2 in the OPTS of the source."
        )
    problems += stand_on_branch(head, where)
    if problems:
        raise ConfigError(problems)


def class_counts(head: CfgNode) -> list[Any]:
    """Settings of a head that hold numbers of classes or keypoints, as keys and values."""
    keys = ("NUM_CLASSES", "NUM_KEYPOINTS", "IGNORE_VALUE")
    sections = [(name, node) for name, node in head.MODEL.items() if isinstance(node, CfgNode)]
    return [i for name, node in sections for key in keys if key in node for i in (f"MODEL.{name}.{key}", node[key])]


def _get(head: CfgNode, key: str) -> object:
    node: Any = head
    for part in key.split("."):
        node = node[part]
    return node


def derive_tasks(sources: Sequence[SourceSpec], heads: Mapping[str, CfgNode]) -> list[TaskSpec]:
    """One record per task, in the order of its first source, with the stages that its heads read.

    Raises:
        ConfigError: when two heads of one task disagree about the dilation, and so the stride, of res5.
    """
    tasks, problems = [], []
    for task in dict.fromkeys(source.task for source in sources):
        members = [source.name for source in sources if source.task == task]
        read = {feature for name in members for feature in heads[name].MODEL.RESNETS.OUT_FEATURES}
        dilations = {name: heads[name].MODEL.RESNETS.RES5_DILATION for name in members if _reads_res5(heads[name])}
        if len(set(dilations.values())) > 1:
            strides = ", ".join(f"{name} has stride {32 // dilation}" for name, dilation in dilations.items())
            problems.append(
                f"The heads of task {task!r} want different strides of res5 ({strides}): "
                "set MODEL.RESNETS.RES5_DILATION alike in the OPTS of these sources, or give them different tasks."
            )
        features = tuple(stage for stage in STAGES if stage in read)
        dilation = next(iter(dilations.values()), 1)
        tasks.append(TaskSpec(name=task, sources=tuple(members), out_features=features, res5_dilation=dilation))
    if problems:
        raise ConfigError(problems)
    return tasks


def _reads_res5(head: CfgNode) -> bool:
    return "res5" in head.MODEL.RESNETS.OUT_FEATURES


def find_resnet(model: nn.Module, source: SourceSpec) -> tuple[nn.Module, str, Branch]:
    """(parent, attribute, network) of the one ResNet, or network of timm, of a head's model."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ResNet | TimmBackbone)
    ]
    if len(found) != 1:
        message = f"{source.config} has {len(found)} ResNets, but exactly one is needed to be replaced by a branch."
        raise ConfigError([f"XLEARNER.SOURCES.{source.name}.CONFIG: {message}"])
    return found[0]


def _check_shapes(own: Backbone, view: Backbone, source: SourceSpec) -> None:
    problems = []
    for name, shape in own.output_shape().items():
        offered = view.output_shape()[name]
        if (shape.channels, shape.stride) != (offered.channels, offered.stride):
            problems.append(
                f"XLEARNER.SOURCES.{source.name}: {source.config} wants {name} with {shape.channels} channels at "
                f"stride {shape.stride}, but the branch of task {source.task!r} has {offered.channels} channels at "
                f"stride {offered.stride}. Change MODEL.RESNETS of the run, or RES5_DILATION in the OPTS of the source."
            )
    if problems:
        raise ConfigError(problems)


def build_head(source: SourceSpec, head: CfgNode, backbone: ExpandedBackbone) -> nn.Module:
    """Build the model that ``head`` describes, on a view of the source's branch.

    Returns:
        a complete Detectron2 model, called as any other, that owns the head's parameters and none of the branch's.

    Raises:
        ConfigError: when the model cannot be built, has no ResNet, or wants other channels or strides.
    """
    try:
        model = build_model(head)
    except Exception as error:  # whatever a third party's model raises
        hint = f" {_IMPORT_HINT}" if "No object named" in str(error) else ""
        message = f"XLEARNER.SOURCES.{source.name}: the model of {source.config} cannot be built: {error!r}.{hint}"
        raise ConfigError([message]) from error
    parent, attribute, resnet = find_resnet(model, source)
    features = list(resnet.output_shape())
    missing = [name for name in features if name not in backbone.output_shape(source.task)]
    if missing:
        raise ConfigError([f"XLEARNER.SOURCES.{source.name}: {source.config} reads {missing}, which no branch offers."])
    view = BranchView(backbone=backbone, task=source.task, out_features=features)
    _check_shapes(resnet, view, source)
    setattr(parent, attribute, view)
    if source.data_sets:
        adapt(model, MetadataCatalog.get(source.data_sets[0]))
    return model
