"""The package's layers: who may import whom. An import that is not listed here fails."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "xlearner_d2"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

#: Module or package -> what of ours it may import, packages with all that is in them. The longest name that fits a
#: module decides: ``modeling.heads`` if it is listed, else ``modeling``.
ALLOWED: dict[str, set[str]] = {
    "": {"_quiet", "config", "modeling", "settings", "library"},
    "library": {"engine", "exports"},
    "lazy": {"specs", "config", "settings", "modeling", "engine"},
    "_quiet": set(),
    "specs": set(),
    "labels": set(),
    "extensions": {"specs"},
    "settings": set(),
    "config": {"specs", "settings"},
    "data": {"specs", "data.problems", "data.files", "data.stock_mapper", "labels", "extensions"},
    "data.stock_mapper": {"specs"},
    "data.problems": set(),
    "data.files": set(),
    "data.polygons": set(),
    "data.builtin": {"specs", "data.problems", "data.files", "data.polygons", "data.builtin"},
    "data.check": {"data.problems", "data.files", "data.check_pixels"},
    "data.check_pixels": {"extensions", "data.depth", "data.files", "data.polygons", "data.problems"},
    "data.sources": {"specs", "data.builtin", "data.check", "data.files", "data.proposals", "data.subset"},
    "data.subset": set(),
    "data.mappers": {
        "specs",
        "data.files",
        "data.classification",
        "data.depth",
        "data.panoptic",
        "data.rotated",
        "data.stock_mapper",
    },
    "data.streams": set(),
    "data.balance": {"specs", "data.streams"},
    "data.samplers": {"data.streams"},
    "data.packing": set(),
    "data.loader": {"specs", "data.balance", "data.mappers", "data.packing", "data.samplers", "data.sources"},
    "modeling": {"modeling"},
    "modeling.reconciliation": set(),
    "modeling.pixels": set(),
    "modeling.classifier": {"modeling.pixels"},
    "modeling.necks": set(),
    "modeling.timm_backbone": {"specs", "modeling.necks"},
    "modeling.branches": {"specs", "modeling.timm_backbone"},
    "modeling.norm_statistics": set(),
    "modeling.expanded": {
        "specs",
        "modeling.branches",
        "modeling.norm_statistics",
        "modeling.reconciliation",
        "modeling.timm_backbone",
    },
    "modeling.depth": set(),
    "modeling.adapt": {"labels"},
    "modeling.heads": {
        "specs",
        "config",
        "settings",
        "extensions",
        "labels",
        "modeling.branches",
        "modeling.expanded",
        "modeling.adapt",
        "modeling.timm_backbone",
    },
    "modeling.weighting": set(),
    "modeling.small_maps": set(),
    "modeling.xlearner": {"specs", "modeling.expanded", "modeling.heads", "modeling.pixels", "modeling.small_maps"},
    "modeling.normalisers": set(),
    "modeling.distill": {
        "modeling.branches",
        "modeling.expanded",
        "modeling.normalisers",
        "modeling.small_maps",
        "modeling.xlearner",
    },
    "modeling.plug_in": {
        "specs",
        "settings",
        "checkpoint.load",
        "checkpoint.stored",
        "modeling.branches",
        "modeling.expanded",
        "modeling.necks",
    },
    "checkpoint": {"specs", "checkpoint"},
    "exports": {"specs", "checkpoint", "modeling", "exports"},
    "evaluation": {"specs", "extensions", "labels", "data", "checkpoint", "evaluation"},
    "results": {"specs", "results"},
    "report": {"specs", "extensions", "labels", "data", "evaluation", "results", "report"},
    "engine": {
        "specs",
        "config",
        "settings",
        "extensions",
        "data",
        "modeling",
        "checkpoint",
        "evaluation",
        "report",
        "engine",
    },
    "commands": {
        "specs",
        "config",
        "data",
        "engine",
        "exports",
        "results",
        "report",
        "transfer",
    },
    "__main__": {"commands"},
    "transfer": {
        "specs",
        "config",
        "settings",
        "extensions",
        "data",
        "modeling",
        "checkpoint",
        "evaluation",
        "engine",
        "results",
        "transfer",
    },
}


def module_name(path: Path) -> str:
    """``modeling.heads`` for its file; a package for its ``__init__.py``; "" for that of the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known_modules() -> set[str]:
    return {module_name(path) for path in ROOT.rglob("*.py")}


