"""The student in other libraries: same features there, conventions in the file, clear refusals, a true model card."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from safetensors import safe_open
from students import make_student, student_cfg
from torch import Tensor, nn

from xlearner_d2.checkpoint.export import export_student
from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.exports import write
from xlearner_d2.exports.convention import own_convention
from xlearner_d2.exports.student import load_student, norm_kind
from xlearner_d2.exports.write import FORMATS, export
from xlearner_d2.modeling.branches import build_branch
from xlearner_d2.modeling.expanded import STAGES
from xlearner_d2.specs import ConfigError

TRAINING = {
    "sources": {
        "birds": {"task": "classification", "config": "c.yaml", "images": 7, "licences": {"birds_train": "CC BY 4.0"}},
        "cells": {"task": "detection", "config": "d.yaml", "images": 3, "licences": {"cells_train": ""}},
    },
    "steps": "10 of expansion, then 5 of squeeze, of 4 images each",
    "command": "train_net.py --config-file mine.yaml",
    "commit": "abc",
}


def write_student(path: Path, cfg: CfgNode) -> Path:
    student = make_student(cfg)
    if cfg.MODEL.RESNETS.NORM == "BN" and not cfg.MODEL.BACKBONE.get("TIMM", ""):
        student.stem.conv1.norm.running_var *= 255**2  # as after training on pixels from 0 to 255
    export_student(student, cfg, path, training=TRAINING)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student") / "student_d2.pth", student_cfg(18))


def rgb_images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 255


def close(found: Tensor, own: Tensor) -> bool:
    return torch.allclose(found, own, rtol=1e-5, atol=1e-5 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_every_format_gives_the_students_features(weights: Path, tmp_path: Path, to: str) -> None:
    done = export(weights, to=to, output=tmp_path / f"out{FORMATS[to].ending}")
    assert done.difference <= 1e-5
    assert done.path.exists()
    assert done.card.is_file()
    assert set(told_by(to, done.path)) >= {"channel_order", "mean", "std"}


def told_by(to: str, path: Path) -> dict[str, Any]:
    """The convention as the file itself has it, read by the library that it is for."""
    extra = {"convention.json": ""}
    if to in ("d2", "d2-pkl"):
        pixels = read_checkpoint(path)["xlearner"]["input"]
        return {"channel_order": pixels["format"], "mean": pixels["pixel_mean"], "std": pixels["pixel_std"]}
    if to == "torchvision":
        return torch.load(path, weights_only=True)["convention"]
    if to == "timm":
        return json.loads((path / "config.json").read_text())["convention"]
    if to == "safetensors":
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["convention"])
    if to == "onnx":
        return json.loads({item.key: item.value for item in onnx.load(path).metadata_props}["convention"])
    if to == "torchscript":
        torch.jit.load(str(path), _extra_files=extra)
    else:
        torch.export.load(str(path), extra_files=extra)
    return json.loads(extra["convention.json"])


def test_torchvision_takes_the_file_with_its_usual_transform(weights: Path, tmp_path: Path) -> None:
    done = export(weights, to="torchvision", output=tmp_path / "tv.pth")
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    found = model.load_state_dict(torch.load(done.path, weights_only=True)["state_dict"], strict=False)
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    assert not found.unexpected_keys
    transform = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        pooled = model.eval()(transform(rgb_images() / 255))
        own = load_student(weights).features(rgb_images())["res5"].mean(dim=(2, 3))
    assert close(pooled, own)


def test_timm_makes_the_model_from_the_folder_alone(weights: Path, tmp_path: Path) -> None:
    done = export(weights, to="timm", output=tmp_path / "hub")
    model = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
    images = torchvision.transforms.Normalize(data["mean"], data["std"])(rgb_images() / 255)
    with torch.no_grad():
        found = model.forward_features(images)
    assert close(found, load_student(weights).features(rgb_images())["res5"])


def test_timm_makes_the_model_as_from_the_hub(weights: Path, tmp_path: Path) -> None:
    """The folder stands where the hub's client keeps what it has fetched of USER/NAME; nothing is fetched."""
    revision = "0" * 40
    cached = tmp_path / "hub" / "models--me--mine"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    export(weights, to="timm", output=cached / "snapshots" / revision)
    code = (
        "import sys, timm, torch\n"
        "model = timm.create_model('hf_hub:me/mine', pretrained=True, features_only=True).eval()\n"
        "torch.save(model(torch.load(sys.argv[1]))[-1].detach(), sys.argv[2])\n"
    )
    images = rgb_images() / 255
    normalised = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images)
    torch.save(normalised, tmp_path / "images.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    files = [str(tmp_path / "images.pt"), str(tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=environment)
    own = load_student(weights).features(rgb_images())["res5"]
    assert close(torch.load(tmp_path / "found.pt"), own)


def test_onnx_takes_images_of_any_number_and_size(weights: Path, tmp_path: Path) -> None:
    path = export(weights, to="onnx", output=tmp_path / "student.onnx").path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    student = load_student(weights)
    for shape in [(1, 3, 64, 64), (3, 3, 96, 160)]:
        images = torch.rand(*shape) * 255
        found = session.run(None, {"images": images.numpy()})
        own = student.features(images)
        assert all(close(torch.from_numpy(value), own[stage]) for value, stage in zip(found, STAGES, strict=True))
    properties = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert json.loads(properties["convention"])["normalised_inside"] is True


def test_safetensors_and_pkl_hold_the_very_weights(weights: Path, tmp_path: Path) -> None:
    own = torch.load(weights, weights_only=True)["model"]
    arrays = pickle.loads(export(weights, to="d2-pkl", output=tmp_path / "s.pkl").path.read_bytes())["model"]
    assert all(np.array_equal(arrays[name], value.numpy()) for name, value in own.items())
    with safe_open(export(weights, to="safetensors", output=tmp_path / "s.safetensors").path, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in own.items())
        assert json.loads(file.metadata()["convention"])["channel_order"] == "BGR"


@pytest.mark.parametrize(
    ("depth", "resnets"),
    [
        (50, {"STRIDE_IN_1X1": False}),
        (50, {"STRIDE_IN_1X1": False, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        (50, {"STRIDE_IN_1X1": False, "WIDTH_PER_GROUP": 128}),
        (34, {"NORM": "FrozenBN"}),
    ],
)
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_other_depths_and_widths(tmp_path: Path, to: str, depth: int, resnets: dict[str, Any]) -> None:
    path = write_student(tmp_path / "student_d2.pth", student_cfg(depth, **resnets))
    assert export(path, to=to).difference <= 1e-5


def test_other_pixels_are_folded_into_the_stem_or_told(tmp_path: Path) -> None:
    cfg = student_cfg(18)
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "RGB", [100.0, 110.0, 130.0], [60.0, 57.0, 55.0]
    path = write_student(tmp_path / "student_d2.pth", cfg)
    convention = torch.load(export(path, to="torchvision").path, weights_only=True)["convention"]
    assert convention["mean"] == pytest.approx([100 / 255, 110 / 255, 130 / 255])
    assert own_convention(load_student(path)).channel_order == "RGB"


@pytest.mark.parametrize(
    ("resnets", "words"),
    [
        ({"STRIDE_IN_1X1": True}, "MODEL.RESNETS.STRIDE_IN_1X1 is True"),
        ({"NORM": "GN", "STRIDE_IN_1X1": False}, "MODEL.RESNETS.NORM is 'GN'"),
        ({"RES5_DILATION": 2, "STRIDE_IN_1X1": False}, "MODEL.RESNETS.RES5_DILATION is 2"),
    ],
)
def test_what_a_library_cannot_express_is_refused(tmp_path: Path, resnets: dict[str, Any], words: str) -> None:
    path = write_student(tmp_path / "student_d2.pth", student_cfg(50, **resnets))
    with pytest.raises(ConfigError, match=words):
        export(path, to="timm")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["student_d2.pth"]
    assert export(path, to="onnx").difference <= 1e-5  # a graph can express anything


@pytest.mark.parametrize("norm", ["SyncBN", "nnSyncBN", "naiveSyncBN"])
def test_a_student_of_synchronised_norms_is_one_of_plain_norms(tmp_path: Path, norm: str) -> None:
    cfg = student_cfg(18)
    student = make_student(cfg)
    cfg.MODEL.RESNETS.NORM = norm
    export_student(student, cfg, tmp_path / "student_d2.pth")
    assert export(tmp_path / "student_d2.pth", to="torchvision").difference <= 1e-5


@pytest.mark.parametrize("to", ["d2-pkl", "safetensors"])
def test_what_is_exported_can_be_exported(weights: Path, tmp_path: Path, to: str) -> None:
    """The file tells of its network and its input, so that the project knows it again."""
    again = load_student(export(weights, to=to, output=tmp_path / f"other{FORMATS[to].ending}").path)
    own = load_student(weights)
    assert (again.cfg, again.training) == (own.cfg, own.training)
    assert all(
        torch.equal(again.features(rgb_images())[name], value) for name, value in own.features(rgb_images()).items()
    )


def test_no_card_replaces_another_text(weights: Path, tmp_path: Path) -> None:
    cards = [
        export(weights, to=to, output=tmp_path / f"a{FORMATS[to].ending}").card for to in ("torchscript", "d2-pkl")
    ]
    assert [card.name for card in cards] == ["a.ts.md", "a.pkl.md"]
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ConfigError, match=r"README\.md is not that of an export: name another folder"):
        export(weights, to="timm", output=folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("README.md", "# Mine\n")]
    (folder / "README.md").unlink()
    for _ in range(2):  # its own
        export(weights, to="timm", output=folder)


def test_the_default_name_is_not_that_of_the_student(weights: Path, tmp_path: Path) -> None:
    shutil.copyfile(weights, tmp_path / "student_d2.pth")
    (tmp_path / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 2}\n')  # of Detectron2's trainer
    assert export(tmp_path / "student_d2.pth", to="d2").path == tmp_path / "student_d2_copy.pth"


@pytest.mark.parametrize("timm_name", ["", "test_convnext"])
def test_the_card_has_the_settings_of_the_network(tmp_path: Path, timm_name: str) -> None:
    cfg = student_cfg(18)
    cfg.MODEL.BACKBONE.TIMM = timm_name
    path = write_student(tmp_path / "student_d2.pth", cfg)
    card = export(path, to="d2").card.read_text()
    resnet = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64"
    assert ("MODEL.BACKBONE.TIMM test_convnext" if timm_name else resnet) in card


def test_a_dilated_student_of_timm_is_no_network_of_timm(tmp_path: Path) -> None:
    cfg = student_cfg(18, RES5_DILATION=2)
    cfg.MODEL.BACKBONE.TIMM = "test_convnext"
    path = write_student(tmp_path / "student_d2.pth", cfg)
    with pytest.raises(ConfigError, match="RES5_DILATION is 2, but 1 is expected"):
        export(path, to="timm")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("test_convnext", "LayerNorm2d"), ("regnetz_005", "live BN"), ("test_efficientnet_gn", "GroupNormAct")],
)
def test_norm_layers_of_timm_by_their_kind(tmp_path: Path, name: str, kind: str) -> None:
    cfg = student_cfg(18)
    cfg.MODEL.BACKBONE.TIMM = name
    network = build_branch(cfg, out_features=STAGES)
    assert norm_kind(network) == kind
    assert norm_kind(FrozenBatchNorm2d.convert_frozen_batchnorm(network)) == ("frozen BN" if "BN" in kind else kind)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_a_student_of_timm(tmp_path: Path, name: str) -> None:
    cfg = student_cfg(18)
    cfg.MODEL.BACKBONE.TIMM = name
    path = write_student(tmp_path / "student_d2.pth", cfg)
    for to in ("d2", "timm", "onnx", "safetensors", "torchscript", "torch-export"):
        done = export(path, to=to, output=tmp_path / f"out{FORMATS[to].ending}")
        assert done.difference <= 1e-5
    with pytest.raises(ConfigError, match=f"the student is {name} of timm, but a ResNet is expected"):
        export(path, to="torchvision")


