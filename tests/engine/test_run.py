"""Whole runs: both stages, resuming, evaluating, squeezing online."""

import argparse
import gc
import json
import re
import weakref

import pytest
import torch
import yaml
from conftest import Project
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.logger import _LOG_COUNTER

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.config import load_config
from xlearner_d2.engine import launch, trainer
from xlearner_d2.engine import run as running
from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.resumed import keep_config
from xlearner_d2.engine.squeeze import build_squeeze_hook, load_teacher
from xlearner_d2.engine.squeeze_settings import squeeze_config
from xlearner_d2.engine.steps import StepTrainer
from xlearner_d2.exports.student import load_student
from xlearner_d2.specs import ConfigError


def weights(path):
    return read_checkpoint(path)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run; tests may add to it, but not change what it left."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.metrics = project.run()
    return project


def without_extras(project):
    """The same run without what follows training."""
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)
    return project


def test_one_run_leaves_everything_a_user_needs(finished):
    out = finished.root / "out"
    for name in ("expanded.pth", "student_d2.pth", "metrics.json", "config.yaml", "log.txt"):
        assert (out / name).is_file(), name
    assert {path.name for path in (out / "pictures").iterdir()} == {
        "pics_t_pics.png",
        "boxes_t_boxes.png",
        "areas_t_areas.png",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == finished.metrics
    assert set(metrics["expanded"]["boxes"]["t_boxes"]) == {"bbox/AP", "segm/AP"}
    assert metrics["trivial"]["pics"]["t_pics"]["classification/top1"] == pytest.approx(100 * 3 / 8)
    assert set(metrics["probes"]["pics"]) == {"student", "random"}
    shape = {source: {name: found.keys() for name, found in of.items()} for source, of in metrics["expanded"].items()}
    assert {s: {n: f.keys() for n, f in of.items()} for s, of in metrics["squeezed"].items()} == shape
    log = (out / "log.txt").read_text()
    assert "trivial predictor" in log
    assert "use " + str(out / "student_d2.pth") + " as MODEL.WEIGHTS" in log


def test_images_without_objects_are_told_here_and_in_the_log(project, capfd):
    file = project.root / "data/boxes.json"
    boxes = json.loads(file.read_text())
    _LOG_COUNTER.clear()  # of what is said once in a process
    boxes["annotations"] = boxes["annotations"][2:]
    file.write_text(json.dumps(boxes))
    told = "data set 't_boxes': 2 of 8 images have no object to learn from and are left out."
    keep = ["XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1]
    without_extras(project).run(*keep)
    assert (project.root / "out/log.txt").read_text().count(told) == 1
    assert capfd.readouterr().err.count(told) <= 1  # once where no earlier run in this process has set up logs
    opts = project.content["XLEARNER"]["SOURCES"]["boxes"]["OPTS"]
    opts += ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]
    project.write(project.content)
    project.run(*keep, "OUTPUT_DIR", project.root / "all")
    assert told not in (project.root / "all/log.txt").read_text()


def test_machines_whose_copies_differ(finished, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(finished.root / "data"))
    plan = make_plan(finished.load("OUTPUT_DIR", finished.root / "other"), world_size=1)
    here = {f"XLEARNER.SOURCES.{name}.{part}": 8 for name in plan.data for part in ("TRAIN", "TEST")}
    others = [("b", here), ("c", {**here, "XLEARNER.SOURCES.pics.TRAIN": 7})] * 2
    monkeypatch.setattr(running.comm, "all_gather", lambda own: [("a", own[1]), *others])
    with pytest.raises(ConfigError) as caught:
        running.check_same_data(plan)
    assert caught.value.problems == [
        "XLEARNER.SOURCES.pics.TRAIN has 8 images on a, but 7 on c: are both copies whole?"
    ]


def test_data_sets_that_nothing_names_need_not_be_there(project):
    project.content["XLEARNER"]["DATASETS"]["elsewhere"] = {"FORMAT": "coco", "IMAGES": "no", "ANNOTATIONS": "no.json"}
    project.write(project.content)
    assert "elsewhere" not in project.dry_run()
    project.content["XLEARNER"]["SOURCES"]["boxes"]["TEST"] = ["elsewhere"]
    project.write(project.content)
    with pytest.raises(ConfigError, match="data set 'elsewhere'"):
        project.dry_run()


def test_settings_that_only_heads_read_are_told(project, caplog):
    _LOG_COUNTER.clear()
    project.dry_run("SOLVER.BASE_LR", 0.01, "CUDNN_BENCHMARK", True)
    assert "No source reads" not in caplog.text
    project.dry_run("SOLVER.IMS_PER_BATCH", 64, "INPUT.MIN_SIZE_TRAIN", "[640]", "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    told = "No source reads INPUT.MIN_SIZE_TRAIN, MODEL.ROI_HEADS.NUM_CLASSES, SOLVER.IMS_PER_BATCH, which the config"
    assert told in caplog.text


def test_a_warm_up_that_outlasts_its_stage_is_told(project, caplog, monkeypatch):
    """As Detectron2's default of 1,000 steps does in a short run."""
    _LOG_COUNTER.clear()
    project.dry_run("SOLVER.MAX_ITER", 9, "SOLVER.WARMUP_ITERS", 8, "XLEARNER.SQUEEZE.SOLVER.MAX_ITER", 9)
    assert "rate rises" not in caplog.text
    project.dry_run("SOLVER.MAX_ITER", 9, "SOLVER.WARMUP_ITERS", 8, "XLEARNER.TRUNK_STEPS", 7)
    for stage, steps in (("trunk", 7), ("squeeze", 2)):
        assert f"The {stage} takes {steps} steps, but SOLVER.WARMUP_ITERS is 8, in which" in caplog.text
    assert "The expansion takes" not in caplog.text
    _LOG_COUNTER.clear()
    caplog.clear()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    alone = ("XLEARNER.STAGE", "squeeze", "SOLVER.WARMUP_ITERS", 2, "XLEARNER.SQUEEZE.SOLVER.WARMUP_ITERS", 1)
    make_plan(project.load(*alone), world_size=1)
    online = ("XLEARNER.SQUEEZE.ONLINE", True, "SOLVER.MAX_ITER", 9, "SOLVER.WARMUP_ITERS", 8)  # it takes nine as well
    make_plan(project.load(*online), world_size=1)
    assert "rate rises" not in caplog.text


@pytest.mark.parametrize(("workers", "norm", "told"), [(1, "BN", False), (2, "BN", True), (2, "naiveSyncBN", False)])
def test_few_images_of_a_worker_are_told(project, caplog, monkeypatch, workers, norm, told):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    _LOG_COUNTER.clear()
    make_plan(project.load("MODEL.RESNETS.NORM", norm), world_size=workers)
    text = "Each of the 2 workers has few images of segmentation (1), detection (1), classification (1) in a step"
    assert (text in caplog.text) == told


def test_a_student_is_evaluated_on_the_way(project):
    project.run("TEST.EVAL_PERIOD", 1)
    lines = (project.root / "out/squeeze/metrics.json").read_text().splitlines()
    assert any("boxes/t_boxes/bbox/AP" in json.loads(line) for line in lines)


def test_a_config_that_is_kept_has_its_sources_in_their_order(project):
    project.file.write_text(yaml.safe_dump(project.content, sort_keys=False))
    cfg = project.load()
    (project.root / "out").mkdir()
    keep_config(cfg)
    again = load_config(project.root / "out/config.yaml", [])
    assert list(again.XLEARNER.SOURCES) == list(cfg.XLEARNER.SOURCES) == ["pics", "boxes", "areas"]


def test_each_stage_logs_its_losses_and_its_learning_rate(finished):
    for stage, loss in (("expand", "boxes/loss_mask"), ("squeeze", "loss_hint_detection")):
        lines = (finished.root / "out" / stage / "metrics.json").read_text().splitlines()
        last = json.loads(lines[-1])
        assert {loss, "total_loss", "lr", "data_time"} <= last.keys()
        assert not [name for name in last if name.startswith("/")]


def test_student_loads_into_a_model_zoo_config(finished):
    """Through Detectron2's own checkpointer, with the student's width set as a user would set it."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
    for key, value in finished.content["MODEL"]["RESNETS"].items():
        cfg.MODEL.RESNETS[key] = value
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(finished.root / "out/student_d2.pth"))
    loaded = model.backbone.bottom_up.state_dict()
    student = weights(finished.root / "out/student_d2.pth")
    assert loaded.keys() == student.keys()
    assert same(loaded, student)
    images = 255 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    normalised = (images - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        own = load_student(finished.root / "out/student_d2.pth").network.eval()(normalised)
        assert same(model.eval().backbone.bottom_up(normalised), own)


@pytest.mark.parametrize("stage", ["expand", "squeeze"])
def test_resumed_run_ends_with_the_same_weights(finished, project, stage):
    """The second run loses its last step and its result, as if it had been stopped before them."""
    other = without_extras(project)
    other.run()
    out = other.root / "out"
    for name in ["student_d2.pth", *(["expanded.pth"] if stage == "expand" else [])]:
        (out / name).unlink()
    (out / stage / "model_final.pth").unlink()
    (out / stage / "last_checkpoint").write_text("model_0000000.pth")
    if stage == "expand":
        for path in (out / "squeeze").iterdir():
            path.unlink() if path.is_file() else None
    other.run(resume=True)
    for name in ("expanded.pth", "student_d2.pth"):
        assert same(weights(finished.root / "out" / name), weights(out / name)), name


@pytest.mark.parametrize(("opts", "online"), [([], False), (["EMA_DECAY", 0.5], False), (["ONLINE", True], True)])
def test_the_student_that_is_evaluated_is_the_one_that_is_exported(project, monkeypatch, opts, online):
    """With the statistics of the last recalibration, or the average of its weights; by the heads it learned with,
    averaged alike.
    """
    found = []

    def note(model, plan, sources, *, folder):
        if model.backbone.tasks and "squeezed" in folder.name:
            found.append(({name: value.clone() for name, value in model.state_dict().items()}, folder.parent.name))
        return {source.name: {"set": {"top1": 50.0}} for source in sources}

    for module in ("squeeze", "run"):
        monkeypatch.setattr(f"xlearner_d2.engine.{module}.evaluate_sources", note)
    metrics = without_extras(project).run(*(f"XLEARNER.SQUEEZE.{x}" if isinstance(x, str) else x for x in opts))
    ((state, stage),) = found
    assert stage == ("expand" if online else "squeeze")
    trunk = {name.partition("trunk.")[2]: value for name, value in state.items() if ".trunk." in name}
    exported = weights(project.root / "out/student_d2.pth")  # without the counters of batches
    assert same({name: value for name, value in trunk.items() if "num_batches" not in name}, exported)
    assert metrics["squeezed"]["areas"] == {"set": {"top1": 50.0}}
    kept = torch.load(project.root / f"out/{stage}/model_final.pth", weights_only=False)["trainer"]["hooks"]
    heads = {name: value for name, value in state.items() if name.startswith("heads.")}
    trained = kept["SqueezeHook"]["distiller"]
    averaged = kept["SqueezeHook"].get("average", trained)
    assert same(heads, {name: averaged[name] for name in heads})


def test_hints_alone_leave_no_heads_to_evaluate(project):
    assert without_extras(project).run("XLEARNER.SQUEEZE.TASK_LOSSES", False)["squeezed"] == {}


def test_a_finished_run_is_not_run_again(finished):
    before = (finished.root / "out/expanded.pth").stat().st_mtime_ns
    metrics = finished.run(resume=True)
    assert (finished.root / "out/expanded.pth").stat().st_mtime_ns == before
    assert metrics["expanded"] == finished.metrics["expanded"]


def test_what_the_squeeze_does_not_say_is_as_in_the_expansion(project):
    project.content["XLEARNER"]["SQUEEZE"]["SOLVER"] |= {"CLIP_GRADIENTS": {"CLIP_VALUE": 2.0}}
    project.write(project.content)
    solver = squeeze_config(project.load()).SOLVER
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, solver.WARMUP_ITERS) == (True, "norm", 2.0, 1)


def test_eval_only_equals_the_evaluation_after_training(finished):
    assert finished.run(eval_only=True)["expanded"] == finished.metrics["expanded"]


OTHER = {
    "MODEL.RESNETS.STRIDE_IN_1X1": (False, r"STRIDE_IN_1X1 is False, but the expanded model .*/expanded\.pth .* True"),
    "INPUT.FORMAT": ("RGB", r"INPUT\.FORMAT is 'RGB', but the expanded model .*/expanded\.pth was trained with 'BGR'"),
    "MODEL.PIXEL_MEAN": (
        [1.0, 2.0, 3.0],
        r"PIXEL_MEAN is \[1\.0, 2\.0, 3\.0\], but .* was trained with \[103\.53, 116",
    ),
    "MODEL.PIXEL_STD": ([58.0, 57.0, 57.0], r"PIXEL_STD is \[58\.0, 57\.0, 57\.0\], but .* was trained with \[1\.0, 1"),
}


@pytest.mark.parametrize("key", OTHER)
def test_an_expanded_model_is_used_as_it_was_trained(finished, key):
    value, message = OTHER[key]
    teacher = ["XLEARNER.SQUEEZE.TEACHER", finished.root / "out/expanded.pth"]
    other = finished.root / "other"
    for options in (["XLEARNER.STAGE", "squeeze"], []):
        with pytest.raises(ConfigError, match=message):
            finished.run(*options, *teacher, key, value, "OUTPUT_DIR", other)
    with pytest.raises(ConfigError, match=message):
        finished.run(key, value, eval_only=True)
    before = (finished.root / "out/config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        finished.run(key, value, resume=True)
    assert (finished.root / "out/config.yaml").read_text() == before
    assert not other.exists()


def test_an_expanded_model_of_another_res5_is_not_evaluated(finished):
    """Names and shapes are those of the stride that it was trained with."""
    opts = [*finished.content["XLEARNER"]["SOURCES"]["pics"]["OPTS"], "MODEL.RESNETS.RES5_DILATION", 2]
    with pytest.raises(ConfigError, match=r"'classification' want stride 16 of res5, but in the expanded .* it has 32"):
        finished.run("XLEARNER.SOURCES.pics.OPTS", opts, "XLEARNER.SQUEEZE.TASK_LOSSES", False, eval_only=True)


def test_an_expanded_model_of_other_tasks_is_no_teacher(finished):
    """Told before the expansion, after which it would be loaded."""
    opts = ["XLEARNER.SQUEEZE.TEACHER", finished.root / "out/expanded.pth", "OUTPUT_DIR", finished.root / "other"]
    lack = r"sources, are classification \(pics\), segmentation \(areas\), but the expanded model .* has classification"
    with pytest.raises(ConfigError, match=lack):
        finished.run(*opts, "XLEARNER.SOURCES.boxes", "null")
    assert not (finished.root / "other").exists()


def test_an_expanded_model_of_another_convention_is_a_start_with_a_warning(finished, project):
    """As a ResNet of another convention is, from which one goes on learning."""
    start = ["MODEL.WEIGHTS", finished.root / "out/expanded.pth", "MODEL.RESNETS.STRIDE_IN_1X1", False]
    without_extras(project).run("XLEARNER.STAGE", "expand", *start)
    log = (project.root / "out/log.txt").read_text()
    assert re.search(
        r"WARNING.* MODEL.RESNETS.STRIDE_IN_1X1 is False, but MODEL.WEIGHTS .*expanded.pth was trained with True", log
    )


def test_an_expanded_model_that_does_not_say_how_it_was_trained_is_taken(finished, project):
    other = without_extras(project)
    torch.save({"model": weights(finished.root / "out/expanded.pth")}, other.root / "bare.pth")
    options = ["XLEARNER.SQUEEZE.TEACHER", other.root / "bare.pth", "MODEL.PIXEL_STD", [58.0, 57.0, 57.0]]
    other.run("XLEARNER.STAGE", "squeeze", *options)
    assert (other.root / "out/student_d2.pth").is_file()


def test_stages_run_one_after_the_other_equal_both_at_once(finished, project):
    other = without_extras(project)
    first = other.run("XLEARNER.STAGE", "expand")
    assert not (other.root / "out/student_d2.pth").exists()
    second = other.run("XLEARNER.STAGE", "squeeze")
    assert second == {**first, "squeezed": {}, "probes": {}}  # no source has TEST
    for name in ("expanded.pth", "student_d2.pth"):
        assert same(weights(finished.root / "out" / name), weights(other.root / "out" / name))


def test_online_squeeze_leaves_the_expansion_as_it_is(finished, project):
    other = without_extras(project)
    other.run("XLEARNER.SQUEEZE.ONLINE", True)
    assert same(weights(finished.root / "out/expanded.pth"), weights(other.root / "out/expanded.pth"))
    student = weights(other.root / "out/student_d2.pth")
    assert student.keys() == weights(finished.root / "out/student_d2.pth").keys()
    assert "squeeze/loss_hint_detection" in (other.root / "out/expand/metrics.json").read_text()


@pytest.mark.parametrize(
    ("first", "opts", "start"),
    [
        ("pics", ["XLEARNER.SQUEEZE.INIT", "detection"], "detection"),
        ("boxes", [], "classification"),  # by default that of a source of classes, whichever comes first
        ("boxes", ["XLEARNER.SOURCES.pics", "null"], "detection"),
    ],
)
def test_where_the_student_starts(project, first, opts, start):
    content = without_extras(project).content["XLEARNER"]
    content["SQUEEZE"]["SOLVER"]["BASE_LR"] = 1e-12
    content["SOURCES"][f"a_{first}"] = content["SOURCES"].pop(first)  # the file that is written sorts its keys
    project.write(project.content)
    project.run(*opts)
    expanded, student = (weights(project.root / "out" / name) for name in ("expanded.pth", "student_d2.pth"))
    for name, value in student.items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, expanded[f"backbone.branches.{start}.{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("opts", "passes"),
    [([], 3), (["XLEARNER.SHARING", "bidirectional"], 1), (["XLEARNER.STEPS", "alternating"], 0)],
    ids=["detached", "bidirectional", "alternating"],
)
def test_branches_learn_one_after_another(project, monkeypatch, opts, passes):
    """Where no loss reaches two of them: a backward pass for each, before that of Detectron2's step."""
    seen = []
    monkeypatch.setattr(StepTrainer, "_backward", lambda _, loss: (seen.append(loss), loss.backward()))
    without_extras(project).run("XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 2, *opts)
    assert len(seen) == 2 * passes


@pytest.mark.parametrize("steps", ["joint", "alternating"])
def test_of_a_finished_expansion_only_the_model_is_left(project, monkeypatch, steps):
    """It waits for its report while the student learns, but what trained it is not needed any more."""
    made = []
    build = trainer.build_step_trainer
    monkeypatch.setattr(
        trainer, "build_step_trainer", lambda *args, **options: (made.append(build(*args, **options)), made[-1])[1]
    )
    without_extras(project)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    plan = make_plan(project.load("XLEARNER.STEPS", steps), world_size=1)
    (project.root / "out").mkdir()
    model = trainer.expand(plan, resume_run=False)
    gone = weakref.ref(made.pop())
    gc.collect()
    assert gone() is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_squeeze_may_be_without_mixed_precision(project, monkeypatch):
    project.run("XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    plan = make_plan(project.load("XLEARNER.STAGE", "squeeze"), world_size=1)
    teacher = load_teacher(plan)
    teacher.autocast_dtype = torch.bfloat16  # as the expansion has it where SOLVER.AMP is on
    hook = build_squeeze_hook(plan, teacher, [], max_iter=1)
    assert hook.distiller.teacher.autocast_dtype is None
    assert {p.dtype for p in hook.distiller.teacher.backbone.parameters()} == {torch.float32}


def test_workers_on_gpus_are_checked_for_in_a_process_of_its_own(project, monkeypatch):
    """Whose memory on the GPU is free again when they start."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    monkeypatch.setattr(launch, "usable_device", lambda cfg: "cuda")
    monkeypatch.setattr(launch, "_check_devices", lambda *args: True)
    started = []
    monkeypatch.setattr(launch, "_launch", lambda cfg, args, told: started.append(args.opts))
    arguments = {"config_file": str(project.file), "dry_run": False, "num_gpus": 2, "num_machines": 1}
    arguments |= {"dist_url": "auto", "machine_rank": 0, "resume": False, "eval_only": False}
    launch.start(argparse.Namespace(**arguments, opts=["SOLVER.MAX_ITER", "3"]))
    assert started == [["SOLVER.MAX_ITER", "3", "XLEARNER.CHECK_IMAGES", "0"]]
    with pytest.raises(ConfigError, match=r"^The configuration has 1 problem:\n  1\. SOLVER\.MAX_ITER is 0"):
        launch.start(argparse.Namespace(**arguments, opts=["SOLVER.MAX_ITER", "0"]))


def test_the_squeeze_has_its_own_checkpoint_period(project):
    without_extras(project).content["XLEARNER"]["SQUEEZE"]["SOLVER"]["CHECKPOINT_PERIOD"] = 2
    project.write(project.content)
    project.run("SOLVER.CHECKPOINT_PERIOD", 1)
    first = [(project.root / f"out/{stage}/model_0000000.pth").is_file() for stage in ("expand", "squeeze")]
    assert first == [True, False]


def test_dry_run_tells_the_plan_and_writes_nothing(project):
    plan = project.dry_run()
    for pattern in (
        r"expand for 2 steps, then squeeze for 2 steps",
        r"boxes\s+detection\s+8\s+8\s+3\s+2\s+0\.5",
        r"detection\s+boxes\s+ResNet-50\s+res2, res3, res4, res5\s+res2, res3, res4",
    ):
        assert re.search(pattern, plan), pattern
    numbers = re.search(
        r"about (\S+) GB to expand, (\S+) GB to squeeze a worker, (\S+) GB of it taken already; libraries", plan
    )
    expand, squeeze, taken = map(float, numbers.groups())
    assert 0.3 < taken <= min(expand, squeeze)  # PyTorch alone takes as much, and this model less than a digit shows
    assert not (project.root / "out").exists()


def test_the_plan_of_a_shared_trunk_has_one_branch(project):
    plan = project.dry_run("XLEARNER.STAGE", "expand", "XLEARNER.SHARING", "shared")
    table = plan[plan.index("branch ") :].split("\n\n")[0].splitlines()
    assert len(table) == 3
    assert re.match(r"trunk\s+areas, boxes, pics\s+ResNet-50", table[2])
    assert plan.endswith("out/expanded.pth.")


@pytest.mark.parametrize(("online", "steps", "epochs"), [(False, 8, "2"), (True, 2, "0.5")])
def test_the_plan_of_a_squeeze_has_its_own_steps(finished, online, steps, epochs):
    alone = ["XLEARNER.STAGE", "squeeze", "XLEARNER.SQUEEZE.TEACHER", finished.root / "out/expanded.pth"]
    opts = ["XLEARNER.SQUEEZE.ONLINE", online, "XLEARNER.SQUEEZE.SOLVER.MAX_ITER", 8]
    plan = finished.dry_run(*([] if online else alone), *opts, "OUTPUT_DIR", finished.root / "else")
    assert f"squeeze for {steps} steps" in plan
    assert re.search(rf"boxes\s+detection\s+8\s+8\s+3\s+2\s+{epochs}\s", plan)
    assert plan.endswith("else/student_d2.pth.")


def test_squeeze_without_a_teacher_says_what_to_do(project):
    with pytest.raises(ConfigError, match=r"no expanded model .*expanded\.pth: run XLEARNER\.STAGE expand first"):
        project.run("XLEARNER.STAGE", "squeeze")
    with pytest.raises(ConfigError, match=r"no expanded model .*expanded\.pth"):
        project.run(eval_only=True)
    assert not (project.root / "out").exists()


def test_output_of_another_run_is_not_overwritten(finished):
    with pytest.raises(ConfigError, match=r"out/expand is not empty\. Add --resume .* or set another OUTPUT_DIR"):
        finished.run()


def test_branches_start_from_any_resnet_checkpoint(finished, project):
    """Here from a student; every branch then holds its weights."""
    student = finished.root / "out/student_d2.pth"
    without_extras(project)
    project.run("XLEARNER.STAGE", "expand", "MODEL.WEIGHTS", student, "SOLVER.BASE_LR", 1e-12)
    expanded = weights(project.root / "out/expanded.pth")
    for name, value in weights(student).items():
        if not name.endswith(("running_mean", "running_var")):
            for task in ("classification", "detection", "segmentation"):
                found = expanded[f"backbone.branches.{task}.{name}"]
                torch.testing.assert_close(found, value, rtol=0, atol=1e-9)