def imports(source: str, module: str, *, is_package: bool, known: set[str]) -> Iterator[str]:
    """Our modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *filter(None, module.split("."))]
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
                continue
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            while inner not in known:  # a function or class: its module
                inner = inner.rpartition(".")[0]
            yield inner


def within(module: str, names: set[str]) -> str | None:
    """The longest of ``names`` that is the module or a package around it."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in prefixes if name in names), None)


def forbidden(source: str, module: str, *, is_package: bool = False, known: set[str] | None = None) -> list[str]:
    """Imports of a module's source that are not allowed."""
    layer = within(module, set(ALLOWED))
    if layer is None:
        return [f"{module} is in no layer: add it to ALLOWED."]
    found = imports(source, module, is_package=is_package, known=known_modules() if known is None else known)
    return [f"{module} imports {name or PACKAGE}" for name in found if within(name, ALLOWED[layer]) is None]


def test_every_import_is_listed() -> None:
    problems = []
    for path in sorted(ROOT.rglob("*.py")):
        is_package = path.name == "__init__.py"
        problems += forbidden(path.read_text(encoding="utf-8"), module_name(path), is_package=is_package)
    assert problems == []


def test_every_layer_exists() -> None:
    listed = set(ALLOWED) | {name for names in ALLOWED.values() for name in names}
    assert listed - known_modules() == set()


def reachable(layer: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The top-level layers below one, however many steps away."""
    tops = {name.split(".")[0] for key, names in ALLOWED.items() if key.split(".")[0] == layer for name in names}
    new = tops - seen - {layer}
    return new.union(*(reachable(name, seen | new | {layer}) for name in new))


@pytest.mark.parametrize("layer", sorted({key.split(".")[0] for key in ALLOWED} - {""}))
def test_layers_have_no_cycle(layer: str) -> None:
    assert layer not in {below for name in reachable(layer) for below in reachable(name)}


@pytest.mark.parametrize("above", ["data", "engine", "evaluation", "report"])
def test_modeling_stays_below(above: str) -> None:
    assert above not in reachable("modeling")
    assert above not in reachable("checkpoint")


KNOWN = {"", "specs", "data", "data.loader", "modeling", "modeling.heads", "engine", "engine.trainer"}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from ..engine.trainer import expand", "engine.trainer"),
        ("from ..engine import trainer", "engine.trainer"),
        ("from .. import engine", "engine"),
        ("import xlearner_d2.data.loader", "data.loader"),
        ("from xlearner_d2.data.loader import JointDataset", "data.loader"),
        ("def late():\n    from ..data.loader import JointDataset", "data.loader"),
        ("if TYPE_CHECKING:\n    from ..data import loader", "data.loader"),
        ("from xlearner_d2 import XLearner", "xlearner_d2"),
    ],
)
def test_a_forbidden_import_is_found(source: str, wanted: str) -> None:
    assert forbidden(source, "modeling.heads", known=KNOWN) == [f"modeling.heads imports {wanted}"]


def test_an_allowed_import_is_not() -> None:
    assert forbidden("import torch\nfrom ..specs import SourceSpec", "modeling.heads", known=KNOWN) == []
    assert forbidden("from . import heads", "modeling", is_package=True, known=KNOWN) == []


def test_a_new_layer_must_be_listed() -> None:
    assert forbidden("", "novel.module") == ["novel.module is in no layer: add it to ALLOWED."]
