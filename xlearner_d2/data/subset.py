"""A random share of a data set: the same for the same seed, and within a larger one of that seed."""

from typing import Any

import numpy as np

Records = list[dict[str, Any]]


def random_share(size: int, share: float, *, seed: int | tuple[int, ...]) -> list[int]:
    """A random share of the indices below ``size``, at least one, in order."""
    if share == 1:
        return list(range(size))
    count = max(1, round(share * size))
    return sorted(np.random.default_rng(seed).permutation(size)[:count].tolist())


def share_of_records(records: Records, share: float, *, seed: int) -> Records:
    """A random share of the records, in order; of each class where every image has one of its own."""
    if share == 1 or not records:
        return records
    of_class: dict[int, list[int]] = {}
    has_classes = all("category_id" in record for record in records)
    for index, record in enumerate(records):
        of_class.setdefault(record["category_id"] if has_classes else 0, []).append(index)
    chosen = [
        members[place]
        for label, members in of_class.items()
        for place in random_share(len(members), share, seed=(seed, label))
    ]
    return [records[index] for index in sorted(chosen)]
