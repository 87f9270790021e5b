"""What leaves the project loads into unmodified Detectron2; files are written whole or not at all."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import ResNet
from students import make_student, student_cfg
from torch import Tensor, nn

from xlearner_d2.checkpoint.export import export_student
from xlearner_d2.checkpoint.files import save_atomically
from xlearner_d2.checkpoint.load import load_resnet, read_checkpoint
from xlearner_d2.checkpoint.training import TrainingCheckpointer
from xlearner_d2.modeling.expanded import build_branch
from xlearner_d2.specs import ConfigError

STAGES = ["res2", "res3", "res4", "res5"]
ZOO = {
    "fpn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "c4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "dc5": "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "semantic": "Misc/semantic_R_50_FPN_1x.yaml",
}


def images() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[ResNet, Path]]:
    """A student of a depth and its checkpoint, made once."""
    made: dict[int, tuple[ResNet, Path]] = {}

    def get(depth: int = 50) -> tuple[ResNet, Path]:
        if depth not in made:
            cfg = student_cfg(depth)
            path = tmp_path_factory.mktemp("export") / f"student_{depth}.pth"
            made[depth] = make_student(cfg), path
            export_student(made[depth][0], cfg, path)
        return made[depth]

    return get


Exported = Callable[..., tuple[ResNet, Path]]


class Recorder(DetectionCheckpointer):
    """Detectron2's checkpointer, whose findings can be read afterwards."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.found = incompatible
        super()._log_incompatible_keys(incompatible)


