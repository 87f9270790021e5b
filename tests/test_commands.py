"""``python -m xlearner_d2`` and the scripts of a checkout are the same commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from xlearner_d2 import __main__ as package
from xlearner_d2.commands import COMMANDS, start

ROOT = Path(__file__).resolve().parents[1]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["xlearner-d2", *arguments])
    package.main()


def test_every_module_is_listed_and_has_a_script() -> None:
    modules = {path.stem for path in (ROOT / "xlearner_d2/commands").glob("*.py")} - {"__init__"}
    assert modules == set(COMMANDS)
    scripts = {name: ROOT / ("train_net.py" if name == "train" else f"tools/{name}.py") for name in COMMANDS}
    assert all(f'start("{name}")' in path.read_text() for name, path in scripts.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spelled = name.replace("_", "-")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, spelled, "--help")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: xlearner-d2 {spelled} ")


def test_the_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch)
    shown = capsys.readouterr().out
    assert all(what in shown for what in COMMANDS.values())


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="'trian' is no command"):
        call(monkeypatch, "trian")


def test_wrong_input_gets_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no checkpoint"):
        call(monkeypatch, "export", str(tmp_path / "none.pth"), "--to", "d2")


def test_from_another_folder_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xlearner_d2", "train", "--config-file", "none.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--num-gpus", "--num-machines"])
def test_no_worker_is_too_few(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    config = str(ROOT / "configs/base.yaml")
    with pytest.raises(SystemExit, match=f"{option} is 0, but at least 1 is expected"):
        start("train", ["--config-file", config, "--dry-run", option, "0"])
