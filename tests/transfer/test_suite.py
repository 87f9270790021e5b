"""What a suite file may hold, and what is said about what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import MetadataCatalog
from tiny_suite import TinySuite, fine_tune, one_set

from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer.measure import check_suite
from xlearner_d2.transfer.protocols import check_heads, fine_tune_config, is_deterministic
from xlearner_d2.transfer.suite import check_data


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> TinySuite:
    """Whose files stay as they are; what a test changes, it changes on the command line."""
    return TinySuite(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def tiny(tmp_path: Path) -> TinySuite:
    return TinySuite(tmp_path)


def problems(suite: TinySuite, *opts: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        suite.parse(*opts)
    return caught.value.problems


# Parsing


def test_a_suite_is_what_its_file_says(shared: TinySuite) -> None:
    suite = shared.parse()
    assert suite.name == "tiny"
    assert suite.primary == {"pics": "probe", "boxes": "dense", "areas": "linear"}
    assert suite.sets["pics"].train == ("s_pics",)
    assert suite.protocols["few"].images_per_class == 2
    assert suite.protocols["knn"].feature == "res5"
    assert suite.datasets.keys() == {"s_pics", "s_boxes", "s_areas"}
    assert suite.cfg.is_frozen()


def test_null_drops_a_record(shared: TinySuite) -> None:
    suite = shared.parse("TRANSFER.SETS.boxes", "null", "TRANSFER.PROTOCOLS.dense", "null")
    assert suite.sets.keys() == {"pics", "areas"}
    assert "dense" not in suite.protocols


def test_modules_are_imported_before_their_data_sets_are_named(
    shared: TinySuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('mine_of_suite', lambda: [])\n"
    (tmp_path / "sets_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    suite = shared.parse("XLEARNER.IMPORTS", "['sets_of_mine']", "TRANSFER.SETS.pics.TEST", "mine_of_suite")
    assert suite.sets["pics"].test == "mine_of_suite"


def test_a_mapper_of_its_own_may_change_images(shared: TinySuite) -> None:
    suite = shared.parse()
    cfg = fine_tune_config(suite, suite.sets["boxes"], suite.protocols["dense"]).clone()
    assert is_deterministic(cfg)
    cfg.defrost()
    cfg.INPUT.MAPPER = "a.Mapper"
    assert not is_deterministic(cfg)


def test_a_dropped_data_set_is_unknown(shared: TinySuite) -> None:
    shared.parse()  # in this process it has been registered before
    assert any("the unknown data set 's_pics'" in text for text in problems(shared, "XLEARNER.DATASETS.s_pics", "null"))


ONE_PROBLEM = {
    "unknown protocol": (
        ["TRANSFER.SETS.pics.PROTOCOLS", "[prob]"],
        "TRANSFER.SETS.pics.PROTOCOLS names the unknown protocol 'prob'. Did you mean 'probe'?",
    ),
    "unknown data set": (
        ["TRANSFER.SETS.pics.TEST", "s_pic"],
        "TRANSFER.SETS.pics names the unknown data set 's_pic'. Did you mean 's_pics'?",
    ),
    "unknown family": (
        ["TRANSFER.SETS.areas.FAMILY", "segment"],
        "TRANSFER.SETS.areas.FAMILY is 'segment'. Did you mean 'segmentation'?",
    ),
    "unknown kind": (
        ["TRANSFER.PROTOCOLS.probe.KIND", "linear_prob"],
        "TRANSFER.PROTOCOLS.probe.KIND is 'linear_prob'. Did you mean 'linear_probe'?",
    ),
    "unknown key": (
        ["TRANSFER.SETS.pics.TESTS", "s_pics"],
        "TRANSFER.SETS.pics has the unknown key 'TESTS'. Did you mean 'TEST'?",
    ),
    "wrong metric of a probe": (
        ["TRANSFER.PROTOCOLS.probe.METRIC", "top5"],
        "TRANSFER.PROTOCOLS.probe.METRIC is 'top5'. Did you mean 'top1'?",
    ),
    "metric that only the linear probe has": (
        ["TRANSFER.PROTOCOLS.knn.METRIC", "mean_class_acc"],
        "TRANSFER.PROTOCOLS.knn.METRIC is 'mean_class_acc'. Known: top1.",
    ),
    "metric that no evaluator has": (
        ["TRANSFER.PROTOCOLS.tuned.METRIC", "top1"],
        "TRANSFER.PROTOCOLS.tuned.METRIC is 'top1', but one such as bbox/AP or sem_seg/mIoU is expected.",
    ),
    "metric of another family": (
        ["TRANSFER.PROTOCOLS.dense.METRIC", "sem_seg/mIoU"],
        "TRANSFER.SETS.boxes.PROTOCOLS: dense has METRIC sem_seg/mIoU, but detection has bbox, segm, keypoints.",
    ),
    "metric of its family, misspelt": (
        ["TRANSFER.PROTOCOLS.dense.METRIC", "bbox/APX"],
        "TRANSFER.SETS.boxes.PROTOCOLS: dense has METRIC bbox/APX. Did you mean 'bbox/AP'?",
    ),
    "probe of another family": (
        ["TRANSFER.SETS.areas.PROTOCOLS", "[knn]"],
        "TRANSFER.SETS.areas.PROTOCOLS: knn is for classification, but FAMILY is segmentation.",
    ),
    "unknown stage": (
        ["TRANSFER.PROTOCOLS.probe.FEATURE", "res6"],
        "TRANSFER.PROTOCOLS.probe.FEATURE is 'res6'. Did you mean 'res5'?",
    ),
    "no image left to choose by": (
        ["TRANSFER.PROTOCOLS.few.IMAGES_PER_CLASS", "1"],
        "TRANSFER.PROTOCOLS.few.IMAGES_PER_CLASS is 1, but one more is held out to choose the regularisation.",
    ),
    "share of nothing": (
        ["TRANSFER.PROTOCOLS.dense.TRAIN_SHARE", "0"],
        "TRANSFER.PROTOCOLS.dense.TRAIN_SHARE is 0, but more than 0 and at most 1 is expected.",
    ),
    "too few neighbours": (
        ["TRANSFER.PROTOCOLS.knn.K", "0"],
        "TRANSFER.PROTOCOLS.knn.K is 0, but at least 1 is expected.",
    ),
    "odd options": (
        ["TRANSFER.PROTOCOLS.dense.OPTS", "[SOLVER.MAX_ITER]"],
        "TRANSFER.PROTOCOLS.dense.OPTS has 1 entries, but pairs of key and value are expected.",
    ),
    "options that are pairs in a list": (
        ["TRANSFER.PROTOCOLS.dense.OPTS", "[[INPUT.MIN_SIZE_TEST, 96], [INPUT.MAX_SIZE_TEST, 160]]"],
        "TRANSFER.PROTOCOLS.dense.OPTS has ['INPUT.MIN_SIZE_TEST', 96], but the name of a setting is expected, then "
        "its value, and so on in one list.",
    ),
    "unknown depth": (
        ["MODEL.RESNETS.DEPTH", "20"],
        "MODEL.RESNETS.DEPTH is 20, but 18, 34, 50, 101 or 152 is expected.",
    ),
    "no protocol": (
        ["TRANSFER.SETS.pics.PROTOCOLS", "[]"],
        "TRANSFER.SETS.pics.PROTOCOLS is empty, but at least one name is needed.",
    ),
    "protocol twice": (
        ["TRANSFER.SETS.pics.PROTOCOLS", "[probe, knn, probe]"],
        "TRANSFER.SETS.pics.PROTOCOLS has 'probe' twice.",
    ),
    "data set twice": (
        ["TRANSFER.SETS.pics.TRAIN", "[s_pics, s_pics]"],
        "TRANSFER.SETS.pics.TRAIN has 's_pics' twice.",
    ),
    "no set": (
        ["TRANSFER.SETS.pics", "null", "TRANSFER.SETS.boxes", "null", "TRANSFER.SETS.areas", "null"],
        "TRANSFER.SETS is empty, but at least one downstream set is needed.",
    ),
}


@pytest.mark.parametrize("name", ONE_PROBLEM)
def test_one_problem_is_named(shared: TinySuite, name: str) -> None:
    opts, message = ONE_PROBLEM[name]
    assert problems(shared, *opts) == [message]


def test_a_name_that_is_no_folder_is_refused(tiny: TinySuite) -> None:
    """Reports would not find its records."""
    sets = tiny.content["TRANSFER"]["SETS"]
    sets["cells/blood"] = sets.pop("boxes")
    tiny.write()
    assert problems(tiny) == [
        "TRANSFER.SETS has the name 'cells/blood', but letters, digits, - and _ are expected, as it names a folder of "
        "records."
    ]


def test_a_missing_head_says_where_it_was_looked_for(shared: TinySuite) -> None:
    (message,) = problems(shared, "TRANSFER.PROTOCOLS.dense.CONFIG", "heads/gone.yaml")
    assert message.startswith("TRANSFER.PROTOCOLS.dense.CONFIG is 'heads/gone.yaml': there is neither a file")


def test_a_head_that_would_run_code_is_refused_unread(tiny: TinySuite) -> None:
    """Its digest is part of a cell's settings, so it is read before any model is built."""
    trap = tiny.root / "trap.yaml"
    trap.write_text(f'A: !!python/object/apply:os.system ["touch {tiny.root}/sprung"]\n')
    (message,) = problems(tiny, "TRANSFER.PROTOCOLS.dense.CONFIG", trap)
    assert "has the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'" in message
    assert not (tiny.root / "sprung").exists()


