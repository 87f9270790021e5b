"""What a number of workers asks of a config."""

import re

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from hypothesis import given
from hypothesis import strategies as st

from xlearner_d2 import add_xlearner_config
from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.scaling import check_norm, check_timeouts, scale_to_workers
from xlearner_d2.specs import ConfigError


def written_for(cfg, workers, **solver):
    cfg = cfg.clone()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = workers
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


@given(reference=st.sampled_from([1, 2, 4, 8]), workers=st.sampled_from([1, 2, 3, 4, 6, 16]))
def test_detectron2_scales_alike(tiny_cfg_once, reference, workers):
    cfg = written_for(tiny_cfg_once, reference, MAX_ITER=960, STEPS=(480, 720), WARMUP_ITERS=96, BASE_LR=0.25)
    cfg.TEST.EVAL_PERIOD = 48
    cfg.SOLVER.IMS_PER_BATCH = 16
    found, wanted = scale_to_workers(cfg, workers), DefaultTrainer.auto_scale_workers(cfg, workers)
    for key in ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD", "REFERENCE_WORLD_SIZE"):
        assert found.SOLVER[key] == wanted.SOLVER[key], key
    assert found.TEST.EVAL_PERIOD == wanted.TEST.EVAL_PERIOD
    for record in found.XLEARNER.SOURCES.values():
        assert record.get("IMS_PER_BATCH", 16) == wanted.SOLVER.IMS_PER_BATCH


@pytest.fixture(scope="module")
def tiny_cfg_once():
    """Two sources of 16 images a step; by default and as the record says."""
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.XLEARNER.SOURCES.a = CfgNode({"TASK": "t"})
    cfg.XLEARNER.SOURCES.b = CfgNode({"TASK": "t", "IMS_PER_BATCH": 16})
    return cfg


def test_batches_of_sources_that_share_one_of_the_step_are_left(tiny_cfg_once):
    cfg = written_for(tiny_cfg_once, 3)
    cfg.XLEARNER.SAMPLING.IMS_PER_BATCH = 48
    found = scale_to_workers(cfg, 2).XLEARNER
    assert found.SAMPLING.IMS_PER_BATCH == 32
    assert found.SOURCES == cfg.XLEARNER.SOURCES


def test_a_network_of_timm_has_no_norm_of_detectron2(tiny_cfg):
    tiny_cfg.MODEL.RESNETS.NORM = "naiveSyncBN"
    assert check_norm(tiny_cfg, "MODEL", 2) == []
    tiny_cfg.XLEARNER.BRANCHES.it = CfgNode({"TIMM": "resnet18"})
    (problem,) = check_norm(tiny_cfg, "MODEL", 2)
    assert problem.startswith("MODEL.RESNETS.NORM is 'naiveSyncBN', which networks of timm cannot have")
    assert check_norm(tiny_cfg, "MODEL", 1) == []


def test_zero_means_any_number_of_workers(tiny_cfg):
    assert scale_to_workers(tiny_cfg, 4).dump() == tiny_cfg.dump()


def test_the_squeeze_has_its_own_solver_scaled(tiny_cfg):
    tiny_cfg.XLEARNER.SQUEEZE.SOLVER.BASE_LR = 0.5
    tiny_cfg.XLEARNER.SQUEEZE.SOLVER.MAX_ITER = 100
    found = scale_to_workers(written_for(tiny_cfg, 2), 4).XLEARNER.SQUEEZE.SOLVER
    assert dict(found) == {"BASE_LR": 1.0, "MAX_ITER": 50}


