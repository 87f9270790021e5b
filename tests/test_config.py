"""Config files and command-line settings: merged as a user expects, refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode

from xlearner_d2 import load_config
from xlearner_d2.config import check_config_file
from xlearner_d2.specs import ConfigError, parse_sources

TWO = """
XLEARNER:
  SOURCES:
    one: {TASK: detection, CONFIG: head.yaml, TRAIN: [a]}
    two: {TASK: segmentation, CONFIG: head.yaml, TRAIN: [b], IMS_PER_BATCH: 4}
  DATASETS:
    a: {FORMAT: coco, IMAGES: x, ANNOTATIONS: y}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


def names(cfg: CfgNode) -> list[str]:
    problems: list[str] = []
    found = [source.name for source in parse_sources(cfg.XLEARNER.SOURCES, problems)]
    assert problems == []
    return found


def test_defaults_are_complete(write: Write) -> None:
    cfg = load_config(write("SEED: 3"))
    assert (cfg.SEED, cfg.XLEARNER.SHARING, dict(cfg.XLEARNER.SOURCES)) == (3, "detached", {})


def test_base_is_merged_and_a_source_dropped_with_null(write: Write) -> None:
    write(TWO, "base.yaml")
    cfg = load_config(write("_BASE_: base.yaml\nXLEARNER: {SOURCES: {one: null, two: {LOSS_WEIGHT: 2.0}}}"))
    assert names(cfg) == ["two"]
    assert (cfg.XLEARNER.SOURCES.two.IMS_PER_BATCH, cfg.XLEARNER.SOURCES.two.LOSS_WEIGHT) == (4, 2.0)


def test_several_bases(write: Write) -> None:
    write(TWO, "base.yaml")
    write("SEED: 5", "seed.yaml")
    cfg = load_config(write("_BASE_: [base.yaml, seed.yaml]"))
    assert (names(cfg), cfg.SEED) == (["one", "two"], 5)


def test_zoo_config_may_be_the_base(write: Write) -> None:
    """Even RetinaNet's, which computes its anchor sizes in a tag."""
    base = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg = load_config(write(f"_BASE_: {base}\nSEED: 1"))
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5


# The command line


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("LOSS_WEIGHT", "0.5", 0.5),  # at its default in the file
        ("LOSS_WEIGHT", "1e-3", 0.001),
        ("IMS_PER_BATCH", "8", 8),
        ("TEST", "[c, d]", ["c", "d"]),
        ("OPTS", "[MODEL.MASK_ON, true]", ["MODEL.MASK_ON", True]),
        ("TASK", "detection", "detection"),
    ],
)
def test_key_of_a_source_is_set(write: Write, key: str, text: str, value: Any) -> None:
    cfg = load_config(write(TWO), [f"XLEARNER.SOURCES.two.{key}", text])
    assert cfg.XLEARNER.SOURCES.two[key] == value
    assert names(cfg) == ["one", "two"]


def test_source_is_dropped_added_and_replaced(write: Write) -> None:
    record = "{TASK: x, CONFIG: c.yaml, TRAIN: [z]}"
    opts = ["XLEARNER.SOURCES.one", "null", "XLEARNER.SOURCES.new", record, "XLEARNER.SOURCES.new.LOSS_WEIGHT", "3"]
    cfg = load_config(write(TWO), opts)
    assert names(cfg) == ["two", "new"]
    assert cfg.XLEARNER.SOURCES.new == {"TASK": "x", "CONFIG": "c.yaml", "TRAIN": ["z"], "LOSS_WEIGHT": 3}


def test_data_set_is_set(write: Write) -> None:
    cfg = load_config(write(TWO), ["XLEARNER.DATASETS.a.IMAGES", "elsewhere"])
    assert cfg.XLEARNER.DATASETS.a.IMAGES == "elsewhere"


