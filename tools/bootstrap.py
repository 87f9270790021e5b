"""Set up `.venv` from nothing: pinned packages, Detectron2, and this project, editable.

Needs only Python 3.11 or 3.12 and a package registry. Running it again does nothing until
a requirement file changes. A Detectron2 that the environment can import already, such as your own build
of upstream with its compiled operators, is kept.

    python3 tools/bootstrap.py [--venv DIR]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 12))
# Upstream's pure-Python tree, its projects and its model-zoo configs. The wheel's tag names CPython 3.10, so it
# has to be asked for by that tag.
DETECTRON2 = "sal-detectron2==0.7.2"
UV = "uv==0.13.9"
INPUTS = ("constraints.txt", "setup.py", "tools/bootstrap.py")


def fail(message: str) -> None:
    sys.exit(f"set-up stopped: {message}")


def run(*command: str | Path, what: str) -> None:
    """Run one step; on failure show its output and say which step it was."""
    print(f"  {what} …", flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT, text=True, capture_output=True)
    if done.returncode == 0:
        return
    output = (done.stdout + done.stderr).strip()
    print(output, file=sys.stderr)
    network = ("resolve", "connect", "timed out", "network", "dns", "certificate", "fetch", "retries")
    hint = (
        "The package registry could not be reached: check the network, the proxy and pip's settings, then run again."
        if any(word in output.lower() for word in network)
        else "The lines above are the installer's own."
    )
    fail(f"{what} failed with exit code {done.returncode}. {hint}")


def fingerprint() -> str:
    """Hash of everything that decides what gets installed; the project is installed as a link to its folder."""
    digest = hashlib.sha256(sys.version.encode() + os.fsencode(ROOT))
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def site_packages(target: Path) -> Path:
    return Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(target), "platbase": str(target)}))


def installer(python: Path) -> list[str | Path]:
    """uv where it can be had, which is faster; pip otherwise."""
    uv = python.parent / "uv"
    if not uv.exists():
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", UV], capture_output=True, text=True)
        if done.returncode:
            print("  uv is not available here; using pip, which is slower")
            return [python, "-m", "pip", "install", "-q"]
    return [uv, "pip", "install", "-q", "--python", python]


def install_detectron2(python: Path, install: list[str | Path], site: Path) -> None:
    probe = subprocess.run([str(python), "-W", "ignore", "-c", "import detectron2.modeling"], capture_output=True)
    if probe.returncode == 0:
        print("  keeping the Detectron2 that is installed")
        return
    what = f"installing Detectron2 ({DETECTRON2}, pure Python)"
    if "pip" in map(str, install[1:2]):
        run(*install, "--no-deps", "--python-version", "3.10", DETECTRON2, what=what)
    else:
        tag = "--python-version 3.10 --implementation cp --abi none --platform any"
        options = f"--no-deps --only-binary=:all: --upgrade {tag}".split()
        run(*install, *options, "--target", site, DETECTRON2, what=what)
    for operators in (site / "detectron2").glob("_C.*.so"):
        operators.unlink()  # compiled for CPython 3.10 only
    shutil.rmtree(site / "tools", ignore_errors=True)  # a top-level package the wheel should not carry


def make_environment(target: Path, python: Path) -> None:
    """Also where an earlier attempt was interrupted before it had pip; what is there of the environment stays."""
    try:
        if not python.exists():
            venv.create(target, with_pip=True)
        elif subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
            subprocess.run([python, "-m", "ensurepip", "--upgrade"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        hint = "On Debian and Ubuntu, install the package python3-venv of this Python's version"
        fail(f"making the environment {target} failed: {error}. {hint}, then run again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to create or update")
    target = parser.parse_args().venv.resolve()
    if sys.version_info[:2] not in SUPPORTED:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        fail(f"this is Python {sys.version.split()[0]}, but {wanted} is needed. Try: python3.12 tools/bootstrap.py")
    stamp, state = target / ".xlearner-stamp", fingerprint()
    if stamp.exists() and stamp.read_text() == state:
        return
    print(f"setting up {target} (about 6 GB, one to two minutes)")
    python = target / "bin" / "python"
    make_environment(target, python)
    install = installer(python)
    run(*install, "-r", "constraints.txt", what="installing the pinned packages")
    install_detectron2(python, install, site_packages(target))
    run(*install, "--no-deps", "--no-build-isolation", "-e", ".", what="installing xlearner_d2")
    stamp.write_text(state)
    print("set-up is complete")


if __name__ == "__main__":
    main()
