"""Any Detectron2 config is a head: model-zoo configs as they are, on a narrow branch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model, build_resnet_backbone
from detectron2.utils.events import EventStorage

from xlearner_d2 import XLearner
from xlearner_d2.modeling.heads import derive_tasks, find_config, head_config
from xlearner_d2.specs import ConfigError, SourceSpec, parse_sources

FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
DC5 = "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
#: config -> what the head predicts for an image
ZOO = {
    FPN: {"instances"},
    C4: {"instances"},
    DC5: {"instances"},
    RETINANET: {"instances"},
    MASK: {"instances"},
    SEMANTIC: {"sem_seg"},
    PANOPTIC: {"instances", "sem_seg", "panoptic_seg"},
}
#: Small heads; each config reads those of these that concern it.
LIGHT = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}
THINGS, STUFF = ["cat", "dog", "eel"], ["sea", "sky", "sun", "mud"]

Make = Callable[..., XLearner]


def record(config: str, *, task: str = "it", train: str = "tiny_all", **opts: Any) -> CfgNode:
    """A source's record with a light head; dots of a setting are written as two underscores."""
    settings = LIGHT | {key.replace("__", "."): value for key, value in opts.items()}
    pairs = [item for pair in settings.items() for item in pair]
    return CfgNode({"TASK": task, "CONFIG": str(config), "TRAIN": [train], "OPTS": pairs})


@pytest.fixture
def make(tiny_cfg: CfgNode) -> Make:
    """Build a model of the given sources: ``make(a=record(…), b=record(…))``."""
    MetadataCatalog.get("tiny_all").set(thing_classes=THINGS, stuff_classes=STUFF, classes=THINGS, ignore_label=255)

    def build(*opts: Any, **sources: CfgNode) -> XLearner:
        tiny_cfg.merge_from_list(list(opts))
        tiny_cfg.XLEARNER.SOURCES = CfgNode(sources, new_allowed=True)
        torch.manual_seed(0)
        return build_model(tiny_cfg)

    return build


@pytest.mark.parametrize("config", ZOO)
def test_zoo_config_learns_and_predicts(make: Make, batch: list[dict[str, Any]], config: str) -> None:
    model = make(one=record(config))
    with EventStorage():
        losses = model({"one": batch})
    assert losses
    assert all(name.startswith("one/loss_") and loss.isfinite() for name, loss in losses.items())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    predictions = model.eval()({"one": batch})["one"]
    assert len(predictions) == len(batch)
    assert all(set(found) == ZOO[config] for found in predictions)


@pytest.mark.parametrize("config", ZOO)
def test_head_owns_nothing_of_the_branch(make: Make, config: str) -> None:
    model = make(one=record(config), two=record(FPN, task="other"))
    pointers = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(pointers) == len(set(pointers))
    assert [name for name in model.heads.state_dict() if "bottom_up" in name or "stem" in name] == []
    everything = {id(p) for p in model.parameters()}
    assert everything == {id(p) for part in (model.backbone, model.heads) for p in part.parameters()}
    assert len(everything) == len(list(model.named_parameters(remove_duplicate=False)))


def test_class_counts_come_from_the_metadata(make: Make) -> None:
    model = make(box=record(MASK), dense=record(RETINANET), area=record(PANOPTIC), flat=record(SEMANTIC))
    heads = model.heads
    assert heads["box"].roi_heads.box_predictor.cls_score.out_features == len(THINGS) + 1
    assert heads["box"].roi_heads.mask_head.predictor.out_channels == len(THINGS)
    assert heads["dense"].head.cls_score.out_channels == len(THINGS) * heads["dense"].anchor_generator.num_anchors[0]
    assert heads["area"].sem_seg_head.predictor.out_channels == len(STUFF)
    assert heads["flat"].sem_seg_head.predictor.out_channels == len(STUFF)


def test_ignore_value_comes_from_the_metadata(tiny_cfg: CfgNode) -> None:
    MetadataCatalog.get("tiny_ignoring").set(stuff_classes=STUFF, ignore_label=7)
    source = SourceSpec(name="a", task="t", config=SEMANTIC, train=("tiny_ignoring",))
    assert head_config(source, tiny_cfg).MODEL.SEM_SEG_HEAD.IGNORE_VALUE == 7


