"""Any Detectron2 config is a head: its model is built, and its ResNet is replaced by a view of the task's branch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import Backbone, build_model
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from ..config import add_classifier_config, check_config_file
from ..specs import ConfigError, SourceSpec, TaskSpec
from .expanded import STAGES, BranchView, ExpandedBackbone

#: What a branch is made of; a head's config follows the project's config in these.
ARCHITECTURE_KEYS = (
    "DEPTH",
    "NUM_GROUPS",
    "NORM",
    "WIDTH_PER_GROUP",
    "STRIDE_IN_1X1",
    "STEM_OUT_CHANNELS",
    "RES2_OUT_CHANNELS",
    "DEFORM_ON_PER_STAGE",
    "DEFORM_MODULATED",
    "DEFORM_NUM_GROUPS",
)
#: Metadata that holds class names -> settings that hold their number.
CLASS_COUNTS = {
    "thing_classes": ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
    "stuff_classes": ("MODEL.SEM_SEG_HEAD.NUM_CLASSES",),
    "classes": ("MODEL.CLASSIFIER.NUM_CLASSES",),
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
        source: its TRAIN data sets must be registered.
        cfg: the project's config; decides the branches, the input normalisation and the device.
        where: the setting that describes the source, for messages; that in ``XLEARNER.SOURCES`` unless given.

    Raises:
        ConfigError: when the config cannot be found or read, or the data set lacks what the head needs.
    """
    where = where or f"XLEARNER.SOURCES.{source.name}"
    try:
        path = find_config(source.config)
        check_config_file(path)
    except ConfigError as error:
        raise ConfigError([f"{where}.CONFIG is {source.config!r}: {problem}" for problem in error.problems]) from error
    head = get_cfg()
    add_classifier_config(head)
    try:
        head.merge_from_file(path, allow_unsafe=True)  # checked above
        _follow(head, cfg)
        _set_classes(head, MetadataCatalog.get(source.train[0]), source, where)
        head.merge_from_list(list(source.opts))
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [f"{where} ({source.config}): {error}"]
        raise ConfigError(problems) from error
    head.DATASETS.TRAIN, head.DATASETS.TEST = source.train, source.test
    head.freeze()
    return head


def _follow(head: CfgNode, cfg: CfgNode) -> None:
    """Copy what is one setting for all sources."""
    for key in ARCHITECTURE_KEYS:
        head.MODEL.RESNETS[key] = cfg.MODEL.RESNETS[key]
    head.MODEL.PIXEL_MEAN, head.MODEL.PIXEL_STD = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    head.INPUT.FORMAT = cfg.INPUT.FORMAT
    head.MODEL.DEVICE = cfg.MODEL.DEVICE


def _set_classes(head: CfgNode, metadata: Metadata, source: SourceSpec, where: str) -> None:
    for name in NEEDED_CLASSES.get(head.MODEL.META_ARCHITECTURE, ()):
        if name not in metadata.as_dict():
            lack = f"the data set {source.train[0]!r} has no {name}"
            wish = f"which {head.MODEL.META_ARCHITECTURE} learns from (CONFIG {source.config})"
            raise ConfigError([f"{where}: {lack}, {wish}."])
    for name, settings in CLASS_COUNTS.items():
        if name in metadata.as_dict():
            head.merge_from_list([item for key in settings for item in (key, len(metadata.get(name)))])
    head.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = metadata.get("ignore_label", head.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


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


def find_resnet(model: nn.Module, source: SourceSpec) -> tuple[nn.Module, str, ResNet]:
    """(parent, attribute, ResNet) of the one ResNet of a head's model."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ResNet)
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
                f"stride {offered.stride}. Change MODEL.RESNETS, here or in the OPTS of the source."
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
    except (AssertionError, KeyError, ValueError, ImportError) as error:
        message = f"XLEARNER.SOURCES.{source.name}: the model of {source.config} cannot be built: {error!r}"
        raise ConfigError([message]) from error
    parent, attribute, resnet = find_resnet(model, source)
    features = list(resnet.output_shape())
    missing = [name for name in features if name not in backbone.output_shape(source.task)]
    if missing:
        raise ConfigError([f"XLEARNER.SOURCES.{source.name}: {source.config} reads {missing}, which no branch offers."])
    view = BranchView(backbone=backbone, task=source.task, out_features=features)
    _check_shapes(resnet, view, source)
    setattr(parent, attribute, view)
    return model