def test_wrong_commands_get_one_message(weights: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ({"to": "onx"}, "'onx'"),
        ({"to": "d2", "output": weights}, "the file to export"),
        ({"to": "onnx", "output": tmp_path / "a.pth"}, "ends in .onnx"),
        ({"to": "timm", "output": weights}, "folder is expected"),
    ]:
        with pytest.raises(ConfigError, match=words):
            export(weights, **arguments)  # type: ignore[arg-type]
    other = tmp_path / "other.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, other)
    with pytest.raises(ConfigError, match="does not say what network it holds"):
        export(other, to="d2")


def test_a_difference_is_an_error_and_leaves_no_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "compare", lambda *_: 0.5)
    with pytest.raises(ConfigError, match=r"differ by 5.0e-01"):
        export(weights, to="onnx", output=tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_the_comparison_sees_a_changed_weight(weights: Path, tmp_path: Path) -> None:
    student = load_student(weights)
    path = tmp_path / "a.pth"
    convention = FORMATS["torchvision"].write(student, path)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["conv1.weight"] = content["state_dict"]["conv1.weight"].flip(1)  # channels confused
    torch.save(content, path)
    assert write.compare(student, FORMATS["torchvision"].read(student, path), convention, [(64, 96)]) > 1e-3


def test_the_comparison_sees_what_is_no_number(weights: Path) -> None:
    student = load_student(weights)

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            found = student.features(images.flip(1))
            return {**found, "res3": found["res3"] * torch.nan}

    assert not write.compare(student, Broken(), own_convention(student), [(64, 96), (64, 64)]) <= write.TOLERANCE


def test_the_card_tells_where_the_weights_come_from(weights: Path, tmp_path: Path) -> None:
    metrics = {
        "expanded": {"birds": {"birds_val": {"classification/top1": 61.25}}},
        "squeezed": {"birds": {"birds_val": {"classification/top1": 58.75}}},
        "probes": {"pets": {"student": 70.0, "random": 50.0}},
    }
    student = tmp_path / "student_d2.pth"
    student.write_bytes(weights.read_bytes())
    student.with_name("metrics.json").write_text(json.dumps(metrics))
    card = export(student, to="timm").card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["datasets"] == ["birds_train", "cells_train"]
    assert front["library_name"] == "timm"
    for text in (
        "CC BY 4.0",
        "not stated",
        "61.2",
        "58.8",
        "70.0",
        TRAINING["command"],
        "classification and detection",
    ):
        assert str(text) in card