def test_all_problems_come_at_once(shared: TinySuite) -> None:
    opts = [part for name in ("unknown protocol", "unknown kind", "unknown stage") for part in ONE_PROBLEM[name][0][:2]]
    found = problems(shared, *opts, "XLEARNER.DATASETS.s_boxes.FORMAT", "coca", "TRANSFER.SETS.areas", "3")
    assert len(found) == 4  # the unknown kind hides what else is wrong with that protocol
    assert [text.split(".")[0] for text in found] == ["XLEARNER", "TRANSFER", "TRANSFER", "TRANSFER"]


# Data


def test_problems_of_all_sets_data_come_at_once(tiny: TinySuite) -> None:
    (tiny.root / "data/pics/cat/0.png").write_text("hello")
    (tiny.root / "data/areas/images/3.png").unlink()
    with pytest.raises(ConfigError) as caught:
        check_data(tiny.parse(), check_images=-1)
    text = str(caught.value)
    assert text.startswith("The suite's data has")
    assert "pics: data set 's_pics'" in text
    assert "areas: data set 's_areas'" in text
    assert "boxes: " not in text


def test_test_data_of_other_classes_is_refused(tiny: TinySuite) -> None:
    boxes = json.loads((tiny.root / "data/boxes.json").read_text())
    boxes["categories"][0]["name"] = "cow"
    (tiny.root / "data/cows.json").write_text(json.dumps(boxes))
    record = {**tiny.content["XLEARNER"]["DATASETS"]["s_boxes"], "ANNOTATIONS": str(tiny.root / "data/cows.json")}
    suite = tiny.parse("XLEARNER.DATASETS.s_cows", record, "TRANSFER.SETS.boxes.TEST", "s_cows")
    with pytest.raises(
        ConfigError, match=r"boxes: data sets 's_boxes' and 's_cows' should .* class 0 is 'cat' .*'cow'"
    ):
        check_data(suite, check_images=0)


