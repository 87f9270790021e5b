"""Run the commands of the documentation, in a folder of their own, on small data; say of each what was done with it.

python tools/docs_commands.py            # what `make docs-check` runs
python tools/docs_commands.py --list     # what would be done, without doing it

`RULES` decide: a command is run as it stands (with a few settings more that make it short, where there are any), or its
options, files and settings are checked, or it is left out; the last two with a reason. A command without a rule is an
error.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import docs_example

ROOT = Path(__file__).resolve().parents[1]
#: Pages that make what others use come first.
FIRST = ("datasets/README.md", "docs/CONFIGS.md", "README.md")
#: What a command begins with, after assignments of variables.
PROGRAMS = {"python", "python3", "pip", "make", "torchrun", "srun", "tensorboard", "xlearner-d2", "source"}
#: What else may begin a line of a shell script.
SHELL = {"set", "export", "cd"}
_FENCE = re.compile(r"^\s*(```+|~~~+)\s*(\w*)")
_ASSIGNMENT = re.compile(r"^(?:\w+=\S*\s+)+")
_COMMENT = re.compile(r"\s+#\s.*$")

#: Settings that make a run of the demo short.
SHORT = (
    "SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1 XLEARNER.SQUEEZE.SOLVER.MAX_ITER 1 XLEARNER.SQUEEZE.SOLVER.WARMUP_ITERS 1 "
    "XLEARNER.SQUEEZE.BN_RECALIBRATION_BATCHES 1 DATALOADER.NUM_WORKERS 0"
)
PHOTOGRAPHS = "needs photographs that are not shipped"
LONG = "takes hours or measures this machine"


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line, without its comment."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done with the commands that a pattern fits; the first rule that fits counts.

    Attributes:
        pattern: regular expression, searched for in the command.
        how: run, check (options, files and settings), or leave out.
        why: the reason for not running it.
        add: what is put behind the command; options, which begin with two hyphens, behind its script.
        copy: (from, to) of a file that stands for one that the reader would have.
        swap: (old, new) text within the command.
    """

    pattern: str
    how: str = "run"
    why: str = ""
    add: str = ""
    copy: tuple[str, str] | None = None
    swap: tuple[str, str] | None = None


RULES = (
    # Made first, used by others.
    Rule(pattern=r"tools/docs_example\.py$"),
    Rule(pattern=r"tools/(settings|reference|draw_stages)\.py$", add="--check"),
    Rule(pattern=r"prepare_openmoji\.py$", add="--scale 0.1"),
    Rule(pattern=r"configs/quick/openmoji\.yaml$", add=SHORT),
    Rule(pattern=r"configs/lazy/openmoji\.py$", add=f"{SHORT} OUTPUT_DIR output/lazy"),  # beside that
    # Others' programs, and names.
    Rule(
        pattern=r"^(python (train_net|tools/\w+)\.py|xlearner-d2 [a-z-]+)$",
        how="leave out",
        why="names a command without its options; tests/test_commands.py runs each with --help",
    ),
    Rule(pattern=r"^make docs", how="leave out", why="is what runs this, or builds these pages"),
    Rule(pattern=r"^make demo", how="leave out", why="sets up .venv first; its two commands are run by themselves"),
    Rule(pattern=r"^make", how="leave out", why="is what .ci/run runs"),
    Rule(pattern=r"^pip install", how="leave out", why="would change the environment"),
    Rule(pattern=r"^source ", how="leave out", why="what it does is done here by PATH"),
    Rule(pattern=r"^tensorboard", how="leave out", why="serves until it is stopped"),
    Rule(pattern=r"path/to/detectron2", how="leave out", why="needs a checkout of Detectron2, and COCO"),
    Rule(pattern=r"torchvision import datasets", how="leave out", why="downloads"),
    # Several workers and machines. torchrun's own options are torch's; what follows them is ours.
    Rule(pattern=r"--nnodes|--num-machines|srun", how="check", why="needs several machines"),
    Rule(pattern=r"--max-restarts", how="check", why="an ellipsis stands for the options of a cluster"),
    Rule(pattern=r"--num-gpus 8", add="--dry-run"),
    Rule(pattern=r"--nproc-per-node 8", add="--dry-run", swap=("--nproc-per-node 8", "--nproc-per-node 2")),
    # What cannot be run here.
    Rule(pattern=r"tools/replay\.py", how="check", why="needs a failed step; tests/engine/test_failure.py makes one"),
    Rule(pattern=r"benchmarks/(run|soak)\.py", how="check", why=LONG),
    Rule(pattern=r"configs/(quick/real|lazy/real|transfer/real12)", how="check", why=PHOTOGRAPHS),
    Rule(pattern=r"configs/transfer/paper12", how="check", why=PHOTOGRAPHS),
    Rule(pattern=r"XLEARNER\.SQUEEZE\.TEACHER output/expanded\.pth", how="check", why=LONG),
    Rule(pattern=r"openmoji12_(few_)?pretrain\.yaml (SOLVER|XLEARNER\.STAGE squeeze)", how="check", why=LONG),
    Rule(pattern=r"output/lazy/model_final\.pth", how="check", why="needs a run that tests/test_lazy.py makes"),
    Rule(pattern=r"NAME=PATH|FOLDER", how="check", why="has placeholders"),
    # Checks of its own.
    Rule(
        pattern=r"single/icons=output/icons/expanded\.pth",
        add="--dry-run",
        copy=("output/openmoji/expanded.pth", "output/icons/expanded.pth"),
    ),
    Rule(
        pattern=r"openmoji12_study\.yaml --seeds (1|3 --jobs)",
        how="check",
        why="differs in numbers from one that is run",
    ),
    Rule(pattern=r"tools/(transfer|study)\.py", add="--dry-run"),
    Rule(
        pattern=r"XLEARNER\.EXTEND output/before/expanded\.pth$",
        add="--dry-run",
        copy=("output/mine/expanded.pth", "output/before/expanded.pth"),
    ),
    Rule(pattern=r"XLEARNER\.STAGE expand XLEARNER\.SOURCES", add="--dry-run"),
    Rule(pattern=r"configs/lazy/openmoji\.py --dry-run"),
    Rule(pattern=r"tools/docs_commands\.py", how="leave out", why="is what runs this"),
    Rule(pattern=r"train_net\.py --config-file mine\.yaml( --(dry-run|resume|eval-only))?$"),
    Rule(pattern=r"mine\.yaml XLEARNER\.TRUNK_STEPS", add=f"{SHORT} XLEARNER.TRUNK_STEPS 1"),
    Rule(pattern=r"tools/(browse_data|export|report)\.py"),
    Rule(pattern=r"(python -m xlearner_d2|xlearner-d2)"),
)