@given(steps=st.integers(0, 20), reference=st.integers(1, 8), workers=st.integers(1, 64))
def test_some_steps_stay_some_and_none_stay_none(tiny_cfg_once, steps, reference, workers):
    """A checkpoint every 3 steps of 1 worker is one every step of 8; a run that never evaluates does not start to."""
    cfg = written_for(tiny_cfg_once, reference, CHECKPOINT_PERIOD=steps, MAX_ITER=steps)
    cfg.XLEARNER.SQUEEZE.SOLVER = CfgNode({"CHECKPOINT_PERIOD": steps})
    cfg.TEST.EVAL_PERIOD = steps
    cfg.XLEARNER.SOURCES = CfgNode()
    found = scale_to_workers(cfg, workers)
    scaled = max(round(steps / (workers / reference)), 1) if steps else 0
    got = [found.SOLVER.CHECKPOINT_PERIOD, found.SOLVER.MAX_ITER, found.TEST.EVAL_PERIOD]
    assert [*got, found.XLEARNER.SQUEEZE.SOLVER.CHECKPOINT_PERIOD] == [scaled] * 4


def test_a_batch_that_the_reference_could_not_share(tiny_cfg):
    tiny_cfg.XLEARNER.SOURCES.pics.IMS_PER_BATCH = 3
    with pytest.raises(
        ConfigError, match=r"SOURCES.pics.IMS_PER_BATCH is 3, but a number that the 2 workers of SOLVER"
    ):
        scale_to_workers(written_for(tiny_cfg, 2), 4)


def test_a_reference_that_is_no_number_of_workers(tiny_cfg):
    with pytest.raises(ConfigError, match=r"SOLVER.REFERENCE_WORLD_SIZE is -1, but a number of workers is expected"):
        scale_to_workers(written_for(tiny_cfg, -1), 4)


def test_records_that_are_wrong_are_left_to_those_who_judge_them(tiny_cfg):
    tiny_cfg.XLEARNER.SOURCES.boxes = None
    tiny_cfg.XLEARNER.SOURCES.areas.IMS_PER_BATCH = "many"
    found = scale_to_workers(written_for(tiny_cfg, 1), 2).XLEARNER.SOURCES
    assert found.boxes is None
    assert found.areas.IMS_PER_BATCH == "many"
    assert found.pics.IMS_PER_BATCH == 32


def test_the_plan_says_that_it_was_scaled(project):
    said = project.dry_run("SOLVER.REFERENCE_WORLD_SIZE", 2)
    assert "Scaled from 2 to 1 workers (SOLVER.REFERENCE_WORLD_SIZE): batches and learning rate times 0.5" in said
    assert "expand for 4 steps, then squeeze for 4 steps" in said
    assert "Scaled from" not in project.dry_run()


@pytest.mark.parametrize("name", ["SyncBN", "nnSyncBN"])
def test_norm_layers_that_cpus_lack(tiny_cfg, name):
    assert check_norm(tiny_cfg, "MODEL", 2) == []
    tiny_cfg.MODEL.RESNETS.NORM = tiny_cfg.MODEL.FPN.NORM = name
    problems = check_norm(tiny_cfg, "MODEL", 2)
    assert len(problems) == 2
    assert all(re.search(r"NORM is '\w*SyncBN', which torch has for GPUs alone: take naiveSyncBN", p) for p in problems)
    assert check_norm(tiny_cfg, "MODEL", 1) == []


def test_norm_layers_of_heads_are_looked_at(project, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    project.content["XLEARNER"]["SOURCES"]["areas"]["OPTS"] += ["MODEL.FPN.NORM", "SyncBN"]
    project.write(project.content)
    with pytest.raises(ConfigError, match=r"XLEARNER.SOURCES.areas: MODEL.FPN.NORM is 'SyncBN'"):
        make_plan(project.load(), world_size=2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["SILENT", "STUCK"])
def test_timeouts_are_positive(tiny_cfg, key, seconds):
    assert check_timeouts(tiny_cfg) == []
    tiny_cfg.XLEARNER.TIMEOUT[key] = seconds
    assert check_timeouts(tiny_cfg) == [
        f"XLEARNER.TIMEOUT.{key} is {seconds}, but a number of seconds above 0 is expected."
    ]