def test_plain_settings_are_merged_as_in_detectron2(write: Write) -> None:
    opts = ["SOLVER.BASE_LR", "0.5", "XLEARNER.SHARING", "shared", "XLEARNER.SQUEEZE.STAGES", "['res5']"]
    cfg = load_config(write(TWO), opts)
    assert (cfg.SOLVER.BASE_LR, cfg.XLEARNER.SHARING, cfg.XLEARNER.SQUEEZE.STAGES) == (0.5, "shared", ["res5"])


def test_null_stands_for_no_text(write: Write) -> None:
    cfg = load_config(write("XLEARNER: {COMPILE: null, SQUEEZE: {TEACHER: }}\nMODEL: {WEIGHTS: }"))
    assert (cfg.XLEARNER.COMPILE, cfg.XLEARNER.SQUEEZE.TEACHER, cfg.MODEL.WEIGHTS) == ("", "", "")


def test_an_empty_text_is_one(write: Write) -> None:
    opts = ["XLEARNER.SOURCES.one.SAMPLER", "", "XLEARNER.BRANCHES.it.WEIGHTS", "", "OUTPUT_DIR", ""]
    cfg = load_config(write(TWO), opts)
    assert (cfg.XLEARNER.SOURCES.one.SAMPLER, cfg.XLEARNER.BRANCHES.it.WEIGHTS, cfg.OUTPUT_DIR) == ("", "", "")


def test_setting_of_the_squeezes_solver(write: Write) -> None:
    """Whether or not the file has it already."""
    opts = ["XLEARNER.SQUEEZE.SOLVER.MAX_ITER", "7", "XLEARNER.SQUEEZE.SOLVER.BASE_LR", "0.5"]
    cfg = load_config(write("XLEARNER: {SQUEEZE: {SOLVER: {MAX_ITER: 5}}}"), opts)
    assert cfg.XLEARNER.SQUEEZE.SOLVER == {"MAX_ITER": 7, "BASE_LR": 0.5}


def test_one_config_is_not_changed_by_another(write: Write) -> None:
    path = write(TWO)
    load_config(path, ["XLEARNER.SOURCES.one", "null"])
    assert names(load_config(path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], r"no setting SOLVER\.BASE_LRR \(below SOLVER\)\. Did you mean 'BASE_LR'\?"),
        (["SOLVR.BASE_LR", "1"], r"no setting SOLVR\.BASE_LR \(below the top\)\. Did you mean 'SOLVER'\?"),
        (["XLEARNER.SHARE", "x"], r"no setting XLEARNER\.SHARE \(below XLEARNER\)\. Did you mean 'SHARING'\?"),
        (["SEED.X", "1"], r"no setting SEED\.X \(below SEED\)"),
        (["XLEARNER.SOURCES.tow.TASK", "x"], r"SOURCES\.tow\.TASK: there is no such record\. Did you mean 'two'\?"),
        (["XLEARNER.SOURCES.one.TRAIN", "[a"], r"SOURCES\.one\.TRAIN: .*'\[a' is not valid YAML"),
        (["XLEARNER.SQUEEZE.SOLVER.BASE_LR", "[a"], r"SOLVER\.BASE_LR: .*'\[a' is not valid YAML"),
        (["SEED"], r"should be pairs of key and value, got \['SEED'\]"),
        (["SEED", "many"], r"The command line: .*Type mismatch"),
    ],
)
def test_bad_command_line(write: Write, opts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(TWO), opts)


def test_all_unknown_settings_at_once(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"^The command line has 2 problems:"):
        load_config(write(TWO), ["A.B", "1", "SEED", "1", "C.D", "2"])


# Files


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file .*gone\.yaml"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 1", r"mine\.py should define 'settings', a dict with the keys of a YAML config"),
        ("settings = 3", r"mine\.py should define 'settings'"),
        ("settings = {'SEED': 1 / 0}", r"mine\.py: ZeroDivisionError: division by zero"),
        ("settings = {'SEED': }", r"mine\.py: SyntaxError"),
        ("settings = {'SEEED': 1}", r"(?s)mine\.py.*There is no setting SEEED .*Did you mean 'SEED'\?"),
        ("settings = {'SEED': 'three'}", r"mine\.py: .*SEED"),
        ("settings = {'SEED': '${nowhere}'}", r"mine\.py: InterpolationKeyError"),
    ],
)
def test_a_python_config_in_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "mine.py")


