"""The contract with Detectron2's model zoo: each of its configs is a head, as it is."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detectron2
import pytest
import torch
from conftest import SIZE
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from xlearner_d2 import XLearner
from xlearner_d2.data.mappers import build_mapper
from xlearner_d2.engine.branches import start_branch
from xlearner_d2.modeling import heads as heads_module
from xlearner_d2.modeling.expanded import build_branch, build_expanded_backbone
from xlearner_d2.modeling.heads import build_head, derive_tasks, head_config
from xlearner_d2.specs import ConfigError, SourceSpec

FOLDER = Path(detectron2.__file__).parent / "model_zoo/configs"
ZOO = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
#: Heads so narrow that a step takes a moment; GN wants 32 channels.
LIGHT = {
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
}
#: What Detectron2's meta-architectures predict.
PREDICTS = {
    "GeneralizedRCNN": {"instances"},
    "ProposalNetwork": {"proposals"},
    "RetinaNet": {"instances"},
    "SemanticSegmentor": {"sem_seg"},
    "PanopticFPN": {"instances", "sem_seg", "panoptic_seg"},
}
DEFORMABLE = [name for name in ZOO if "dconv" in name]


def source(config: str, **opts: Any) -> SourceSpec:
    settings = {**LIGHT, **{key.replace("__", "."): value for key, value in opts.items()}}
    pairs = tuple(item for pair in settings.items() for item in pair)
    return SourceSpec(name="one", task="it", config=config, train=("tiny_zoo",), opts=pairs)


@pytest.fixture
def cfg(tiny_cfg: CfgNode) -> CfgNode:
    names = ["cat", "dog", "eel"]
    MetadataCatalog.get("tiny_zoo").set(
        thing_classes=names,
        stuff_classes=[*names, "sky"],
        ignore_label=255,
        keypoint_names=["left", "right", "nose"],
        keypoint_flip_map=[("left", "right")],
    )
    tiny_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    return tiny_cfg


@functools.cache
def behaviour(config: str) -> str:
    """What a config says about its model, beyond the ResNet that a branch replaces: the same for the same behaviour."""
    cfg = heads_module.get_cfg()
    cfg.merge_from_file(str(FOLDER / config), allow_unsafe=True)
    for key in ("WEIGHTS", "RESNETS", "PIXEL_MEAN", "PIXEL_STD"):
        del cfg.MODEL[key]
    return str(cfg.MODEL)


#: One config of each behaviour.
DISTINCT = {behaviour(name): name for name in reversed(ZOO)}


def build(cfg: CfgNode, one: SourceSpec) -> XLearner:
    head = head_config(one, cfg)
    backbone = build_expanded_backbone(cfg, derive_tasks([one], {"one": head}))
    normal = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    return XLearner(backbone=backbone, heads={"one": build_head(one, head, backbone)}, sources=[one], **normal)


@pytest.fixture
def batch(make_batches: Callable[..., Any]) -> list[dict[str, Any]]:
    """Two images with everything a head of the zoo learns from."""
    made = make_batches("boxes", "areas")
    records = [{**area, **box, "source": "one"} for box, area in zip(made["boxes"], made["areas"], strict=True)]
    for record in records:
        found = record["instances"]
        corners = found.gt_boxes.tensor
        points = torch.stack([corners[:, :2], corners[:, 2:] - 1, corners[:, :2] + 5], dim=1)
        found.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 3, 1), 2.0)], dim=2))
        proposals = torch.cat([corners, torch.tensor([[0.0, 0.0, 30.0, 30.0]])])
        record["proposals"] = Instances((SIZE, SIZE), proposal_boxes=Boxes(proposals))
        record["proposals"].objectness_logits = torch.zeros(len(proposals))
    return records


def test_zoo_is_all_there() -> None:
    assert len(ZOO) >= 92
    assert len(DEFORMABLE) == 4


def test_every_config_builds_a_head(cfg: CfgNode) -> None:
    failed = {}
    for name in ZOO:
        try:
            build(cfg, source(name))
        except Exception as error:
            failed[name] = error
    assert failed == {}


@pytest.mark.parametrize("config", DISTINCT.values())
def test_every_behaviour_learns_and_predicts(cfg: CfgNode, batch: list[dict[str, Any]], config: str) -> None:
    torch.manual_seed(0)
    model = build(cfg, source(config))
    with EventStorage():
        losses = model({"one": batch})
    assert losses
    assert all(name.startswith("one/loss_") and loss.isfinite() for name, loss in losses.items())
    sum(losses.values()).backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert learning
    assert all(parameter.grad is not None for parameter in learning)
    with torch.no_grad():
        predictions = model.eval()({"one": batch})["one"]
    architecture = type(model.heads["one"]).__name__
    assert [set(found) for found in predictions] == [PREDICTS[architecture]] * len(batch)


@pytest.mark.parametrize("config", DEFORMABLE)
def test_deformable_convolutions_are_those_of_the_replaced_resnet(
    cfg: CfgNode, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Each message is logged once, so under another name than that of the tests above.
    head_config(source(config), cfg, where="XLEARNER.SOURCES.deformed")
    assert "deformable convolutions" in caplog.text
    assert "DEFORM_ON_PER_STAGE" in caplog.text


@pytest.mark.parametrize(
    "opts",
    [
        {"MODEL__PROPOSAL_GENERATOR__NAME": "RRPN"},
        {"MODEL__ROI_HEADS__NAME": "RROIHeads"},
        {"MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator"},
        {"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignRotated"},
        {"MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]},
    ],
    ids=lambda opts: next(iter(opts)),
)
def test_compiled_operators_are_asked_for_by_name(
    cfg: CfgNode, opts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_module, "has_compiled_operators", lambda: False)
    key = next(iter(opts)).replace("__", ".")
    if "RESNETS" in key:  # of the run, as a head follows its branch
        cfg.merge_from_list([key, opts.popitem()[1]])
    wanted = rf"SOURCES\.one \(COCO-Detection.*: {key}.* needs Detectron2's compiled operators.*detectron2\._C"
    with pytest.raises(ConfigError, match=wanted):
        head_config(source("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", **opts), cfg)


def test_compiled_operators_are_used_where_they_are(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_module, "has_compiled_operators", lambda: True)
    rotated = {"MODEL__PROPOSAL_GENERATOR__NAME": "RRPN", "MODEL__ROI_HEADS__NAME": "RROIHeads"}
    head = head_config(source("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", **rotated), cfg)
    assert head.MODEL.ROI_HEADS.NAME == "RROIHeads"


@pytest.mark.parametrize("lacking", ["keypoint_names", "keypoint_flip_map"])
def test_keypoint_head_needs_keypoints_in_the_metadata(cfg: CfgNode, lacking: str) -> None:
    metadata = MetadataCatalog.get("tiny_pointless")
    metadata.set(thing_classes=["cat"], **({"keypoint_names": ["nose"]} if lacking == "keypoint_flip_map" else {}))
    config = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
    one = SourceSpec(name="one", task="it", config=config, train=("tiny_pointless",))
    with pytest.raises(ConfigError, match=rf"data set 'tiny_pointless' has no {lacking}, which GeneralizedRCNN"):
        head_config(one, cfg)
    MetadataCatalog.pop("tiny_pointless")


@pytest.mark.parametrize(
    "config",
    [
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_a_source_without_training_data_has_a_mapper_for_tests(cfg: CfgNode, config: str) -> None:
    """As a frozen one may be."""
    head = head_config(dataclasses.replace(source(config), train=(), test=("tiny_zoo",)), cfg)
    assert build_mapper(head, is_train=False)


@pytest.mark.parametrize("fits", [True, False])
def test_the_res5_of_a_head_starts_as_that_of_the_file(cfg: CfgNode, tmp_path: Path, fits: bool) -> None:
    """Detectron2 names it so that R-50.pkl fills it."""
    file = cfg.clone()
    file.MODEL.RESNETS.NORM = "FrozenBN"
    stages = ["res2", "res3", "res4", "res5"]
    weights = build_branch(file, out_features=stages).state_dict()
    torch.save(weights if fits else {n: v for n, v in weights.items() if "res5.0" not in n}, tmp_path / "R-50.pth")
    model = build(cfg, source("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))
    before = copy.deepcopy(model.heads["one"].roi_heads.res5.state_dict())
    said = start_branch(model, "it", str(tmp_path / "R-50.pth"), cfg, heads=True)
    assert ("res5 of head one as well" in said) is fits
    for name, value in model.heads["one"].roi_heads.res5.state_dict().items():
        wanted = weights.get(f"res5.{name}", before[name]) if fits else before[name]
        assert torch.equal(value, wanted), name
