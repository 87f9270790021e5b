"""The page of settings says what the code has."""

import subprocess
import sys
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from xlearner_d2 import add_xlearner_config

ROOT = Path(__file__).resolve().parents[1]


def test_settings_page_is_up_to_date():
    done = subprocess.run([sys.executable, "tools/settings.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