def test_a_python_config_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no config file .*gone\.py"):
        load_config(tmp_path / "gone.py")


def test_a_python_config_is_overridden_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("settings = {'SEED': 1, 'SOLVER': {'MAX_ITER': 7}}")
    cfg = load_config(tmp_path / "mine.py", ["SEED", "3"])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (3, 7)


def test_a_python_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("settings = {}")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.py")
    with pytest.raises(ConfigError, match=r"base\.py is a Python config, which train_net\.py reads, but a YAML file"):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO.replace("two:", "one:"), r"XLEARNER\.SOURCES\.one is given twice \(the second time in line 5\)"),
        ("SEED: 1\nSEED: 2", r"SEED is given twice \(the second time in line 2\)"),
        ("A: [{B: 1, B: 2}]", r"A\.B is given twice"),
        ("SEED: [1", r"(?s)config\.yaml is not valid YAML: .*line 1"),
        ("\tSEED: 1", r"config\.yaml is not valid YAML"),
        ("- SEED", r"should hold a mapping such as 'XLEARNER: …'"),
        ("", r"should hold a mapping such as 'XLEARNER: …'"),
        ("SEDE: 1", r"(?s)config\.yaml.*There is no setting SEDE \(below the top\)\. Did you mean 'SEED'\?"),
        ("XLEARNER: {SHARNG: x}", r"(?s)config\.yaml.*There is no setting XLEARNER\.SHARNG .*Did you mean 'SHARING'\?"),
        ("SEED: many", r"config\.yaml: Type mismatch"),
        (
            "XLEARNER: {DATASETS: {2017: {}}}",
            r"XLEARNER\.DATASETS\.2017 in line 1 is read as a value of the kind int, but",
        ),
        ("XLEARNER: {SOURCES: {on: {}}}", r"SOURCES\.on in line 1 is read as a value of the kind bool, but a name is"),
        (
            "XLEARNER: {IMPORTS: }\nOUTPUT_DIR:",
            r"1\. OUTPUT_DIR is empty \(null\), but.*'\./output'\.\n  2\. XLEARNER\.IMPORTS",
        ),
        ("? [1, 2]\n: 3", r"The file has a key in line 1 that is no name"),
        ("XLEARNER: &x {SOURCES: *x}", r"XLEARNER\.SOURCES contains itself"),
        ("_BASE_: {a: b}", r"_BASE_ should be a file or a list of files"),
        ("_BASE_: gone.yaml", r"There is no config file .*gone\.yaml"),
        ("_BASE_: config.yaml", r"config\.yaml is based on itself through _BASE_"),
        ("SEED: !!python/name:os.system", r"SEED has the YAML tag 'tag:.*python/name:os\.system' in line 1"),
        ("SEED: !mine 3", r"SEED has the YAML tag '!mine' in line 1, but plain values are expected"),
    ],
)
def test_bad_file(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x\.yaml is not valid YAML"):
        load_config(tmp_path / "x.yaml")


def test_base_with_a_double_key_is_named(write: Write) -> None:
    write("SEED: 1\nSEED: 2", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml: SEED is given twice"):
        load_config(write("_BASE_: base.yaml"))


def test_bases_that_go_round(write: Write) -> None:
    write("_BASE_: config.yaml", "base.yaml")
    with pytest.raises(ConfigError, match="is based on itself"):
        check_config_file(write("_BASE_: base.yaml"))


def test_code_in_a_base_does_not_run(write: Write, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    write(f"SEED: !!python/object/apply:os.mkdir [{sentinel}]", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml: SEED has the YAML tag"):
        load_config(write("_BASE_: [base.yaml]"))
    assert not sentinel.exists()