def load_stock(cfg: CfgNode, path: Path) -> tuple[nn.Module, Recorder]:
    """The config's model with everything but the backbone's shape as in the file, loaded by Detectron2."""
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(path)
    model = build_model(cfg).eval()
    checkpointer = Recorder(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return model, checkpointer


def assert_backbone_loaded(checkpointer: Recorder, *owners: str) -> None:
    missing = [name for name in checkpointer.found.missing_keys if name.startswith(owners)]
    own = [name for name in missing if any(stage in name for stage in ("stem", *STAGES))]
    assert own == []
    assert list(checkpointer.found.unexpected_keys) == []
    assert list(checkpointer.found.incorrect_shapes) == []


@pytest.mark.parametrize("name", ZOO)
def test_student_loads_into_unmodified_detectron2(
    exported: Exported, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    student, path = exported()
    with caplog.at_level(logging.WARNING):
        model, checkpointer = load_stock(model_zoo.get_config(ZOO[name]), path)
    assert_backbone_loaded(checkpointer, "backbone", "roi_heads.res5")
    assert "not found in the model" not in caplog.text
    assert "will not be loaded" not in caplog.text
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    if name == "dc5":  # the same weights, dilated
        dilated = build_branch(student_cfg(), out_features=STAGES, res5_dilation=2).eval()
        dilated.load_state_dict(student.state_dict())
        student = dilated
    with torch.no_grad():
        expected, found = student(images()), bottom_up(images())
    assert found
    assert all(torch.equal(value, expected[stage]) for stage, value in found.items())
    if name == "c4":  # the last stage is the head's
        with torch.no_grad():
            assert torch.equal(model.roi_heads.res5(found["res4"]), expected["res5"])


@pytest.mark.parametrize("depth", [18, 34])
def test_shallow_student_loads_into_detectron2(exported: Exported, depth: int) -> None:
    student, path = exported(depth)
    cfg = model_zoo.get_config(ZOO["semantic"])
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = depth, 64
    model, checkpointer = load_stock(cfg, path)
    assert_backbone_loaded(checkpointer, "backbone.bottom_up")
    with torch.no_grad():
        expected, found = student(images()), model.backbone.bottom_up(images())
    assert all(torch.equal(found[stage], expected[stage]) for stage in STAGES)


def test_file_holds_the_backbone_and_how_to_feed_it(exported: Exported) -> None:
    student, path = exported(18)
    found = torch.load(path, weights_only=True)
    assert set(found) == {"model", "__author__", "matching_heuristics", "xlearner"}
    counters = {name for name in student.state_dict() if name.endswith("num_batches_tracked")}
    assert set(found["model"]) == set(student.state_dict()) - counters
    cfg = student_cfg(18)
    resnets = found["xlearner"]["resnets"]
    assert (resnets["DEPTH"], resnets["STRIDE_IN_1X1"]) == (18, cfg.MODEL.RESNETS.STRIDE_IN_1X1)
    expected = {"format": "BGR", "pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    assert found["xlearner"]["input"] == expected


def test_weights_do_not_depend_on_the_memory_format(exported: Exported, tmp_path: Path) -> None:
    _, path = exported(18)
    other = make_student(student_cfg(18)).to(memory_format=torch.channels_last)
    export_student(other, student_cfg(18), tmp_path / "other.pth")
    first, second = (torch.load(file, weights_only=True)["model"] for file in (path, tmp_path / "other.pth"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.is_contiguous() for value in second.values())


def test_student_starts_another_run(exported: Exported) -> None:
    student, path = exported(18)
    again = build_branch(student_cfg(18), out_features=STAGES).eval()
    report = load_resnet(again, path)
    assert {name.split(".")[-1] for name in report.missing} == {"num_batches_tracked"}
    with torch.no_grad():
        expected, found = student(images()), again(images())
    assert all(torch.equal(found[stage], expected[stage]) for stage in STAGES)


def test_student_of_another_depth_is_refused(exported: Exported) -> None:
    _, path = exported(18)
    wanted = r"student_18\.pth, which says that it is of a ResNet-18, does not fit MODEL\.RESNETS"
    with pytest.raises(ConfigError, match=wanted):
        load_resnet(build_branch(student_cfg(34), out_features=STAGES), path)


# Writing


def fail_midway(data: Any, file: Any) -> None:
    file.write(b"half a check")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["disk", "content"])
def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "deep" / "x.pth"
    save_atomically({"w": torch.ones(2)}, path)
    old = path.read_bytes()
    if broken == "disk":
        monkeypatch.setattr(torch, "save", fail_midway)
        with pytest.raises(OSError, match="No space left"):
            save_atomically({"w": torch.zeros(2)}, path)
        monkeypatch.undo()
    else:
        with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"pickle|local object"):
            save_atomically({"w": torch.zeros(9), "f": lambda: 0}, path)
    assert path.read_bytes() == old
    save_atomically({"w": torch.zeros(2)}, path)
    assert not read_checkpoint(path)["model"]["w"].any()
    assert [file.name for file in path.parent.iterdir()] == ["x.pth"]


def test_failed_first_save_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        save_atomically({"w": torch.zeros(2)}, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    assert list(tmp_path.glob("*.pth")) == []


# Checkpoints of a running stage


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def make_run(folder: Path, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Counter, TrainingCheckpointer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    counter = Counter()
    return model, optimizer, counter, TrainingCheckpointer(model, str(folder), optimizer=optimizer, counter=counter)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(6.0).view(2, 3)).square().sum().backward()
    optimizer.step()


def test_training_checkpoint_round_trip(tmp_path: Path) -> None:
    model, optimizer, counter, checkpointer = make_run(tmp_path, seed=0)
    step(model, optimizer)
    counter.count = 5
    assert not checkpointer.has_checkpoint()
    checkpointer.save("model_0000000", iteration=5)
    again, optimizer2, counter2, checkpointer2 = make_run(tmp_path, seed=1)
    assert checkpointer2.has_checkpoint()
    rest = checkpointer2.load(checkpointer2.get_checkpoint_file())
    assert (rest, counter2.count) == ({"iteration": 5}, 5)
    for _ in range(2):  # momentum is there, too
        step(model, optimizer)
        step(again, optimizer2)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_last_checkpoint_is_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_, checkpointer = make_run(tmp_path, seed=0)
    checkpointer.save("first")
    model[0].weight.data.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_midway)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save("second")
    assert Path(checkpointer.get_checkpoint_file()).name == "first.pth"
    checkpointer.load(checkpointer.get_checkpoint_file())
    assert model[0].weight.all()


def test_killed_while_noting_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note is replaced as a whole: there is no moment at which it is empty."""
    *_, checkpointer = make_run(tmp_path, seed=0)
    checkpointer.save("first")

    def killed(self: Path, target: Any) -> None:
        if Path(target).name == "last_checkpoint":
            raise KeyboardInterrupt
        self.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("second")
    assert Path(checkpointer.get_checkpoint_file()).name == "first.pth"
    checkpointer.save("third")
    assert Path(checkpointer.get_checkpoint_file()).name == "third.pth"


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    *_, checkpointer = make_run(tmp_path, seed=0)
    checkpointer.save("first")
    other = TrainingCheckpointer(nn.Linear(3, 4), str(tmp_path))
    with pytest.raises(ConfigError, match=r"first\.pth does not fit the model; .*\n.*weight is missing"):
        other.load(other.get_checkpoint_file())


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    *_, checkpointer = make_run(tmp_path, seed=0)
    checkpointer.save("first")
    assert list(tmp_path.iterdir()) == []
