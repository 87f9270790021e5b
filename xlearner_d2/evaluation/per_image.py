"""What evaluators have in common that keep something of each image and need all of it at the end."""

from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

Kept = TypeVar("Kept")


class PerImageEvaluator(DatasetEvaluator, Generic[Kept]):
    """Keeps one value of each image and gathers those of all workers.

    An image that several workers (or one worker twice) were given, as by a sampler that pads, counts once: images are
    told apart by ``image_id``, else by ``file_name``, else not at all.
    """

    def __init__(self, *, distributed: bool = True):
        """
        Args:
            distributed: gather from all workers; every worker must then call :meth:`gather`.
        """
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images: dict[Hashable, Kept] = {}

    def keep(self, item: Mapping[str, Any], value: Kept) -> None:
        """Keep a value of the image that ``item`` describes."""
        key = item.get("image_id", item.get("file_name"))
        self._images[(comm.get_rank(), len(self._images)) if key is None else key] = value

    def gather(self) -> list[Kept] | None:
        """The values of all workers' images; None on all workers but the first."""
        parts = [self._images]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(self._images)
            if not comm.is_main_process():
                return None
        return list({key: value for part in parts for key, value in part.items()}.values())