def test_a_head_follows_the_project_in_what_all_sources_share(tiny_cfg: CfgNode) -> None:
    tiny_cfg.INPUT.FORMAT, tiny_cfg.MODEL.PIXEL_MEAN = "RGB", [1.0, 2.0, 3.0]
    head = head_config(SourceSpec(name="a", task="t", config=FPN, train=("tiny_det",)), tiny_cfg)
    assert (head.INPUT.FORMAT, head.MODEL.PIXEL_MEAN, head.MODEL.DEVICE) == ("RGB", [1.0, 2.0, 3.0], "cpu")
    assert head.MODEL.RESNETS.RES2_OUT_CHANNELS == tiny_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    assert head.is_frozen()


def test_sources_of_one_task_share_a_branch_of_the_stages_they_read(make: Make) -> None:
    model = make(one=record(C4), two=record(RETINANET), three=record(C4, task="other"))
    branches = model.backbone.branches
    assert set(branches) == {"it", "other"}
    assert list(branches["it"].output_shape()) == ["res2", "res3", "res4", "res5"]
    assert list(branches["other"].output_shape()) == ["res2", "res3", "res4"]
    assert model.heads["one"].backbone.output_shape()["res4"] == branches["it"].output_shape()["res4"]


def test_dilated_head_gets_a_dilated_branch(make: Make, batch: list[dict[str, Any]]) -> None:
    model = make(one=record(DC5), two=record(FPN, task="other"))
    assert model.backbone.output_shape("it")["res5"].stride == 16
    assert model.backbone.output_shape("other")["res5"].stride == 32
    with EventStorage():
        assert all(loss.isfinite() for loss in model({"one": batch, "two": batch}).values())


def test_c4_beside_dc5_takes_the_dilation_of_the_one_that_reads_res5(tiny_cfg: CfgNode) -> None:
    tiny_cfg.XLEARNER.SOURCES = CfgNode({"a": record(C4, train="tiny_det"), "b": record(DC5, train="tiny_det")})
    sources = parse_sources(tiny_cfg.XLEARNER.SOURCES, [])
    tasks = derive_tasks(sources, {source.name: head_config(source, tiny_cfg) for source in sources})
    assert [(task.name, task.sources, task.res5_dilation) for task in tasks] == [("it", ("a", "b"), 2)]


@pytest.mark.parametrize("name", ["configs/heads/classifier.yaml", FPN])
def test_config_is_found_from_any_working_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(name)).is_file()


def test_strides_of_one_task_must_agree(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"task 'it' want different.*one has stride 32, two has stride 16.*DILATION"):
        make(one=record(FPN), two=record(DC5))


def test_strides_of_a_shared_trunk_must_agree(make: Make) -> None:
    wanted = r"SOURCES\.one: .*wants res5 with 128 channels at stride 32, but .* 128 channels at stride 16"
    with pytest.raises(ConfigError, match=wanted):
        make("XLEARNER.SHARING", "shared", one=record(FPN), two=record(DC5, task="other"))


def test_reconciled_stages_of_different_strides_are_explained(make: Make) -> None:
    wanted = r"res5 of branch 'it' has stride 16 .*'other', which has stride 32: .*RECONCILIATION\.STAGES"
    with pytest.raises(ConfigError, match=wanted):
        make("XLEARNER.RECONCILIATION.STAGES", ["res5"], one=record(DC5), two=record(FPN, task="other"))


def test_channels_must_agree(make: Make) -> None:
    wanted = r"SOURCES\.one: .*DC5_1x\.yaml wants res2 with 32 channels at stride 4, but the branch of task 'it' has 16"
    stages = ["res2", "res3", "res4", "res5"]
    with pytest.raises(ConfigError, match=wanted) as caught:
        make(one=record(DC5, MODEL__BACKBONE__NAME="build_wide_resnet", MODEL__RESNETS__OUT_FEATURES=stages))
    assert len(caught.value.problems) == 4  # one for each stage, all at once


@BACKBONE_REGISTRY.register()
def build_wide_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    return build_resnet_backbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
class PixelBackbone(Backbone):
    """No ResNet."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        self._out_features = ["res2"]
        self._out_feature_channels, self._out_feature_strides = {"res2": 3}, {"res2": 1}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"res2": x}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CLASSIFIER_ON_PIXELS = """
