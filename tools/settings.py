"""Write docs/SETTINGS.md from the comments of xlearner_d2/settings.py and the docstrings of the records.

python tools/settings.py [--check]
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs/SETTINGS.md"
RECORDS = {
    "XLEARNER.DATASETS": ("specs.py", "DatasetSpec"),
    "XLEARNER.SOURCES": ("specs.py", "SourceSpec"),
    "XLEARNER.BRANCHES": ("modeling/branches.py", "BranchSpec"),
    "XLEARNER.PROBES": ("specs.py", "ProbeSpec"),
    "TRANSFER.SETS": ("transfer/suite.py", "SetSpec"),
    "TRANSFER.PROTOCOLS": ("transfer/suite.py", "ProtocolSpec"),
}
HEADER = """# Settings

What this project adds to Detectron2's settings. Written by `python tools/settings.py`; edit the comments there instead:
`xlearner_d2/settings.py`, `xlearner_d2/specs.py`, `xlearner_d2/modeling/branches.py`, `xlearner_d2/transfer/suite.py`.

"""


def read_settings(source: str) -> list[tuple[str, str, str]]:
    """(name, default, comment) of each assignment to a config node in settings.py, in order."""
    nodes = {"cfg": ""}
    comment: list[str] = []
    found = []
    for line in source.splitlines():
        text = line.strip()
        section = re.fullmatch(r"(\w+)\.(\w+(?:\.\w+)?) = (\w+) = CfgNode\(\)", text)
        setting = re.fullmatch(r"(\w+)\.(\w+(?:\.[A-Z_]+)*) = (.+)", text)
        if section and section[1] in nodes:
            nodes[section[3]] = f"{nodes[section[1]]}{section[2]}."
        elif text.startswith("# "):
            comment.append(text[2:])
            continue
        elif setting and setting[1] in nodes and setting[2].replace(".", "").replace("_", "").isupper():
            default = setting[3] if "CfgNode" not in setting[3] else "none"
            found.append((nodes[setting[1]] + setting[2], default, " ".join(comment)))
        comment = []
    return found


def read_record(source: str, name: str) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of each field of a dataclass."""
    tree = ast.parse(source)
    record = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in record.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    known = "|".join(field.target.id for field in fields)  # type: ignore[union-attr]
    keys_of_entry = rf"(?:{known})(?:, (?:{known}))*"
    text = re.sub(r"\n\s{8,}(?=\S)", " ", (ast.get_docstring(record) or "").split("Attributes:")[1])
    meaning = dict(re.findall(rf"^ {{4}}({keys_of_entry}): (.+)$", text, re.MULTILINE))
    meanings = {key: value.strip() for keys, value in meaning.items() for key in keys.split(", ")}
    rows = []
    for field in fields:
        key = field.target.id  # type: ignore[union-attr]
        if key != "name":
            default = ast.unparse(field.value) if field.value else "needed"
            rows.append((key.upper(), default, meanings.get(key, "")))
    return rows


def table(rows: list[tuple[str, str, str]], first: str) -> str:
    lines = [f"| {first} | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |" for name, default, meaning in rows]
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    keys = (ROOT / "xlearner_d2/settings.py").read_text(encoding="utf-8")
    parts = [table(read_settings(keys), "setting")]
    for section, (file, record) in RECORDS.items():
        source = (ROOT / "xlearner_d2" / file).read_text(encoding="utf-8")
        parts.append(f"## A record of `{section}`\n\n{table(read_record(source, record), 'key')}")
    return HEADER + "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not up to date")
    if parser.parse_args().check:
        if OUTPUT.read_text(encoding="utf-8") != render():
            sys.exit(f"{OUTPUT} is not up to date: run python tools/settings.py")
        return
    OUTPUT.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