def pages() -> list[str]:
    """All pages, those that make what others use first."""
    found = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
    return [*FIRST, *(page for page in found if page not in FIRST)]


def first_word(line: str) -> str:
    return (_ASSIGNMENT.sub("", line.strip()).split() or [""])[0]


def commands_of(page: str, text: str) -> Iterator[Command]:
    """The commands of a page: in blocks, indented or fenced, and within lines of text, in backticks.

    Raises:
        ValueError: for a line of a shell block that begins with no known program.
    """
    fence, language, start, waiting = "", "", 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = _FENCE.match(line)
        if mark and (not fence or line.strip() == fence):
            fence, language = ("", "") if fence else (mark[1], mark[2])
            continue
        block = bool(fence) or line.startswith("    ")
        if not block:
            yield from _inline(page, number, line)
            continue
        if waiting:
            waiting += " " + line.strip()
        elif first_word(line) in PROGRAMS and language in ("", "bash", "sh", "console"):
            start, waiting = number, line.strip()
        elif language in ("bash", "sh", "console"):
            _check_shell(page, number, line)
        if waiting.endswith("\\"):
            waiting = waiting[:-1].rstrip()
        elif waiting:
            yield Command(page, start, _COMMENT.sub("", waiting))
            waiting = ""


def _inline(page: str, number: int, line: str) -> Iterator[Command]:
    for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
        if first_word(text) in PROGRAMS and " " in text.strip():
            yield Command(page, number, text.strip())


def _check_shell(page: str, number: int, line: str) -> None:
    word = line.strip()
    if word and not word.startswith("#") and first_word(line) not in SHELL and not re.match(r"\w+=", word):
        raise ValueError(f"{page}:{number}: {word!r} begins with no program of docs_commands.PROGRAMS.")


def all_commands() -> list[Command]:
    """Those of all pages, each text once."""
    found: dict[str, Command] = {}
    for page in pages():
        for command in commands_of(page, (ROOT / page).read_text(encoding="utf-8")):
            found.setdefault(command.text, command)
    return list(found.values())


def rule_for(command: Command) -> Rule:
    """The first rule whose pattern fits.

    Raises:
        ValueError: when none does.
    """
    for rule in RULES:
        if re.search(rule.pattern, command.text):
            return rule
    raise ValueError(f"{command}: there is no rule for it in docs_commands.RULES.")


