"""Train and test parts of classification sets that come without an official split."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import sha256

#: Path below the root and class index of an image.
Sample = tuple[str, int]
#: Images of a class -> how many of them are for training and how many for testing.
Rule = Callable[[int], tuple[int, int]]


def split_by_class(samples: Sequence[Sample], rule: Rule, *, split: str) -> list[Sample]:
    """Images of one part, class by class and sorted by their path.

    Within a class, images are ranked by the SHA-256 of their path; the first ones are for training, those that follow
    for testing. So the parts are the same on every machine and with any version of any library.

    Args:
        samples: all images, in any order.
        rule: the sizes of both parts; an image that is in neither is left out.
        split: ``train`` or ``test``.

    Raises:
        ValueError: naming the first class that has too few images.
    """
    by_class: dict[int, list[str]] = defaultdict(list)
    for path, label in samples:
        by_class[label].append(path)
    chosen: list[Sample] = []
    for label, paths in sorted(by_class.items()):
        num_train, num_test = rule(len(paths))
        if min(num_train, num_test) < 1 or num_train + num_test > len(paths):
            text = f"{num_train} + {max(num_test, 1)} are needed for training and testing"
            raise ValueError(f"class {label} has {len(paths)} images, but at least {text}")
        ranked = sorted(paths, key=_digest)
        part = ranked[:num_train] if split == "train" else ranked[num_train : num_train + num_test]
        chosen += [(path, label) for path in sorted(part)]
    return chosen


def _digest(path: str) -> bytes:
    return sha256(path.encode()).digest()
