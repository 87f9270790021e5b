"""The pages say what the code has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import settings
from detectron2.config import CfgNode, get_cfg

from xlearner_d2 import add_xlearner_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("tool", ["settings", "reference", "draw_stages"])
def test_what_is_generated_is_up_to_date(tool):
    done = subprocess.run([sys.executable, f"tools/{tool}.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_meaning_may_have_colons():
    record = """
class Record:
    '''One.

    Attributes:
        name: left out.
        list: a file with one image a line: those to read,
            and no others.
        first, second: both: alike.
    '''

    name: str
    list: str = ""
    first: int = 0
    second: int = 1
"""
    assert settings.read_record(record, "Record") == [
        ("LIST", "''", "a file with one image a line: those to read, and no others."),
        ("FIRST", "0", "both: alike."),
        ("SECOND", "1", "both: alike."),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def texts_of_the_code():
    """Every string in it, as Python reads it: neighbouring literals are one, and placeholders end one."""
    files = [path for folder in ("xlearner_d2", "tools", "datasets") for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join({node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)})


def test_every_message_of_the_errors_page_is_one_of_the_code():
    page, code = (ROOT / "docs/ERRORS.md").read_text(encoding="utf-8"), texts_of_the_code()
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) > 70
    for message in messages:
        parts = [part for part in message.split("…") if part.strip(" .,:")]
        assert parts, message
        for part in parts:
            assert part in code, message


def test_results_of_the_readme_are_those_of_the_results_page():
    readme, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/RESULTS.md"))
    rows = re.search(r"^## What it is worth so far\n.*?(^\|.*?)\n\n", readme, re.MULTILINE | re.DOTALL)
    numbers = re.findall(r"\d+\.\d", rows[1])
    assert len(numbers) > 12
    assert set(numbers) <= set(re.findall(r"\d+\.\d", results))


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode) and len(value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_added_setting_is_on_the_page_with_its_meaning():
    cfg = get_cfg()
    before = set(leaves(cfg))
    add_xlearner_config(cfg)
    page = (ROOT / "docs/SETTINGS.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for key in set(leaves(cfg)) - before:
        assert key in rows, key
        assert not rows[key].endswith("|  |"), key