def test_a_probe_needs_one_class_of_each_image(tiny: TinySuite) -> None:
    suite = tiny.parse("TRANSFER.SETS.pics.TEST", "s_boxes", "TRANSFER.SETS.pics.TRAIN", "[s_boxes]")
    with pytest.raises(ConfigError, match=r"pics: data set 's_boxes': 8 of 8 images have no category_id"):
        check_data(suite, check_images=0)


def test_another_precision_is_another_cell(tiny: TinySuite) -> None:
    found = {
        suite.settings(suite.sets["pics"], suite.protocols["probe"])
        for suite in (tiny.parse(), tiny.parse("XLEARNER.AMP_PRECISION", "bfloat16"))
    }
    assert len(found) == 2


# Heads


def test_problems_of_all_heads_come_at_once(tiny: TinySuite) -> None:
    protocols, sets = (tiny.content["TRANSFER"][key] for key in ("PROTOCOLS", "SETS"))
    protocols["dense"]["OPTS"] += ["SOLVER.MAXITER", 3]
    protocols["masks"] = fine_tune("segm/AP", "configs/transfer/heads/mask_rcnn.yaml")
    sets["wrong"] = one_set("detection", "s_pics", "masks")
    tiny.write()
    with pytest.raises(ConfigError) as caught:
        check_heads(tiny.parse())
    first, second = caught.value.problems
    assert first.startswith("TRANSFER.SETS.boxes with TRANSFER.PROTOCOLS.dense")
    assert "SOLVER.MAXITER" in first
    assert second.startswith("TRANSFER.SETS.wrong with TRANSFER.PROTOCOLS.masks: the data set 's_pics' has no thing_cl")


