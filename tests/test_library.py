"""The project as a library: the tutorial runs as it is, and importing the package imports no more than it must."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xlearner_d2 import library, load_config
from xlearner_d2.engine.stopping import RunStopped

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_tutorial(openmoji: Path, tmp_path: Path) -> None:
    """All cells in one process, from a folder that has ``configs/``, as a notebook would be run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = tmp_path / "tutorial.py"
    ends = [
        "print(sorted(trained.metrics), student.depth)",
        "print(exported.path, exported.difference <= 1e-5)",
    ]
    script.write_text("\n".join([*code_cells(), *ends]))
    command = [sys.executable, str(script)]
    environment = {"DETECTRON2_DATASETS": str(openmoji), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [
        "['expanded', 'probes', 'squeezed', 'trivial'] 18",
        "output/tutorial/hub True",
    ]
    assert (tmp_path / "output/tutorial/hub/README.md").is_file()


def test_the_tutorial_is_short_and_kept_without_results() -> None:
    lines = [line for cell in code_cells() for line in cell.splitlines() if line.strip()]
    assert len(lines) <= 20
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)


def test_importing_the_package_leaves_the_engine_out() -> None:
    code = "import sys, xlearner_d2; print([name for name in sys.modules if name.startswith('xlearner_d2.engine')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name() -> None:
    import xlearner_d2

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        xlearner_d2.trian  # noqa: B018


def test_a_run_that_stops_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that ends with an exit code alone would say nothing."""

    def stop(*args: Any) -> None:
        raise RunStopped("The disk is full.")

    monkeypatch.setattr(library, "run", stop)
    with pytest.raises(RunStopped, match=r"^The disk is full\.$"):
        library.train(load_config(ROOT / "configs/base.yaml"))
    assert capsys.readouterr().err == "error: The disk is full.\n"
