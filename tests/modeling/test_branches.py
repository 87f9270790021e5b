"""What holds for branches of a ResNet holds for those of other networks, and for branches that differ."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2 import XLearner, add_xlearner_config
from xlearner_d2.checkpoint.export import export_student, save_expanded
from xlearner_d2.checkpoint.load import load_resnet
from xlearner_d2.modeling.branches import build_branch, network_name, with_network
from xlearner_d2.modeling.distill import Distiller
from xlearner_d2.modeling.heads import derive_tasks, head_config
from xlearner_d2.modeling.plug_in import load_expanded_backbone
from xlearner_d2.modeling.timm_backbone import STAGES, TimmBackbone, timm_problem
from xlearner_d2.specs import ConfigError, parse_sources

MakeModel = Callable[..., XLearner]
MakeBatches = Callable[..., dict[str, list[dict[str, Any]]]]

RESNETS = "MODEL.RESNETS"
#: Detectron2's GN has 32 groups.
GN_OF_32 = {"NORM": "GN", "STEM_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 32, "RES2_OUT_CHANNELS": 32}
#: network of the branches -> settings
NETWORKS: dict[str, list[Any]] = {
    "ConvNeXt": ["MODEL.BACKBONE.TIMM", "test_convnext"],
    "EfficientNet": ["MODEL.BACKBONE.TIMM", "test_efficientnet"],
    "RegNet": ["MODEL.BACKBONE.TIMM", "regnetx_002"],
    "ResNet of timm": ["MODEL.BACKBONE.TIMM", "test_resnet"],
    "ResNeXt": [f"{RESNETS}.NUM_GROUPS", 2, f"{RESNETS}.WIDTH_PER_GROUP", 4],
    "wide": [f"{RESNETS}.WIDTH_PER_GROUP", 16],
    "GN": [item for key, value in GN_OF_32.items() for item in (f"{RESNETS}.{key}", value)],
    "SyncBN": [f"{RESNETS}.NORM", "SyncBN"],
    "each its own": [
        "XLEARNER.BRANCHES",
        {"classification": {"TIMM": "test_convnext"}, "detection": {"DEPTH": 18}, "segmentation": {}},
    ],
}


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def losses_of(model: nn.Module, batches: Any) -> Tensor:
    with EventStorage():
        return sum(model(batches).values())  # type: ignore[return-value]


def step(model: nn.Module, batches: Any) -> None:
    losses_of(model, batches).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad(set_to_none=True)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def idle(module: nn.Module) -> list[str]:
    """Parameters without a gradient, or with nothing but zeros."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> list[Any]:
    return NETWORKS[request.param]


# The contract of branches


@pytest.mark.parametrize("training", [True, False])
def test_starts_as_independent_branches_bit_for_bit(make_model: MakeModel, network: list[Any], training: bool) -> None:
    expanded = make_model(*network).backbone.train(training)
    separate = make_model(*network, "XLEARNER.SHARING", "separate").backbone.train(training)
    separate.branches.load_state_dict(expanded.branches.state_dict())
    assert len(expanded.reconciliation) == 3
    for task in expanded.tasks:
        found = expanded(images(), task)
        assert list(found) == list(expanded.output_shape(task))
        assert equal(found, separate(images(), task))


def test_gradients_reach_what_they_should_and_nothing_else(
    make_model: MakeModel, make_batches: MakeBatches, network: list[Any]
) -> None:
    model = make_model(*network)
    step(model, make_batches())  # reconciliation layers have left their zeros
    backbone = model.backbone
    for source in ("pics", "boxes", "areas"):
        own = model.task_of[source]
        others = [task for task in backbone.tasks if task != own]
        before = {task: state_of(backbone.branches[task]) for task in others}
        losses_of(model, make_batches(source)).backward()
        assert idle(backbone.branches[own]) == []
        assert idle(backbone.reconciliation[own]) == []
        for task in others:
            assert equal(before[task], state_of(backbone.branches[task]))  # BN statistics among them
            assert all(p.grad is None for p in backbone.branches[task].parameters())
        model.zero_grad(set_to_none=True)


def test_all_branches_at_once_and_one_branch_are_the_same(
    make_model: MakeModel, make_batches: MakeBatches, network: list[Any]
) -> None:
    """Also of images whose sides no stride divides."""
    model = make_model(*network)
    step(model, make_batches())
    backbone = model.backbone.eval()
    together = backbone.forward_all(images(75))
    for task in backbone.tasks:
        found = backbone(images(75), task)
        assert equal(together[task], found)
        assert [x.shape[-1] for x in found.values()] == [19, 10, 5, 3]


def test_checkpoint_holds_the_networks(
    tiny_cfg: CfgNode, make_model: MakeModel, make_batches: MakeBatches, network: list[Any], tmp_path: Path
) -> None:
    model = make_model(*network)
    step(model, make_batches())
    tiny_cfg.merge_from_list(network)
    sources = parse_sources(tiny_cfg.XLEARNER.SOURCES, [])
    tasks = derive_tasks(sources, {source.name: head_config(source, tiny_cfg) for source in sources})
    save_expanded(model, tiny_cfg, tasks, tmp_path / "expanded.pth")
    again = load_expanded_backbone(str(tmp_path / "expanded.pth")).eval()
    found, expected = again.forward_all(images()), model.backbone.eval().forward_all(images())
    assert found.keys() == expected.keys()
    assert all(equal(found[task], expected[task]) for task in expected)


