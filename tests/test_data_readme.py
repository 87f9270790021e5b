"""The records that the documentation shows are valid, and show every format with every key."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from xlearner_d2.specs import DATASET_KEYS, parse_datasets, parse_sources

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "datasets/README.md")


def blocks(page: str) -> list[Any]:
    """The YAML examples of a page."""
    found = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(text) for text in found]


def records(page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Data sets, of a whole config or by themselves."""
    for block in blocks(page):
        yield from block.get("XLEARNER", {}).get("DATASETS", {} if "XLEARNER" in block else block).items()


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_valid(page: str) -> None:
    assert list(records(page))
    for name, record in records(page):
        problems: list[str] = []
        assert [spec.name for spec in parse_datasets({name: record}, problems)] == [name]
        assert problems == []


@pytest.mark.parametrize("page", PAGES)
def test_sources_of_the_examples_are_valid(page: str) -> None:
    for block in blocks(page):
        if "XLEARNER" in block:
            problems: list[str] = []
            assert parse_sources(block["XLEARNER"]["SOURCES"], problems)
            assert problems == []


def test_every_key_of_every_format_is_shown() -> None:
    shown = defaultdict(set)
    for _, record in records("datasets/README.md"):
        shown[record["FORMAT"]] |= record.keys() - {"FORMAT"}
    expected = {kind: set(required | optional) for kind, (required, optional) in DATASET_KEYS.items()}
    assert {kind: expected[kind] - shown[kind] for kind in expected} == {kind: set() for kind in expected}
