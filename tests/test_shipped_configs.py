"""Every config that is shipped fits together, by the command a user would check it with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/quick").glob("*.yaml"))


def dry_run(config, data, tmp_path):
    output = ["OUTPUT_DIR", str(tmp_path / "out")]
    return subprocess.run(
        [sys.executable, "train_net.py", "--config-file", str(config), "--dry-run", *output],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(data)},
    )


def test_nothing_is_shipped_untested():
    assert {str(path) for path in CONFIGS} == {"configs/quick/openmoji.yaml", "configs/quick/real.yaml"}


def test_openmoji(tmp_path):
    sets = ["up_cls", "up_det", "up_seg", "down_cls_food"]
    make = [sys.executable, "datasets/prepare_openmoji.py", "--scale", "0.03", "--output", str(tmp_path / "openmoji")]
    subprocess.run([*make, "--only", *sets], cwd=ROOT, check=True, capture_output=True)
    done = dry_run("configs/quick/openmoji.yaml", tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "icons     classification" in done.stdout
    assert not (tmp_path / "out").exists()


def test_real(tmp_path):
    root = Path(os.environ.get("DETECTRON2_DATASETS", "nowhere"))
    if not (root / "upstream/cls_caltech99").is_dir():
        pytest.skip("needs the photographs that configs/quick/real.yaml names, under $DETECTRON2_DATASETS")
    done = dry_run("configs/quick/real.yaml", root, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "facade    detection" in done.stdout
