"""Write docs/SOURCES.md, docs/CONFIGS.md and docs/COMMANDS.md from the code, the configs' headers and the parsers.

python tools/reference.py [--check]
"""

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from settings import read_record

from xlearner_d2.commands import COMMANDS
from xlearner_d2.data import builtin
from xlearner_d2.data.builtin.public_sets import public_sets
from xlearner_d2.data.mappers import MAPPERS
from xlearner_d2.evaluation import build as evaluation
from xlearner_d2.modeling.heads import CLASS_COUNTS, NEEDED_CLASSES
from xlearner_d2.specs import DATASET_KEYS

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = "Written by `python tools/reference.py`; edit {} instead."
PROGRAMS = {name: "train_net.py" if name == "train" else f"tools/{name}.py" for name in COMMANDS}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)])


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def first_sentence(thing: Any) -> str:
    """Of a docstring; nothing without one, also where a base class has one."""
    text = inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:(?=`)", "", text.replace("``", "`"))


def format_section(name: str) -> str:
    """What a FORMAT is, and its keys."""
    module: ModuleType = sys.modules[builtin._FORMATS[name].__module__]
    fields = {key: (default, meaning) for key, default, meaning in _dataset_fields()}
    needed, optional = DATASET_KEYS[name]
    rows = [(f"`{key}`", "needed", fields[key][1]) for key in fields if key in needed]
    rows += [(f"`{key}`", f"`{fields[key][0]}`", fields[key][1]) for key in fields if key in optional]
    return f"### `{name}`\n\n{inspect.cleandoc(module.__doc__ or '')}\n\n{table(('key', 'default', 'meaning'), rows)}"


def _dataset_fields() -> list[tuple[str, str, str]]:
    found = read_record((ROOT / "xlearner_d2/specs.py").read_text(encoding="utf-8"), "DatasetSpec")
    return [
        (key, default, f"one of {code(DATASET_KEYS)}." if key == "FORMAT" else meaning)
        for key, default, meaning in found
    ]


def _heads() -> str:
    rows = []
    for name in dict.fromkeys([*NEEDED_CLASSES, *MAPPERS]):
        needed = NEEDED_CLASSES.get(name, ())
        counts = code(key for kind in needed for key in CLASS_COUNTS[kind])
        mapper = MAPPERS.get(name)
        shown = f"`{mapper.__module__.removeprefix('xlearner_d2.')}`" if mapper else "Detectron2's `DatasetMapper`"
        rows.append((f"`{name}`", code(needed) or "", counts, shown))
    return table(("`MODEL.META_ARCHITECTURE`", "metadata it needs", "settings that follow", "mapper"), rows)


def _evaluators() -> str:
    rows = []
    for kind, builder in evaluation._BUILDERS.items():
        names = re.findall(r"return (\w+)\(", inspect.getsource(builder))
        classes = [getattr(evaluation, name) for name in names]
        rows.append((f"`{kind}`", code(names), " ".join(filter(None, map(first_sentence, classes[-1:])))))
    return table(("`evaluator_type`", "evaluator", "what it is"), rows)


def sources_page() -> str:
    """Formats of data sets, heads and evaluators."""
    keys = [row for row in _dataset_fields() if row[0] in ("FORMAT", "LICENSE")]
    public = [
        (f"`{name}`", str(found.num_classes), ", ".join(found.parts) if not found.rule else "train, test")
        for name, found in sorted(public_sets().items())
    ]
    headlines = [(f"`{kind}`", f"`{metric}`") for kind, (metric, *_) in evaluation.METRICS.items()]
    return "\n\n".join(
        [
            "# Sources, formats and kinds",
            WRITTEN.format("the docstrings and tables there: `xlearner_d2/specs.py`, `data/`, `evaluation/`"),
            "The keys of a source are in [SETTINGS.md](SETTINGS.md); the folders and files of each format, with "
            "examples, in [datasets/README.md](../datasets/README.md); how to add a kind of your own, in "
            "[EXTENDING.md](EXTENDING.md).",
            "## Formats of `XLEARNER.DATASETS`",
            "Every record has these two:",
            table(
                ("key", "default", "meaning"), [(f"`{key}`", f"`{default}`", meaning) for key, default, meaning in keys]
            ),
            *map(format_section, DATASET_KEYS),
            "### The sets of `torchvision`",
            table(("`DATASET`", "classes", "`SPLIT`"), public),
            "## Heads",
            "What the meta-architecture of a source's `CONFIG` decides. Class counts are read from the metadata of the "
            "data set. Others than these are taken at their word, with Detectron2's mapper or that of `INPUT.MAPPER`.",
            _heads(),
            "## Evaluators",
            "The metadata of a data set name its `evaluator_type`; a classifier with `MULTI_LABEL` is evaluated as "
            "`multi_label`.",
            _evaluators(),
            "The number that stands for each kind of result, in tables and in `metrics.json`:",
            table(("result", "metric"), headlines),
        ]
    )


def config_section(path: Path) -> str:
    """A config's header, a line for each of its parts."""
    text = path.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)*", text)
    parts: list[str] = []
    for line in (header[0] if header else "").splitlines():
        words = line.removeprefix("#").strip()
        if parts and not re.match(r"[A-Z]\w*(?: \w+){0,3}: ", words):
            parts[-1] += f" {words}"
        else:
            parts.append(words)
    shown = [re.sub(r"^(Command: |Data: )(python .+)$", r"\1`\2`", part) for part in parts]
    return f"### `{path.relative_to(ROOT)}`\n\n" + "\n".join(f"- {part}" for part in shown)


