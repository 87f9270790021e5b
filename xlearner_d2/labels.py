"""What class indices mean where Detectron2's models and data sets number the same classes differently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import Metadata


@dataclass(frozen=True)
class PanopticLabels:
    """The categories of a panoptic data set, as Detectron2's PanopticFPN numbers them.

    A data set has one numbering of all categories, that of its ``segments_info``. PanopticFPN numbers things from 0
    on, and stuff from 1 on, after one class that stands for all things.

    Attributes:
        things: the data set's number of each of the model's things.
        stuff: the data set's number of the model's stuff classes 1, 2, …
    """

    things: tuple[int, ...]
    stuff: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> "PanopticLabels | None":
        """From a data set's metadata; None if it is no panoptic data set."""
        known = metadata.as_dict()
        keys = ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
        if not all(key in known for key in keys):
            return None
        things, stuff = (sorted(set(known[key].values())) for key in keys)
        return cls(things=tuple(things), stuff=tuple(number for number in stuff if number or not _is_any_thing(known)))

    @property
    def stuff_classes(self) -> int:
        """How many classes the model's semantic head has."""
        return len(self.stuff) + 1

    def in_data_set(self, category: int, *, is_thing: bool) -> int:
        """The data set's number of a category that PanopticFPN predicts."""
        return self.things[category] if is_thing else self.stuff[category - 1]

    def in_model(self, category: int, *, is_thing: bool) -> int:
        """PanopticFPN's number of a category of the data set."""
        return self.things.index(category) if is_thing else 1 + self.stuff.index(category)


def _is_any_thing(known: dict[str, object]) -> bool:
    """Whether stuff class 0 of the data set stands for all things already, as in Detectron2's "separated" sets."""
    names = known.get("stuff_classes")
    return isinstance(names, Sequence) and bool(names) and names[0] == "things"


def image_labels(record: Mapping[str, Any]) -> list[int]:
    """The classes of an image that may have any number of them, each once.

    They are ``category_ids``, those of the objects in ``annotations`` less crowds, or ``category_id`` alone.
    """
    if "category_ids" in record:
        return sorted(set(record["category_ids"]))
    if "annotations" in record:
        return sorted({item["category_id"] for item in record["annotations"] if not item.get("iscrowd", 0)})
    return [record["category_id"]]
