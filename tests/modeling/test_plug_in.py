"""A branch of an expanded checkpoint as the backbone of ordinary Detectron2 configs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2 import XLearner, add_xlearner_config
from xlearner_d2.checkpoint.export import export_student, save_expanded
from xlearner_d2.modeling.expanded import build_branch
from xlearner_d2.modeling.heads import derive_tasks, head_config
from xlearner_d2.modeling.plug_in import expanded_branch, load_expanded_backbone
from xlearner_d2.specs import ConfigError, parse_sources

C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
#: config -> the backbone that stands where a ResNet stood
BACKBONES = {
    C4: "build_xlearner_backbone",
    FPN: "build_xlearner_fpn_backbone",
    RETINANET: "build_xlearner_retinanet_fpn_backbone",
    SEMANTIC: "build_xlearner_fpn_backbone",
}

Saved = Callable[..., tuple[XLearner, Path]]


@pytest.fixture
def saved(
    tiny_cfg: CfgNode, make_model: Callable[..., XLearner], make_batches: Callable[..., Any], tmp_path: Path
) -> Saved:
    """An expanded model after one step, when its reconciliation layers have left zero, and its checkpoint."""

    def make(*opts: Any) -> tuple[XLearner, Path]:
        model = make_model(*opts)
        with EventStorage():
            sum(model(make_batches()).values()).backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(list(opts))
        sources = parse_sources(cfg.XLEARNER.SOURCES, [])
        tasks = derive_tasks(sources, {source.name: head_config(source, cfg) for source in sources})
        save_expanded(model, cfg, tasks, tmp_path / "expanded.pth")
        return model.eval(), tmp_path / "expanded.pth"

    return make


def user_cfg(name: str, weights: Path, tiny_cfg: CfgNode, *opts: Any, task: str = "detection") -> CfgNode:
    """A model-zoo config with the branch as its backbone; widths and a light head are all else that is changed."""
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name), allow_unsafe=True)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", BACKBONES[name]
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM = 0, "BN"
    for key in ("WIDTH_PER_GROUP", "RES2_OUT_CHANNELS", "STEM_OUT_CHANNELS"):
        cfg.MODEL.RESNETS[key] = tiny_cfg.MODEL.RESNETS[key]
    cfg.XLEARNER.PLUG_IN.WEIGHTS, cfg.XLEARNER.PLUG_IN.TASK = str(weights), task
    cfg.MODEL.WEIGHTS = ""
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, *opts])
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50])
    return cfg


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def branch_in(model: nn.Module) -> nn.Module:
    return getattr(model.backbone, "bottom_up", model.backbone)


def assert_same_features(branch: nn.Module, expanded: XLearner, task: str) -> None:
    with torch.no_grad():
        expected, found = expanded.backbone(images(), task), branch(images())
    assert set(found) == set(branch.output_shape()) <= set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_branches_of_timm_that_were_trained_with_frozen_stages(saved: Saved) -> None:
    """Their norm layers have no counters of batches there."""
    expanded, path = saved("MODEL.BACKBONE.TIMM", "resnet18", "MODEL.BACKBONE.FREEZE_AT", 2)
    found = load_expanded_backbone(str(path)).eval()
    with torch.no_grad():
        own, other = expanded.backbone(images(), "detection"), found(images(), "detection")
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("sharing", ["detached", "shared"])
def test_features_are_the_branchs_bit_for_bit(saved: Saved, tiny_cfg: CfgNode, name: str, sharing: str) -> None:
    expanded, path = saved("XLEARNER.SHARING", sharing)
    model = build_model(user_cfg(name, path, tiny_cfg)).eval()
    assert_same_features(branch_in(model), expanded, "detection")
    assert len(model([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}])) == 1


def test_every_parameter_that_may_learns(saved: Saved, tiny_cfg: CfgNode, make_batches: Callable[..., Any]) -> None:
    _, path = saved()
    model = build_model(user_cfg(FPN, path, tiny_cfg))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with EventStorage():
        sum(model(make_batches("boxes")["boxes"]).values()).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learning
    branch = "backbone.bottom_up.backbone."
    others = [name for name in before if name.startswith((f"{branch}branches.class", f"{branch}branches.segm"))]
    assert others
    assert not learning & set(others)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in others)  # BN statistics, too
    assert f"{branch}branches.detection.stem.conv1.weight" in learning
    assert any(name.startswith(f"{branch}reconciliation.detection") for name in learning)


def test_holds_what_the_task_needs_and_no_more(saved: Saved, tiny_cfg: CfgNode) -> None:
    _, path = saved()
    branch = branch_in(build_model(user_cfg(FPN, path, tiny_cfg)))
    assert set(branch.backbone.branches) == {"classification", "detection", "segmentation"}
    assert set(branch.backbone.reconciliation) == {"detection"}
    _, path = saved("XLEARNER.SHARING", "separate")
    branch = branch_in(build_model(user_cfg(FPN, path, tiny_cfg)))
    assert set(branch.backbone.branches) == {"detection"}


@pytest.mark.parametrize("sharing", ["separate", "shared", "detached", "bidirectional"])
def test_stages_that_are_not_read_are_dropped(
    saved: Saved, tiny_cfg: CfgNode, make_batches: Callable[..., Any], sharing: str
) -> None:
    """They would cost time, and their parameters would get no gradient, which data-parallel training refuses."""
    _, path = saved("XLEARNER.SHARING", sharing, "XLEARNER.RECONCILIATION.STAGES", ["res3", "res4", "res5"])
    model = build_model(user_cfg(C4, path, tiny_cfg))
    assert not any(hasattr(branch, "res5") for branch in branch_in(model).backbone.branches.values())
    with EventStorage():
        sum(model(make_batches("boxes")["boxes"]).values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3])
def test_freeze_at(saved: Saved, tiny_cfg: CfgNode, freeze_at: int) -> None:
    expanded, path = saved()
    branch = branch_in(build_model(user_cfg(FPN, path, tiny_cfg, "MODEL.BACKBONE.FREEZE_AT", freeze_at)))
    own = branch.backbone.branches["detection"]
    for number, stage in enumerate(("stem", "res2", "res3", "res4", "res5"), 1):
        learns = {p.requires_grad for p in getattr(own, stage).parameters()}
        assert learns == {number > freeze_at}
    assert_same_features(branch.eval(), expanded, "detection")


def parameters_up_to(branch: nn.Module, task: str, number: int) -> dict[str, bool]:
    """Of a task's stem and first stages, and of the layers that lead into these: whether each learns."""
    parts = {"stem": branch.backbone.branches[task].stem}
    layers = branch.backbone.reconciliation[task].layers
    for stage in ("res2", "res3", "res4", "res5")[: max(number - 1, 0)]:
        parts[stage] = getattr(branch.backbone.branches[task], stage)
        of_stage = {f"{name}.{key}": of[key] for name, of in layers.items() for key in of if key.endswith(f"_{stage}")}
        parts |= of_stage
    chosen = parts if number else {}
    return {f"{name}.{key}": p.requires_grad for name, part in chosen.items() for key, p in part.named_parameters()}


