"""The classes that a trained file's heads were trained for, by name: numbers alone do not tell them from others."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from ..data.check import CLASS_KEYS, class_difference
from ..specs import SourceSpec

#: source -> kind of class, as in Detectron2's metadata -> names in order of their index
ClassNames = dict[str, dict[str, list[str]]]


def class_names(sources: Sequence[SourceSpec]) -> ClassNames:
    """Those of each source that has data, whose data sets have been loaded."""
    found = {}
    for source in sources:
        for data_set in (*source.train, *source.test)[:1]:  # all of them have the same
            metadata = MetadataCatalog.get(data_set)
            names = {key: metadata.get(key, None) for key in CLASS_KEYS}
            found[source.name] = {key: [str(name) for name in of] for key, of in names.items() if of}
    return found


def stored_class_names(checkpoint: Mapping[str, Any]) -> ClassNames:
    """Those that an expanded checkpoint has; none in one of before they were kept."""
    return checkpoint.get("xlearner", {}).get("class_names", {})


def check_class_names(sources: Sequence[SourceSpec], stored: ClassNames, what: str) -> list[str]:
    """Problems of sources whose classes are not those that ``stored`` has under their name.

    Args:
        what: the file that has them, for messages.
    """
    problems = []
    for source, own in class_names(sources).items():
        for key, expected in stored.get(source, {}).items():
            got = own.get(key)
            if got != expected:
                text = class_difference(expected, got, ("file", "data"))
                wish = "Give CLASSES of its data sets as the file has them, or another name to the source."
                problems.append(f"XLEARNER.SOURCES.{source} has other {key} than {what}: {text}. {wish}")
    return problems
