"""What the documentation's site has beyond the pages in docs/, and that it loads nothing from elsewhere."""

import json

import docs_site
import pytest
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("README.md", "[a](docs/DESIGN.md#limits)", "[a](DESIGN.md#limits)"),
        ("README.md", "[a](datasets/README.md)", "[a](datasets/README.md)"),
        ("README.md", "![a](docs/assets/stages.svg)", "![a](assets/stages.svg)"),
        ("datasets/README.md", "[a](../docs/EXPORT.md)", "[a](../EXPORT.md)"),
        ("docs/DESIGN.md", "[a](RESULTS.md), [b](../README.md#start)", "[a](RESULTS.md), [b](index.md#start)"),
        ("docs/API.md", "[a](tutorial.ipynb)", "[a](TUTORIAL.md)"),
        ("docs/DESIGN.md", "[a](https://example.org/x), [b](#limits)", "[a](https://example.org/x), [b](#limits)"),
    ],
)
def test_links_follow_the_files(page, before, after):
    assert docs_site.rewrite_links(before, page) == after


def test_a_notebook_is_a_page():
    cells = [("markdown", ["# Title\n", "\n", "Text."]), ("code", ["x = 1\n", "x"])]
    content = json.dumps({"cells": [{"cell_type": kind, "source": source} for kind, source in cells]})
    assert docs_site.notebook_page(content) == "# Title\n\nText.\n\n```python\nx = 1\nx\n```\n"


def test_arguments_that_share_an_entry_have_one_each():
    before = "Sum.\n\n    Args:\n        mean, std: three numbers,\n            one a channel.\n        size: pixels."
    shared = "three numbers,\n            one a channel."
    after = f"Sum.\n\n    Args:\n        mean: {shared}\n        std: {shared}\n        size: pixels."
    assert docs_site.split_names(before) == after


def test_roles_are_left_out():
    assert docs_site.without_roles("As :func:`a.b` and :data:`C` do: `d`.") == "As `a.b` and `C` do: `d`."


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', True),
        ("a.html", '<link rel="preconnect" href="//fonts.example">', True),
        ("a.html", '<img src="http://example.org/x.png">', True),
        ("a.css", "@import url(https://fonts.example/css);", True),
        ("a.html", '<a href="https://example.org">a link is not loaded</a>', False),
        ("a.html", '<script src="assets/x.js"></script><link rel="canonical" href="https://x.example">', False),
    ],
)
def test_what_a_browser_would_load_from_elsewhere(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert bool(docs_site.foreign_loads(tmp_path)) is found
    config = MkDocsConfig()
    config.site_dir = str(tmp_path)
    if found:
        with pytest.raises(PluginError, match=rf"loads from elsewhere:\n{name}: .*example"):
            docs_site.on_post_build(config)
    else:
        docs_site.on_post_build(config)