# The contract of students


@pytest.mark.parametrize("student", [*NETWORKS, "smaller"])
def test_squeeze_trains_every_parameter_and_the_file_is_the_student(
    tiny_cfg: CfgNode, make_model: MakeModel, make_batches: MakeBatches, student: str, tmp_path: Path
) -> None:
    if student == "each its own":
        teacher, cfg = make_model(*NETWORKS[student]), with_network(tiny_cfg, timm="test_efficientnet", depth=0)
    elif student == "smaller":
        teacher, cfg = make_model(), with_network(tiny_cfg, timm="", depth=18)
    else:
        tiny_cfg.merge_from_list(NETWORKS[student])
        teacher, cfg = make_model(*NETWORKS[student]), tiny_cfg
    taught = state_of(teacher)
    network = build_branch(cfg, out_features=STAGES)
    distiller = Distiller(student=network, teacher=teacher.freeze(), stage_weights=dict.fromkeys(STAGES, 1.0))
    step(distiller, make_batches())  # what starts at zero, such as the last scale of a block, lets nothing through
    losses_of(distiller, make_batches()).backward()
    assert idle(distiller) == []
    assert equal(taught, state_of(teacher))
    torch.optim.SGD(distiller.parameters(), lr=0.01).step()
    export_student(network, cfg, tmp_path / "student.pth")
    again = build_branch(cfg, out_features=STAGES).eval().to(memory_format=torch.channels_last)  # as the teacher
    report = load_resnet(again, tmp_path / "student.pth")
    assert (report.unexpected, report.reshaped, report.converted) == ((), (), ())
    assert equal(again(images()), network.eval()(images()))


# Networks of timm as such


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet", "mobilenetv3_small_050"])
def test_features_are_those_of_timm(name: str) -> None:
    theirs = timm.create_model(name).eval()
    ours = TimmBackbone(name=name, out_features=STAGES).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({own: weights[name] for own, name in ours.timm_names().items()})
    with torch.no_grad():
        found, expected = ours(images()), theirs.forward_intermediates(images(), intermediates_only=True)
    for stage, feature in zip(STAGES, expected[-4:], strict=True):
        assert torch.equal(found[stage], feature)


def test_any_detectron2_config_can_stand_on_timm(tiny_cfg: CfgNode) -> None:
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_retinanet_fpn_backbone"
    cfg.MODEL.BACKBONE.TIMM = "test_convnext"
    model = build_model(cfg)
    network = model.backbone.bottom_up
    assert not any(p.requires_grad for p in network.stem.parameters())  # FREEZE_AT 2
    assert not any(p.requires_grad for p in network.res2.parameters())
    assert all(p.requires_grad for p in network.res3.parameters())
    with EventStorage():
        assert model.eval()([{"image": images()[0]}])


def test_frozen_norm_keeps_the_activation_in_it(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.BACKBONE.TIMM = "test_efficientnet"
    torch.manual_seed(0)
    plain = build_branch(tiny_cfg, out_features=STAGES).eval()
    tiny_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    frozen = build_branch(tiny_cfg, out_features=STAGES).train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    for found, expected in zip(frozen(images()).values(), plain(images()).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_only_the_stages_that_are_read_are_built() -> None:
    network = TimmBackbone(name="test_convnext", out_features=["res3"])
    assert list(network(images())) == ["res3"]
    assert not hasattr(network, "res4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_tinny", r"timm has no model 'convnext_tinny'\. Did you mean 'convnext_tiny'"),
        ("test_vit", r"can run it only as a whole"),
        ("swin_tiny_patch4_window7_224", r"channels last \(NHWC\)"),
        ("inception_v3", r"images of 76 pixels give it features .* are expected"),
    ],
)
def test_networks_that_cannot_be_branches(name: str, message: str) -> None:
    assert re.search(message, timm_problem(name))


def test_networks_that_cannot_be_dilated() -> None:
    assert "dilated res5" in timm_problem("pvt_v2_b0", res5_dilation=2)
    assert timm_problem("test_convnext", res5_dilation=2) == ""


# Heads that cannot stand on such a branch


def test_head_with_a_res5_of_its_own(tiny_cfg: CfgNode, make_model: MakeModel) -> None:
    tiny_cfg.XLEARNER.SOURCES["boxes"]["CONFIG"] = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    tiny_cfg.XLEARNER.SOURCES["boxes"]["OPTS"] = []
    with pytest.raises(ConfigError, match=r"has res5 of a ResNet in its head .* give its task a ResNet with XLEARNER"):
        make_model("MODEL.BACKBONE.TIMM", "test_convnext")


def test_names_of_networks(tiny_cfg: CfgNode) -> None:
    assert network_name(tiny_cfg) == "ResNet-50"
    assert network_name(with_network(tiny_cfg, timm="test_convnext", depth=0)) == "test_convnext"
    tiny_cfg.merge_from_list([f"{RESNETS}.NUM_GROUPS", 32, f"{RESNETS}.WIDTH_PER_GROUP", 4])
    assert network_name(tiny_cfg) == "ResNeXt-50 32x4d"
    assert network_name(with_network(tiny_cfg, timm="", depth=18)) == "ResNet-18"
    assert with_network(tiny_cfg, timm="", depth=18).MODEL.RESNETS.WIDTH_PER_GROUP == 64  # which basic blocks ignore