@pytest.mark.parametrize(
    ("sharing", "freeze_at"),
    [("detached", 0), ("detached", 1), ("detached", 2), ("detached", 5), ("bidirectional", 4), ("bidirectional", 5)],
)
def test_what_is_frozen_is_frozen_in_what_leads_into_it(saved: Saved, sharing: str, freeze_at: int) -> None:
    expanded, path = saved("XLEARNER.SHARING", sharing)
    branch = expanded_branch(str(path), "detection", out_features=["res2", "res3", "res4", "res5"])
    free = {name for name, p in branch.named_parameters() if p.requires_grad}
    frozen = parameters_up_to(branch, "detection", freeze_at)
    assert branch.freeze(freeze_at) is branch
    after = parameters_up_to(branch, "detection", freeze_at)
    assert not any(after.values())
    assert bool(after) == (freeze_at > 0)
    norms = {name for name in frozen if ".norm." in name}
    assert not norms & after.keys()  # they are buffers of frozen norm layers now
    left = {name for name, p in branch.named_parameters() if p.requires_grad}
    assert len(left) == (0 if freeze_at == 5 else len(free) - len(frozen))
    assert_same_features(branch.train(freeze_at == 5), expanded, "detection")


@pytest.mark.parametrize("sharing", ["detached", "bidirectional", "separate", "shared"])
def test_frozen_as_a_whole_it_stays_as_it_is(saved: Saved, make_batches: Callable[..., Any], sharing: str) -> None:
    _, path = saved("XLEARNER.SHARING", sharing)
    branch = expanded_branch(str(path), "detection", out_features=["res5"]).freeze(5).train()
    before = {name: value.clone() for name, value in branch.state_dict().items()}
    assert not branch(images())["res5"].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in branch.state_dict().items())