def test_data_that_a_head_cannot_learn_from_or_be_tested_on_is_found_before_any_cell(
    tiny: TinySuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = json.loads((tiny.root / "data/boxes.json").read_text())
    del boxes["annotations"][2]["segmentation"]
    (tiny.root / "data/few_masks.json").write_text(json.dumps(boxes))
    found, record = tiny.content["TRANSFER"], tiny.content["XLEARNER"]["DATASETS"]["s_boxes"]
    tiny.content["XLEARNER"]["DATASETS"]["s_few_masks"] = {
        **record,
        "ANNOTATIONS": str(tiny.root / "data/few_masks.json"),
    }
    found["PROTOCOLS"]["masks"] = fine_tune("bbox/AP", "configs/transfer/heads/mask_rcnn.yaml")
    found["SETS"]["masks"] = one_set("detection", "s_few_masks", "masks")
    tiny.write()
    suite = tiny.parse()
    monkeypatch.setitem(vars(MetadataCatalog.get("s_boxes")), "evaluator_type", "of_another_project")
    with pytest.raises(ConfigError) as caught:
        check_heads(suite)
    first, second = caught.value.problems
    assert first.startswith(
        "TRANSFER.SETS.boxes.TEST: evaluator_type of the data set 's_boxes' is 'of_another_project'"
    )
    assert second.startswith("TRANSFER.SETS.masks.TRAIN ['s_few_masks']: 1 of 8 objects have no mask")


def test_a_cell_has_no_sampler_but_the_usual_one(shared: TinySuite) -> None:
    suite = shared.parse("TRANSFER.PROTOCOLS.dense.OPTS", "[DATALOADER.SAMPLER_TRAIN, RepeatFactorTrainingSampler]")
    with pytest.raises(ConfigError, match=r"dense\.CONFIG: DATALOADER\.SAMPLER_TRAIN is 'RepeatFactor.*', but a cell"):
        check_heads(suite)


def test_odd_overrides_of_a_suite(shared: TinySuite) -> None:
    with pytest.raises(ConfigError, match="should be pairs of key and value"):
        check_suite(str(shared.file), ["TRANSFER.NAME"])


# Settings


CHANGES = {
    "TRANSFER.PROTOCOLS.probe.IMAGE_SIZE": ("32", {"probe"}),
    "TRANSFER.PROTOCOLS.dense.OPTS": ("[SOLVER.MAX_ITER, 5]", {"dense"}),
    "TRANSFER.PROTOCOLS.dense.CONFIG": ("configs/transfer/heads/faster_rcnn.yaml", {"dense"}),
    "XLEARNER.DATASETS.s_areas.IGNORE_VALUE": ("254", {"linear"}),
    "TRANSFER.SETS.boxes.TEST": ("s_areas", {"dense"}),
    "MODEL.RESNETS.DEPTH": ("101", {"probe", "knn", "dense", "linear"}),
    "MODEL.PIXEL_MEAN": ("[0.0, 0.0, 0.0]", {"probe", "knn", "dense", "linear"}),
    "SOLVER.AMP.ENABLED": ("True", {"probe", "knn", "dense", "linear"}),
    "TRANSFER.NAME": ("other", set()),
    "TRANSFER.SETS.pics.PROTOCOLS": ("[probe, knn, few]", set()),
    "TRANSFER.PROTOCOLS.few.IMAGES_PER_CLASS": ("3", set()),
}


@pytest.mark.parametrize("key", CHANGES)
def test_settings_differ_for_the_cells_that_a_change_bears_on(shared: TinySuite, key: str) -> None:
    value, expected = CHANGES[key]

    def settings(*opts: str) -> dict[str, str]:
        suite = shared.parse(*opts)
        pairs = (("pics", "probe"), ("pics", "knn"), ("boxes", "dense"), ("areas", "linear"))
        return {p: suite.settings(suite.sets[s], suite.protocols[p]) for s, p in pairs}

    before, after = settings(), settings(key, value)
    assert {name for name in before if before[name] != after[name]} == expected


def test_settings_differ_with_a_file_that_the_heads_config_is_based_on(tiny: TinySuite) -> None:
    base = tiny.root / "base.yaml"
    (tiny.root / "head.yaml").write_text(f"_BASE_: {base}\n")
    tiny.content["TRANSFER"]["PROTOCOLS"]["dense"]["CONFIG"] = str(tiny.root / "head.yaml")
    tiny.write()
    found = set()
    for steps in (3, 4):
        base.write_text(f"SOLVER: {{MAX_ITER: {steps}}}\n")
        suite = tiny.parse()
        found.add(suite.settings(suite.sets["boxes"], suite.protocols["dense"]))
    assert len(found) == 2


def test_protocols_share_features_unless_these_differ(shared: TinySuite) -> None:
    suite = shared.parse("TRANSFER.PROTOCOLS.knn.FEATURE", "res4")
    spec = suite.sets["pics"]
    probe, few, knn = (suite.feature_settings(spec, suite.protocols[name]) for name in ("probe", "few", "knn"))
    assert probe == few != knn
    other = shared.parse("MODEL.RESNETS.DEPTH", "101")
    assert other.feature_settings(spec, other.protocols["probe"]) != probe


def test_a_protocol_may_freeze_norms_and_leaves_pixels_alone(shared: TinySuite) -> None:
    """The file is converted to the suite's pixels."""
    suite = shared.parse("TRANSFER.PROTOCOLS.dense.OPTS", "[MODEL.RESNETS.NORM, FrozenBN]")
    assert fine_tune_config(suite, suite.sets["boxes"], suite.protocols["dense"]).MODEL.RESNETS.NORM == "FrozenBN"
    suite = shared.parse("TRANSFER.PROTOCOLS.dense.OPTS", "[INPUT.FORMAT, RGB]")
    with pytest.raises(ConfigError, match=r"dense\.OPTS sets INPUT\.FORMAT to 'RGB', but it holds for all .* 'BGR'"):
        check_heads(suite)