def configs_page() -> str:
    """What each shipped config is for."""
    parts = [
        "# Shipped configs",
        WRITTEN.format("the header of a config"),
        "`_BASE_: configs/base.yaml` is the start of a config of yours in the project's folder; elsewhere, its path "
        "starts at your config.",
    ]
    titles = {
        ".": "Common",
        "heads": "Heads",
        "quick": "Runs",
        "lazy": "Runs, written in Python",
        "transfer": "Suites and studies",
        "transfer/heads": "Heads of suites",
    }
    for folder, title in titles.items():
        parts += [f"## {title}", *map(config_section, sorted((ROOT / "configs" / folder).glob("*.*")))]
    return "\n\n".join(parts)


def command_section(name: str) -> str:
    """A command's options."""
    parser: argparse.ArgumentParser = importlib.import_module(f"xlearner_d2.commands.{name}").make_parser()
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = f" {action.metavar}" if isinstance(action.metavar, str) else ""
        shown = ", ".join(f"`{name}{value}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        optional = not action.required or action.nargs in ("*", argparse.REMAINDER)
        given = action.default not in (None, False, "", [], argparse.SUPPRESS)
        default = f"`{action.default}`" if given else "" if optional else "needed"
        text = formatter._expand_help(action) if action.help else ""
        rows.append((shown, default, " ".join(re.sub(r"\s*\(default: [^)]*\)", "", text).split())))
    spelled = (
        f"In a checkout, `{PROGRAMS[name]}`; where it is installed in place, `xlearner-d2 {name.replace('_', '-')}`."
    )
    what = COMMANDS[name][0].upper() + COMMANDS[name][1:]
    return f"## {name.replace('_', '-')}\n\n{what}. {spelled}\n\n{table(('option', 'default', 'meaning'), rows)}"


def commands_page() -> str:
    """The options of every command."""
    makefile = re.findall(r'@echo "make (\w[\w-]*)\s+(.+)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    return "\n\n".join(
        [
            "# Commands",
            WRITTEN.format("the parsers in `xlearner_d2/commands/`"),
            "Where a command says so, settings can follow it as pairs of key and value: those of "
            "[SETTINGS.md](SETTINGS.md), and Detectron2's own.",
            *map(command_section, COMMANDS),
            "## make",
            table(("target", "what it does"), [(f"`{name}`", text) for name, text in makefile]),
        ]
    )


PAGES = {"SOURCES.md": sources_page, "CONFIGS.md": configs_page, "COMMANDS.md": commands_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is not up to date")
    check = parser.parse_args().check
    for name, render in PAGES.items():
        path, content = ROOT / "docs" / name, render() + "\n"
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != content):
            sys.exit(f"{path} is not up to date: run python tools/reference.py")
        if not check:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