def test_what_is_not_frozen_learns_from_the_others(saved: Saved) -> None:
    _, path = saved("XLEARNER.SHARING", "detached")
    branch = expanded_branch(str(path), "detection", out_features=["res5"]).freeze(2)
    branch(images())["res5"].square().mean().backward()
    layers = branch.backbone.reconciliation["detection"].layers["segmentation"]
    assert {key: p.grad is not None for key, layer in layers.items() for p in layer.parameters()} == {
        key: not key.endswith("_to_res2") for key in layers
    }


def test_a_branch_of_no_such_task(saved: Saved) -> None:
    _, path = saved()
    with pytest.raises(ConfigError, match=r"'detektion' is no task of .*expanded\.pth\. Did you mean 'detection'\?"):
        expanded_branch(str(path), "detektion", out_features=["res5"])


def test_frozen_norm(saved: Saved, tiny_cfg: CfgNode) -> None:
    expanded, path = saved()
    branch = branch_in(build_model(user_cfg(FPN, path, tiny_cfg, "MODEL.RESNETS.NORM", "FrozenBN")))
    assert not [module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)]
    assert_same_features(branch.train(), expanded, "detection")  # in training, too


@pytest.mark.parametrize(
    ("key", "value"), [("INPUT.FORMAT", "RGB"), ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]), ("MODEL.PIXEL_STD", [58.0] * 3)]
)
def test_images_have_to_be_as_the_branch_knows_them(saved: Saved, tiny_cfg: CfgNode, key: str, value: Any) -> None:
    _, path = saved()
    wanted = rf"{key} is {re.escape(repr(value))}, but the expanded model .*expanded\.pth was trained with "
    with pytest.raises(ConfigError, match=wanted):
        build_model(user_cfg(FPN, path, tiny_cfg, key, value))


def test_unknown_task_names_the_nearest(saved: Saved, tiny_cfg: CfgNode) -> None:
    _, path = saved()
    cfg = user_cfg(FPN, path, tiny_cfg, task="detektion")
    with pytest.raises(ConfigError, match=r"PLUG_IN\.TASK: 'detektion' is no task of .*\. Did you mean 'detection'\?"):
        build_model(cfg)


def test_student_is_no_expanded_checkpoint(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "student.pth"
    export_student(build_branch(tiny_cfg, out_features=["res5"]), tiny_cfg, path)
    with pytest.raises(ConfigError, match=r"student\.pth is no expanded checkpoint"):
        build_model(user_cfg(FPN, path, tiny_cfg))


def test_missing_file(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no checkpoint .*gone\.pth"):
        build_model(user_cfg(FPN, tmp_path / "gone.pth", tiny_cfg))


def test_stage_that_the_branch_lacks(saved: Saved, tiny_cfg: CfgNode) -> None:
    opts = ["MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.CLASSIFIER.IN_FEATURE", "res4"]
    tiny_cfg.XLEARNER.SOURCES.pics.OPTS = opts
    _, path = saved()
    with pytest.raises(ConfigError, match=r"asks for \['res5'\], but branch 'classification' has \['res2', 'res3', 'r"):
        build_model(user_cfg(FPN, path, tiny_cfg, task="classification"))


def test_checkpoint_with_a_tensor_gone(saved: Saved, tiny_cfg: CfgNode) -> None:
    _, path = saved()
    data = torch.load(path)
    del data["model"]["backbone.branches.detection.stem.conv1.weight"]
    torch.save(data, path)
    with pytest.raises(ConfigError, match=r"branches\.detection\.stem\.conv1\.weight is missing"):
        build_model(user_cfg(FPN, path, tiny_cfg))


def test_weights_of_the_zoo_would_replace_the_branch(saved: Saved, tiny_cfg: CfgNode) -> None:
    _, path = saved()
    weights = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    cfg = user_cfg(FPN, path, tiny_cfg, "MODEL.WEIGHTS", weights)
    with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS is {weights}, which would be loaded over the branch: set it"):
        build_model(cfg)