def check_options(text: str) -> list[str]:
    """What is wrong with the options, files and settings of a command that is not run."""
    words = [word.rstrip("…") for word in shlex.split(_ASSIGNMENT.sub("", text)) if word != "…"]
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    if not scripts or not (ROOT / words[scripts[0]]).is_file():
        return ["names no script of the project"]
    script, arguments = words[scripts[0]], words[scripts[0] + 1 :]
    missing = [word for word in arguments if word.startswith("configs/") and not (ROOT / word).is_file()]
    if missing:
        return [f"there is no file {word}" for word in missing]
    parser = _parser(script)
    if parser is None:
        shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        options = [word for word in arguments if word.startswith("--")]
        return [f"{script} has no option {word}" for word in options if not re.search(rf"{word}\b", shown)]
    return _parse(parser, arguments)


def _parser(script: str) -> argparse.ArgumentParser | None:
    """Of a command of the package; None for other scripts."""
    from xlearner_d2.commands import COMMANDS

    name = "train" if script == "train_net.py" else Path(script).stem
    if name not in COMMANDS or not script.startswith(("tools/", "train_net")):
        return None
    parser: argparse.ArgumentParser = importlib.import_module(f"xlearner_d2.commands.{name}").make_parser()
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    from xlearner_d2.config import load_config
    from xlearner_d2.specs import ConfigError

    try:
        args = parser.parse_args(list(arguments))
    except SystemExit:
        return [f"{shlex.join(arguments)} is not accepted by its parser"]
    file = getattr(args, "config_file", "")
    try:
        if file.startswith("configs/"):
            load_config(ROOT / file, args.opts)
    except ConfigError as error:
        return error.problems
    return []


def make_folder(folder: Path) -> None:
    """Where commands run: the project, by links, and small data with the config of the README and a larger one."""
    folder.mkdir(exist_ok=True)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "build", "data", "mine.yaml", "larger.yaml"):
            link = folder / path.name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(path)  # fails at what somebody else keeps there
    docs_example.write_all(folder)


def spelled(command: Command, rule: Rule) -> str:
    """The command as it is run."""
    text = command.text.replace(*rule.swap) if rule.swap else command.text
    if rule.add.startswith("--"):  # options go before settings
        return re.sub(r"\.py(?= |$)", f".py {rule.add}", text, count=1)
    return f"{text} {rule.add}".strip()


def run(command: Command, rule: Rule, folder: Path, *, limit: float) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder, by a shell that finds this Python first."""
    if rule.copy:
        target = folder / rule.copy[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / rule.copy[0], target)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {"PATH": path, "DETECTRON2_DATASETS": str(folder / "data"), "CI": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        spelled(command, rule),
        shell=True,
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def perform(command: Command, rule: Rule, folder: Path, *, limit: float) -> list[str]:
    """Do what the rule says; return what is wrong."""
    if rule.how == "leave out":
        return []
    if rule.how == "check":
        return check_options(command.text)
    try:
        done = run(command, rule, folder, limit=limit)
    except subprocess.TimeoutExpired:
        return [f"it took more than {limit:g} s"]
    if done.returncode:
        return [f"it ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"]
    return []


def describe(command: Command, rule: Rule) -> str:
    """One line: what is done with a command, and why it is not run as it stands."""
    parts = [f"{rule.how:9} {command}"]
    if spelled(command, rule) != command.text:
        parts.append(f"[as: {spelled(command, rule)}]")
    return "   ".join([*parts, *([f"({rule.why})"] if rule.why else [])])


def check_pages(folder: Path, *, only: str, limit: float) -> list[str]:
    """Do what the rules say with all commands, printing a line for each; return what is wrong."""
    failed, counts = [], {"run": 0, "check": 0, "leave out": 0}
    for command in all_commands():
        rule = rule_for(command)
        if not re.search(only, command.text):
            continue
        start = time.monotonic()
        wrong = perform(command, rule, folder, limit=limit)
        counts[rule.how] += 1
        print(f"{'FAILED: ' if wrong else ''}{describe(command, rule)}   {time.monotonic() - start:.0f} s", flush=True)
        failed += [f"{command}: {problem}" for problem in wrong]
    print(f"{counts['run']} commands run, {counts['check']} not run but checked, {counts['leave out']} left out.")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what would be done, do nothing")
    parser.add_argument("--only", default="", metavar="REGEX", help="only commands in which this is found")
    parser.add_argument("--folder", type=Path, help="run there, and keep it (default: a temporary one)")
    parser.add_argument("--limit", type=float, default=600, help="seconds a command may take (default: %(default)s)")
    args = parser.parse_args()
    if args.list:
        print("\n".join(describe(command, rule_for(command)) for command in all_commands()))
        return
    with tempfile.TemporaryDirectory(prefix="docs_commands_") as name:
        folder = (args.folder or Path(name)).resolve()
        make_folder(folder)
        failed = check_pages(folder, only=args.only, limit=args.limit)
    if failed:
        sys.exit("\n\n".join(failed))


if __name__ == "__main__":
    main()
