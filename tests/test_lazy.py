"""LazyConfig: what Detectron2's lazy trainer does with a shipped file, and what train_net.py does with the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from students import make_student, student_cfg

from xlearner_d2 import load_config, train
from xlearner_d2.checkpoint.export import export_student
from xlearner_d2.lazy import complete
from xlearner_d2.specs import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "configs/lazy/openmoji.py"
SMALL = {
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.WARMUP_ITERS": 2,
    "XLEARNER.CHECK_IMAGES": 0,
    "XLEARNER.SOURCES.icons.IMS_PER_BATCH": 2,
    "XLEARNER.SOURCES.scenes.IMS_PER_BATCH": 1,
    "XLEARNER.SOURCES.areas.IMS_PER_BATCH": 1,
    "MODEL.DEVICE": "cpu",
}


def lazily(folder: Path) -> Any:
    """The shipped file with overrides, as the lazy trainer's command line gives them."""
    changes = {**SMALL, "OUTPUT_DIR": folder}
    return LazyConfig.apply_overrides(LazyConfig.load(str(FILE)), [f"settings.{k}={v}" for k, v in changes.items()])


def train_lazily(cfg: Any) -> torch.nn.Module:
    """The steps of Detectron2's ``lazyconfig_train_net.py``, ``do_train``."""
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
        ]
    )
    trainer.train(0, cfg.train.max_iter)
    return model


def test_detectron2_trains_it_and_train_net_squeezes_the_result(
    openmoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(openmoji))
    Path(tmp_path / "lazy").mkdir()
    cfg = lazily(tmp_path / "lazy")
    assert cfg.train.max_iter == 3
    model = train_lazily(cfg)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    more = {
        **SMALL,
        "OUTPUT_DIR": tmp_path / "student",
        "XLEARNER.STAGE": "squeeze",
        "XLEARNER.SQUEEZE.TEACHER": tmp_path / "lazy/model_final.pth",
        "XLEARNER.SQUEEZE.SOLVER.MAX_ITER": 1,
        "XLEARNER.SQUEEZE.BN_RECALIBRATION_BATCHES": 1,
        "XLEARNER.PROBES.food": "null",
    }
    del more["SOLVER.MAX_ITER"]
    trained = train(load_config(FILE, [str(part) for pair in more.items() for part in pair]))
    assert trained.student == tmp_path / "student/student_d2.pth"


@pytest.mark.parametrize(("device", "amp"), [("cpu", False), ("cuda", torch.cuda.is_available()), ("cuda:1", True)])
def test_its_trainer_has_mixed_precision_on_gpus_alone(device: str, amp: bool) -> None:
    """On CPUs Detectron2's AMPTrainer refuses to work."""
    overrides = [f"settings.MODEL.DEVICE={device}", "settings.SOLVER.AMP.ENABLED=True"]
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(FILE)), overrides)
    assert cfg.train.amp.enabled is amp


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_its_trainer_takes_the_cpu_where_there_is_no_gpu() -> None:
    cfg = LazyConfig.load(str(FILE))
    assert (cfg.settings.MODEL.DEVICE, cfg.train.device, cfg.train.amp.enabled) == ("cuda", "cpu", False)


def test_its_trainer_has_the_seed_of_the_settings() -> None:
    """Detectron2's ``default_setup`` looks for it there, and takes the clock where it finds none."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(FILE)), ["settings.SEED=7"])
    assert cfg.train.seed == 7


def test_what_the_lazy_trainer_would_leave_out_is_refused(
    openmoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(openmoji))
    overrides = ["XLEARNER.STEPS=alternating", "XLEARNER.WEIGHTING.METHOD=dwa", "XLEARNER.EXTEND=old.pth"]
    overrides += ["XLEARNER.AMP_PRECISION=bfloat16", "TEST.EVAL_PERIOD=500"]
    cfg = LazyConfig.apply_overrides(lazily(tmp_path), [f"settings.{text}" for text in overrides])
    with pytest.raises(ConfigError) as caught:
        instantiate(cfg.model)
    said = "is {!r}, which only train_net.py --config-file can do. Train with it, or set {!r}."
    assert caught.value.problems == [
        "XLEARNER.EXTEND " + said.format("old.pth", ""),
        "XLEARNER.STEPS " + said.format("alternating", "joint"),
        "XLEARNER.AMP_PRECISION " + said.format("bfloat16", "float16"),
        "XLEARNER.WEIGHTING.METHOD " + said.format("dwa", "fixed"),
        "TEST.EVAL_PERIOD " + said.format(500, 0),
    ]


@pytest.mark.parametrize(("norm", "depth"), [("BN", 50), ("FrozenBN", 50), ("BN", 18)])
def test_a_lazy_model_of_the_zoo_takes_the_student(tmp_path: Path, norm: str, depth: int) -> None:
    """As docs/LAZY.md shows it: all of its ResNet comes from the file, and its features are the student's."""
    cfg = student_cfg(depth)
    student = make_student(cfg)
    export_student(student, cfg, tmp_path / "student_d2.pth")
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = norm
    if depth == 18:
        model.backbone.bottom_up.stages.depth = 18
        del model.backbone.bottom_up.stages.stride_in_1x1
    built = instantiate(model).eval()
    found = DetectionCheckpointer(built).load(str(tmp_path / "student_d2.pth"))
    assert found  # what else the file holds, beside the weights
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = built.backbone.bottom_up(images)
        for stage, expected in student(images).items():
            torch.testing.assert_close(features[stage], expected, rtol=1e-4, atol=1e-5)


def test_the_rate_is_that_of_the_settings(openmoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(openmoji))
    multiplier = instantiate(lazily(tmp_path).lr_multiplier)
    assert multiplier(0.0) == pytest.approx(0.001)  # SOLVER.WARMUP_FACTOR
    assert multiplier(2 / 3) == pytest.approx(0.25)  # after the warm-up, half a cosine from 0 to 1


@pytest.mark.parametrize("changes", [{"SEEED": 1}, {"SEED": "three"}, {"SOLVER": {"MAX_ITERS": 1}}])
def test_settings_that_do_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"SEEED|SEED|SOLVER\.MAX_ITERS"):
        complete("configs/base.yaml", changes)


def test_none_drops_a_record() -> None:
    settings = complete("configs/quick/openmoji.yaml", {"XLEARNER": {"SOURCES": {"icons": None}}})
    assert settings["XLEARNER"]["SOURCES"]["icons"] is None
    assert settings["XLEARNER"]["SOURCES"]["scenes"]["TASK"] == "detection"