MODEL: {META_ARCHITECTURE: ImageClassifier, BACKBONE: {NAME: PixelBackbone}, CLASSIFIER: {IN_FEATURE: res2}}
"""


def test_config_without_resnet(make: Make, tmp_path: Path) -> None:
    config = write(tmp_path / "pixels.yaml", CLASSIFIER_ON_PIXELS)
    with pytest.raises(ConfigError, match=r"SOURCES\.one\.CONFIG: .*pixels\.yaml has 0 ResNets, but exactly one"):
        make(one=record(config))


@pytest.mark.parametrize("name", ["Nothing/there.yaml", "configs/heads/missing.yaml"])
def test_unknown_config(make: Make, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"SOURCES\.one\.CONFIG is '{name}': there is neither a file {name}"):
        make(one=record(name))


def test_lazy_config_is_refused(make: Make, tmp_path: Path) -> None:
    config = write(tmp_path / "lazy.py", "from detectron2.config import LazyCall as L\nmodel = L(print)(x=[1])\n")
    with pytest.raises(ConfigError, match=r"SOURCES\.one\.CONFIG is .*lazy\.py"):
        make(one=record(config))


@pytest.mark.parametrize(
    ("config", "train", "lacking", "arch"),
    [
        (FPN, "tiny_cls", "thing_classes", "GeneralizedRCNN"),
        (RETINANET, "tiny_seg", "thing_classes", "RetinaNet"),
        (SEMANTIC, "tiny_det", "stuff_classes", "SemanticSegmentor"),
        (PANOPTIC, "tiny_det", "stuff_classes", "PanopticFPN"),
        ("configs/heads/classifier.yaml", "tiny_det", "classes", "ImageClassifier"),
    ],
)
def test_data_set_lacks_the_classes_of_the_head(make: Make, config: str, train: str, lacking: str, arch: str) -> None:
    with pytest.raises(ConfigError, match=rf"SOURCES\.one: the data set '{train}' has no {lacking}, which {arch}"):
        make(one=record(config, train=train))


def test_unknown_setting_in_opts(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"SOURCES\.one \(.*FPN_1x\.yaml\): Non-existent key: MODEL\.FPN\.CHANNELS"):
        make(one=record(FPN, MODEL__FPN__CHANNELS=1))


def test_unknown_setting_in_the_file(make: Make, tmp_path: Path) -> None:
    config = write(tmp_path / "head.yaml", "MODEL: {FPN: {CHANNELS: 1}}")
    with pytest.raises(ConfigError, match=r"SOURCES\.one \(.*head\.yaml\): .*MODEL\.FPN\.CHANNELS"):
        make(one=record(config))


def test_double_key_in_the_file(make: Make, tmp_path: Path) -> None:
    config = write(tmp_path / "head.yaml", "MODEL: {MASK_ON: True, MASK_ON: False}")
    with pytest.raises(ConfigError, match=r"SOURCES\.one\.CONFIG is .*MODEL\.MASK_ON is given twice"):
        make(one=record(config))


def test_file_with_code_is_refused(make: Make, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    config = write(tmp_path / "head.yaml", f"SEED: !!python/object/apply:pathlib.Path.touch [{sentinel}]")
    with pytest.raises(ConfigError, match=r"head\.yaml: SEED has the YAML tag 'tag:.*python/object/apply:pathlib"):
        make(one=record(config))
    assert not sentinel.exists()


def test_model_that_cannot_be_built(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"SOURCES\.one: the model of .*FPN_1x\.yaml cannot be .*build_nothing"):
        make(one=record(FPN, MODEL__BACKBONE__NAME="build_nothing"))


def test_head_that_reads_the_stem(make: Make) -> None:
    opts = {"MODEL__RESNETS__OUT_FEATURES": ["stem", "res4"], "MODEL__BACKBONE__NAME": "build_resnet_backbone"}
    with pytest.raises(ConfigError, match=r"SOURCES\.one: .*C4_1x\.yaml reads \['stem'\], which no branch offers"):
        make(one=record(C4, **opts))
