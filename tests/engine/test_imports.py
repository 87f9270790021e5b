"""Heads of other projects: Detectron2's own and one that is written here, named under XLEARNER.IMPORTS."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from disk_data import NAMES, SIZE
from kinds_data import register_panoptic, write_kinds

from xlearner_d2.modeling.heads import has_compiled_operators
from xlearner_d2.specs import ConfigError

PROJECT = '''
"""A project as others publish theirs: written for Detectron2 alone."""
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList

def add_brightness_config(cfg):
    cfg.MODEL.BRIGHTNESS = CfgNode({{"FACTOR": 1.0}})

@META_ARCH_REGISTRY.register()
class {name}(torch.nn.Module):
    """The mean brightness of an image from res5."""
    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.factor = cfg.MODEL.BRIGHTNESS.FACTOR
        self.linear = torch.nn.Linear(self.backbone.output_shape()["res5"].channels, 1)

    def forward(self, batched_inputs):
        batch = ImageList.from_tensors([x["image"].float() / 255 for x in batched_inputs], 32).tensor
        found = self.linear(self.backbone(batch)["res5"].mean(dim=(2, 3)))[:, 0]
        if not self.training:
            return [{{"brightness": value}} for value in found]
        wanted = torch.stack([x["brightness"] for x in batched_inputs])
        return {{"loss_brightness": self.factor * (found - wanted).square().mean()}}

class BrightnessMapper(DatasetMapper):
    def __call__(self, record):
        mapped = super().__call__(record)
        return {{**mapped, "brightness": mapped["image"].float().mean() / 255}}
'''
NARROW = ["INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.MIN_SIZE_TEST", SIZE]
ASPP = ["ASPP_CHANNELS", 16, "CONVS_DIM", 16]
BASE = {"IMS_PER_BATCH": 2}


def section(name: str, opts: list[Any]) -> list[Any]:
    return [f"MODEL.{name}.{opt}" if number % 2 == 0 else opt for number, opt in enumerate(opts)]


def sources() -> dict[str, dict[str, Any]]:
    roi = ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, *section("POINT_HEAD", ["FC_DIM", 16])]
    semantic = section("SEM_SEG_HEAD", ASPP)
    panoptic = [*semantic, *section("INS_EMBED_HEAD", ASPP), *section("SEM_SEG_HEAD", ["HEAD_CHANNELS", 16])]
    return {
        "points": {
            **{"TASK": "boxes", "CONFIG": "configs/heads/pointrend_mask_rcnn_fpn.yaml", "TRAIN": ["t_boxes"], **BASE},
            **{"TEST": ["t_boxes"], "OPTS": [*NARROW, *roi, *section("ROI_MASK_HEAD", ["FC_DIM", 16, "CONV_DIM", 16])]},
        },
        "areas": {
            **{"TASK": "dense", "CONFIG": "configs/heads/deeplab_v3_plus.yaml", "TRAIN": ["t_areas"], **BASE},
            **{"OPTS": [*NARROW, *semantic]},
        },
        "everything": {
            **{"TASK": "dense", "CONFIG": "configs/heads/panoptic_deeplab.yaml", "TRAIN": ["i_panoptic"], **BASE},
            **{"TEST": ["i_panoptic"], "OPTS": [*NARROW, *panoptic]},
        },
        "light": {
            **{"TASK": "boxes", "CONFIG": "head.yaml", "TRAIN": ["t_boxes"], **BASE},
            **{"OPTS": [*NARROW, "INPUT.MAPPER", "their_project.BrightnessMapper"]},
        },
    }


def make_project(root: Path, patch: pytest.MonkeyPatch) -> Project:
    project = Project(root)
    write_kinds(root / "data")
    register_panoptic("i_panoptic", root / "data")
    (root / "their_project.py").write_text(PROJECT.format(name="BrightnessEstimator"))
    patch.syspath_prepend(str(root))
    head = "MODEL: {META_ARCHITECTURE: BrightnessEstimator, BACKBONE: {NAME: build_resnet_backbone}, "
    head += "RESNETS: {OUT_FEATURES: [res5]}, BRIGHTNESS: {FACTOR: 2.0}}\n"
    (root / "head.yaml").write_text(head)
    content = project.content["XLEARNER"]
    names = ("point_rend", "deeplab", "panoptic_deeplab")
    content["IMPORTS"] = [*(f"detectron2.projects.{name}" for name in names), "their_project"]
    content["SOURCES"], content["PROBES"] = sources(), {}
    content["SQUEEZE"] |= {"TASK_LOSSES": False}  # heads of two strides of res5
    content["SOURCES"]["light"]["CONFIG"] = str(root / "head.yaml")
    project.write(project.content)
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield make_project(tmp_path_factory.mktemp("imports"), patch)


def test_heads_of_other_projects_are_trained_and_evaluated(project: Project) -> None:
    metrics = project.run()["expanded"]
    assert {name: set(found) for by_set in metrics.values() for name, found in by_set.items()} == {
        "t_boxes": {"bbox/AP", "segm/AP"},
        "i_panoptic": {"panoptic_seg/PQ"},
    }
    line = (project.root / "out/expand/metrics.json").read_text().splitlines()[-1]
    for loss in ("points/loss_mask_point", "areas/loss_sem_seg", "everything/loss_center", "light/loss_brightness"):
        assert f'"{loss}"' in line


def test_classes_of_an_imported_section_follow_the_data(project: Project) -> None:
    row = next(line for line in project.dry_run().splitlines() if line.startswith("points"))
    assert row.split()[4] == str(len(NAMES))


def fails(project: Project, match: str, *opts: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        project.dry_run(*opts)


def test_unknown_module(project: Project) -> None:
    fails(project, r"IMPORTS names 'no_such_project'.*PYTHONPATH", "XLEARNER.IMPORTS", ["no_such_project"])


def test_module_that_fails(project: Project) -> None:
    (project.root / "broken_project.py").write_text("raise RuntimeError('needs a compiler')")
    fails(project, "IMPORTS names 'broken_project'.*needs a compiler", "XLEARNER.IMPORTS", ["broken_project"])


def test_function_that_fails(project: Project) -> None:
    (project.root / "odd_project.py").write_text("def add_odd_config(cfg, size): pass")
    wanted = r"IMPORTS names 'odd_project', whose add_odd_config\(cfg\) fails on a new config.*size"
    fails(project, wanted, "XLEARNER.IMPORTS", ["odd_project"])


def test_head_whose_module_is_not_imported(project: Project) -> None:
    wanted = r"SOURCES\.light.*MODEL\.BRIGHTNESS.* name its module in XLEARNER\.IMPORTS"
    imports = ["detectron2.projects.point_rend", "detectron2.projects.panoptic_deeplab"]
    fails(project, wanted, "XLEARNER.IMPORTS", imports)


@pytest.mark.parametrize("mapper", ["their_project.NoMapper", "their_project", "nowhere.Mapper"])
def test_mapper_that_is_not_there(project: Project, mapper: str) -> None:
    opts = [*NARROW, "INPUT.MAPPER", mapper]
    fails(project, rf"SOURCES\.light.*INPUT\.MAPPER is {re.escape(repr(mapper))}", "XLEARNER.SOURCES.light.OPTS", opts)


def test_dilated_res4_is_refused(project: Project) -> None:
    opts = [*project.content["XLEARNER"]["SOURCES"]["areas"]["OPTS"]]
    opts += ["MODEL.RESNETS.RES4_DILATION", 2, "MODEL.RESNETS.RES5_DILATION", 4]
    wanted = r"SOURCES\.areas .*wants a dilated res4 .*stride 16\. Set RES4_DILATION to 1"
    fails(project, wanted, "XLEARNER.SOURCES.areas.OPTS", opts)


def test_deeplabs_own_resnet_is_a_plain_branch(project: Project) -> None:
    opts = [*project.content["XLEARNER"]["SOURCES"]["areas"]["OPTS"]]
    opts += ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"]
    assert "areas" in project.dry_run("XLEARNER.SOURCES.areas.OPTS", opts)


@pytest.mark.skipif(has_compiled_operators(), reason="this Detectron2 has the operators")
def test_deformable_branches_need_compiled_operators(project: Project) -> None:
    wanted = r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE needs Detectron2's compiled operators"
    fails(project, wanted, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
