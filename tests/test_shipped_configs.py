"""Every config that is shipped fits together, by the command a user would check it with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_ins import write_for

from xlearner_d2 import load_config

ROOT = Path(__file__).resolve().parents[1]
TESTED = {
    "lazy/openmoji.py",
    "lazy/real.py",
    "quick/openmoji.yaml",
    "quick/real.yaml",
    "transfer/openmoji12.yaml",
    "transfer/openmoji12_ablation.yaml",
    "transfer/openmoji12_pretrain.yaml",
    "transfer/openmoji12_few_pretrain.yaml",
    "transfer/openmoji12_few_study.yaml",
    "transfer/openmoji12_study.yaml",
    "transfer/paper12.yaml",
    "transfer/real12.yaml",
    "transfer/real12_few_pretrain.yaml",
    "transfer/real12_few_study.yaml",
    "transfer/real12_pretrain.yaml",
    "transfer/real12_study.yaml",
    "transfer/real12_trunk_study.yaml",
}


def dry_run(script, *options, data):
    return subprocess.run(
        [sys.executable, script, "--dry-run", *map(str, options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(data)},
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Not them, but small sets of noise where the configs look for them."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("quick/real.yaml", "transfer/real12_pretrain.yaml", "transfer/real12.yaml"):
        write_for(ROOT / "configs" / name, root)
    return root


def test_nothing_is_shipped_untested():
    configs = ROOT / "configs"
    found = [path for folder in ("lazy", "quick", "transfer") for path in (configs / folder).glob("*.*")]
    assert {str(path.relative_to(configs)) for path in found} == TESTED


def test_quick_openmoji(openmoji, tmp_path):
    config = ["--config-file", "configs/quick/openmoji.yaml", "OUTPUT_DIR", tmp_path / "out"]
    done = dry_run("train_net.py", *config, data=openmoji)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "icons     classification" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["openmoji", "real"])
def test_lazy_configs_have_the_settings_of_the_quick_ones(name):
    python, written = load_config(ROOT / f"configs/lazy/{name}.py"), load_config(ROOT / f"configs/quick/{name}.yaml")
    assert yaml.safe_load(python.dump()) == yaml.safe_load(written.dump())


def test_quick_real(photographs, tmp_path):
    config = ["--config-file", "configs/quick/real.yaml", "OUTPUT_DIR", tmp_path / "out"]
    done = dry_run("train_net.py", *config, data=photographs)
    assert done.returncode == 0, done.stderr
    assert "facade    detection" in done.stdout


@pytest.mark.parametrize(
    ("name", "subject", "found"),
    [
        ("study", "squeezed", "squeezed: xlearner/student_d2.pth"),
        ("few_study", "squeezed", "single/areas: single_areas/expanded.pth:segmentation"),
        ("ablation", "default", "separate_teacher: separate_teacher/student_d2.pth"),
    ],
)
def test_studies_openmoji(openmoji, tmp_path, name, subject, found):
    study = ["--study", f"configs/transfer/openmoji12_{name}.yaml", "--subject", subject, "--output", tmp_path / "out"]
    done = dry_run("tools/study.py", *study, data=openmoji)
    assert done.returncode == 0, done.stderr
    assert found in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["real12_study", "real12_few_study"])
def test_study_real(photographs, tmp_path, name):
    study = ["--study", f"configs/transfer/{name}.yaml", "--output", tmp_path / "out"]
    done = dry_run("tools/study.py", *study, data=photographs)
    assert done.returncode == 0, done.stderr
    assert "single/coco_boxes: single_coco_boxes/expanded.pth:detection" in done.stdout


def test_study_real_with_a_trunk_first(photographs, tmp_path):
    study = ["--study", "configs/transfer/real12_trunk_study.yaml"]
    done = dry_run("tools/study.py", *study, "--output", tmp_path / "out", data=photographs)
    assert done.returncode == 0, done.stderr
    assert "squeezed/trunk_first: trunk_first/student_d2.pth" in done.stdout


def test_suite_paper_names_all_that_is_missing(tmp_path):
    suite = ["--suite", "configs/transfer/paper12.yaml", "--output", tmp_path / "out"]
    done = dry_run("tools/transfer.py", *suite, data=tmp_path)
    assert done.returncode != 0
    assert "The suite has 25 problems" in done.stderr
    for place in ("cifar-10-batches-py", "food-101", "SUN397", "VOC2007", "widerface", "VOC2012/JPEGImages"):
        assert place in done.stderr
    assert not (tmp_path / "out").exists()
